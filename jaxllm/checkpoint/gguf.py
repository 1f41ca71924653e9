"""GGUF files: metadata, the table of tensors, the tensors' bytes. Versions 2 and 3, little-endian, split or not.

Source: github.com/ggml-org/ggml, docs/gguf.md. The header is read through a memory map, so that every count and
length is held against the file's size before anything is made of it; tensors are read into memory of their own,
because a mapped file's pages would stay in memory beside the parameters.
"""

from __future__ import annotations

import math
import mmap
import pathlib
import re
import struct
from typing import Any, NamedTuple

import numpy as np

from jaxllm.checkpoint.gguf_types import TYPES, TensorType
from jaxllm.checkpoint.safetensors import read_bytes
from jaxllm.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
STRING, ARRAY = 8, 9
LONGEST_NAME = 2**16 - 1  # of a key; tensors have less
MOST_SIZES = 4  # of one tensor
LARGEST_SIZE = 2**40
SMALLEST_TENSOR = 24  # bytes of a table entry: a name's length, the number of sizes, the type, the offset
SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


class Tensor(NamedTuple):
    """Where a tensor lies. shape: as arrays have it, [.., out, in], the reverse of the file's."""

    name: str
    path: pathlib.Path
    kind: TensorType
    shape: tuple[int, ...]
    start: int  # byte of the file
    nbytes: int

    def read(self) -> np.ndarray:
        """Its bytes: u8 [nbytes]. CheckpointError where the file has become shorter."""
        return read_bytes(self.path, self.start, self.nbytes, name=self.name)


class GGUF(NamedTuple):
    """What a file, or all parts of a split one, says. Arrays of numbers are numpy's, of strings are lists."""

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def files(self) -> tuple[pathlib.Path, ...]:
        """Those that hold its tensors."""
        return tuple(sorted({tensor.path for tensor in self.tensors.values()}))


def recognised(path: pathlib.Path) -> bool:
    """Whether the file begins as GGUF does."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def in_folder(folder: pathlib.Path) -> pathlib.Path | None:
    """The one GGUF file of a folder, the first part where it is split; None where there is none.

    Raises CheckpointError where there are several to choose from."""
    files = sorted(path for path in folder.glob("*.gguf") if recognised(path))
    later = [path for path in files if (part := SPLIT_NAME.fullmatch(path.name)) and int(part[2]) != 1]
    first = [path for path in files if path not in later]
    if len(first) > 1:
        names = ", ".join(path.name for path in first[:8])
        raise CheckpointError(f"{folder} holds several GGUF files ({names}); give the path of one of them")
    return first[0] if first else later[0] if later else None


def read_gguf(path: pathlib.Path) -> GGUF:
    """The metadata and tensors of a GGUF file; of all parts, where it is one part of several.

    Raises CheckpointError where a count, length, size or offset does not fit the file, something is named twice,
    tensors overlap, a part is missing, or the file is big-endian or of another version."""
    whole = read_one(path)
    count = whole.metadata.get("split.count", 0)
    if not isinstance(count, int) or not 0 <= count < 2**16:
        raise CheckpointError(f"{path}: split.count should be a small whole number, got {count!r}")
    return whole if count < 2 else _joined(path, count)


def _joined(path: pathlib.Path, count: int) -> GGUF:
    """All parts of a split file, found by name; the first carries the metadata."""
    name = SPLIT_NAME.fullmatch(path.name)
    if not name or int(name[3]) != count:
        raise CheckpointError(
            f"{path} is a part of {count}; it should be named like NAME-00001-of-{count:05d}.gguf"
        )
    parts = [path.with_name(f"{name[1]}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    if absent := [part.name for part in parts if not part.is_file()]:
        raise CheckpointError(
            f"{path.parent} lacks {len(absent)} of {count} parts, {absent[0]} first; download them"
        )
    opened = [read_one(part) for part in parts]
    tensors: dict[str, Tensor] = {}
    for number, part in enumerate(opened):
        place = part.metadata.get("split.no"), part.metadata.get("split.count")
        if place != (number, count):
            raise CheckpointError(
                f"{part.path} should be part {number} of {count}, but says {place[0]} of {place[1]}"
            )
        if twice := sorted(tensors.keys() & part.tensors.keys()):
            raise CheckpointError(f"{part.path} repeats the tensor {twice[0]!r} of another part")
        tensors |= part.tensors
    said = opened[0].metadata.get("split.tensors.count", len(tensors))
    if said != len(tensors):
        raise CheckpointError(f"{path}: its parts hold {len(tensors)} tensors, and should hold {said}")
    return GGUF(parts[0], opened[0].metadata, tensors)


def read_one(path: pathlib.Path) -> GGUF:
    """One file by itself. Raises CheckpointError as `read_gguf` does."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, data)
    except (OSError, ValueError, struct.error) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a whole GGUF file ({error}); download it again") from error


def _parse(path: pathlib.Path, data: mmap.mmap) -> GGUF:
    header = _Reader(data)
    if header.take(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = header.number("I")
    if version & 0xFFFF == 0 and version:
        raise ValueError("it is big-endian, which is not read; convert it with gguf_convert_endian.py")
    if version not in VERSIONS:
        raise ValueError(f"its version is {version}; versions 2 and 3 are read")
    tensors, pairs = header.count(SMALLEST_TENSOR, "tensors"), header.count(13, "metadata entries")
    metadata = _metadata(header, pairs)
    table = _table(header, tensors)
    start = _aligned(header.at, metadata.get("general.alignment", 32))
    return GGUF(path, metadata, _places(path, table, start, metadata.get("general.alignment", 32), len(data)))


class _Reader:
    """A position in the header. Nothing is taken that the file does not have."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at, self.size = data, 0, len(data)

    def take(self, n: int) -> bytes:
        if n > self.size - self.at:
            raise ValueError(f"{n} bytes are wanted at byte {self.at} of {self.size}")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, code: str) -> Any:
        layout = struct.Struct("<" + code)
        return layout.unpack(self.take(layout.size))[0]

    def count(self, smallest: int, what: str) -> int:
        """A number of things that take at least `smallest` bytes each."""
        n = self.number("Q")
        if n * smallest > self.size - self.at:
            raise ValueError(f"{n} {what} do not fit the {self.size - self.at} bytes left at byte {self.at}")
        return n

    def text(self, most: int | None = None) -> str:
        n = self.count(1, "bytes of text")
        if most is not None and n > most:
            raise ValueError(f"a name of {n} bytes; {most} are the most")
        return self.take(n).decode("utf-8", "strict" if most else "surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array(self.number("I"))
        if kind not in SCALARS:
            raise ValueError(f"{kind} is not a type of metadata")
        return self.number(SCALARS[kind])

    def array(self, kind: int) -> list[str] | np.ndarray:
        if kind == ARRAY:
            raise ValueError("metadata has an array of arrays, which no model needs")
        if kind == STRING:
            return [self.text() for _ in range(self.count(8, "texts"))]
        if kind not in SCALARS:
            raise ValueError(f"{kind} is not a type of metadata")
        dtype = np.dtype("<" + SCALARS[kind])
        n = self.count(dtype.itemsize, "numbers")
        return np.frombuffer(self.take(n * dtype.itemsize), dtype)


def _metadata(header: _Reader, pairs: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(pairs):
        key = header.text(LONGEST_NAME)
        if key in found:
            raise ValueError(f"the metadata names {key!r} twice")
        found[key] = header.value(header.number("I"))
    return found


class _Entry(NamedTuple):
    """A row of the table of tensors: sizes as the file has them, offset from the start of the data."""

    kind: TensorType
    sizes: tuple[int, ...]
    offset: int


def _table(header: _Reader, tensors: int) -> dict[str, _Entry]:
    found: dict[str, _Entry] = {}
    for _ in range(tensors):
        name = header.text(LONGEST_NAME)
        if name in found:
            raise ValueError(f"the tensor {name!r} is there twice")
        found[name] = _entry(header, name)
    return found


def _entry(header: _Reader, name: str) -> _Entry:
    n = header.number("I")
    if n > MOST_SIZES:
        raise ValueError(f"{name!r} has {n} sizes; {MOST_SIZES} are the most")
    sizes = tuple(header.number("Q") for _ in range(n))
    kind = header.number("I")
    if kind not in TYPES:
        known = ", ".join(t.name for t in TYPES.values())
        raise ValueError(f"{name!r} has the tensor type {kind}, which is not read; read are {known}")
    if not all(1 <= size <= LARGEST_SIZE for size in sizes):
        raise ValueError(f"{name!r} has the sizes {list(sizes)}")
    if sizes and sizes[0] % TYPES[kind].block:
        raise ValueError(f"a row of {name!r} has {sizes[0]} values, no multiple of {TYPES[kind].block}")
    return _Entry(TYPES[kind], sizes, header.number("Q"))


def _aligned(at: int, to: Any) -> int:
    if not isinstance(to, int) or not 8 <= to <= 2**20 or to % 8:
        raise ValueError(f"general.alignment should be a multiple of 8 up to {2**20}, got {to!r}")
    return -(-at // to) * to


def _places(
    path: pathlib.Path, table: dict[str, _Entry], start: int, alignment: int, size: int
) -> dict[str, Tensor]:
    """The tensors with their place in the file. ValueError where one is not within it, or lies on another."""
    places, end = {}, 0
    for name, entry in sorted(table.items(), key=lambda item: item[1].offset):
        nbytes = math.prod(entry.sizes) // entry.kind.block * entry.kind.nbytes
        if entry.offset % alignment:
            raise ValueError(f"{name!r} starts at {entry.offset}, no multiple of the alignment {alignment}")
        if entry.offset < end:
            raise ValueError(f"{name!r} starts at {entry.offset}, within the tensor before it")
        end = entry.offset + nbytes
        if start + end > size:
            raise ValueError(f"{name!r} ends at byte {start + end}, and the file has {size}")
        places[name] = Tensor(name, path, entry.kind, entry.sizes[::-1], start + entry.offset, nbytes)
    return {name: places[name] for name in table}
