"""A Core ML package as it lies on disk: its functions, and the numbers in its weight file.

Read from the protocol buffers themselves, and not by what wrote them. Source: Model.proto and MIL.proto of the
Core ML format, and the layout of weight files in MILBlob (StorageFormat.hpp) of github.com/apple/coremltools: a
header of 64 bytes, and for each array 64 bytes that say its type, size and place, numbers of less than a byte from
the lowest bits on.
"""

from __future__ import annotations

import contextlib
import io
import logging
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxllm.errors import CheckpointError

WEIGHTS = "@model_path/"
SENTINEL = 0xDEADBEEF
# MIL.proto's DataType -> (numpy's dtype, bits)
TYPES = {1: ("bool", 8), 10: ("float16", 16), 11: ("float32", 32), 21: ("int8", 8), 22: ("int16", 16)}
TYPES |= {23: ("int32", 32), 25: ("int8", 4), 31: ("uint8", 8), 32: ("uint16", 16), 35: ("uint8", 4)}
STRING = 2
# MILBlob's BlobDataType, of the same arrays
STORED = {10: 1, 11: 2, 31: 3, 21: 4, 22: 6, 32: 7, 25: 8, 35: 11, 23: 14}
METADATA = np.dtype([("sentinel", "<u4"), ("type", "<u4"), ("bytes", "<u8"), ("offset", "<u8")])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without coremltools' bars, and its remarks that this is no Mac and about versions it was not tried with."""
    log = logging.getLogger("coremltools")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


@dataclass(frozen=True)
class Kind:
    """What an operation says of an output: its dtype (numpy's name) and shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """One operator: `inputs` are names of values, arrays, strings, or tuples of those."""

    type: str
    inputs: Mapping[str, Any]
    outputs: tuple[tuple[str, Kind], ...]
    blocks: tuple[Block, ...] = ()
    stored: tuple[int, ...] = ()  # where its numbers begin in the weight file


@dataclass(frozen=True)
class Block:
    """Operations one after the other."""

    inputs: tuple[str, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Name:
    """A value of the function, by its name."""

    name: str


@dataclass(frozen=True)
class Function:
    """What a package can be asked for."""

    block: Block
    inputs: Mapping[str, Kind]
    states: Mapping[str, Kind]
    described: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # "input", "output", "state" -> names


def read(package: pathlib.Path) -> dict[str, Function]:
    """Its functions by name. Raises CheckpointError for what is no such package."""
    with quiet():
        from coremltools.proto import Model_pb2

    data = package / "Data" / "com.apple.CoreML"
    try:
        model = Model_pb2.Model.FromString((data / "model.mlmodel").read_bytes())
    except Exception as error:  # protobuf has one for each of its engines
        raise CheckpointError(f"{package} is no Core ML package ({error}); export it again") from error
    described = {each.name: each for each in model.description.functions}
    read_ = _Reader(data)
    found = {name: read_.function(f, described[name]) for name, f in model.mlProgram.functions.items()}
    if not found:
        raise CheckpointError(f"{package} has no functions; export it again")
    return found


class _Reader:
    """Functions of one package."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._files: dict[str, np.ndarray] = {}

    def function(self, function: Any, described: Any) -> Function:
        (block,) = function.block_specializations.values()
        inputs = {x.name: x.type for x in function.inputs}
        states = {k: _kind(t.stateType.wrappedType) for k, t in inputs.items() if t.HasField("stateType")}
        inputs = {k: _kind(t) for k, t in inputs.items() if k not in states}
        names = {role: tuple(x.name for x in getattr(described, role)) for role in ("input", "output", "state")}
        return Function(self._block(block), inputs, states, names)

    def _block(self, block: Any) -> Block:
        operations = tuple(map(self._operation, block.operations))
        return Block(tuple(x.name for x in block.inputs), operations, tuple(block.outputs))

    def _operation(self, op: Any) -> Operation:
        inputs = {key: self._argument(argument) for key, argument in op.inputs.items()}
        values = [b.value for a in op.inputs.values() for b in a.arguments if b.HasField("value")]
        if op.type == "const":
            inputs["val"] = self._value(op.attributes["val"])
            values.append(op.attributes["val"])
        stored = tuple(v.blobFileValue.offset for v in values if v.HasField("blobFileValue"))
        outputs = tuple((x.name, _kind(x.type)) for x in op.outputs)
        return Operation(op.type, inputs, outputs, tuple(map(self._block, op.blocks)), stored)

    def _argument(self, argument: Any) -> Any:
        found = [Name(b.name) if b.HasField("name") else self._value(b.value) for b in argument.arguments]
        return found[0] if len(found) == 1 else tuple(found)

    def _value(self, value: Any) -> Any:
        kind = value.type.tensorType
        if value.HasField("blobFileValue"):
            return self._stored(value.blobFileValue, kind)
        tensor = value.immediateValue.tensor
        which = tensor.WhichOneof("value")
        if kind.dataType == STRING:
            return tensor.strings.values[0]
        dtype, shape = _kind(value.type).dtype, _kind(value.type).shape
        if which == "bytes":
            return _unpacked(np.frombuffer(tensor.bytes.values, np.uint8), kind.dataType, shape)
        return np.array(getattr(tensor, which).values if which else [], dtype).reshape(shape)

    def _stored(self, place: Any, kind: Any) -> np.ndarray:
        file, name = self._file(place.fileName), place.fileName
        head = np.frombuffer(file[place.offset : place.offset + METADATA.itemsize].tobytes(), METADATA)
        if head.size != 1 or head["sentinel"] != SENTINEL or head["type"] != STORED.get(kind.dataType):
            raise CheckpointError(f"{name} holds no such array at {place.offset}; export it again")
        begin, size = int(head["offset"][0]), int(head["bytes"][0])
        shape = tuple(int(d.constant.size) for d in kind.dimensions)
        return _unpacked(file[begin : begin + size], kind.dataType, shape)

    def _file(self, name: str) -> np.ndarray:
        if name not in self._files:
            path = self._folder / name.removeprefix(WEIGHTS)
            if not name.startswith(WEIGHTS) or not path.is_file():
                raise CheckpointError(f"the package's {name} is missing; export it again")
            self._files[name] = np.memmap(path, np.uint8, "r")
        return self._files[name]


def _kind(type_: Any) -> Kind:
    tensor = type_.tensorType
    if not type_.HasField("tensorType"):
        return Kind("other", ())
    dtype = "string" if tensor.dataType == STRING else TYPES.get(tensor.dataType, ("other",))[0]
    return Kind(dtype, tuple(int(d.constant.size) for d in tensor.dimensions))


def _unpacked(data: np.ndarray, kind: int, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes as an array; those of 4 bits as i8 or u8."""
    if kind not in TYPES:
        raise CheckpointError(f"the package has an array of MIL's type {kind}, which is not known here")
    dtype, bits = TYPES[kind]
    if bits != 4:
        return data.view(dtype).reshape(shape)
    codes = np.stack([data & 15, data >> 4], -1).reshape(-1)[: np.prod(shape, dtype=np.int64)]
    if dtype == "int8":
        codes = (codes.astype(np.int8) ^ 8) - 8
    return codes.astype(dtype).reshape(shape)
