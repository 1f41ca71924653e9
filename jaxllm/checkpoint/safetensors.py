"""Folders of safetensors files, one or many with an index; read tensor by tensor.

Source of the format: github.com/huggingface/safetensors. Values are read into memory of their own and not
mapped: a mapped file's pages would stay in memory beside the parameters until the last tensor is read.
"""

from __future__ import annotations

import json
import math
import pathlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxllm.arena import aligned
from jaxllm.errors import CheckpointError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LONGEST_HEADER = 100_000_000  # bytes, as the format's own reader has it
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class Place(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the end of the header
    stop: int


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file; calling it reads its values."""

    path: pathlib.Path
    begin: int  # bytes before the first value of the file
    name: str
    place: Place

    @property
    def shape(self) -> tuple[int, ...]:
        return self.place.shape

    @property
    def dtype(self) -> np.dtype:
        return self.place.dtype

    def __call__(self) -> np.ndarray:
        return _read(self.path, self.begin, self.name, self.place)


Readers = dict[str, Tensor]


def read_folder(folder: pathlib.Path) -> Readers:
    """Name -> reader of every tensor in a checkpoint folder. Nothing but headers is read here.

    Raises CheckpointError for a folder without safetensors (with the way to convert pickles), a malformed index,
    a missing, truncated or malformed file, and a tensor that two files hold.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _indexed(folder, index)
    files = sorted(folder.glob("*.safetensors"))
    single = folder / "model.safetensors"
    if single in files:
        files = [single]
    if not files:
        raise CheckpointError(_nothing(folder))
    readers: Readers = {}
    for file in files:
        found = open_file(file)
        if twice := sorted(readers.keys() & found.keys()):
            raise CheckpointError(
                f"{file} repeats tensors of another file, {twice[0]!r} for one; keep one of them"
            )
        readers |= found
    return readers


def open_file(path: pathlib.Path) -> Readers:
    """Name -> reader of every tensor in one safetensors file.

    Raises CheckpointError where the header does not describe exactly the bytes that follow it."""
    try:
        header, length, size = _header(path)
        places = _places(header, size - 8 - length)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); download it again") from error
    return {name: Tensor(path, 8 + length, name, place) for name, place in places.items()}


def _header(path: pathlib.Path) -> tuple[str, int, int]:
    """The header of a file, its length and that of the whole file in bytes."""
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, LONGEST_HEADER):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        return file.read(length).decode("utf-8"), length, size


def read_metadata(folder: pathlib.Path) -> dict[str, str]:
    """The free text that the headers of a folder's files carry beside their tensors.

    Raises CheckpointError where a header is malformed."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            table = json.loads(_header(path)[0])
            extra = table.get("__metadata__", {}) if isinstance(table, dict) else {}
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is not a whole safetensors file ({error}); download it again"
            ) from error
        if isinstance(extra, dict):
            found |= {key: text for key, text in extra.items() if isinstance(text, str)}
    return found


def _places(header: str, size: int) -> dict[str, Place]:
    """The tensors of a header, whose values fill `size` bytes. ValueError where they do not."""
    table = json.loads(header, object_pairs_hook=_each_once)
    if not isinstance(table, dict):
        raise ValueError("the header is not an object")
    places = {name: _place(name, entry) for name, entry in table.items() if name != "__metadata__"}
    end = 0
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].stop)):
        if place.start != end:
            raise ValueError(f"{name!r} starts at byte {place.start}, but the tensor before it ends at {end}")
        end = place.stop
    if end != size:
        raise ValueError(f"its tensors need {end} bytes and the file has {size}")
    return places


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("the header names a tensor twice")
    return table


def _place(name: str, entry: Any) -> Place:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{name!r} should have dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise ValueError(f"the dtype of {name!r} is not one of {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (_whole_numbers(shape) and len(shape) <= 32 and _whole_numbers(offsets) and len(offsets) == 2):
        raise ValueError(f"the shape or data_offsets of {name!r} are no lists of sizes")
    place = Place(np.dtype(DTYPES[entry["dtype"]]), tuple(shape), *offsets)
    given = place.stop - place.start
    if given != math.prod(shape) * place.dtype.itemsize:
        raise ValueError(f"{name!r} of shape {shape} does not take the {given} bytes it is given")
    return place


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**48 for v in values)


def _read(path: pathlib.Path, begin: int, name: str, place: Place) -> np.ndarray:
    data = read_bytes(path, begin + place.start, place.stop - place.start, name=name)
    return data.view(place.dtype).reshape(place.shape)


def read_bytes(path: pathlib.Path, start: int, size: int, *, name: str) -> np.ndarray:
    """u8 [size] from byte `start` of a file, in memory that JAX on a CPU can take over without a copy.

    Raises CheckpointError, with the tensor's name, where the file cannot be read or is too short."""
    data = aligned(size)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            got = 0
            while got < size and (n := file.readinto(data[got:])):  # Linux gives at most 2 GiB at once
                got += n
    except OSError as error:
        raise CheckpointError(f"{path}: {name} cannot be read ({error})") from error
    if got < size:
        raise CheckpointError(f"{path}: {name} has only {got} of its {size} bytes left; download the file again")
    return data


def _indexed(folder: pathlib.Path, index: pathlib.Path) -> Readers:
    wanted = _weight_map(index)
    opened = {}
    for name in sorted(set(wanted.values())):
        if pathlib.PurePath(name).name != name:
            raise CheckpointError(f"{index} names {name!r}; it may only name files in its own folder")
        if not _is_file(folder / name):
            raise CheckpointError(f"{index} names {name!r}, which is not in {folder}; download the missing file")
        opened[name] = open_file(folder / name)
    absent = [t for t, file in wanted.items() if t not in opened[file]]
    if absent:
        raise CheckpointError(
            f"{wanted[absent[0]]} lacks {len(absent)} tensors that {index} promises: {absent[:5]}"
        )
    return {tensor: opened[file][tensor] for tensor, file in wanted.items()}


def _is_file(path: pathlib.Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    try:
        wanted = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(wanted, dict) or not all(isinstance(f, str) and f for f in wanted.values()):
            raise TypeError("weight_map should map tensor names to file names")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is not an index of safetensors files ({error}); download it again"
        ) from error
    return wanted


def _nothing(folder: pathlib.Path) -> str:
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if not pickles:
        return f"{folder} has no .safetensors file; a checkpoint folder needs its weights beside config.json"
    return (
        f"{folder} holds PyTorch pickles ({pickles[0]}), which can run code when read, so jaxllm never reads "
        "them; convert once where you trust the file: load it with transformers and call "
        "save_pretrained(folder, safe_serialization=True)"
    )
