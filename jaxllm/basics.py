"""The small pieces every layer is made of."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxllm import ops
from jaxllm.config import Norm, Rope

Array = jax.Array
F32 = jnp.float32


def linear(p: dict, x: Array, out: jnp.dtype | None = None) -> Array:
    """x [..., in] -> [..., out], with p["w"] [out, in] and, where present, p["b"] [out]."""
    return _biased(p, ops.matmul(x, p["w"], out=out))


def linears(ps: Sequence[dict], x: Array) -> list[Array]:
    """`linear` of one x with each of ps."""
    return list(map(_biased, ps, ops.matmuls(x, [p["w"] for p in ps])))


def _biased(p: dict, y: Array) -> Array:
    return y + p["b"].astype(y.dtype) if "b" in p else y


def norm(n: Norm, p: dict, x: Array) -> Array:
    """RMSNorm (arXiv 1910.07467) or LayerNorm (1607.06450) over the last axis, in f32, back in x's dtype."""
    return ops.norm(x, p["w"], p["b"] if n.bias else None, eps=n.eps, centered=n.kind == "layer")


def turn(rope: Rope, pos: Array) -> tuple[Array, Array]:
    """Cosines and sines f32 [B, T, 1, n] of a rotary embedding at positions i32 [B, T], amplitude included."""
    angle = pos[:, :, None, None].astype(F32) * jnp.asarray(rope.inv_freq, F32)
    return ops.once(jnp.cos(angle) * rope.amplitude), ops.once(jnp.sin(angle) * rope.amplitude)


def rotate(x: Array, turned: tuple[Array, Array] | None) -> Array:
    """Rotary embedding (arXiv 2104.09864) of x [B, T, heads, h] by `turn`'s tables, halves rotated together."""
    if turned is None:
        return x
    cos, sin = turned
    n = cos.shape[-1]
    a, b, rest = x[..., :n].astype(F32), x[..., n : 2 * n].astype(F32), x[..., 2 * n :]
    out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
    return jnp.concatenate([out, rest], -1) if rest.shape[-1] else out


def activate(act: str, gate: Array, up: Array | None = None) -> Array:
    """The feed-forward's nonlinearity of `gate`, times `up` where the layer is gated."""
    if act == "clamped_swiglu":
        gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0) + 1
        return gate * jax.nn.sigmoid(1.702 * gate) * up
    y = _ACTIVATION[act](gate)
    return y if up is None else y * up


def gated(act: str, p: dict, x: Array) -> Array:
    """`activate` of x's products with p["gate"] and p["up"]: [..., D] -> [..., F], in x's dtype."""
    if "b" in p["gate"] or "b" in p["up"]:
        return activate(act, *(linear(p[name], x, out=F32) for name in ("gate", "up"))).astype(x.dtype)
    return ops.gated(x, p["gate"]["w"], p["up"]["w"], act, activate)


_ACTIVATION = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_quick": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
