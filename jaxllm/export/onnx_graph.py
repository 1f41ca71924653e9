"""An ONNX graph while it is written: values, nodes, and tensors that lie in files beside it.

A value knows two shapes: the one the traced program gives it, whose axes may be symbolic (tokens of a call), and
the one it has when it runs, where an axis that nobody has broadcast yet is still 1. Equal nodes are made once.
What no output needs is left out when the graph is written, and only then are tensors fetched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

Axes = tuple[Any, ...]  # ints, and sums of multiples of one symbol
MICROSOFT = "com.microsoft"
TYPES = {  # numbers of onnx.TensorProto's types; browsers' builds have no bfloat16
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "uint32": 12,
}


class Unsupported(Exception):
    """A part of a program that ONNX has no operator for, as words that follow "it has"."""


@dataclass(frozen=True)
class Value:
    """One array of the graph."""

    name: str
    shape: Axes  # of the traced program
    dtype: np.dtype
    actual: Axes  # when it runs: `shape`, or 1 along an axis that is still to be broadcast


@dataclass(frozen=True)
class Node:
    """One operator."""

    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Tensor:
    """A constant whose numbers are fetched when they are written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[], np.ndarray]


def linear(axis: Any) -> tuple[int, int]:
    """(a, b) of an axis a * t + b. Raises Unsupported for a symbolic axis of another form."""
    if isinstance(axis, int | np.integer):
        return 0, int(axis)
    found = re.fullmatch(r"(?:(\d+)\*)?[a-z]\w*(?: ([+-]) (\d+))?", str(axis))
    if found is None:
        raise Unsupported(f"an axis of length {axis}")
    times, sign, more = found.groups()
    return int(times or 1), int(f"{sign or ''}{more or 0}")


def static(shape: Axes) -> bool:
    """Whether every axis has a known length."""
    return all(isinstance(axis, int | np.integer) for axis in shape)


def same(a: Any, b: Any) -> bool:
    """Whether two axes have one length."""
    return linear(a) == linear(b)


def broadcast(*shapes: Axes) -> Axes:
    """The shape that arrays of these shapes have together."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(next((a for a in axes if not same(a, 1)), 1) for axes in zip(*padded, strict=True))


class Graph:
    """Nodes in the order in which they can run. A graph inside of another has that one as `outer`.

    bytes: packed weights are to be rows of bytes (`onnx_bytes.py`)."""

    def __init__(self, outer: Graph | None = None, *, bytes: bool = False):
        self.outer = outer
        self.bytes = bytes if outer is None else outer.bytes
        self.nodes: list[Node] = []
        self.tensors: dict[str, Tensor] = {} if outer is None else outer.tensors
        self.inputs: list[Value] = []
        self.outputs: list[tuple[str, Value]] = []
        self._made: dict[Any, tuple[str, ...]] = {}
        self._constants: dict[Any, Value] = {} if outer is None else outer._constants
        self._names: list[int] = [0] if outer is None else outer._names

    def name(self, stem: str) -> str:
        """One that nothing else has."""
        self._names[0] += 1
        return f"{stem}_{self._names[0]}"

    def input(self, name: str, shape: Axes, dtype: Any) -> Value:
        """Declare an input."""
        value = Value(name, tuple(shape), np.dtype(dtype), tuple(shape))
        self.inputs.append(value)
        return value

    def constant(self, x: Any, dtype: Any = None) -> Value:
        """A small constant of the graph."""
        x = np.asarray(x, dtype)
        key = (x.dtype.name, x.shape, x.tobytes())
        if key not in self._constants:
            name = self.name("constant")
            self.tensors[name] = Tensor(name, x.shape, x.dtype, lambda: x)
            self._constants[key] = Value(name, x.shape, x.dtype, x.shape)
        return self._constants[key]

    def tensor(self, name: str, shape: tuple[int, ...], dtype: Any, fetch: Callable[[], np.ndarray]) -> Value:
        """A constant that is fetched when it is written; one for each name."""
        tensor = Tensor(name, tuple(shape), np.dtype(dtype), fetch)
        self.tensors.setdefault(name, tensor)
        return Value(name, tensor.shape, tensor.dtype, tensor.shape)

    def value(self, x: Value | np.ndarray) -> Value:
        """x, as a constant where it is an array."""
        return x if isinstance(x, Value) else self.constant(x)

    def made(
        self, op: str, inputs: Iterable[Value | np.ndarray | None], count: int, domain: str, **attributes: Any
    ) -> tuple[str, ...]:
        """The names of a node's outputs; those of an equal node where there is one."""
        inputs = list(inputs)
        while inputs and inputs[-1] is None:  # the runtime's optimizer breaks down at a last input without a name
            inputs.pop()
        names = tuple("" if x is None else self.value(x).name for x in inputs)
        stated = tuple(sorted((k, v) for k, v in attributes.items() if v is not None))
        key = (op, domain, names, count, repr(stated))
        graph = self
        while graph is not None:
            if key in graph._made:
                return graph._made[key]
            graph = graph.outer
        outputs = tuple(self.name(op.lower()) for _ in range(count))
        self.nodes.append(Node(op, domain, names, outputs, stated))
        self._made[key] = outputs
        return outputs

    def op(
        self,
        op: str,
        *inputs: Value | np.ndarray | None,
        shape: Axes,
        dtype: Any,
        actual: Axes | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> Value:
        """A node of one output."""
        (name,) = self.made(op, inputs, 1, domain, **attributes)
        return Value(name, tuple(shape), np.dtype(dtype), tuple(shape if actual is None else actual))

    # ---- shapes -----------------------------------------------------------------------------------------

    def length(self, axis: Any) -> Value:
        """int64 [1]: how long an axis is."""
        a, b = linear(axis)
        if a == 0:
            return self.constant([b], np.int64)
        graph = self
        while graph.outer is not None:
            graph = graph.outer
        tokens = next(x for x in graph.inputs if not static(x.shape))
        at = next(i for i, axis in enumerate(tokens.shape) if not isinstance(axis, int))
        vector = dict(shape=(1,), dtype=np.int64)
        found = graph.op("Shape", tokens, **vector, start=at, end=at + 1)
        if a != 1:
            found = graph.op("Mul", found, np.array([a], np.int64), **vector)
        return found if b == 0 else graph.op("Add", found, np.array([b], np.int64), **vector)

    def lengths(self, shape: Axes) -> Value:
        """int64 [rank]: a shape as a value."""
        if static(shape):
            return self.constant([int(axis) for axis in shape], np.int64)
        parts = [self.length(axis) for axis in shape]
        return self.op("Concat", *parts, shape=(len(shape),), dtype=np.int64, axis=0)

    def whole(self, x: Value | np.ndarray) -> Value:
        """x with every axis broadcast."""
        x = self.value(x)
        if len(x.actual) == len(x.shape) and all(map(same, x.actual, x.shape)):
            return x
        # An axis of 1 leaves the other side's length alone.
        goal = tuple(1 if same(a, s) else s for a, s in zip(self._padded(x), x.shape, strict=True))
        return self.op("Expand", x, self.lengths(goal), shape=x.shape, dtype=x.dtype)

    @staticmethod
    def _padded(x: Value) -> Axes:
        return (1,) * (len(x.shape) - len(x.actual)) + x.actual

    def reshape(self, x: Value | np.ndarray, shape: Axes) -> Value:
        """x with the same numbers in another shape."""
        x = self.whole(x)
        if len(x.shape) == len(shape) and all(map(same, x.shape, shape)):
            return x
        unknown = [i for i, axis in enumerate(shape) if not isinstance(axis, int | np.integer)]
        if len(unknown) > 1:
            goal = self.lengths(shape)
        else:
            goal = self.constant([-1 if i in unknown else int(axis) for i, axis in enumerate(shape)], np.int64)
        return self.op("Reshape", x, goal, shape=shape, dtype=x.dtype)

    def transpose(self, x: Value | np.ndarray, order: Iterable[int]) -> Value:
        """x with its axes in another order."""
        x, order = self.value(x), tuple(int(i) for i in order)
        if order == tuple(range(len(order))):
            return x
        actual = self._padded(x)
        if len(x.actual) < len(x.shape):
            x = self.reshape(Value(x.name, x.actual, x.dtype, x.actual), actual)
        shape, actual = (tuple(s[i] for i in order) for s in (x.shape, actual))
        return self.op("Transpose", x, shape=shape, dtype=x.dtype, actual=actual, perm=order)

    def cast(self, x: Value | np.ndarray, dtype: Any) -> Value:
        """x as another type."""
        x, dtype = self.value(x), np.dtype(dtype)
        if x.dtype == dtype:
            return x
        if dtype.name not in TYPES:
            raise Unsupported(f"numbers of type {dtype.name}")
        return self.op("Cast", x, shape=x.shape, dtype=dtype, actual=x.actual, to=TYPES[dtype.name])

    def elementwise(self, op: str, *inputs: Value | np.ndarray, dtype: Any, shape: Axes | None = None) -> Value:
        """A node that broadcasts its inputs as numpy does; axes that all of them lack stay to be broadcast."""
        values = [self.value(x) for x in inputs]
        shape = broadcast(*(x.shape for x in values)) if shape is None else shape
        actual = broadcast(*(x.actual for x in values))
        return self.op(op, *values, shape=shape, dtype=dtype, actual=actual)

    def slice(self, x: Value | np.ndarray, axis: int, start: int, length: Any) -> Value:
        """`length` elements along an axis from `start` on."""
        x = self.value(x)
        if start == 0 and same(x.shape[axis], length):
            return x
        x = self.whole(x)
        first, (a, b) = np.array([start], np.int64), linear(length)
        end = np.array([start + b], np.int64) if a == 0 else self.length(length + start)
        shape = (*x.shape[:axis], length, *x.shape[axis + 1 :])
        return self.op("Slice", x, first, end, np.array([axis], np.int64), shape=shape, dtype=x.dtype)

    def concatenate(self, parts: list[Value | np.ndarray], axis: int, shape: Axes) -> Value:
        """Parts one after the other along an axis; empty ones are left out."""
        values = [self.whole(x) for x in parts if not same(x.shape[axis], 0)]
        if len(values) == 1:
            return values[0]
        return self.op("Concat", *values, shape=shape, dtype=values[0].dtype, axis=axis)

    # ---- the end ----------------------------------------------------------------------------------------

    def output(self, name: str, x: Value | np.ndarray) -> None:
        """Give a value as an output of that name."""
        self.outputs.append((name, self.whole(x)))

    def needed(self) -> tuple[list[Node], set[str]]:
        """(the nodes that outputs need, every name that is used)."""
        used, kept = {value.name for _, value in self.outputs}, []
        for node in reversed(self.nodes):
            if used.isdisjoint(node.outputs):
                continue
            kept.append(node)
            used.update(filter(None, node.inputs))
            for _, attribute in node.attributes:
                if isinstance(attribute, Graph):
                    used |= attribute.needed()[1]
        return kept[::-1], used


def numbers(x: np.ndarray) -> bytes:
    """As ONNX has them in a file: little-endian rows."""
    x = np.ascontiguousarray(x)
    return x.astype(x.dtype.newbyteorder("<")).tobytes() if x.dtype.byteorder == ">" else x.tobytes()
