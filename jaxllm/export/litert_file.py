"""A .tflite from programs without parameters: the numbers of each are put behind the flatbuffer, one by one.

Every program's input that is a parameter becomes a constant of the file, and both programs name the same bytes.
Buffers lie behind the flatbuffer (`Buffer.offset` of LiteRT's schema), so that nothing is in memory twice and the
2 GB that a flatbuffer can address are no bound. Packed weights are stored as their codes: they are not rounded
again, because nothing here rounds.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxllm.errors import ConfigError
from jaxllm.progress import progress
from jaxllm.quant import Format, QTensor, dequantize
from jaxllm.quant.formats import FORMATS
from jaxllm.quant.qtensor import unpack

ALIGN = 64  # bytes: a cache line, and enough for any instruction
BLOCKS = (32, 64, 128, 256)  # columns of a block that the runtime's 4-bit products take
ROWS = 2**24  # weights that are turned into a file's bytes at a time


def unfit(format: Format) -> str | None:
    """Why the codes of a format cannot stand in a file as they are, or None."""
    whole = format.levels == "int" and format.zero is None and not format.global_scale and not format.power
    if not whole:
        return "its values are not whole numbers times a scale"
    if format.activations:
        return "it says how activations are rounded, and LiteRT does that its own way"
    if format.bits == 8 and format.group is None and format.center == 0:
        return None
    if format.bits == 8:
        return "LiteRT has codes of 8 bits with one scale a row only (int8)"
    if format.bits != 4:
        return "LiteRT's products take codes of 4 and 8 bits"
    if FORMATS.get(format.name) == format and format.high != 2 * format.center:
        return "its scales have either sign and LiteRT's are positive; q4f16_1 takes as many bits"
    if format.group is not None and (format.group not in BLOCKS or format.scale != "float16"):
        return f"LiteRT has 4 bits with float16 scales of {', '.join(map(str, BLOCKS))} columns, or of whole rows"
    return None if format.center in (7, 8) else "its codes do not stand around zero"


@dataclass
class _Stored:
    """A buffer behind the flatbuffer: its bytes come in pieces."""

    size: int
    pieces: Callable[[], Iterator[bytes]]
    index: int = -1


@dataclass
class _Parameter:
    """One matrix of the model, in the forms that programs read it in. All but the name are made when asked for."""

    name: str
    leaf: Any  # [out, in] or smaller; a QTensor's parts are read lazily
    stored: dict[str, _Stored] = field(default_factory=dict)


def write(path: pathlib.Path, data: bytes, leaves: Mapping[str, Any]) -> dict[str, str]:
    """Write the flatbuffer `data` with these parameters in it: arrays, QTensors, and matrices of experts in one.

    -> name of each parameter to what it is in the file: "float32", "float16", "int4" or "int8"."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
    made = _Writer(model, schema, {name: _Parameter(name, leaf) for name, leaf in _matrices(leaves)})
    made.put_parameters()
    made.save(path)
    return made.kinds


def _matrices(leaves: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """As `litert_program.apart` names them."""
    for path, leaf in leaves.items():
        if len(leaf.shape) == 3 and ".ffn." in path:
            for i in range(leaf.shape[0]):
                yield f"{path}.{i}", jax.tree.map(lambda x, i=i: x[i], leaf)
        else:
            yield path, leaf


class _Writer:
    def __init__(self, model, schema, parameters: dict[str, _Parameter]):
        self.model, self.schema, self.parameters = model, schema, parameters
        self.kinds: dict[str, str] = {}
        self.buffers: list[_Stored] = []
        codes = vars(schema.BuiltinOperator)
        self.product, self.row = codes["FULLY_CONNECTED"], codes["GATHER_ND"]

    # ---- the graph ------------------------------------------------------------------------------------------

    def put_parameters(self) -> None:
        """Make constants of all inputs that are parameters."""
        for signature in self.model.signatureDefs:
            graph = self.model.subgraphs[signature.subgraphIndex]
            given = {_text(entry.name): entry.tensorIndex for entry in signature.inputs}
            mine = {name: given[name] for name in self.parameters if name in given}
            signature.inputs = [entry for entry in signature.inputs if _text(entry.name) not in mine]
            graph.inputs = [i for i in graph.inputs if i not in set(mine.values())]
            for name, tensor in mine.items():
                self._put(graph, tensor, self.parameters[name])

    def _put(self, graph, index: int, parameter: _Parameter) -> None:
        users = [(op, list(op.inputs).index(index)) for op in graph.operators if index in list(op.inputs)]
        if not users:  # a program without logits has no use for the last layer
            return
        tensor, leaf = graph.tensors[index], parameter.leaf
        if _whole(leaf) and all(self._multiplies(op, at) or self._reads_rows(graph, op, at) for op, at in users):
            kind = _kind(leaf)
            self._quantized(graph, tensor, parameter)
        elif _halves(leaf) and all(self._multiplies(op, at) for op, at in users):
            kind = "float16"
            self._widened(graph, index, parameter)
        else:
            kind = "float32"
            tensor.buffer = self._stored(parameter, kind, _values(leaf, "<f4"))
        self.kinds[parameter.name] = kind
        for op, at in users:
            if self._reads_rows(graph, op, at):
                self._look_up(graph, op)

    def _code(self, op) -> int:
        code = self.model.operatorCodes[op.opcodeIndex]
        return max(code.builtinCode, code.deprecatedBuiltinCode)

    def _multiplies(self, op, at: int) -> bool:
        """Whether the operand is the weight of a product."""
        return (self._code(op), at) == (self.product, 1)

    def _reads_rows(self, graph, op, at: int) -> bool:
        """Whether the operand is a table of which rows are taken, by numbers [n, 1]."""
        if (self._code(op), at) != (self.row, 0):
            return False
        table, numbers = (graph.tensors[i].shape for i in op.inputs)
        return len(table) == 2 and len(numbers) == 2 and numbers[1] == 1

    def _quantized(self, graph, tensor, parameter: _Parameter) -> None:
        leaf, schema = parameter.leaf, self.schema
        tensor.buffer = self._stored(parameter, "codes", _codes(leaf))
        tensor.type = schema.TensorType.INT8 if leaf.format.bits == 8 else schema.TensorType.INT4
        tensor.quantization = schema.QuantizationParametersT()
        tensor.quantization.quantizedDimension = 0
        if leaf.format.group is None:
            tensor.quantization.scale = np.abs(np.asarray(leaf.scale, np.float32).reshape(-1))
            tensor.quantization.zeroPoint = np.zeros(leaf.shape[0], np.int64)
            return
        scales = self._tensor(graph, tensor.name + b"_scales", leaf.scale.shape, schema.TensorType.FLOAT16)
        graph.tensors[scales].buffer = self._stored(parameter, "scale", _scales(leaf))
        blocks = schema.BlockwiseQuantizationT()
        blocks.scales, blocks.zeroPoints, blocks.blockSize = scales, -1, leaf.format.group
        tensor.quantization.detailsType = schema.QuantizationDetails.BlockwiseQuantization
        tensor.quantization.details = blocks

    def _widened(self, graph, index: int, parameter: _Parameter) -> None:
        """Half the bytes, which the runtime makes float32 when it packs a product's weights."""
        tensor, schema = graph.tensors[index], self.schema
        held = self._tensor(graph, tensor.name + b"_half", tuple(tensor.shape), schema.TensorType.FLOAT16)
        graph.tensors[held].buffer = self._stored(parameter, "float16", _values(parameter.leaf, "<f2"))
        op = schema.OperatorT()
        op.opcodeIndex, op.inputs, op.outputs = self._operation("DEQUANTIZE"), [held], [index]
        graph.operators.insert(0, op)

    def _look_up(self, graph, op) -> None:
        """Rows of a table by EMBEDDING_LOOKUP, which takes codes, instead of GATHER_ND."""
        schema, (table, numbers) = self.schema, op.inputs
        count = int(graph.tensors[numbers].shape[0])
        number = self._tensor(graph, b"rows", (count,), schema.TensorType.INT32)
        shape = self._tensor(graph, b"rows_shape", (1,), schema.TensorType.INT32)
        graph.tensors[shape].buffer = len(self.model.buffers)
        held = schema.BufferT()
        held.data = np.array([count], "<i4").view(np.uint8)
        self.model.buffers.append(held)
        line = schema.OperatorT()
        line.opcodeIndex, line.inputs, line.outputs = self._operation("RESHAPE"), [numbers, shape], [number]
        graph.operators.insert([other is op for other in graph.operators].index(True), line)
        op.opcodeIndex, op.inputs = self._operation("EMBEDDING_LOOKUP"), [number, table]
        op.builtinOptionsType, op.builtinOptions = 0, None

    def _operation(self, name: str) -> int:
        number = getattr(self.schema.BuiltinOperator, name)
        for i, code in enumerate(self.model.operatorCodes):
            if max(code.builtinCode, code.deprecatedBuiltinCode) == number:
                return i
        code = self.schema.OperatorCodeT()
        code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, 127), 1
        self.model.operatorCodes.append(code)
        return len(self.model.operatorCodes) - 1

    def _tensor(self, graph, name: bytes, shape: tuple[int, ...], kind: int) -> int:
        tensor = self.schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name, list(shape), kind, 0
        graph.tensors.append(tensor)
        return len(graph.tensors) - 1

    # ---- the bytes ------------------------------------------------------------------------------------------

    def _stored(self, parameter: _Parameter, form: str, stored: _Stored) -> int:
        """The number of a buffer: the same for all programs that read a parameter in this form."""
        known = parameter.stored.setdefault(form, stored)
        if known.index < 0:
            known.index = len(self.model.buffers)
            self.model.buffers.append(self.schema.BufferT())
            self.buffers.append(known)
        return known.index

    def save(self, path: pathlib.Path) -> None:
        """The flatbuffer, and behind it what it points to."""
        size = len(self._packed(ALIGN))  # offsets have a fixed width: the size is that of the real ones
        with path.open("wb") as file, progress("writing parameters", len(self.buffers)) as advance:
            file.write(self._packed(size))
            for stored in self.buffers:
                file.write(bytes(-file.tell() % ALIGN))
                start = file.tell()
                for piece in stored.pieces():
                    file.write(piece)
                assert file.tell() == start + stored.size, "a parameter has other bytes than announced"
                advance()

    def _packed(self, behind: int) -> bytes:
        import flatbuffers

        at = behind
        for stored in self.buffers:
            at += -at % ALIGN
            buffer = self.model.buffers[stored.index]
            buffer.offset, buffer.size = at, stored.size
            at += stored.size
        builder = flatbuffers.Builder(2**20)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name


# ---- what a parameter is in a file --------------------------------------------------------------------------


def _whole(leaf: Any) -> bool:
    """Whether it is packed, in groups that are full."""
    return isinstance(leaf, QTensor) and leaf.padded == leaf.columns and leaf.order is None


def _kind(leaf: QTensor) -> str:
    return f"int{leaf.format.bits}"


def _scales(leaf: QTensor) -> _Stored:
    """f16, positive."""
    return _Stored(2 * leaf.scale.size, lambda: iter([np.abs(np.asarray(leaf.scale, "<f2")).tobytes()]))


def _halves(leaf: Any) -> bool:
    """Whether float16 holds it: what is float16, and bfloat16 that is not too large (below 2**-14 to 2**-25)."""
    if isinstance(leaf, QTensor) or leaf.dtype not in (np.float16, ml_dtypes.bfloat16):
        return False
    return all(np.abs(part.astype(np.float32)).max(initial=0) < np.finfo(np.float16).max for part in _rows(leaf))


def _values(leaf: Any, dtype: str) -> _Stored:
    """Numbers, row by row."""

    def pieces():
        for part in _rows(leaf):
            values = dequantize(part, np.float32) if isinstance(part, QTensor) else part
            yield np.ascontiguousarray(values.astype(dtype)).tobytes()

    return _Stored(np.dtype(dtype).itemsize * int(np.prod(leaf.shape, dtype=np.int64)), pieces)


def _codes(leaf: QTensor) -> _Stored:
    """Signed codes; of 4 bits two in a byte, the lower columns in the lower bits."""
    count = int(np.prod(leaf.shape, dtype=np.int64))
    return _Stored(count * leaf.format.bits // 8, lambda: map(_coded, _rows(leaf)))


def _coded(part: QTensor) -> bytes:
    if part.format.bits == 8:
        return _positive(part.codes, part).astype(np.int8).tobytes()
    signed = _positive(unpack(part.codes, None, 4).astype(np.int8) - np.int8(part.format.center), part)
    if signed.max(initial=0) > 7:
        raise ConfigError(
            f"a group of a matrix in {part.format.name} has a negative scale and the code -8, and LiteRT's scales "
            "are positive; quantize to q4f16_1, which takes as many bits"
        )
    nibbles = signed.view(np.uint8) & 15
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).tobytes()


def _positive(codes: np.ndarray, part: QTensor) -> np.ndarray:
    """The codes, with other signs where a scale is negative: [N, C], i16 or as they are."""
    below = np.asarray(part.scale, np.float32) < 0
    if not below.any():
        return codes
    return np.where(np.repeat(below, part.columns_per_scale, -1), -codes.astype(np.int16), codes).astype(np.int8)


def _rows(leaf: Any) -> Iterator[Any]:
    """Blocks of rows of a matrix; what has no rows, whole."""
    if len(leaf.shape) < 2:
        yield np.asarray(leaf)
        return
    size = max(1, ROWS // int(np.prod(leaf.shape[1:])))
    for start in range(0, leaf.shape[0], size):
        part = slice(start, start + size)
        if isinstance(leaf, QTensor):
            yield jax.tree.map(np.asarray, replace(leaf, **{k: x[part] for k, x in leaf.row_parts().items()}))
        else:
            yield np.asarray(leaf[part])
