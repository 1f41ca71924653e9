"""MIL's operators in numpy, as coremltools documents them (coremltools.converters.mil.mil.ops.defs, to iOS 18).

What is documented as undefined, an index beyond an axis, is an error. Sums and products of float16 are added in
float32 and rounded once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxllm.errors import CheckpointError

Inputs = Mapping[str, Any]


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32) if x.dtype == np.float16 else x


def _of(f: Callable) -> Callable:
    """A function of x, by way of float32."""
    return lambda i: f(_wide(i["x"])).astype(i["x"].dtype)


def _with(f: Callable) -> Callable:
    """A function of x and y, in their dtype."""

    def run(i: Inputs) -> np.ndarray:
        x, y = i["x"], i["y"]
        if x.dtype != y.dtype:
            raise CheckpointError(f"an operator takes {x.dtype} and {y.dtype} together; export it again")
        return f(_wide(x), _wide(y)).astype(x.dtype)

    return run


def _compared(f: Callable) -> Callable:
    return lambda i: f(i["x"], i["y"])


def _epsilon(f: Callable) -> Callable:
    return lambda i: f(_wide(i["x"]) + np.float32(i["epsilon"])).astype(i["x"].dtype)


def _erf(x: np.ndarray) -> np.ndarray:
    from scipy.special import erf

    return erf(x)


# ---- constants ------------------------------------------------------------------------------------------


def _blockwise(i: Inputs) -> np.ndarray:
    """scale * (data - offset), a scale for each block of equal size."""
    data, scale, offset = i["data"], i["scale"], i.get("offset")
    kind = scale.dtype
    shape = [n for a, b in zip(data.shape, scale.shape, strict=True) for n in (b, a // b)]
    one = [n for b in scale.shape for n in (b, 1)]
    x = data.astype(np.float32).reshape(shape)
    if offset is not None:
        x = x - offset.astype(np.float32).reshape(one)
    return (x * scale.astype(np.float32).reshape(one)).astype(kind).reshape(data.shape)


# ---- axes -----------------------------------------------------------------------------------------------


def _span(i: Inputs, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """What begin, end, stride and their masks of slice_by_index and slice_update say."""
    n = len(shape)
    off = np.zeros(n, bool)
    begin, end = np.asarray(i["begin"]), np.asarray(i["end"])
    stride = np.asarray(i.get("stride", np.ones(n, int)))
    masks = [np.asarray(i.get(key, off)) for key in ("begin_mask", "end_mask", "squeeze_mask")]
    if masks[2].any() or (stride < 1).any():
        raise CheckpointError("the package slices in a way that is not known here")
    begin, end = np.where(masks[0], 0, begin), np.where(masks[1], shape, end)
    if (begin < 0).any() or (end > shape).any() or (end < begin).any():
        raise CheckpointError(f"the package slices from {begin} to {end} of an array {shape}")
    return tuple(slice(int(a), int(b), int(s)) for a, b, s in zip(begin, end, stride, strict=True))


def _slice_update(i: Inputs) -> np.ndarray:
    x = i["x"].copy()
    x[_span(i, x.shape)] = i["update"]
    return x


def _slice_by_size(i: Inputs) -> np.ndarray:
    return i["x"][_span({"begin": i["begin"], "end": np.add(i["begin"], i["size"])}, i["x"].shape)]


def _split(i: Inputs) -> list[np.ndarray]:
    sizes = i.get("split_sizes")
    at = int(i["num_splits"]) if sizes is None else np.cumsum(sizes)[:-1]
    return np.split(i["x"], at, int(i["axis"]))


def _pad(i: Inputs) -> np.ndarray:
    if i["mode"] != "constant":
        raise CheckpointError(f"the package pads by {i['mode']}, which is not known here")
    widths = np.asarray(i["pad"]).reshape(-1, 2)
    lead = np.zeros((i["x"].ndim - len(widths), 2), int)
    return np.pad(i["x"], np.concatenate([lead, widths]), constant_values=i["constant_val"])


def _concat(i: Inputs) -> np.ndarray:
    values = i["values"] if isinstance(i["values"], list) else [i["values"]]
    return np.concatenate(values, int(i["axis"]))


def _transpose(i: Inputs) -> np.ndarray:
    return i["x"].transpose([int(n) for n in i["perm"]])


# ---- products and sums ----------------------------------------------------------------------------------


def _linear(i: Inputs) -> np.ndarray:
    y = _wide(i["x"]) @ _wide(i["weight"]).T
    return (y if i.get("bias") is None else y + _wide(i["bias"])).astype(i["x"].dtype)


def _matmul(i: Inputs) -> np.ndarray:
    x, y = (
        _wide(i[n]).swapaxes(-1, -2) if np.any(i.get(f"transpose_{n}", False)) else _wide(i[n]) for n in ("x", "y")
    )
    return (x @ y).astype(i["x"].dtype)


def _reduced(f: Callable) -> Callable:
    def run(i: Inputs) -> np.ndarray:
        axes = tuple(int(a) for a in i["axes"])
        found = f(_wide(i["x"]), axis=axes, keepdims=bool(i["keep_dims"]))
        return np.asarray(found).astype(i["x"].dtype)

    return run


def _argmax(i: Inputs) -> np.ndarray:
    return np.argmax(i["x"], int(i["axis"]), keepdims=bool(i["keep_dims"])).astype(np.int32)


def _cumsum(i: Inputs) -> np.ndarray:
    axis, x = int(i["axis"]), i["x"]
    if i["exclusive"]:
        raise CheckpointError("the package sums without the last one, which is not known here")
    if i["reverse"]:
        return np.flip(np.cumsum(np.flip(x, axis), axis, dtype=x.dtype), axis)
    return np.cumsum(x, axis, dtype=x.dtype)


def _topk(i: Inputs) -> list[np.ndarray]:
    axis, x = int(i["axis"]), i["x"]
    order = np.argsort(x if i["ascending"] else -x, axis, kind="stable")
    order = np.take(order, np.arange(int(i["k"])), axis)
    return [np.take_along_axis(x, order, axis), order.astype(np.int32)]


def _argsort(i: Inputs) -> np.ndarray:
    x = i["x"] if i["ascending"] else -i["x"]
    return np.argsort(x, int(i["axis"]), kind="stable").astype(np.int32)


# ---- by index -------------------------------------------------------------------------------------------


def _checked(indices: np.ndarray, size: int) -> np.ndarray:
    if indices.size and (indices.min() < 0 or indices.max() >= size):
        raise CheckpointError(f"the package reads or writes at {indices.min()} to {indices.max()} of {size}")
    return indices


def _gather(i: Inputs) -> np.ndarray:
    if int(i.get("batch_dims", 0)):
        raise CheckpointError("the package gathers in batches, which is not known here")
    axis = int(i["axis"])
    return np.take(i["x"], _checked(np.asarray(i["indices"]), i["x"].shape[axis]), axis)


def _scatter(i: Inputs) -> np.ndarray:
    x, axis = i["data"].copy(), int(i["axis"])
    at = (slice(None),) * axis + (_checked(i["indices"], x.shape[axis]),)
    if i["mode"] == "update":
        x[at] = i["updates"]
    elif i["mode"] == "add":
        np.add.at(x, at, i["updates"])
    else:
        raise CheckpointError(f"the package scatters by {i['mode']}, which is not known here")
    return x


DTYPES = {"fp32": np.float32, "fp16": np.float16, "int32": np.int32, "bool": np.bool_}
OPERATORS: dict[str, Callable[[Inputs], Any]] = {
    "const": lambda i: i["val"],
    "constexpr_blockwise_shift_scale": _blockwise,
    "identity": lambda i: i["x"],
    "add": _with(operator.add),
    "sub": _with(operator.sub),
    "mul": _with(operator.mul),
    "real_div": _with(np.true_divide),
    "floor_div": _with(np.floor_divide),
    "mod": _with(np.mod),
    "pow": _with(np.power),
    "maximum": _with(np.maximum),
    "minimum": _with(np.minimum),
    "equal": _compared(np.equal),
    "not_equal": _compared(np.not_equal),
    "less": _compared(np.less),
    "less_equal": _compared(np.less_equal),
    "greater": _compared(np.greater),
    "greater_equal": _compared(np.greater_equal),
    "logical_and": _compared(np.logical_and),
    "logical_or": _compared(np.logical_or),
    "logical_not": lambda i: np.logical_not(i["x"]),
    "abs": _of(np.abs),
    "sign": _of(np.sign),
    "floor": _of(np.floor),
    "ceil": _of(np.ceil),
    "exp": _of(np.exp),
    "exp2": _of(np.exp2),
    "log": _epsilon(np.log),
    "sin": _of(np.sin),
    "cos": _of(np.cos),
    "tanh": _of(np.tanh),
    "erf": _of(_erf),
    "sigmoid": _of(lambda x: 1 / (1 + np.exp(-x))),
    "silu": _of(lambda x: x / (1 + np.exp(-x))),
    "sqrt": _of(np.sqrt),
    "rsqrt": _epsilon(lambda x: 1 / np.sqrt(x)),
    "square": _of(np.square),
    "select": lambda i: np.where(i["cond"], i["a"], i["b"]),
    "cast": lambda i: np.asarray(i["x"]).astype(DTYPES[i["dtype"]]),
    "tile": lambda i: np.tile(i["x"], [int(n) for n in i["reps"]]),
    "fill": lambda i: np.full([int(n) for n in i["shape"]], i["value"]),
    "reshape": lambda i: i["x"].reshape([int(n) for n in i["shape"]]),
    "expand_dims": lambda i: np.expand_dims(i["x"], tuple(int(a) for a in i["axes"])),
    "squeeze": lambda i: np.squeeze(i["x"], tuple(int(a) for a in i["axes"])),
    "transpose": _transpose,
    "concat": _concat,
    "split": _split,
    "slice_by_index": lambda i: i["x"][_span(i, i["x"].shape)],
    "slice_by_size": _slice_by_size,
    "slice_update": _slice_update,
    "pad": _pad,
    "linear": _linear,
    "matmul": _matmul,
    "reduce_sum": _reduced(np.sum),
    "reduce_max": _reduced(np.max),
    "reduce_min": _reduced(np.min),
    "reduce_argmax": _argmax,
    "cumsum": _cumsum,
    "topk": _topk,
    "argsort": _argsort,
    "gather": _gather,
    "scatter": _scatter,
}
