"""ONNX Runtime's operators for the operations that `ops.named` keeps whole, by their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxllm.errors import CheckpointError
from jaxllm.export import onnx_bytes
from jaxllm.export.onnx_graph import MICROSOFT, Graph, Unsupported, Value
from jaxllm.export.onnx_packed import blocks
from jaxllm.quant import QTensor, dequantize

F32 = np.dtype(np.float32)
Input = Value | np.ndarray


@dataclass(frozen=True)
class Parameter:
    """An array of the model, which becomes a tensor of the graph where something reads it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        return len(self.shape)


def tensor(g: Graph, p: Parameter) -> Value:
    """A parameter; where it has 16 bits, in float16, and widened when the session begins.

    Browsers' builds read no bfloat16. As float16 its numbers are the same from 2^-17 on, and within 2^-25 below.
    """
    if p.dtype.name not in ("float16", "bfloat16"):
        return g.tensor(p.name, p.shape, p.dtype, p.fetch)
    return g.cast(g.tensor(p.name, p.shape, np.float16, lambda: _half(p)), F32)


def _half(p: Parameter) -> np.ndarray:
    x = p.fetch()
    if x.dtype != np.float16 and np.abs(x.astype(np.float32)).max(initial=0) > np.finfo(np.float16).max:
        raise CheckpointError(f"{p.name} has numbers beyond float16, in which 16 bits are stored there")
    return x.astype(np.float16)


def read(g: Graph, x: Any) -> Input:
    """A value, of whatever an argument is."""
    return tensor(g, x) if isinstance(x, Parameter) else x


# ---- products -------------------------------------------------------------------------------------------


def matmul(g: Graph, out: Any, numbers: Mapping[str, Any], x: Input, w: Any) -> Value:
    """x [..., in] times w [out, in] transposed."""
    if isinstance(w, QTensor):
        return packed_product(g, out.shape, g.cast(g.whole(x), F32), w)
    rows = g.reshape(g.cast(x, F32), (_count(x.shape[:-1]), x.shape[-1]))
    shape = (rows.shape[0], w.shape[0])
    y = g.op("Gemm", rows, g.whole(read(g, w)), shape=shape, dtype=F32, transB=1)
    return g.reshape(y, out.shape)


def _count(axes: tuple) -> Any:
    total = 1
    for axis in axes:
        total = axis if isinstance(total, int) and total == 1 else total * axis
    return total


def packed_product(g: Graph, shape: tuple, x: Value, q: QTensor) -> Value:
    """x [..., in] times a packed weight [out, in]."""
    if q.order is not None:
        order = g.cast(read(g, q.order), np.int64)
        x = g.op("Gather", x, order, shape=x.shape, dtype=F32, axis=len(x.shape) - 1)
    if g.bytes:
        return onnx_bytes.product(g, shape, x, _bytes(g, q))
    found = blocks(q, lambda part: getattr(q, part).fetch())
    name, N = _name(q), q.shape[0]
    codes = g.tensor(f"{name}.codes", _codes_shape(q, found), np.uint8, found.codes)
    scales = _scales(g, q, found, name, (N, found.count))
    zeros = None
    if found.zeros:
        zeros = g.tensor(f"{name}.zeros", (N, -(-found.count * found.bits // 8)), np.uint8, found.zeros)
    attributes = dict(K=q.columns, N=N, bits=found.bits, block_size=found.block, accuracy_level=_level(q))
    return g.op("MatMulNBits", x, codes, scales, zeros, shape=shape, dtype=F32, domain=MICROSOFT, **attributes)


def _level(q: QTensor) -> int:
    """4 lets activations be rounded to 8 bits, as the kernels here do beside the same weights; 1 keeps them."""
    return 1 if q.dtype == F32 or q.format.bits > 4 else 4


def _codes_shape(q: QTensor, found) -> tuple[int, ...]:
    return (*q.codes.shape[:-1], found.count, found.block * found.bits // 8)


def _scales(g: Graph, q: QTensor, found, name: str, shape: tuple) -> Value:
    return g.cast(g.tensor(f"{name}.scales", shape, found.scale_dtype, found.scales), F32)


def expanded(g: Graph, w: Any) -> Value:
    """A weight as f32, packed or not: for what has no operator of packed ones."""
    if not isinstance(w, QTensor):
        return g.cast(read(g, w), F32)
    return g.tensor(f"{_name(w)}.expanded", w.shape, F32, lambda: _values(w))


def _name(q: QTensor) -> str:
    return q.codes.name.removesuffix(".codes")


def _values(q: QTensor) -> np.ndarray:
    parts = {part: p.fetch() for part, p in q.parts().items()}
    return dequantize(QTensor(**parts, format=q.format, columns=q.columns, dtype_name="float32"))


def _bytes(g: Graph, q: QTensor) -> onnx_bytes.Rows:
    """Rows of bytes, whose columns are in the order of the codes."""
    return onnx_bytes.rows(g, _name(q), q.shape, lambda: _values(replace(q, order=None)))


def per_head(g: Graph, out: Any, numbers: Mapping[str, Any], x: Input, w: Any) -> Value:
    """x [B, T, H, in] times each head's w [H, out, in]."""
    by_head = g.transpose(g.cast(x, F32), (0, 2, 1, 3))
    turned = g.transpose(expanded(g, w), (0, 2, 1))
    b, t, h, o = out.shape
    y = g.op("MatMul", g.whole(by_head), turned, shape=(b, h, t, o), dtype=F32)
    return g.transpose(y, (0, 2, 1, 3))


def embed(g: Graph, out: Any, numbers: Mapping[str, Any], w: Any, tokens: Input) -> Value:
    """Rows of w [V, D]."""
    if not isinstance(w, QTensor):
        return g.op("Gather", g.cast(read(g, w), F32), tokens, shape=out.shape, dtype=F32, axis=0)
    if w.order is not None:
        return g.op("Gather", expanded(g, w), tokens, shape=out.shape, dtype=F32, axis=0)
    if g.bytes:
        return onnx_bytes.lookup(g, out, _bytes(g, w), g.value(tokens))
    found = blocks(w, lambda part: getattr(w, part).fetch())
    name, N = _name(w), w.shape[0]
    codes = g.tensor(f"{name}.codes", _codes_shape(w, found), np.uint8, found.codes)
    scales = g.reshape(_scales(g, w, found, name, (N, found.count)), (N, found.count, 1))
    rows = lambda a: g.op("Gather", a, tokens, shape=(*tokens.shape, *a.shape[1:]), dtype=a.dtype, axis=0)
    x = _levels(g, rows(codes), found.bits)
    zero = np.asarray(2 ** (found.bits - 1), F32)
    if found.zeros:
        width = -(-found.count * found.bits // 8)
        zero = _levels(g, rows(g.tensor(f"{name}.zeros", (N, width), np.uint8, found.zeros)), found.bits)
        zero = g.slice(zero, len(zero.shape) - 1, 0, found.count)
        zero = g.reshape(zero, (*zero.shape, 1))
    scale = rows(scales)
    number = lambda op, *xs: g.elementwise(op, *xs, dtype=F32, shape=x.shape)
    x = number("Mul", number("Sub", x, zero), scale)
    x = g.reshape(x, (*tokens.shape, found.count * found.block))
    return g.slice(x, len(out.shape) - 1, 0, out.shape[-1])


def _levels(g: Graph, codes: Value, bits: int) -> Value:
    """u8 [.., n] -> f32 [.., n * 8 / bits]: each byte's codes, the low one first."""
    x = g.cast(codes, F32)
    if bits == 8:
        return x
    sixteen = np.asarray(16, F32)
    number = lambda op, *xs: g.elementwise(op, *xs, dtype=F32)
    high = number("Floor", number("Div", x, sixteen))
    low = number("Sub", x, number("Mul", high, sixteen))
    pair = (*x.shape, 1)
    both = g.concatenate([g.reshape(part, pair) for part in (low, high)], len(x.shape), (*x.shape, 2))
    return g.reshape(both, (*x.shape[:-1], 2 * x.shape[-1]))


def grouped_matmul(g: Graph, out: Any, numbers: Mapping[str, Any], x: Input, w: Any, expert: Input) -> Value:
    """Row i of x [R, in] times w[expert[i]] of w [E, out, in], experts never decreasing: a turn for each expert
    that is there, of the rows that are its own."""
    x, expert = g.whole(g.cast(x, F32)), g.whole(expert)
    R = x.shape[0]
    vector = dict(shape=("n",), dtype=np.int64)
    none = np.array(-1, np.int32)
    before = g.op("Pad", expert, np.array([1, 0], np.int64), none, shape=(R + 1,), dtype=np.int32)
    before = g.slice(before, 0, 0, R)
    first = g.elementwise("Not", g.elementwise("Equal", before, expert, dtype=bool), dtype=bool)
    starts = g.op("NonZero", first, shape=(1, "n"), dtype=np.int64)
    starts = g.op("Squeeze", starts, np.array([0], np.int64), **vector)
    ends = g.op(
        "Concat",
        g.op("Slice", starts, np.array([1]), np.array([2**31]), np.array([0]), **vector),
        g.length(R),
        axis=0,
        **vector,
    )
    count = g.reshape(g.op("Shape", starts, shape=(1,), dtype=np.int64), ())
    empty = g.op("Expand", np.zeros((), F32), g.lengths(out.shape), shape=out.shape, dtype=F32)
    body = _turn(g, x, w, expert, starts, ends, out)
    (y,) = g.made("Loop", [count, np.array(True), empty], 1, "", body=body)
    return Value(y, tuple(out.shape), F32, tuple(out.shape))


def _turn(g: Graph, x: Value, w: Any, expert: Value, starts: Value, ends: Value, out: Any) -> Graph:
    body = Graph(g)
    turn, go = body.input(g.name("turn"), (), np.int64), body.input(g.name("go"), (), bool)
    y = body.input(g.name("rows"), out.shape, F32)
    vector = dict(shape=(1,), dtype=np.int64)
    at = body.reshape(turn, (1,))
    start, end = (body.op("Gather", a, at, axis=0, **vector) for a in (starts, ends))
    owner = body.op("Gather", expert, body.reshape(start, ()), shape=(), dtype=np.int32, axis=0)
    some = ("m",)
    rows = body.op("Slice", x, start, end, np.array([0]), shape=(*some, x.shape[1]), dtype=F32)
    own = _of_expert(body, (*some, out.shape[1]), rows, w, owner)
    scalars = [body.reshape(start, ()), body.reshape(end, ()), np.ones((), np.int64)]
    place = body.op(
        "Unsqueeze",
        body.op("Range", *scalars, shape=some, dtype=np.int64),
        np.array([1]),
        shape=(*some, 1),
        dtype=np.int64,
    )
    body.outputs.append((body.name("go"), body.op("Identity", go, shape=(), dtype=bool)))
    body.outputs.append((body.name("rows"), body.op("ScatterND", y, place, own, shape=out.shape, dtype=F32)))
    return body


def _of_expert(g: Graph, shape: tuple, x: Value, w: Any, owner: Value) -> Value:
    """x [m, in] times w[owner] of w [E, out, in]."""
    if not isinstance(w, QTensor):
        one = g.op("Gather", read(g, w), owner, shape=w.shape[1:], dtype=F32, axis=0)
        return g.op("Gemm", x, one, shape=shape, dtype=F32, transB=1)
    if w.order is not None:
        raise Unsupported("experts with columns in an order of their own")
    if g.bytes:
        return onnx_bytes.product(g, shape, x, onnx_bytes.of_expert(g, _bytes(g, w), owner))
    found, (E, N) = blocks(w, lambda part: getattr(w, part).fetch()), w.shape[:2]
    name = _name(w)
    width = -(-found.count * found.bits // 8)
    parts = [
        g.tensor(f"{name}.codes", _codes_shape(w, found), np.uint8, found.codes),
        _scales(g, w, found, name, (E, N, found.count)),
        g.tensor(f"{name}.zeros", (E, N, width), np.uint8, found.zeros) if found.zeros else None,
    ]
    own = [p and g.op("Gather", p, owner, shape=p.shape[1:], dtype=p.dtype, axis=0) for p in parts]
    attributes = dict(K=w.columns, N=N, bits=found.bits, block_size=found.block, accuracy_level=_level(w))
    return g.op("MatMulNBits", x, *own, shape=shape, dtype=F32, domain=MICROSOFT, **attributes)


# ---- the rest -------------------------------------------------------------------------------------------


def norm(g: Graph, out: Any, numbers: Mapping[str, Any], x: Input, w: Any, b: Any) -> Value:
    """RMSNorm or LayerNorm over the last axis."""
    x, w = g.whole(g.cast(x, F32)), g.cast(read(g, w), F32)
    b = None if b is None else g.cast(read(g, b), F32)
    alone = len(w.shape) == 1
    scale = w if alone else g.constant(np.ones(x.shape[-1], F32))
    like = dict(shape=x.shape, dtype=F32, axis=-1, epsilon=float(numbers["eps"]))
    if numbers["centered"]:
        y = g.op("LayerNormalization", x, scale, b if alone else None, **like)
    else:
        y = g.op("SimplifiedLayerNormalization", x, scale, **like)
    y = y if alone else g.elementwise("Mul", y, w, dtype=F32, shape=x.shape)
    late = b is not None and not (alone and numbers["centered"])
    return g.elementwise("Add", y, b, dtype=F32, shape=x.shape) if late else y


def put(g: Graph, out: Any, numbers: Mapping[str, Any], cache: Value, x: Input, slot: Input) -> Value:
    """cache [1, K, S, h] with x [1, T, K, h] at slots i32 [1, T].

    A slot of S comes only where a row overflows, whose results are NaN from then on: the last slot is written."""
    _, K, S, _ = cache.shape
    T = x.shape[1]
    last = g.elementwise("Min", slot, np.array(S - 1, np.int32), dtype=np.int32)
    slots = g.reshape(g.cast(last, np.int64), (1, 1, T, 1))
    heads = np.arange(K, dtype=np.int64).reshape(1, K, 1, 1)
    column = dict(shape=(1, K, T, 1), dtype=np.int64)
    goal = g.lengths((1, K, T, 1))
    parts = [g.op("Expand", a, goal, **column) for a in (np.zeros((1, 1, 1, 1), np.int64), heads, slots)]
    place = g.op("Concat", *parts, shape=(1, K, T, 3), dtype=np.int64, axis=3)
    return g.op("ScatterND", cache, place, g.whole(g.transpose(x, (0, 2, 1, 3))), shape=cache.shape, dtype=F32)


def attend(
    g: Graph, out: Any, numbers: Mapping[str, Any], q: Input, k: Value, v: Value, mask: Input, *extras: Any
) -> Value:
    """Softmax attention of q [1, T, K, G, h] over k [1, K, S, h], v [1, K, S, j], mask bool [1, T, S]."""
    sinks, bias, slopes = (None if x is None else g.value(read(g, x)) for x in extras)
    _, T, K, G, h = q.shape
    S, j = k.shape[2], v.shape[3]
    if not numbers["softcap"]:
        q = g.elementwise("Mul", q, np.asarray(numbers["scale"], F32), dtype=F32, shape=q.shape)
    # The queries are turned, not the keys: those are the whole cache.
    turned = g.reshape(g.transpose(q, (0, 2, 4, 1, 3)), (1, K, h, T * G))
    scores = g.op("MatMul", g.whole(k), turned, shape=(1, K, S, T * G), dtype=F32)
    scores = g.transpose(g.reshape(scores, (1, K, S, T, G)), (0, 1, 3, 4, 2))  # [1, K, T, G, S]
    number = lambda op, *xs: g.elementwise(op, *xs, dtype=F32, shape=scores.shape)
    if numbers["softcap"]:
        scores = number("Mul", scores, np.asarray(numbers["scale"], F32))
    if bias is not None:
        if slopes is not None:
            slopes = g.reshape(slopes, (1, K, 1, G, 1))
            bias = g.elementwise("Mul", bias, slopes, dtype=F32, shape=scores.shape)
        scores = number("Add", scores, bias)
    if numbers["softcap"]:
        cap = np.asarray(numbers["softcap"], F32)
        scores = number("Mul", g.elementwise("Tanh", number("Div", scores, cap), dtype=F32), cap)
    seen = g.reshape(mask, (1, 1, T, 1, S))
    scores = number("Where", seen, scores, np.asarray(np.finfo(F32).min, F32))
    weights = _weights(g, scores, sinks)
    y = g.op("MatMul", g.reshape(weights, (1, K, T * G, S)), g.whole(v), shape=(1, K, T * G, j), dtype=F32)
    return g.transpose(g.reshape(y, (1, K, T, G, j)), (0, 2, 1, 3, 4))


def _weights(g: Graph, scores: Value, sinks: Value | None) -> Value:
    """Softmax over the last axis of [1, K, T, G, S]; a sink [K, G] takes its part and belongs to no slot."""
    if sinks is None:
        return g.op("Softmax", g.whole(scores), shape=scores.shape, dtype=F32, axis=-1)
    _, K, T, G, S = scores.shape
    column = g.reshape(g.cast(sinks, F32), (1, K, 1, G, 1))
    column = g.op("Expand", column, g.lengths((1, K, T, G, 1)), shape=(1, K, T, G, 1), dtype=F32)
    more = g.concatenate([scores, column], 4, (1, K, T, G, S + 1))
    return g.slice(g.op("Softmax", more, shape=more.shape, dtype=F32, axis=-1), 4, 0, S)


CALLS = {f.__name__: f for f in (matmul, per_head, embed, grouped_matmul, norm, put, attend)}
