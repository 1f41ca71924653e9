"""Keys and values in few bits: what a decode state holds instead of arrays.

Each head and position has scales of its own, so a value never changes once it is written: forking, rewinding and
replaying a state give the same bits as without.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import ContextError
from jaxllm.quant.qtensor import pack, unpack

Array = jax.Array
KV_FORMATS = ("int8", "fp8", "int4")
MOST = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}  # what the largest magnitude of a group becomes
INT4_GROUP = 32


def _static():
    return field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CacheCodes:
    """Vectors [B, K, S, h] of a cache in few bits: code * scale of its group. shape and dtype are the values'."""

    codes: Array  # int8 [B, K, S, h]; u8: the bytes of float8_e4m3fn; "int4": u8 [B, K, S, h // 2], 8 is zero
    scale: Array  # f32, for "int4" bf16 [B, K, S, G]
    format: str = _static()
    dtype_name: str = _static()  # of the values

    @property
    def shape(self) -> tuple[int, ...]:
        *before, last = self.codes.shape
        return (*before, 2 * last if self.format == "int4" else last)

    @property
    def ndim(self) -> int:
        return len(self.codes.shape)

    @property
    def dtype(self) -> np.dtype:
        return jnp.dtype(self.dtype_name)


def empty(format: str, shape: tuple[int, ...], dtype: Any, *, parts: int | None = None) -> CacheCodes:
    """Nothing but zeros of `shape` [B, K, S, h], standing for values of `dtype`.

    parts: a length that no group reaches across a multiple of (default h, or 32 for "int4" where it divides h).

    Raises ContextError for an unknown format, and for "int4" where h is odd."""
    if format not in KV_FORMATS:
        raise ContextError(f"kv_format is one of {', '.join(KV_FORMATS)} or None, got {format!r}")
    *before, h = shape
    if format == "int4" and h % 2:
        raise ContextError(f"kv_format 'int4' keeps two values in a byte, and a head has {h}; choose 'int8'")
    group = _group(format, h, parts or h)
    width, codes = (h // 2, jnp.uint8) if format == "int4" else (h, jnp.int8 if format == "int8" else jnp.uint8)
    scale = jnp.zeros((*before, h // group), jnp.bfloat16 if format == "int4" else jnp.float32)
    return CacheCodes(jnp.zeros((*before, width), codes), scale, format, jnp.dtype(dtype).name)


def _group(format: str, h: int, parts: int) -> int:
    """Values that share a scale; groups of fewer than 8 would cost more than they save."""
    group = math.gcd(h, parts, *((INT4_GROUP,) if format == "int4" else ()))
    return group if group >= 8 else h


def quantized(x: Array, like: CacheCodes) -> CacheCodes:
    """x [.., h] rounded as the cache `like` holds it; halves to even."""
    G, most = like.scale.shape[-1], MOST[like.format]
    groups = x.astype(jnp.float32).reshape(*x.shape[:-1], G, -1)
    scale = (jnp.abs(groups).max(-1) / most).astype(like.scale.dtype)
    by = scale.astype(jnp.float32)[..., None]
    scaled = (groups / jnp.where(by > 0, by, 1)).reshape(x.shape)
    return replace(like, codes=_codes(scaled, like.format), scale=scale)


def _codes(scaled: Array, format: str) -> Array:
    most = MOST[format]
    if format == "fp8":
        return jax.lax.bitcast_convert_type(jnp.clip(scaled, -most, most).astype(jnp.float8_e4m3fn), jnp.uint8)
    near = jnp.clip(jnp.round(scaled), -most, most)
    return near.astype(jnp.int8) if format == "int8" else pack((near + 8).astype(jnp.uint8), 4)[0]


def expanded(cache: Array | CacheCodes) -> Array:
    """The values [.., h] of a cache in its dtype; arrays as they are."""
    if not isinstance(cache, CacheCodes):
        return cache
    codes = cache.codes
    if cache.format == "fp8":
        levels = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)
    elif cache.format == "int4":
        levels = unpack(codes, None, 4).astype(jnp.float32) - 8
    else:
        levels = codes.astype(jnp.float32)
    groups = levels.reshape(*codes.shape[:-1], cache.scale.shape[-1], -1)
    return (groups * cache.scale.astype(jnp.float32)[..., None]).reshape(cache.shape).astype(cache.dtype)
