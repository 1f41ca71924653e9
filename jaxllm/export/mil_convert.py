"""A jaxpr as operations of MIL, Core ML's intermediate language.

A value is a numpy array where it is known, and then folded, or a variable of MIL. A variable may be thinner than
the array it stands for: of size 1 along axes that it is repeated along, as MIL's elementwise operators allow.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from jaxllm.export import mil_index, mil_rules
from jaxllm.export.mil_rules import DTYPES, dtype_of

Value = Any  # np.ndarray or a Var of MIL
MOST_AXES = 5
INLINED = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat")
BLOCKS = ("while", "scan", "cond", "platform_index")
RULES = mil_rules.RULES | mil_index.RULES
LIMITS = mil_rules.LIMITS | mil_index.LIMITS


def refusal(jaxpr: Any) -> str | None:
    """Why a program cannot be written in MIL, or None."""
    for eqn in _equations(jaxpr):
        name = eqn.primitive.name
        if name not in RULES and name not in INLINED + BLOCKS:
            return f"it computes {name}, for which there is no operator of Core ML here"
        if name in LIMITS and (reason := LIMITS[name](eqn)):
            return f"it computes {name} {reason}, for which there is no operator of Core ML here"
        for x in eqn.outvars:
            if x.aval.dtype.name not in DTYPES:
                return f"it computes {name} in {x.aval.dtype.name}, and Core ML has {', '.join(DTYPES)}"
            if x.aval.ndim > MOST_AXES:
                return f"it computes {name} with {x.aval.ndim} axes, and Core ML takes {MOST_AXES}"
    return None


def _equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "cond" and "branches_platforms" in eqn.params:
            inner = [eqn.params["branches"][-1]]
        else:
            inner = [x for value in eqn.params.values() for x in (value if isinstance(value, tuple) else (value,))]
        found = [getattr(x, "jaxpr", x) for x in inner]
        found = [x for x in found if hasattr(x, "eqns")]
        if found and eqn.primitive.name not in mil_index.SCATTERS:
            for each in found:
                yield from _equations(each)
        if eqn.primitive.name != "platform_index":
            yield eqn


class Converter:
    """Emits into the function of MIL that is being built."""

    def __init__(self, mb: Any):
        self.mb = mb
        self._numbers = itertools.count()
        self.columns: dict[int, tuple[Any, list[Value]]] = {}  # of a concatenation, by the id of its result

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Value]) -> list[Value]:
        """The values of a jaxpr's outputs."""
        env = {v: np.asarray(x) for v, x in zip(jaxpr.constvars, consts, strict=True)}
        env |= dict(zip(jaxpr.invars, args, strict=True))
        read = lambda x: np.asarray(x.val, x.aval.dtype) if isinstance(x, Literal) else env[x]
        for eqn in jaxpr.eqns:
            found = self._equation(eqn, [read(x) for x in eqn.invars])
            env |= dict(zip(eqn.outvars, found, strict=True))
        return [read(x) for x in jaxpr.outvars]

    def _equation(self, eqn: Any, args: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        if name == "platform_index":
            return [np.asarray(len(eqn.params["platforms"]) - 1, np.int32)]  # whatever is for none by name
        if name in INLINED:
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr", eqn.params.get("fun_jaxpr")))
            inner = inner if hasattr(inner, "consts") else jax.extend.core.ClosedJaxpr(inner, ())
            return self.run(inner.jaxpr, inner.consts, args)
        if name in BLOCKS:
            return getattr(self, f"_{name}")(eqn, args)
        if all(isinstance(x, np.ndarray) for x in args):
            return _folded(eqn, args)
        found = RULES[name](self, eqn, *args)
        found = found if isinstance(found, list | tuple) else [found]
        assert all(len(x.shape) == o.aval.ndim for x, o in zip(found, eqn.outvars, strict=True)), eqn
        return list(found)

    # ---- values -----------------------------------------------------------------------------------------

    def var(self, x: Value) -> Any:
        """A variable, whatever it was."""
        if not isinstance(x, np.ndarray | np.generic):
            return x
        x = _signed(x)
        # coremltools gives names of its own to some constants, and would use one of its usual ones twice.
        name = f"known_{next(self._numbers)}"
        return self.mb.const(val=np.ascontiguousarray(x) if np.ndim(x) else x[()], name=name)

    def thin(self, x: Value) -> Value:
        """A value for an elementwise operator: a number that is repeated becomes one of size 1."""
        if not isinstance(x, np.ndarray):
            return x
        x = _signed(x)
        if x.size < 2:
            return x
        cut = tuple(slice(0, 1) if same else slice(None) for same in _repeated(x))
        return np.ascontiguousarray(x[cut])

    def full(self, x: Value, shape: Sequence[int]) -> Any:
        """A variable of all of a shape."""
        if isinstance(x, np.ndarray):
            return self.var(np.broadcast_to(x, shape))
        if tuple(x.shape) == tuple(shape):
            return x
        wide = self.number(x)
        wide = self.mb.tile(x=wide, reps=[n // m for n, m in zip(shape, x.shape, strict=True)])
        return self.cast(wide, dtype_of(x))

    def number(self, x: Value) -> Any:
        """A boolean as integers, which more operators take."""
        return self.cast(self.var(x), "int32") if dtype_of(x) == "bool" else self.var(x)

    def cast(self, x: Any, dtype: str) -> Any:
        """A variable in a dtype (numpy's name)."""
        return x if DTYPES[dtype_of(x)] == DTYPES[dtype] else self.mb.cast(x=x, dtype=DTYPES[dtype])

    def reshape(self, x: Any, shape: Sequence[int]) -> Any:
        """A full variable in another shape."""
        if tuple(x.shape) == tuple(shape):
            return x
        if not len(shape):
            return self.mb.squeeze(x=x, axes=list(range(len(x.shape))))
        return self.mb.reshape(x=x, shape=[int(n) for n in shape])

    # ---- control flow -----------------------------------------------------------------------------------

    def _cond(self, eqn: Any, args: list[Value]) -> list[Value]:
        index, *rest = args
        branches = eqn.params["branches"]
        if isinstance(index, np.ndarray):
            chosen = branches[int(np.clip(index, 0, len(branches) - 1))]
            return self.run(chosen.jaxpr, chosen.consts, rest)
        return self._choice(eqn, branches, index, rest)

    def _choice(self, eqn: Any, branches: Sequence[Any], index: Any, args: list[Value]) -> list[Value]:
        if len(branches) == 1:
            return self.run(branches[0].jaxpr, branches[0].consts, args)
        shapes = [x.aval.shape for x in eqn.outvars]

        def branch(these, index):
            def emitted():
                found = self._choice(eqn, these, index, args)
                return [self.mb.identity(x=self.full(x, s)) for x, s in zip(found, shapes, strict=True)]

            return emitted

        first = self.mb.less_equal(x=index, y=np.int32(0))
        later = self.mb.sub(x=index, y=np.int32(1)) if len(branches) > 2 else index
        found = self.mb.cond(
            pred=first, _true_fn=branch(branches[:1], index), _false_fn=branch(branches[1:], later)
        )
        return list(found) if isinstance(found, list | tuple) else [found]

    def _while(self, eqn: Any, args: list[Value]) -> list[Value]:
        p = eqn.params
        n, m = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        of_cond, of_body, carried = args[:n], args[n:m], args[m:]
        test, body = p["cond_jaxpr"], p["body_jaxpr"]
        shapes = [x.aval.shape for x in eqn.outvars]
        going = lambda *now: self.var(self.run(test.jaxpr, test.consts, [*of_cond, *now])[0])
        once = lambda *now: self.run(body.jaxpr, body.consts, [*of_body, *now])
        return self._loop(going, once, carried, shapes)

    def _loop(self, going: Any, body: Any, carried: Sequence[Value], shapes: Sequence[tuple]) -> list[Value]:
        """A loop of MIL, through which numbers go as arrays of one."""

        def inside(now):
            return [self.reshape(x, shape) for x, shape in zip(now, shapes, strict=True)]

        def outside(now):
            return [self.reshape(self.full(x, shape), shape or (1,)) for x, shape in zip(now, shapes, strict=True)]

        found = self.mb.while_loop(
            _cond=lambda *now: going(*inside(now)),
            _body=lambda *now: outside(body(*inside(now))),
            loop_vars=outside(carried),
        )
        return inside(found if isinstance(found, list | tuple) else [found])

    def _scan(self, eqn: Any, args: list[Value]) -> list[Value]:
        p = eqn.params
        n, m, length, body = p["num_consts"], p["num_consts"] + p["num_carry"], p["length"], p["jaxpr"]
        consts, carried, xs = args[:n], args[n:m], args[m:]
        xs = [self.full(x, v.aval.shape) for x, v in zip(xs, eqn.invars[m:], strict=True)]
        kinds = [(v.aval.shape, v.aval.dtype) for v in eqn.outvars[p["num_carry"] :]]

        def once(at, *now):
            state, ys = now[: len(carried)], now[len(carried) :]
            given = [self._taken(x, at) for x in xs]
            found = self.run(body.jaxpr, body.consts, [*consts, *state, *given])
            rows = zip(ys, found[len(carried) :], kinds, strict=True)
            put = [self._row(y, row, shape, at) for y, row, (shape, _) in rows]
            return [*found[: len(carried)], *put]

        def counted(i, *now):
            at = self.mb.sub(x=np.int32(length - 1), y=i) if p["reverse"] else i
            return [self.mb.add(x=i, y=np.int32(1)), *once(at, *now)]

        if length == 1:
            return once(None, *carried, *([None] * len(kinds)))
        ys = [self.mb.fill(shape=list(shape), value=dtype.type(0)) for shape, dtype in kinds]
        shapes = [(), *(v.aval.shape for v in eqn.outvars)]
        going = lambda i, *now: self.mb.less(x=i, y=np.int32(length))
        return self._loop(going, counted, [np.asarray(0, np.int32), *carried, *ys], shapes)[1:]

    def _taken(self, x: Any, at: Any) -> Any:
        """The row at an index of the first axis."""
        shape = [int(n) for n in x.shape]
        if shape[0] > 1:
            x = self.mb.slice_by_size(x=x, begin=self._begin(at, len(shape)), size=[1, *shape[1:]])
        return self.reshape(x, shape[1:])

    def _begin(self, at: Any, axes: int) -> Any:
        first = self.mb.reshape(x=at, shape=[1])
        return self.mb.concat(values=[first, np.zeros(axes - 1, np.int32)], axis=0) if axes > 1 else first

    def _row(self, y: Any, row: Value, shape: tuple, at: Any) -> Any:
        """`y` with `row` at an index of its first axis; the row itself where there is no other."""
        row = self.full(row, shape[1:])
        row = self.reshape(row, (1, *shape[1:]))
        if y is None:
            return row
        begin = self._begin(at, len(shape))
        end = self.mb.add(x=begin, y=np.asarray([1, *shape[1:]], np.int32))
        return self.mb.slice_update(x=y, update=row, begin=begin, end=end)


def _signed(x: np.ndarray) -> np.ndarray:
    """Unsigned numbers, of which only small ones are places, as int32."""
    if x.dtype != np.uint32:
        return x
    assert x.max(initial=0) < 2**31, "a number that int32 has not"
    return x.astype(np.int32)


def _repeated(x: np.ndarray) -> list[bool]:
    """Which axes hold one value each."""
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        return [n > 1 and s == 0 for n, s in zip(x.shape, x.strides, strict=True)]
    return [n > 1 and bool((x == x.take([0], axis)).all()) for axis, n in enumerate(x.shape)]


def _folded(eqn: Any, args: list[np.ndarray]) -> list[np.ndarray]:
    if eqn.primitive.name == "broadcast_in_dim":
        return [mil_rules.spread(args[0], eqn)]
    found = eqn.primitive.bind(*args, **eqn.params)
    found = found if eqn.primitive.multiple_results else [found]
    return [np.asarray(x) for x in found]
