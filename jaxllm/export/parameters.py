"""Parameters by name, outside of any program: packed weights as their parts, as they are."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxllm.checkpoint.canonical import flatten, nest
from jaxllm.checkpoint.native import Shard
from jaxllm.errors import CheckpointError
from jaxllm.progress import progress
from jaxllm.quant import QTensor

Leaf = Any  # an array or a QTensor, or an abstract one
ENDING = ".safetensors"


def abstract(params: dict) -> dict[str, Leaf]:
    """Path -> shape and dtype of every parameter, packed ones as a QTensor of such.

    Raises CheckpointError for a leaf that is neither an array nor packed."""
    found = flatten(params)
    if odd := [path for path, leaf in found.items() if not isinstance(leaf, QTensor | jax.Array | np.ndarray)]:
        raise CheckpointError(
            f"{odd[0]} is a {type(found[odd[0]]).__name__}, and an export holds arrays and packed weights; "
            "merge adapters first"
        )
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    return {path: jax.tree.map(shape, leaf) for path, leaf in found.items()}


def named(leaves: Mapping[str, Leaf]) -> dict[str, Any]:
    """Name -> array: a packed weight's parts are "layers.0.mixer.q.w.codes", "....scale" and so on."""
    return {name: part for path, leaf in leaves.items() for name, part in _parts(path, leaf)}


def _parts(path: str, leaf: Leaf) -> Iterator[tuple[str, Any]]:
    if not isinstance(leaf, QTensor):
        yield path, leaf
        return
    for name, part in leaf.parts().items():
        yield f"{path}.{name}", part


def assembled(leaves: Mapping[str, Leaf], arrays: Mapping[str, Any]) -> dict:
    """The tree of parameters of `leaves` (as `abstract` gives them) with these arrays in it."""
    made = {}
    for path, leaf in leaves.items():
        packed = isinstance(leaf, QTensor)
        made[path] = replace(leaf, **{n: arrays[f"{path}.{n}"] for n in leaf.parts()}) if packed else arrays[path]
    return nest(made)


def write(folder: pathlib.Path, params: dict, stem: str = "params") -> list[str]:
    """Write every array into safetensors files of about a gigabyte -> their names, of one file or numbered ones.

    One array at a time is fetched from its device."""
    arrays, shards = named(flatten(params)), []
    try:
        with progress("writing parameters", len(arrays)) as advance:
            for name, x in arrays.items():
                _append(shards, folder, name, np.asarray(x))
                advance()
        many = len(shards)
        names = [f"{stem}-{i:05}-of-{many:05}" if many > 1 else stem for i in range(1, many + 1)]
        for shard, name in zip(shards, names, strict=True):
            shard.close(folder / f"{name}{ENDING}")
    finally:
        for shard in shards:
            shard.file.close()
    return [f"{name}{ENDING}" for name in names]


def _append(shards: list[Shard], folder: pathlib.Path, name: str, x: np.ndarray) -> None:
    if not shards or not shards[-1].takes(name, x):
        shards.append(Shard(folder / f"{len(shards)}.part"))
    shards[-1].put(name, x)
