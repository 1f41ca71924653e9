"""What the primitives of a jaxpr that multiply and that read and write by index are in MIL.

MIL says nothing of an index beyond an axis; JAX clamps it, fills or drops. Here every index is made valid first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxllm.export.mil_rules import dtype_of, out, shapes

SCATTERS = ("scatter", "scatter-add", "scatter_add")

# ---- products -------------------------------------------------------------------------------------------


def _dot_general(c, eqn, x, y):
    """A product of float16 is rounded to float16, as Core ML does it."""
    (cx, cy), (bx, by) = eqn.params["dimension_numbers"]
    (xs, ys), kind = shapes(eqn), out(eqn).dtype.name
    if not bx and tuple(cx) == (len(xs) - 1,) and tuple(cy) == (1,) and len(ys) == 2 and _known(y):
        found = c.mb.linear(x=c.full(x, xs), weight=y)
        return c.cast(found, kind)
    fx, fy = ([i for i in range(len(s)) if i not in (*b, *k)] for s, b, k in ((xs, bx, cx), (ys, by, cy)))
    batch = [xs[i] for i in bx]
    rows, columns = [xs[i] for i in fx], [ys[i] for i in fy]
    depth = math.prod(xs[i] for i in cx)
    a = _arranged(c, x, xs, [*bx, *fx, *cx], [*batch, math.prod(rows), depth])
    b = _arranged(c, y, ys, [*by, *fy, *cy], [*batch, math.prod(columns), depth])
    found = c.mb.matmul(x=a, y=b, transpose_y=True)
    return c.cast(c.reshape(found, [*batch, *rows, *columns]), kind)


def _known(y) -> bool:
    return isinstance(y, np.ndarray) or (y.op is not None and y.op.op_type.startswith("const"))


def _arranged(c, x, shape: Sequence[int], order: list[int], to: list[int]) -> Any:
    if isinstance(x, np.ndarray):
        return c.var(x.transpose(order).reshape(to))
    x = c.full(x, shape)
    x = x if order == sorted(order) else c.mb.transpose(x=x, perm=order)
    return c.reshape(x, to)


# ---- reading by index -----------------------------------------------------------------------------------


def _gather(c, eqn, x, indices):
    """Indexed axes first and flattened into one, then rows of that."""
    p, d = eqn.params, eqn.params["dimension_numbers"]
    (shape, at), sizes = shapes(eqn), list(p["slice_sizes"])
    pairs = dict(zip(d.start_indices_batching_dims, d.operand_batching_dims, strict=True))
    places = _columns(c, indices, at)
    lead = at[:-1]
    whole = [i for i in range(len(shape)) if i not in d.start_index_map and i not in d.operand_batching_dims]
    indexed = [i for i in range(len(shape)) if i not in whole]
    windows = [i for i in indexed if sizes[i] > 1 or (i not in d.collapsed_slice_dims and i not in pairs.values())]
    place = {axis: places[k] for k, axis in enumerate(d.start_index_map)}
    place |= {axis: _counting(lead, k) for k, axis in pairs.items()}
    valid = None
    if "FILL" in str(p["mode"]):
        valid = _within(c, [(place[a], shape[a] - sizes[a]) for a in d.start_index_map])
    place = {a: _clamped(c, v, shape[a] - sizes[a]) for a, v in place.items()}
    linear = _linear(c, place, indexed, windows, shape, sizes, lead)
    count = math.prod(shape[i] for i in indexed)
    rows = _arranged(c, x, shape, [*indexed, *whole], [count, *(shape[i] for i in whole)])
    found = c.mb.gather(x=rows, indices=c.reshape(c.full(linear, linear.shape), (-1,)), axis=0)
    found = c.reshape(found, [*lead, *(sizes[i] for i in windows), *(shape[i] for i in whole)])
    return _laid_out(c, eqn, found, [*windows, *whole], valid)


def _laid_out(c, eqn, found, kept, valid):
    """The result's axes where they belong, and what was beyond the operand filled.

    found [*lead, *the operand's axes `kept`]; valid: [*lead], or None where all is."""
    d, lead = eqn.params["dimension_numbers"], len(found.shape) - len(kept)
    axes, batch, inner = [], iter(range(lead)), iter(sorted(kept))
    for i in range(out(eqn).ndim):
        axes.append(lead + kept.index(next(inner)) if i in d.offset_dims else next(batch))
    if axes != sorted(axes):
        found = c.mb.transpose(x=found, perm=axes)
    if valid is None:
        return found
    fill = eqn.params["fill_value"]
    fill = np.nan if fill is None and out(eqn).dtype.kind == "f" else fill
    fill = np.iinfo(np.int32).min if fill is None else fill
    ones = [1] * out(eqn).ndim
    batch = iter(valid.shape)
    wide = [next(batch) if i not in d.offset_dims else 1 for i in range(len(ones))]
    return c.mb.select(cond=c.reshape(valid, wide), a=found, b=np.full(ones, fill, out(eqn).dtype))


def _columns(c, indices, shape) -> list[Any]:
    """Indices [..., n] as n of [...], those that are known as such."""
    n, lead = shape[-1], shape[:-1]
    if isinstance(indices, np.ndarray):
        return [indices[..., i] for i in range(n)]
    _, parts = c.columns.get(id(indices), (None, ()))
    if len(parts) == n:
        return [x[..., 0] if isinstance(x, np.ndarray) else c.reshape(x, x.shape[:-1]) for x in parts]
    indices = c.full(indices, shape)
    if n == 1:
        return [c.reshape(indices, lead)]
    parts = c.mb.split(x=indices, num_splits=n, axis=len(lead))
    return [c.reshape(x, lead) for x in parts]


def _counting(shape: Sequence[int], axis: int) -> np.ndarray:
    """[...]: the index along one axis."""
    wide = [1] * len(shape)
    wide[axis] = shape[axis]
    return np.broadcast_to(np.arange(shape[axis], dtype=np.int32).reshape(wide), shape)


def _within(c, bounded) -> Any:
    """Whether all indices are from 0 to their bounds; None where that is known."""
    found = None
    for x, most in bounded:
        if isinstance(x, np.ndarray):
            if (x >= 0).all() and (x <= most).all():
                continue
            x = c.var(x)
        low, high = c.mb.greater_equal(x=x, y=np.int32(0)), c.mb.less_equal(x=x, y=np.int32(most))
        both = c.mb.logical_and(x=low, y=high)
        found = both if found is None else c.mb.logical_and(x=found, y=both)
    return found


def _clamped(c, x, most: int):
    if isinstance(x, np.ndarray):
        return np.clip(x, 0, most)
    return c.mb.minimum(x=c.mb.maximum(x=x, y=np.int32(0)), y=np.int32(most))


def _linear(c, place, indexed, windows, shape, sizes, lead):
    """Numbers of rows [*lead, *windows] where the indexed axes are one."""
    total, stride = None, 1
    inner = [1] * len(windows)
    for axis in reversed(indexed):
        x = place.get(axis, np.zeros(lead, np.int32))
        x = _wider(c, x, inner)
        if axis in windows:
            steps = list(inner)
            steps[windows.index(axis)] = sizes[axis]
            x = _sum(c, x, np.arange(sizes[axis], dtype=np.int32).reshape([1] * len(lead) + steps))
        total = _sum(c, total, _times(c, x, stride))
        stride *= shape[axis]
    to = [*lead, *(sizes[i] for i in windows)]
    return np.broadcast_to(total, to) if isinstance(total, np.ndarray) else c.full(total, to)


def _wider(c, x, inner):
    wide = [*x.shape, *inner]
    return x.reshape(wide) if isinstance(x, np.ndarray) else c.reshape(x, wide)


def _sum(c, x, y):
    if x is None:
        return y
    if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
        return (x + y).astype(np.int32)
    return c.mb.add(x=c.thin(x), y=c.thin(y))


def _times(c, x, n: int):
    if n == 1:
        return x
    return (x * np.int32(n)).astype(np.int32) if isinstance(x, np.ndarray) else c.mb.mul(x=x, y=np.int32(n))


def _dynamic_slice(c, eqn, x, *begin):
    (shape, *_), sizes = shapes(eqn), eqn.params["slice_sizes"]
    begin = _beginning(c, begin, [n - m for n, m in zip(shape, sizes, strict=True)])
    return c.mb.slice_by_size(x=c.full(x, shape), begin=begin, size=list(sizes))


def _beginning(c, begin, most: Sequence[int]) -> Any:
    """Indices as one array, clamped to what there is."""
    parts = [_clamped(c, x, n) for x, n in zip(begin, most, strict=True)]
    parts = [np.full(1, x, np.int32) if isinstance(x, np.ndarray) else c.reshape(x, (1,)) for x in parts]
    return c.mb.concat(values=parts, axis=0) if len(parts) > 1 else c.var(parts[0])


# ---- writing by index -----------------------------------------------------------------------------------


def _dynamic_update_slice(c, eqn, x, update, *begin):
    shape, part, *_ = shapes(eqn)
    begin = _beginning(c, begin, [n - m for n, m in zip(shape, part, strict=True)])
    end = c.mb.add(x=begin, y=np.asarray(part, np.int32))
    return c.mb.slice_update(x=c.full(x, shape), update=c.full(update, part), begin=begin, end=end)


def _scatter(mode: str):
    def rule(c, eqn, x, indices, updates):
        """Rows of the operand with indexed axes flattened; what is dropped goes to one more row, cut off again."""
        d = eqn.params["dimension_numbers"]
        shape, at, given = shapes(eqn)
        lead = at[:-1]
        indexed = sorted([*d.operand_batching_dims, *d.scatter_dims_to_operand_dims])
        whole = [i for i in range(len(shape)) if i not in indexed]
        places = _columns(c, indices, at)
        place = {axis: places[k] for k, axis in enumerate(d.scatter_dims_to_operand_dims)}
        pairs = zip(d.scatter_indices_batching_dims, d.operand_batching_dims, strict=True)
        place |= {axis: _counting(lead, k) for k, axis in pairs}
        if mode == "update" and (lying := _one_each(place, indexed, shape, lead)):
            return _chosen(c, x, updates, place, lying, d.update_window_dims, shape, given)
        valid = _within(c, [(place[a], shape[a] - 1) for a in indexed])
        linear = _linear(c, place, indexed, [], shape, [1] * len(shape), lead)
        inner = [shape[i] for i in whole]
        count = math.prod(shape[i] for i in indexed)
        rows = _arranged(c, x, shape, [*indexed, *whole], [count, *inner])
        batch = [i for i in range(len(given)) if i not in d.update_window_dims]
        new = _arranged(c, updates, given, [*batch, *d.update_window_dims], [math.prod(lead), *inner])
        rows = _written(c, rows, linear, valid, new, count, inner, mode)
        rows = c.reshape(rows, [*(shape[i] for i in indexed), *inner])
        back = list(np.argsort([*indexed, *whole]))
        return rows if back == sorted(back) else c.mb.transpose(x=rows, perm=[int(i) for i in back])

    return rule


def _limited_scatter(eqn: Any) -> str | None:
    d = eqn.params["dimension_numbers"]
    if sorted(d.scatter_dims_to_operand_dims) != sorted(d.inserted_window_dims):
        return "of windows at indices"
    return "at clamped indices" if "CLIP" in str(eqn.params["mode"]) else None


def _one_each(place, indexed, shape, lead) -> tuple[int, dict[int, int]] | None:
    """(axis, indexed axis -> axis of the indices) where each line of the operand along an axis gets one update."""
    moving = [a for a in indexed if not isinstance(place[a], np.ndarray)]
    counted = {}
    for a in indexed:
        same = lambda j, a=a: lead[j] == shape[a] and np.array_equal(place[a], _counting(lead, j))
        found = [j for j in range(len(lead)) if a not in moving and j not in counted.values() and same(j)]
        counted |= {a: found[0]} if found else {}
    over = [n for j, n in enumerate(lead) if j not in counted.values() and n > 1]
    first = indexed == list(range(len(indexed))) and len(counted) == len(indexed) - 1
    return (moving[0], counted) if len(moving) == 1 and first and not over else None


def _chosen(c, x, updates, place, lying, window_dims, shape, given) -> Any:
    """The operand, or the update where the index is: no engine of a phone copies for that, and none is beyond."""
    axis, counted = lying
    lead = [i for i in range(len(given)) if i not in window_dims]
    rest = [j for j in range(len(lead)) if j not in counted.values()]
    order = [counted[a] for a in sorted(counted)]
    ones = [shape[a] if a in counted else 1 for a in range(len(shape))]
    at = _arranged(c, place[axis], [given[i] for i in lead], [*order, *rest], ones)
    hit = c.mb.equal(x=at, y=_counting([n if a == axis else 1 for a, n in enumerate(shape)], axis))
    wide = [1 if a == axis else n for a, n in enumerate(shape)]
    new = _arranged(c, updates, given, [*(lead[j] for j in (*order, *rest)), *window_dims], wide)
    return c.mb.select(cond=hit, a=new, b=c.full(x, shape))


def _written(c, rows, linear, valid, new, count: int, inner: list[int], mode: str) -> Any:
    linear = c.var(linear)
    if valid is None:
        return c.mb.scatter(data=rows, indices=c.reshape(linear, (-1,)), updates=new, axis=0, mode=mode)
    last = np.full([1] * len(linear.shape), count, np.int32)
    linear = c.mb.select(cond=c.full(valid, linear.shape), a=linear, b=last)
    spare = c.mb.fill(shape=[1, *inner], value=np.dtype(dtype_of(rows)).type(0))
    rows = c.mb.concat(values=[rows, spare], axis=0)
    rows = c.mb.scatter(data=rows, indices=c.reshape(linear, (-1,)), updates=new, axis=0, mode=mode)
    return c.mb.slice_by_index(x=rows, begin=[0] * (1 + len(inner)), end=[count, *inner])


LIMITS = dict.fromkeys(SCATTERS, _limited_scatter)
RULES = {
    "dot_general": _dot_general,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "scatter": _scatter("update"),
    "scatter-add": _scatter("add"),
    "scatter_add": _scatter("add"),
}
