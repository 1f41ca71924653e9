"""The index and the shards of an MLC-LLM weight folder: checked before memory is taken, read tensor by tensor.

Source of the format: tvm.contrib.tvmjs.dump_tensor_cache. Shards are raw little-endian values without padding;
tensor-cache.json (until September 2025 ndarray-cache.json) says where each tensor lies. A "float32" record in
the encoding "f32-to-bf16" is stored as bfloat16; a "-b16" index says bfloat16 of the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxllm.errors import CheckpointError

INDEXES = ("tensor-cache.json", "ndarray-cache.json", "tensor-cache-b16.json", "ndarray-cache-b16.json")
LONGEST_INDEX = 100_000_000  # bytes
DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "uint32": np.uint32,
    "int32": np.int32,
    "uint8": np.uint8,
    "int8": np.int8,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "e4m3_float8": ml_dtypes.float8_e4m3fn,  # these two as older TVM spells them
    "e5m2_float8": ml_dtypes.float8_e5m2,
}


class Stored(NamedTuple):
    """A tensor and the bytes of its shard that hold it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype  # of the values
    kept: np.dtype  # of the bytes: bfloat16 where float32 is encoded
    path: pathlib.Path
    start: int
    nbytes: int


class Shard(NamedTuple):
    """A file of tensors, and what the index says of it."""

    path: pathlib.Path
    nbytes: int
    md5: str | None  # None in files from before August 2023


class Index(NamedTuple):
    """What an index file says."""

    metadata: dict[str, Any]
    shards: tuple[Shard, ...]
    tensors: tuple[Stored, ...]  # in the order of the file


def index_file(folder: pathlib.Path) -> pathlib.Path | None:
    """The index of an MLC-LLM folder, the one without "-b16" first; None where there is none."""
    return next((folder / name for name in INDEXES if (folder / name).is_file()), None)


def read_index(path: pathlib.Path) -> Index:
    """The index at `path`; of the shards only their sizes are looked at.

    Raises CheckpointError where it is malformed, names a file outside its folder, or describes other bytes than
    the shards have: one sentence on the first thing that is wrong.
    """
    try:
        if path.stat().st_size > LONGEST_INDEX:
            raise ValueError(f"it is longer than {LONGEST_INDEX} bytes")
        table = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_once)
        table = _typed(table, dict, "the index")
        metadata = _typed(table.get("metadata", {}), dict, "metadata")
        entries = [_typed(e, dict, "a shard's record") for e in _typed(table.get("records"), list, "records")]
        shards = tuple(_shard(path.parent, entry) for entry in entries)
        _once([s.path.name for s in shards], "shard")
        tensors = tuple(t for s, e in zip(shards, entries, strict=True) for t in _tensors(s, e))
        _once([t.name for t in tensors], "tensor")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} does not describe its shards ({error}); download the folder again"
        ) from error
    return Index(metadata, shards, tensors)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("an object names a field twice")
    return table


def _typed(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{what} should be {kind.__name__}, got {type(value).__name__}")
    return value


def _once(names: Sequence[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{what} {name[:80]!r} is named twice")
        seen.add(name)


def _size(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise ValueError(f"{what} should be a size, got {str(value)[:40]}")
    return value


def _shard(folder: pathlib.Path, entry: dict[str, Any]) -> Shard:
    name, md5 = entry.get("dataPath"), entry.get("md5sum")
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{0,200}", name, re.ASCII):
        raise ValueError(f"dataPath should be the name of a file beside it, got {str(name)[:80]!r}")
    if entry.get("format") != "raw-shard":
        raise ValueError(f"{name} should have the format raw-shard, got {str(entry.get('format'))[:40]!r}")
    if md5 is not None and not (isinstance(md5, str) and re.fullmatch(r"[0-9a-f]{32}", md5)):
        raise ValueError(f"{name} should have an md5sum of 32 hexadecimal digits, got {str(md5)[:40]!r}")
    nbytes, path = _size(entry.get("nbytes"), f"nbytes of {name}"), folder / name
    if not path.is_file():
        raise ValueError(f"{name} is missing")
    if (size := path.stat().st_size) != nbytes:
        raise ValueError(f"{name} should have {nbytes} bytes and has {size}")
    return Shard(path, nbytes, md5)


def _tensors(shard: Shard, entry: dict[str, Any]) -> list[Stored]:
    records = _typed(entry.get("records"), list, f"records of {shard.path.name}")
    found = [_tensor(shard, _typed(record, dict, "a tensor's record")) for record in records]
    end = 0
    for t in sorted(found, key=lambda t: (t.start, t.nbytes)):
        if t.start != end:
            raise ValueError(f"{t.name!r} starts at byte {t.start}, but the tensor before it ends at {end}")
        end += t.nbytes
    if end != shard.nbytes:
        raise ValueError(f"the tensors of {shard.path.name} take {end} of its {shard.nbytes} bytes")
    return found


def _tensor(shard: Shard, record: dict[str, Any]) -> Stored:
    name = record.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= 500:
        raise ValueError(f"a tensor of {shard.path.name} has no name")
    dtype = record.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"the dtype of {name!r} is not one of {', '.join(DTYPES)}")
    encoding = record.get("format")
    if encoding not in ("f32-to-bf16", "raw"):
        raise ValueError(f"the format of {name!r} should be f32-to-bf16 or raw, got {str(encoding)[:40]!r}")
    shape = tuple(_size(n, f"an axis of {name!r}") for n in _typed(record.get("shape"), list, "shape"))
    values = np.dtype(DTYPES[dtype])
    kept = np.dtype(ml_dtypes.bfloat16) if dtype == "float32" and encoding == "f32-to-bf16" else values
    start, nbytes = _size(record.get("byteOffset"), "byteOffset"), _size(record.get("nbytes"), "nbytes")
    if len(shape) > 8 or math.prod(shape) * kept.itemsize != nbytes:
        raise ValueError(
            f"{name!r} of shape {list(shape)[:8]} and {dtype} does not take the {nbytes} bytes it is given"
        )
    return Stored(name, shape, values, kept, shard.path, start, nbytes)


def check_sums(shards: Sequence[Shard], on_shard: Callable[[], None] = lambda: None) -> None:
    """Compare every shard with its md5, a few MB in memory at a time.

    Raises CheckpointError that names the first shard that differs."""
    known = [shard for shard in shards if shard.md5 is not None]
    with ThreadPoolExecutor(4) as pool:
        for shard, found in zip(known, pool.map(_md5, known), strict=True):
            if found != shard.md5:
                raise CheckpointError(
                    f"{shard.path} has the md5 {found} and its index says {shard.md5}; download the file again"
                )
            on_shard()


def _md5(shard: Shard) -> str:
    try:
        with shard.path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{shard.path} cannot be read ({error}); download the file again") from error


def read(tensor: Stored) -> np.ndarray:
    """The values of one tensor, in the dtype its record says.

    Raises CheckpointError where its file no longer holds them."""
    count = math.prod(tensor.shape)
    try:
        data = np.fromfile(tensor.path, np.uint8, tensor.nbytes, offset=tensor.start)
    except OSError as error:
        raise CheckpointError(f"{tensor.path}: {tensor.name} cannot be read ({error})") from error
    if data.nbytes < tensor.nbytes:
        raise CheckpointError(f"{tensor.path} no longer holds all of {tensor.name}; download the file again")
    return data.view(tensor.kept)[:count].reshape(tensor.shape).astype(tensor.dtype, copy=False)
