"""ONNX operators for JAX's primitives: a rule each, from an equation's inputs to the value of its output.

A rule gets the graph, the equation's parameters, the shapes and dtypes of its outputs and its inputs. What these
primitives mean is said by jax.lax's documentation, what the operators mean by onnx.ai/onnx/operators (opset 21).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxllm.export.onnx_graph import Graph, Unsupported, Value

Input = Value | np.ndarray
Rule = Callable[..., Any]


def plain(op: str) -> Rule:
    """An operator that does just what the primitive does, element by element."""

    def rule(g: Graph, params: dict, out: Any, *xs: Input) -> Value:
        return g.elementwise(op, *xs, dtype=out.dtype, shape=out.shape)

    return rule


def _through(g: Graph, params: dict, out: Any, x: Input) -> Value:
    return g.value(x)


def _arithmetic(op: str, neutral: float) -> Rule:
    """One that leaves x alone where the other side is `neutral`."""

    def rule(g: Graph, params: dict, out: Any, x: Input, y: Input) -> Value:
        for one, other in ((x, y), (y, x) if op in ("Add", "Mul") else (x, y)):
            if _only(other, neutral) and tuple(one.shape) == tuple(out.shape):
                return g.value(one)
        return g.elementwise(op, x, y, dtype=out.dtype, shape=out.shape)

    return rule


def _only(x: Input, number: float) -> bool:
    return isinstance(x, np.ndarray) and x.size == 1 and bool((x == number).all())


def _divide(g: Graph, params: dict, out: Any, x: Input, y: Input) -> Value:
    return g.elementwise("Div", x, y, dtype=out.dtype, shape=out.shape)


def _remainder(g: Graph, params: dict, out: Any, x: Input, y: Input) -> Value:
    # The sign of x, as in C.
    x, y = g.value(x), g.value(y)
    actual = g.elementwise("Add", x, y, dtype=out.dtype, shape=out.shape).actual
    return g.op("Mod", x, y, shape=out.shape, dtype=out.dtype, actual=actual, fmod=1)


def _logical(boolean: str, bits: str) -> Rule:
    def rule(g: Graph, params: dict, out: Any, *xs: Input) -> Value:
        return g.elementwise(boolean if out.dtype == bool else bits, *xs, dtype=out.dtype, shape=out.shape)

    return rule


def _unlike(g: Graph, params: dict, out: Any, x: Input, y: Input) -> Value:
    return g.elementwise("Not", g.elementwise("Equal", x, y, dtype=bool, shape=out.shape), dtype=bool)


def _rsqrt(g: Graph, params: dict, out: Any, x: Input) -> Value:
    root = g.elementwise("Sqrt", x, dtype=out.dtype)
    return g.elementwise("Reciprocal", root, dtype=out.dtype)


def _square(g: Graph, params: dict, out: Any, x: Input) -> Value:
    return g.elementwise("Mul", x, x, dtype=out.dtype)


def _power(g: Graph, params: dict, out: Any, x: Input, y: Input | None = None) -> Value:
    y = np.asarray(params["y"], out.dtype) if y is None else y
    return g.elementwise("Pow", x, y, dtype=out.dtype, shape=out.shape)


def _log1p(g: Graph, params: dict, out: Any, x: Input) -> Value:
    more = g.elementwise("Add", x, np.ones((), out.dtype), dtype=out.dtype)
    return g.elementwise("Log", more, dtype=out.dtype)


def _expm1(g: Graph, params: dict, out: Any, x: Input) -> Value:
    return g.elementwise("Sub", g.elementwise("Exp", x, dtype=out.dtype), np.ones((), out.dtype), dtype=out.dtype)


def _erfc(g: Graph, params: dict, out: Any, x: Input) -> Value:
    return g.elementwise("Sub", np.ones((), out.dtype), g.elementwise("Erf", x, dtype=out.dtype), dtype=out.dtype)


def _clamp(g: Graph, params: dict, out: Any, low: Input, x: Input, high: Input) -> Value:
    like = dict(dtype=out.dtype, shape=out.shape)
    return g.elementwise("Min", g.elementwise("Max", x, low, **like), high, **like)


def _select(g: Graph, params: dict, out: Any, which: Input, *cases: Input) -> Value:
    if len(cases) != 2 or which.dtype != bool:
        raise Unsupported("a choice between more than two cases")
    return g.elementwise("Where", which, cases[1], cases[0], dtype=out.dtype, shape=out.shape)


def _convert(g: Graph, params: dict, out: Any, x: Input) -> Value:
    return g.cast(x, out.dtype)


# ---- shapes ---------------------------------------------------------------------------------------------


def _dim(g: Graph, params: dict, out: Any) -> Value:
    return g.cast(g.reshape(g.length(params["dim"]), ()), out.dtype)


def _iota(g: Graph, params: dict, out: Any) -> Value:
    at, shape = params["dimension"], out.shape
    count = g.reshape(g.length(shape[at]), ())
    zero, one = np.zeros((), np.int64), np.ones((), np.int64)
    line = g.cast(g.op("Range", zero, count, one, shape=(shape[at],), dtype=np.int64), out.dtype)
    return _broadcast(g, {"broadcast_dimensions": (at,)}, out, line)


def _broadcast(g: Graph, params: dict, out: Any, x: Input, *more: Any) -> Value:
    x, kept, rank = g.value(x), tuple(params["broadcast_dimensions"]), len(out.shape)
    if len(x.actual) < len(x.shape):
        x = g.whole(x)
    new = [i for i in range(rank) if i not in kept]
    actual = [1] * rank
    for axis, length in zip(kept, x.actual, strict=True):
        actual[axis] = length
    if not new:
        return Value(x.name, tuple(out.shape), x.dtype, tuple(actual))
    if not kept:  # a number is broadcast anyway
        return Value(x.name, tuple(out.shape), x.dtype, ())
    axes = np.array(new, np.int64)
    return g.op("Unsqueeze", x, axes, shape=out.shape, dtype=x.dtype, actual=tuple(actual))


def _reshape(g: Graph, params: dict, out: Any, x: Input, *more: Any) -> Value:
    return g.reshape(x, out.shape)


def _transpose(g: Graph, params: dict, out: Any, x: Input) -> Value:
    return g.transpose(x, params["permutation"])


def _concatenate(g: Graph, params: dict, out: Any, *xs: Input) -> Value:
    return g.concatenate(list(xs), params["dimension"], out.shape)


def _stack(g: Graph, params: dict, out: Any, *xs: Input) -> Value:
    axis = params["axis"]
    lined = [g.reshape(x, (*out.shape[:axis], 1, *out.shape[axis + 1 :])) for x in xs]
    return g.concatenate(lined, axis, out.shape)


def _slice(g: Graph, params: dict, out: Any, x: Input) -> Value:
    if params["strides"] and any(s != 1 for s in params["strides"]):
        raise Unsupported("a slice with strides")
    for axis, start in enumerate(params["start_indices"]):
        x = g.slice(x, axis, start, out.shape[axis])
    return g.value(x)


def _split(g: Graph, params: dict, outs: list, x: Input) -> list[Value]:
    axis, starts = params["axis"], np.cumsum([0, *params["sizes"]])
    return [g.slice(x, axis, int(s), o.shape[axis]) for s, o in zip(starts[:-1], outs, strict=True)]


def _pad(g: Graph, params: dict, out: Any, x: Input, fill: Input) -> Value:
    low, high, inner = zip(*params["padding_config"], strict=True)
    if any(inner) or min(low + high) < 0:
        raise Unsupported("padding between elements, or of a negative length")
    return g.op("Pad", g.whole(x), np.array(low + high, np.int64), fill, shape=out.shape, dtype=out.dtype)


def _reverse(g: Graph, params: dict, out: Any, x: Input) -> Value:
    axes = np.array(params["dimensions"], np.int64)
    last = np.full(len(axes), -1, np.int64)
    ends = np.full(len(axes), np.iinfo(np.int64).min, np.int64)
    return g.op("Slice", g.whole(x), last, ends, axes, last, shape=out.shape, dtype=out.dtype)


# ---- sums, products and order ---------------------------------------------------------------------------


def _reduce(op: str) -> Rule:
    def rule(g: Graph, params: dict, out: Any, x: Input) -> Value:
        x, axes = g.whole(x), np.array(params["axes"], np.int64)
        if out.dtype != bool:
            return g.op(op, x, axes, shape=out.shape, dtype=out.dtype, keepdims=0)
        return g.cast(g.op(op, g.cast(x, np.int32), axes, shape=out.shape, dtype=np.int32, keepdims=0), bool)

    return rule


def _arg(op: str) -> Rule:
    def rule(g: Graph, params: dict, out: Any, x: Input) -> Value:
        (axis,) = params["axes"]
        return g.cast(g.op(op, g.whole(x), shape=out.shape, dtype=np.int64, axis=axis, keepdims=0), out.dtype)

    return rule


def _cumulative(g: Graph, params: dict, out: Any, x: Input) -> Value:
    axis = np.array(params["axis"], np.int64)
    return g.op("CumSum", g.whole(x), axis, shape=out.shape, dtype=out.dtype, reverse=int(params["reverse"]))


def _dot(g: Graph, params: dict, out: Any, x: Input, y: Input) -> Value:
    (cx, cy), (bx, by) = params["dimension_numbers"]
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    left = [next(letters) for _ in x.shape]
    right = [next(letters) for _ in y.shape]
    for i, j in zip((*bx, *cx), (*by, *cy), strict=True):
        right[j] = left[i]
    result = [left[i] for i in bx]
    result += [c for i, c in enumerate(left) if i not in (*bx, *cx)]
    result += [c for i, c in enumerate(right) if i not in (*by, *cy)]
    equation = f"{''.join(left)},{''.join(right)}->{''.join(result)}"
    x, y = (g.cast(g.whole(a), out.dtype) for a in (x, y))
    return g.op("Einsum", x, y, shape=out.shape, dtype=out.dtype, equation=equation)


def _top(g: Graph, x: Input, count: Any, axis: int, largest: int, shape: tuple) -> tuple[Value, Value]:
    """(values, places int64). Of equal ones the first comes first."""
    x = g.whole(x)
    kept = x.dtype
    x = g.cast(x, np.float32) if kept == np.float32 else g.cast(x, np.int64)
    attributes = dict(axis=axis, largest=largest, sorted=1)
    values, places = g.made("TopK", [x, g.length(count)], 2, "", **attributes)
    return g.cast(Value(values, shape, x.dtype, shape), kept), Value(places, shape, np.dtype(np.int64), shape)


def _top_k(g: Graph, params: dict, outs: list, x: Input) -> list[Value]:
    values, places = _top(g, x, outs[0].shape[-1], len(x.shape) - 1, 1, outs[0].shape)
    return [values, g.cast(places, outs[1].dtype)]


def _sort(g: Graph, params: dict, outs: list, *xs: Input) -> list[Value]:
    if params["num_keys"] != 1:
        raise Unsupported("a sort by several keys")
    axis = params["dimension"]
    first, places = _top(g, xs[0], xs[0].shape[axis], axis, 0, outs[0].shape)
    rest = [
        g.op("GatherElements", g.whole(x), places, shape=o.shape, dtype=o.dtype, axis=axis)
        for x, o in zip(xs[1:], outs[1:], strict=True)
    ]
    return [first, *rest]


SEVERAL = {"split": _split, "sort": _sort, "top_k": _top_k}  # of several outputs
RULES: dict[str, Rule] = {
    **{
        name: plain(op)
        for name, op in dict(
            abs="Abs",
            ceil="Ceil",
            cos="Cos",
            eq="Equal",
            erf="Erf",
            exp="Exp",
            floor="Floor",
            ge="GreaterOrEqual",
            gt="Greater",
            is_finite="IsFinite",
            le="LessOrEqual",
            log="Log",
            logistic="Sigmoid",
            lt="Less",
            max="Max",
            min="Min",
            neg="Neg",
            round="Round",
            sign="Sign",
            sin="Sin",
            sqrt="Sqrt",
            tanh="Tanh",
        ).items()
    },
    **dict.fromkeys(("stop_gradient", "copy", "copy_p", "optimization_barrier"), _through),
    "add": _arithmetic("Add", 0),
    "sub": _arithmetic("Sub", 0),
    "mul": _arithmetic("Mul", 1),
    "div": _divide,
    "rem": _remainder,
    "and": _logical("And", "BitwiseAnd"),
    "or": _logical("Or", "BitwiseOr"),
    "xor": _logical("Xor", "BitwiseXor"),
    "not": _logical("Not", "BitwiseNot"),
    "ne": _unlike,
    "rsqrt": _rsqrt,
    "square": _square,
    "pow": _power,
    "integer_pow": _power,
    "log1p": _log1p,
    "expm1": _expm1,
    "erfc": _erfc,
    "clamp": _clamp,
    "select_n": _select,
    "convert_element_type": _convert,
    "dim_as_value": _dim,
    "iota": _iota,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "transpose": _transpose,
    "concatenate": _concatenate,
    "slice": _slice,
    "stack": _stack,
    "pad": _pad,
    "rev": _reverse,
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_prod": _reduce("ReduceProd"),
    "reduce_and": _reduce("ReduceMin"),
    "reduce_or": _reduce("ReduceMax"),
    "argmax": _arg("ArgMax"),
    "argmin": _arg("ArgMin"),
    "cumsum": _cumulative,
    "dot_general": _dot,
}
