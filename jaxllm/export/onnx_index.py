"""ONNX operators for JAX's indexed reads and writes, and for loops (jax.lax.gather, scatter, scan)."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxllm.export.onnx_graph import Graph, Unsupported, Value, linear, same

Input = Value | np.ndarray
Mode = jax.lax.GatherScatterMode


def gather(g: Graph, params: dict, out: Any, x: Input, index: Input) -> Value:
    """jax.lax.gather: windows of x [...] at index i32 [..., n]."""
    dn, sizes, x = params["dimension_numbers"], params["slice_sizes"], g.value(x)
    gone = {*dn.collapsed_slice_dims, *dn.operand_batching_dims}
    moved = [(j, axis) for j, axis in enumerate(dn.start_index_map) if not same(sizes[axis], x.shape[axis])]
    if isinstance(index, np.ndarray) and index.ndim == 1:
        for j, axis in moved:
            x = g.slice(x, int(axis), int(index[j]), sizes[axis])
        return g.reshape(x, out.shape)
    index, batch = g.whole(index), tuple(index.shape[:-1])
    starts = [_start(g, index, j) for j, _ in moved]
    for axis, along in zip(dn.operand_batching_dims, dn.start_indices_batching_dims, strict=True):
        if not same(x.shape[axis], 1):
            moved.append((-1, axis))
            starts.append(_counted(g, batch, along))
    rest = [i for i in range(len(out.shape)) if i not in dn.offset_dims]
    limits = [_limit(g, x.shape[axis], sizes[axis]) for _, axis in moved]
    inside = [g.elementwise("Max", s, np.zeros((), np.int64), dtype=np.int64) for s in starts]
    inside = [g.elementwise("Min", s, top, dtype=np.int64) for s, top in zip(inside, limits, strict=True)]
    found, axes = _windows(g, g.whole(x), inside, [(axis, sizes[axis]) for _, axis in moved], batch, gone)
    kept = iter(i for i in range(len(x.shape)) if i not in gone)
    wanted = [("batch", rest.index(i)) if i in rest else ("axis", next(kept)) for i in range(len(out.shape))]
    wanted = [key for key in wanted if key in axes]
    found = g.reshape(g.transpose(found, [axes.index(key) for key in wanted]), out.shape)
    if Mode.from_any(params["mode"]) != Mode.FILL_OR_DROP or not moved:
        return found
    return _filled(g, params, out, found, starts, inside, rest)


def _start(g: Graph, index: Value, j: int) -> Value:
    """int64 [...]: column j of an index [..., n]."""
    column = g.slice(index, len(index.shape) - 1, j, 1)
    return g.cast(g.reshape(column, index.shape[:-1]), np.int64)


def _counted(g: Graph, batch: tuple, along: int) -> Value:
    """int64 [...]: 0, 1, 2 ... along one of the axes."""
    zero, one, end = np.zeros((), np.int64), np.ones((), np.int64), g.reshape(g.length(batch[along]), ())
    line = g.op("Range", zero, end, one, shape=(batch[along],), dtype=np.int64)
    actual = tuple(length if i == along else 1 for i, length in enumerate(batch))
    line = g.reshape(line, actual)
    return g.whole(Value(line.name, batch, line.dtype, actual))


def _limit(g: Graph, length: Any, size: Any) -> Value:
    """int64 []: the last start of a window that fits."""
    if not isinstance(size, int | np.integer):
        raise Unsupported("an indexed read of windows of unknown length")
    return g.reshape(g.length(length - int(size)), ())


def _windows(g: Graph, x: Value, starts: list[Value], windows: list, batch: tuple, gone: set):
    """(x at the starts, what each of its axes is); axes of length 1 that `gone` has are dropped."""
    every = [("axis", i) for i in range(len(x.shape))]
    across = [("batch", j) for j in range(len(batch))]
    if not windows:
        left = [key for key in every if key[1] not in gone]
        return g.reshape(x, [x.shape[i] for _, i in left] + [1] * len(batch)), left + across
    if len(windows) == 1:
        (axis, size), place = windows[0], starts[0]
        kept = axis not in gone
        if kept:
            place = g.op("Unsqueeze", place, np.array([-1]), shape=(*batch, 1), dtype=np.int64)
            line = np.arange(size, dtype=np.int64)
            place = g.elementwise("Add", place, line, dtype=np.int64, shape=(*batch, size))
        shape = (*x.shape[:axis], *place.shape, *x.shape[axis + 1 :])
        found = g.op("Gather", x, g.whole(place), shape=shape, dtype=x.dtype, axis=axis)
        axes = [*every[:axis], *across, *([("axis", axis)] if kept else []), *every[axis + 1 :]]
    else:
        if any(size != 1 for _, size in windows):
            raise Unsupported("an indexed read of windows along several axes")
        first = [axis for axis, _ in windows]
        after = [i for i in range(len(x.shape)) if i not in first]
        parts = [g.op("Unsqueeze", g.whole(s), np.array([-1]), shape=(*batch, 1), dtype=np.int64) for s in starts]
        place = g.concatenate(parts, len(batch), (*batch, len(first)))
        shape = (*batch, *(x.shape[i] for i in after))
        found = g.op("GatherND", g.transpose(x, first + after), place, shape=shape, dtype=x.dtype)
        axes = across + [("axis", i) for i in after]
    left = [i for i, (kind, axis) in enumerate(axes) if not (kind == "axis" and axis in gone)]
    return g.reshape(found, [found.shape[i] for i in left]), [axes[i] for i in left]


def _filled(g: Graph, params: dict, out: Any, found: Value, starts, inside, rest: list[int]) -> Value:
    """NaN, or the smallest number, where a window does not fit."""
    fits = [g.elementwise("Equal", a, b, dtype=bool) for a, b in zip(starts, inside, strict=True)]
    good = fits[0]
    for more in fits[1:]:
        good = g.elementwise("And", good, more, dtype=bool)
    good = g.reshape(good, [out.shape[i] if i in rest else 1 for i in range(len(out.shape))])
    fill = params["fill_value"]
    if fill is None:
        fill = np.nan if np.issubdtype(out.dtype, np.floating) else np.iinfo(out.dtype).min
    return g.elementwise("Where", good, found, np.asarray(fill, out.dtype), dtype=out.dtype, shape=out.shape)


def scatter(reduction: str | None):
    """The rule of jax.lax.scatter and its kin: x [...] with updates at index i32 [..., n], of single elements
    along the indexed axes and of everything along the others."""

    def rule(g: Graph, params: dict, out: Any, x: Input, index: Input, updates: Input) -> Value:
        dn, x, index, updates = params["dimension_numbers"], g.whole(x), g.whole(index), g.whole(updates)
        first = [int(i) for i in dn.scatter_dims_to_operand_dims]
        if sorted(first) != sorted(dn.inserted_window_dims) or dn.operand_batching_dims:
            raise Unsupported("an indexed write of windows")
        after = [i for i in range(len(x.shape)) if i not in first]
        rest, count = [x.shape[i] for i in after], _product([x.shape[i] for i in first])
        place = _flat_place(g, index, [x.shape[i] for i in first], count)
        lines = g.reshape(g.transpose(x, first + after), [count, *rest])
        line = (1, *rest)  # what is dropped goes there
        drop = g.op("Expand", np.zeros((), x.dtype), g.lengths(line), shape=line, dtype=x.dtype)
        lines = g.concatenate([lines, drop], 0, (count + 1, *rest))
        batch = [i for i in range(len(updates.shape)) if i not in dn.update_window_dims]
        updates = g.transpose(updates, [*batch, *dn.update_window_dims])
        attributes = dict(shape=lines.shape, dtype=x.dtype, reduction=reduction)
        lines = g.slice(g.op("ScatterND", lines, place, updates, **attributes), 0, 0, count)
        lines = g.reshape(lines, [x.shape[i] for i in first + after])
        return g.transpose(lines, np.argsort(first + after))

    return rule


def _product(axes: list) -> Any:
    total = 1
    for axis in axes:
        total = axis if same(total, 1) else total if same(axis, 1) else total * axis
    linear(total)
    return total


def _flat_place(g: Graph, index: Value, lengths: list, count: Any) -> Value:
    """int64 [..., 1]: the row of an array with these axes joined; `count` where there is none."""
    shape, place, good = index.shape[:-1], None, None
    for j, length in enumerate(lengths):
        part = _start(g, index, j)
        end = g.reshape(g.length(length), ())
        fits = g.elementwise(
            "And",
            g.elementwise("GreaterOrEqual", part, np.zeros((), np.int64), dtype=bool),
            g.elementwise("Less", part, end, dtype=bool),
            dtype=bool,
        )
        good = fits if good is None else g.elementwise("And", good, fits, dtype=bool)
        if place is not None:
            place = g.elementwise("Mul", place, end, dtype=np.int64)
        place = part if place is None else g.elementwise("Add", place, part, dtype=np.int64)
    place = g.elementwise("Where", good, place, g.reshape(g.length(count), ()), dtype=np.int64)
    return g.op("Unsqueeze", g.whole(place), np.array([-1]), shape=(*shape, 1), dtype=np.int64)


def dynamic_slice(g: Graph, params: dict, out: Any, x: Input, *starts: Input) -> Value:
    """jax.lax.dynamic_slice: starts are moved so that the slice fits."""
    x, sizes = g.whole(x), params["slice_sizes"]
    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        if same(size, x.shape[axis]):
            continue
        inside = g.elementwise("Max", g.cast(start, np.int64), np.zeros((), np.int64), dtype=np.int64)
        inside = g.elementwise("Min", inside, _limit(g, x.shape[axis], size), dtype=np.int64)
        place = g.elementwise("Add", g.reshape(inside, (1,)), np.arange(size), dtype=np.int64, shape=(size,))
        shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
        x = g.op("Gather", x, place, shape=shape, dtype=x.dtype, axis=axis)
    return x


RULES = {
    "gather": gather,
    "scatter": scatter(None),
    "scatter-add": scatter("add"),
    "scatter_add": scatter("add"),
    "dynamic_slice": dynamic_slice,
}
