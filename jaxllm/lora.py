"""Adapters (LoRA, arXiv 2106.09685) on any parameters, packed ones included: read, chosen, trained and merged.

Parameters stay a nested dict; an adapted weight is a `LoRA` leaf that holds the frozen weight and all adapters.
Everything that takes parameters takes these.

    model = load_adapter(load_adapter(model, "french"), "poems")
    decode.generate(replace(model, params=choose(model.params, [0, 1, -1])), prompts)
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxllm.checkpoint.canonical import flatten, nest
from jaxllm.checkpoint.peft import read_adapter
from jaxllm.errors import JaxllmError
from jaxllm.families import family
from jaxllm.quant import QTensor, dequantize
from jaxllm.quant.adapted import Adapter, LoRA, with_adapter
from jaxllm.quant.recipe import packable
from jaxllm.taps import fits

__all__ = ["Adapter", "LoRA", "add", "choose", "count", "load_adapter"]
__all__ += ["merge", "new", "trainable", "with_trained"]

Array = jax.Array
TARGETS = ("layers.*.mixer.[qv].w",)  # what the paper adapts
Leaves = dict[str, Any]
M = TypeVar("M")


def count(params: dict) -> int:
    """The number of adapters in the parameters."""
    return next((leaf.scale.shape[0] for _, leaf in _adapted(params)), 0)


def choose(params: dict, rows: int | Sequence[int] | Array) -> dict:
    """The parameters with an adapter chosen for every row of the batch (i32 [B]), or one for all (i32 []).

    Adapters count from 0 in the order in which they were added; any other number, such as -1, means none. The
    choice is data: another one does not compile again. Raises JaxllmError without adapters, or for no integers.
    """
    rows = jnp.asarray(rows)
    if rows.ndim > 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise JaxllmError(f"rows should be adapter numbers, i32 [] or [B], got {rows.dtype} {list(rows.shape)}")
    _need(params)
    return _map(lambda path, leaf: replace(leaf, rows=rows.astype(jnp.int32)), params)


def new(
    params: dict,
    key: Array,
    *,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = TARGETS,
    dtype: str = "float32",
) -> dict:
    """The parameters with one more adapter, which changes nothing yet: a random, b zero.

    targets: patterns of paths (`taps.fits`) of weights [out, in]. alpha: the scale is alpha / rank; rank if not
    given. a is uniform within +-1/sqrt(in), as PEFT has it. Raises JaxllmError for a pattern without a weight.
    """
    flat = flatten(params)
    if idle := [t for t in targets if not any(fits(p, t) and _adaptable(p, x) for p, x in flat.items())]:
        raise JaxllmError(f"no weight that an adapter can be added to is named {', '.join(idle)}")
    if type(rank) is not int or rank < 1:
        raise JaxllmError(f"rank should be a whole number of at least 1, got {rank!r}")
    paths = [p for p, x in flat.items() if _adaptable(p, x) and any(fits(p, t) for t in targets)]
    parts = {}
    for path, one in zip(paths, jax.random.split(key, len(paths)), strict=True):
        out, into = flat[path].shape
        a = jax.random.uniform(one, (rank, into), dtype, -1, 1) / math.sqrt(into)
        parts[path] = Adapter(a.astype(dtype), jnp.zeros((out, rank), dtype), (alpha or rank) / rank)
    return add(params, parts)


def add(params: dict, parts: dict[str, Adapter]) -> dict:
    """The parameters with one more adapter, given by path. Raises JaxllmError where its shapes do not fit."""
    n, flat = count(params), flatten(params)
    if unknown := [p for p in parts if p not in flat or not (_adaptable(p, flat[p]) or p == "embed.w")]:
        raise JaxllmError(f"there is no weight that an adapter can be added to at {', '.join(unknown[:5])}")
    if "embed.w" in parts and "head.w" not in flat:
        raise JaxllmError("the embedding is the head, too, and an adapter of one would change both")
    adapted = {path for path, _ in _adapted(params)} | parts.keys()
    flat |= {path: with_adapter(flat[path], parts.get(path), n) for path in adapted}
    return nest(flat)


def load_adapter(model: M, folder: str | os.PathLike) -> M:
    """A jaxllm.Model with one more adapter, from a folder as PEFT saves it; for the last one, see `choose`.

    Raises as `checkpoint.peft.read_adapter` does; ConfigError for a model that does not say of which type it is
    (Model.values, as `load` fills it in), because that tells how the adapter's tensors lie.
    """
    described = family(model.values.get("model_type"))
    parts = read_adapter(folder, model.config, described)
    return replace(model, params=add(model.params, parts))


def trainable(params: dict) -> dict[str, dict[str, Array]]:
    """{path: {"a": [n, r, in], "b": [n, out, r]}} of every adapted weight: what a loss is differentiated by.

    Raises JaxllmError without adapters."""
    _need(params)
    return {path: {"a": leaf.a, "b": leaf.b} for path, leaf in _adapted(params)}


def with_trained(params: dict, trained: dict[str, dict[str, Array]]) -> dict:
    """The parameters with the adapters of `trainable` in place of their own; the rest is as it was.

    jax.grad of a loss over `trained` goes through the frozen weights, packed or not, and makes no gradient of
    them. Raises JaxllmError for paths that are not those of `trainable(params)`.
    """
    if wrong := sorted(trained.keys() ^ {path for path, _ in _adapted(params)}):
        raise JaxllmError(f"trained should have the paths of trainable(params); see {', '.join(wrong[:5])}")
    return _map(lambda path, leaf: replace(leaf, **trained[path]), params)


def merge(params: dict, adapter: int = 0) -> dict:
    """Plain parameters with one adapter worked into the weights, in f32 and back in their dtype.

    A packed weight is expanded; quantize again what should be small. -1 takes the adapters off and leaves packed
    weights as they are. Raises JaxllmError for an adapter that is not there.
    """
    n = _need(params)
    if type(adapter) is not int or not -1 <= adapter < n:
        raise JaxllmError(f"there are adapters 0 to {n - 1} (-1: none), got {adapter!r}")
    return _map(lambda path, leaf: leaf.w if adapter < 0 else _merged(leaf, adapter), params)


def _merged(leaf: LoRA, i: int) -> Array:
    w = dequantize(leaf.w, jnp.float32) if isinstance(leaf.w, QTensor) else leaf.w.astype(jnp.float32)
    delta = jnp.dot(leaf.b[i].astype(jnp.float32), leaf.a[i].astype(jnp.float32), precision="highest")
    return (w + leaf.scale[i] * delta).astype(leaf.dtype)


def _adaptable(path: str, leaf: Any) -> bool:
    return leaf.ndim == 2 and packable(path, tuple(leaf.shape)) and path != "embed.w"


def _adapted(params: dict) -> Iterator[tuple[str, LoRA]]:
    return ((path, leaf) for path, leaf in flatten(params).items() if isinstance(leaf, LoRA))


def _need(params: dict) -> int:
    if not (n := count(params)):
        raise JaxllmError("these parameters have no adapter; add one with lora.new or lora.load_adapter")
    return n


def _map(change: Callable[[str, LoRA], Any], params: dict) -> dict:
    flat: Leaves = flatten(params)
    return nest({p: change(p, leaf) if isinstance(leaf, LoRA) else leaf for p, leaf in flat.items()})
