"""What the primitives of a jaxpr that go element by element or move axes are in MIL.

A rule takes the converter, the equation and the values of its arguments, at least one of which is a variable.
Source: coremltools' documentation of the operators (coremltools.converters.mil.mil.ops.defs).
"""

from __future__ import annotations

from typing import Any

import numpy as np

# numpy's names and MIL's, which has no unsigned numbers to count with: places in arrays are below 2**31
DTYPES = {"float32": "fp32", "float16": "fp16", "uint32": "int32", "int32": "int32", "bool": "bool"}
LEAST = 1e-45  # MIL's operators add an epsilon; this one changes no number that is not zero


def shapes(eqn: Any) -> list[tuple[int, ...]]:
    """Of an equation's arguments."""
    return [x.aval.shape for x in eqn.invars]


def out(eqn: Any) -> Any:
    """The abstract value of an equation's first result."""
    return eqn.outvars[0].aval


def dtype_of(x: Any) -> str:
    """The name that numpy has for the dtype of an array or of a variable of MIL."""
    if isinstance(x, np.ndarray | np.generic):
        return x.dtype.name
    from coremltools.converters.mil.mil import types

    return {short: name for name, short in DTYPES.items()}[types.builtin_to_string(x.dtype)]


# ---- element by element ---------------------------------------------------------------------------------


def _binary(name: str):
    def rule(c, eqn, x, y):
        return getattr(c.mb, name)(x=c.thin(x), y=c.thin(y))

    return rule


def _comparison(name: str):
    def rule(c, eqn, x, y):
        return getattr(c.mb, name)(x=_number(c, x), y=_number(c, y))

    return rule


def _number(c, x):
    """Booleans as integers: only those compare."""
    x = c.thin(x)
    if isinstance(x, np.ndarray):
        return x.astype(np.int32) if x.dtype == bool else x
    return c.number(x)


def _unary(name: str, **more):
    def rule(c, eqn, x):
        return getattr(c.mb, name)(x=x, **more)

    return rule


def _typed(x, value: float):
    """A number of x's dtype."""
    return np.dtype(dtype_of(x)).type(value)


def _div(c, eqn, x, y):
    if out(eqn).dtype.kind == "f":
        return c.mb.real_div(x=c.thin(x), y=c.thin(y))
    return _truncated(c, c.thin(x), c.thin(y), "floor_div")


def _rem(c, eqn, x, y):
    """Integers: what is left has the dividend's sign."""
    x, y = c.thin(x), c.thin(y)
    quotient = _truncated(c, x, y, "floor_div")
    return c.mb.sub(x=x, y=c.mb.mul(x=quotient, y=y))


def _total_order(c, eqn, x, y):
    """Less than, of integers the same as JAX's order in which NaN has a place."""
    return c.mb.less(x=c.thin(x), y=c.thin(y))


def _truncated(c, x, y, name):
    """MIL rounds a quotient down, JAX towards zero."""
    positive = getattr(c.mb, name)(x=_abs(c, x), y=_abs(c, y))
    return c.mb.mul(x=positive, y=c.mb.mul(x=_sign(c, x), y=_sign(c, y)))


def _abs(c, x):
    return np.abs(x) if isinstance(x, np.ndarray) else c.mb.abs(x=x)


def _sign(c, x):
    return np.sign(x) if isinstance(x, np.ndarray) else c.mb.sign(x=x)


def _logical(name: str):
    def rule(c, eqn, *args):
        return getattr(c.mb, f"logical_{name}")(**dict(zip("xy", map(c.thin, args), strict=False)))

    return rule


def _select(c, eqn, which, *cases):
    which, a, b = c.thin(which), *map(c.thin, cases)
    if out(eqn).dtype == bool:
        a, b = _number(c, a), _number(c, b)
    if eqn.invars[0].aval.ndim == 0 and out(eqn).ndim:
        which = c.reshape(c.var(which), (1,) * out(eqn).ndim)
    if isinstance(which, np.ndarray):
        which = c.var(which)
    if out(eqn).shape not in (tuple(a.shape), tuple(b.shape)):  # by one of them coremltools infers the shape
        a = c.full(c.reshape(a, (1,) * (out(eqn).ndim - len(a.shape)) + tuple(a.shape)), out(eqn).shape)
    chosen = c.mb.select(cond=which, a=b, b=a)
    return c.cast(chosen, out(eqn).dtype.name)


def _clamp(c, eqn, least, x, most):
    y = c.mb.maximum(x=c.thin(x), y=_wide(c, c.thin(least), eqn))
    return c.mb.minimum(x=y, y=_wide(c, c.thin(most), eqn))


def _wide(c, x, eqn):
    return np.reshape(x, (1,) * out(eqn).ndim) if isinstance(x, np.ndarray) and x.ndim == 0 else x


def _integer_pow(c, eqn, x):
    n, y = eqn.params["y"], x
    if n < 1:
        return c.mb.pow(x=x, y=_typed(x, n))
    for _ in range(n - 1):
        y = c.mb.mul(x=y, y=x)
    return y


def _log1p(c, eqn, x):
    """log(u) x / (u - 1) with u = 1 + x: as exact as the logarithm where x is small (Kahan)."""
    one = _typed(x, 1)
    u = c.mb.add(x=x, y=one)
    rest = c.mb.sub(x=u, y=one)
    lost = c.mb.equal(x=rest, y=_typed(x, 0))
    factor = c.mb.real_div(x=x, y=c.mb.select(cond=lost, a=one, b=rest))
    return c.mb.select(cond=lost, a=x, b=c.mb.mul(x=c.mb.log(x=u, epsilon=LEAST), y=factor))


def _convert(c, eqn, x):
    return c.cast(x, eqn.params["new_dtype"].name)


def _same(c, eqn, *xs):
    return list(xs)


# ---- axes -----------------------------------------------------------------------------------------------


def spread(x: np.ndarray, eqn: Any) -> np.ndarray:
    """broadcast_in_dim of a known array, without a copy."""
    places = eqn.params["broadcast_dimensions"]
    shape = [1] * out(eqn).ndim
    for axis, place in enumerate(places):
        shape[place] = x.shape[axis]
    return np.broadcast_to(x.reshape(shape), out(eqn).shape)


def _broadcast(c, eqn, x):
    shape = [1] * out(eqn).ndim
    for axis, place in enumerate(eqn.params["broadcast_dimensions"]):
        shape[place] = x.shape[axis]
    return c.reshape(x, shape)


def _reshape(c, eqn, x):
    return c.reshape(c.full(x, shapes(eqn)[0]), out(eqn).shape)


def _squeeze(c, eqn, x):
    gone = eqn.params["dimensions"]
    return c.reshape(x, [n for axis, n in enumerate(x.shape) if axis not in gone])


def _transpose(c, eqn, x):
    return c.mb.transpose(x=x, perm=list(eqn.params["permutation"]))


def _concatenate(c, eqn, *xs):
    axis, parts = eqn.params["dimension"], list(xs)
    full = [c.full(x, shape) for x, shape in zip(xs, shapes(eqn), strict=True)]
    kind = out(eqn).dtype.name
    joined = c.cast(c.mb.concat(values=[c.number(x) for x in full], axis=axis), kind)
    c.columns[id(joined)] = (joined, parts)
    return joined


def _split(c, eqn, x):
    x = c.full(x, shapes(eqn)[0])
    found = c.mb.split(x=x, split_sizes=list(eqn.params["sizes"]), axis=eqn.params["axis"])
    return list(found) if isinstance(found, list | tuple) else [found]


def _slice(c, eqn, x):
    p = eqn.params
    x = c.full(x, shapes(eqn)[0])
    strides = list(p["strides"] or [1] * len(x.shape))
    begin, end = list(p["start_indices"]), list(p["limit_indices"])
    return c.mb.slice_by_index(x=x, begin=begin, end=end, stride=strides)


def _pad(c, eqn, x, value):
    x = c.full(x, shapes(eqn)[0])
    for axis, (low, high, _) in enumerate(eqn.params["padding_config"]):
        shape = [int(n) for n in x.shape]
        sides = [
            _filled(c, value, [*shape[:axis], int(n), *shape[axis + 1 :]]) if n else None for n in (low, high)
        ]
        parts = [part for part in (sides[0], x, sides[1]) if part is not None]
        x = c.mb.concat(values=parts, axis=axis) if len(parts) > 1 else x
    return x


def _filled(c, value, shape):
    value = value if isinstance(value, np.ndarray) else c.mb.reshape(x=value, shape=[1] * len(shape))
    return c.full(value, shape)


# ---- along axes -----------------------------------------------------------------------------------------


def _reduction(name: str):
    def rule(c, eqn, x):
        x = c.full(x, shapes(eqn)[0])
        found = getattr(c.mb, name)(x=c.number(x), axes=list(eqn.params["axes"]), keep_dims=False)
        return c.cast(found, out(eqn).dtype.name)

    return rule


def _argmax(c, eqn, x):
    (axis,) = eqn.params["axes"]
    return c.mb.reduce_argmax(x=c.full(x, shapes(eqn)[0]), axis=axis, keep_dims=False)


def _cumsum(c, eqn, x):
    x = c.full(x, shapes(eqn)[0])
    return c.mb.cumsum(x=x, axis=eqn.params["axis"], exclusive=False, reverse=eqn.params["reverse"])


def _top_k(c, eqn, x):
    x = c.full(x, shapes(eqn)[0])
    values, indices = c.mb.topk(x=x, k=eqn.params["k"], axis=len(x.shape) - 1, ascending=False, sort=True)
    return [values, indices]


def _sort(c, eqn, key, *rest):
    """Few integers in order, and the others with them: key times length plus place is another for each."""
    (length,) = shapes(eqn)[0]
    place = np.arange(length, dtype=np.int32)
    key = c.full(key, (length,))
    unique = c.mb.add(x=c.mb.mul(x=key, y=np.int32(length)), y=place)
    order = c.mb.argsort(x=unique, axis=0, ascending=True)
    moved = lambda x: c.mb.gather(x=c.full(x, (length,)), indices=order, axis=0)
    return [moved(key), *(order if _is(x, place) else moved(x) for x in rest)]


def _is(x, place: np.ndarray) -> bool:
    return isinstance(x, np.ndarray) and bool((x == place).all())


# ---- what the rules cannot do ---------------------------------------------------------------------------


def _kind(eqn: Any) -> str:
    """numpy's letter for the first argument's dtype."""
    return eqn.invars[0].aval.dtype.kind


def _limited_sort(eqn: Any) -> str | None:
    fits = eqn.params["num_keys"] == 1 and len(shapes(eqn)[0]) == 1 and _kind(eqn) == "i"
    return None if fits else "by several keys, along rows, or of numbers that are no integers"


def _limited_pad(eqn: Any) -> str | None:
    fits = all(low >= 0 and high >= 0 and not within for low, high, within in eqn.params["padding_config"])
    return None if fits else "between elements or by less than nothing"


def _only(kinds: str, reason: str):
    return lambda eqn: None if _kind(eqn) in kinds else reason


# Primitive -> why an equation of it has no rule, or None
LIMITS = {
    "sort": _limited_sort,
    "pad": _limited_pad,
    "select_n": lambda eqn: None if len(eqn.invars) == 3 else "among more than two",
    "lt_to": _only("iu", "of floating-point numbers"),
    **{name: _only("b", "of bits") for name in ("and", "or", "not")},
}
RULES = {
    "add": _binary("add"),
    "add_any": _binary("add"),
    "sub": _binary("sub"),
    "mul": _binary("mul"),
    "div": _div,
    "rem": _rem,
    "max": _binary("maximum"),
    "min": _binary("minimum"),
    "pow": _binary("pow"),
    "integer_pow": _integer_pow,
    "neg": lambda c, eqn, x: c.mb.mul(x=x, y=_typed(x, -1)),
    "sign": _unary("sign"),
    "abs": _unary("abs"),
    "floor": _unary("floor"),
    "ceil": _unary("ceil"),
    "exp": _unary("exp"),
    "exp2": _unary("exp2"),
    "log": _unary("log", epsilon=LEAST),
    "log1p": _log1p,
    "sin": _unary("sin"),
    "cos": _unary("cos"),
    "tanh": _unary("tanh"),
    "erf": _unary("erf"),
    "erfc": lambda c, eqn, x: c.mb.sub(x=_typed(x, 1), y=c.mb.erf(x=x)),
    "logistic": _unary("sigmoid"),
    "sqrt": _unary("sqrt"),
    "rsqrt": _unary("rsqrt", epsilon=LEAST),
    "square": lambda c, eqn, x: c.mb.mul(x=x, y=x),
    "eq": _comparison("equal"),
    "ne": _comparison("not_equal"),
    "lt": _comparison("less"),
    "le": _comparison("less_equal"),
    "lt_to": _total_order,
    "gt": _comparison("greater"),
    "ge": _comparison("greater_equal"),
    "and": _logical("and"),
    "or": _logical("or"),
    "not": _logical("not"),
    "select_n": _select,
    "clamp": _clamp,
    "convert_element_type": _convert,
    "stop_gradient": _same,
    "copy": _same,
    "copy_p": _same,
    "optimization_barrier": _same,
    "iota": _same,  # known: always folded
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "concatenate": _concatenate,
    "split": _split,
    "slice": _slice,
    "pad": _pad,
    "reduce_sum": _reduction("reduce_sum"),
    "reduce_max": _reduction("reduce_max"),
    "reduce_min": _reduction("reduce_min"),
    "reduce_and": _reduction("reduce_min"),
    "reduce_or": _reduction("reduce_max"),
    "argmax": _argmax,
    "cumsum": _cumsum,
    "top_k": _top_k,
    "sort": _sort,
}
