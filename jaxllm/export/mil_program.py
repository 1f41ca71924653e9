"""A program of an export as Core ML runs one: parameters inside, caches in states, positions worked out.

A state of Core ML is float16 and begins with zeros. A float16 array is one state; a float32 array is two of them,
a number and what rounding left of it, which together keep 22 bits and take no more memory. Positions and lengths
are integers beyond what float16 counts: they follow from how many tokens a row has seen, which is an input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm import ops
from jaxllm.export.program import Named, Port, Program
from jaxllm.state import appended

LENGTH = "length"
REST = "_rest"
MEANING = "how many tokens each row has seen before"


@dataclass(frozen=True)
class Traced:
    """A jaxpr whose arguments are parameters, then states, then inputs, and whose outputs are results, then
    states; each in the order of the names."""

    name: str
    closed: Any  # ClosedJaxpr
    parameters: Mapping[str, Any]  # name -> abstract array
    states: Mapping[str, Any]  # name -> abstract float16 array
    inputs: Mapping[str, Any]
    results: Mapping[str, Any]


def traced(program: Program, sinks: int) -> Traced:
    """The program, traced for no platform in particular.

    program: of unpacked parameters; sinks: of the options it was made with."""
    parameters, state, inputs = program.specs
    planes = {n: jax.ShapeDtypeStruct(x.shape, jnp.float16) for n, x in sorted(_planes(state).items())}
    inputs = dict(sorted((inputs | {LENGTH: state[LENGTH]}).items()))

    def call(parameters: Named, planes: Named, inputs: Named) -> tuple[Named, Named]:
        new = dict(inputs)
        whole = _state(state, planes, new.pop(LENGTH), sinks)
        results, after = program.call(parameters, whole, new)
        return results, _planes(after)

    with ops.portable():
        closed, shapes = jax.make_jaxpr(call, return_shape=True)(parameters, planes, inputs)
    return Traced(program.name, closed, dict(sorted(parameters.items())), planes, inputs, shapes[0])


def _held(state: Named) -> Named:
    """What of a state has to be kept: not what follows from the lengths."""
    return {name: x for name, x in state.items() if name.split(".")[-1] not in (LENGTH, "pos")}


def _planes(state: Named) -> Named:
    """The float16 arrays that hold a state, by names that Core ML takes."""
    planes = {}
    for name, x in _held(state).items():
        name = identifier(name)
        planes[name] = x
        if x.dtype == jnp.float32 and not isinstance(x, jax.ShapeDtypeStruct):
            planes[name] = x.astype(jnp.float16)
            planes[name + REST] = (x - planes[name].astype(jnp.float32)).astype(jnp.float16)
        elif x.dtype == jnp.float32:
            planes[name + REST] = x
    return planes


def _state(like: Named, planes: Named, length: jax.Array, sinks: int) -> Named:
    """The inverse of `_planes`."""
    made = {LENGTH: length}
    for name, x in like.items():
        if name.split(".")[-1] == "pos":
            made[name] = appended(x.shape[1], length, sinks)
        elif name != LENGTH:
            made[name] = planes[identifier(name)].astype(x.dtype)
            if x.dtype == jnp.float32:
                made[name] += planes[identifier(name) + REST].astype(x.dtype)
    return made


def identifier(name: str) -> str:
    """A name as Core ML spells them."""
    return name.replace(".", "_")


def ports(program: Program) -> Program:
    """What goes in and comes out of the package: parameters and states stay inside."""
    length = next(port for port in program.inputs if port.name == LENGTH)
    length = Port(LENGTH, "input", length.shape, length.dtype, length.layout, MEANING)
    inputs = [port for port in program.inputs if port.role == "input"]
    inputs = sorted([*inputs, length], key=lambda port: port.name)
    outputs = tuple(port for port in program.outputs if port.role == "result")
    return replace(program, inputs=tuple(inputs), outputs=outputs)
