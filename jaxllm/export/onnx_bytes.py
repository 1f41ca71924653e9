"""Products of bytes, for WebAssembly, where products with 4-bit codes are slow: packed weights as int8 rows.

Weights are rounded once more, to 127 steps of a row's largest magnitude, and activations to 127 steps of a token's
(arXiv 2208.07339, section 2), so that a token does not depend on those beside it. Sums are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.export.onnx_graph import Graph, Value

F32 = np.dtype(np.float32)
MOST = 127
ZERO = 128  # an unsigned byte that stands for zero: the runtime's kernels want activations so


@dataclass(frozen=True)
class Rows:
    """A weight [.., N, K] as bytes: int8 [.., K, N], which the operator wants turned, times f32 [.., N]."""

    codes: Value
    scales: Value


def rows(g: Graph, name: str, shape: tuple[int, ...], fetch: Callable[[], np.ndarray]) -> Rows:
    """The bytes of a weight whose values f32 [.., N, K] are fetched when they are written."""
    *before, N, K = shape
    codes = g.tensor(f"{name}.bytes", (*before, K, N), np.int8, lambda: rounded(fetch())[0])
    scales = g.tensor(f"{name}.byte_scales", (*before, N), F32, lambda: rounded(fetch())[1])
    return Rows(codes, scales)


def rounded(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """w f32 [.., N, K] -> (int8 [.., K, N], f32 [.., N])."""
    scale = np.abs(w).max(-1) / np.float32(MOST)
    codes = np.rint(w / np.where(scale > 0, scale, 1)[..., None]).astype(np.int8)
    return np.ascontiguousarray(codes.swapaxes(-1, -2)), scale


def product(g: Graph, shape: tuple, x: Value, w: Rows) -> Value:
    """x f32 [..., K] times a weight's rows -> f32 [..., N]."""
    x, column = g.whole(x), (*x.shape[:-1], 1)
    number = lambda op, *xs, shape: g.elementwise(op, *xs, dtype=F32, shape=shape)
    last = np.array([len(x.shape) - 1], np.int64)
    most = g.op("ReduceMax", number("Abs", x, shape=x.shape), last, shape=column, dtype=F32, keepdims=1)
    # A token of zeros has no scale; any will do.
    most = number("Max", most, np.asarray(1e-30, F32), shape=column)
    step = number("Div", most, np.asarray(MOST, F32), shape=column)
    near = number("Round", number("Div", x, step, shape=x.shape), shape=x.shape)
    near = g.cast(number("Add", near, np.asarray(ZERO, F32), shape=x.shape), np.uint8)
    zero = np.asarray(ZERO, np.uint8)
    sums = g.op("MatMulInteger", near, w.codes, zero, shape=shape, dtype=np.int32)
    return number("Mul", number("Mul", g.cast(sums, F32), step, shape=shape), w.scales, shape=shape)


def lookup(g: Graph, out: Any, w: Rows, tokens: Value) -> Value:
    """The rows of tokens i32 [B, T] -> f32 [B, T, K]."""
    K = w.codes.shape[0]
    found = g.op("Gather", w.codes, tokens, shape=(K, *tokens.shape), dtype=np.int8, axis=1)
    x = g.cast(g.transpose(found, (1, 2, 0)), F32)
    scale = g.op("Gather", w.scales, tokens, shape=tokens.shape, dtype=F32, axis=0)
    return g.elementwise("Mul", x, g.reshape(scale, (*tokens.shape, 1)), dtype=F32, shape=(*tokens.shape, K))


def of_expert(g: Graph, w: Rows, owner: Value) -> Rows:
    """The bytes of one expert i32 [] of a weight [E, N, K]."""
    pick = lambda a: g.op("Gather", a, owner, shape=a.shape[1:], dtype=a.dtype, axis=0)
    return Rows(pick(w.codes), pick(w.scales))
