"""From a traced program to an ONNX graph, equation by equation.

The program is traced once, with the number of tokens of a call as a symbol: one graph reads prompts and single
tokens, and there is one copy of the weights. What `ops.named` keeps whole becomes ONNX Runtime's own operators
(`onnx_calls.py`), every other primitive an operator of ONNX (`onnx_rules.py`, `onnx_index.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.extend import core

from jaxllm import ops
from jaxllm.export import onnx_index, onnx_rules
from jaxllm.export.onnx_calls import CALLS, Parameter, tensor
from jaxllm.export.onnx_graph import Graph, Unsupported, Value, static
from jaxllm.export.program import Program

NEW = "new."  # before the name of a state array that comes out
SMALL = 2**16  # numbers of a constant that are worked out here
RULES = onnx_rules.RULES | onnx_index.RULES
INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}
INLINED |= {"custom_vjp_call": "call_jaxpr", "checkpoint": "jaxpr", "remat": "jaxpr", "core_call": "call_jaxpr"}


def traced(program: Program, longest: int) -> core.ClosedJaxpr:
    """The program for 1 to `longest` tokens of one row, all of them real."""
    (t,) = export.symbolic_shape("t", constraints=[f"t <= {longest}"])

    def call(params, state, tokens):
        n_new = jnp.full((1,), tokens.shape[1], jnp.int32)
        return program.call(params, state, {"tokens": tokens, "n_new": n_new})

    params, state, _ = program.specs
    with ops.portable(), ops.named():
        return jax.make_jaxpr(call)(params, state, jax.ShapeDtypeStruct((1, t), jnp.int32))


def converted(
    program: Program,
    longest: int,
    fetch: Callable[[str], np.ndarray],
    groups: Mapping[str, str],
    *,
    bytes: bool = False,
) -> Graph:
    """The graph of a program, whose parameters are fetched by name when they are written.

    groups: state array -> the one that always has the same numbers, and stands for it. bytes: as in Graph.
    Raises Unsupported for what has no operator there."""
    closed = traced(program, longest)
    params, state, _ = program.specs
    g = Graph(bytes=bytes)
    arguments: list[Any] = [
        Parameter(name, tuple(x.shape), np.dtype(x.dtype), lambda name=name: fetch(name))
        for name, x in sorted(params.items())
    ]
    own = [name for name in sorted(state) if groups.get(name, name) == name]
    held = {name: g.input(name, state[name].shape, state[name].dtype) for name in own}
    arguments += [held[groups.get(name, name)] for name in sorted(state)]
    arguments.append(g.input("tokens", closed.jaxpr.invars[-1].aval.shape, np.int32))
    results = evaluated(g, closed.jaxpr, [np.asarray(c) for c in closed.consts], arguments)
    names = ["logits", *(NEW + name for name in sorted(state))]
    for name, x in zip(names, results, strict=True):
        g.output(name, read(g, x))
    return g


def read(g: Graph, x: Any) -> Value | np.ndarray:
    """A value of whatever a variable holds."""
    return tensor(g, x) if isinstance(x, Parameter) else x


def evaluated(g: Graph, jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Put a jaxpr's equations into the graph -> what its outputs are: values, arrays and parameters."""
    held: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    look = lambda v: np.asarray(v.val, v.aval.dtype) if isinstance(v, core.Literal) else held[v]
    for eqn in jaxpr.eqns:
        outs = _equation(g, eqn, [look(v) for v in eqn.invars])
        held.update(zip(eqn.outvars, outs, strict=True))
    return [look(v) for v in jaxpr.outvars]


def _equation(g: Graph, eqn: Any, inputs: list[Any]) -> list[Any]:
    name, params, outs = eqn.primitive.name, eqn.params, [v.aval for v in eqn.outvars]
    if name in INLINED:
        inner = params[INLINED[name]]
        inner, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, [])
        return evaluated(g, inner, [np.asarray(c) for c in consts], inputs)
    if name == "jaxllm_call":
        arguments = jax.tree.unflatten(params["tree"], inputs)
        return [_called(g, params["name"], outs[0], dict(params["numbers"]), arguments)]
    if _known(eqn, inputs):
        found = eqn.primitive.bind(*map(jnp.asarray, inputs), **params)
        return [np.asarray(x) for x in (found if eqn.primitive.multiple_results else [found])]
    inputs = [read(g, x) for x in inputs]
    if name == "scan":
        return _scan(g, params, outs, inputs)
    if name in onnx_rules.SEVERAL:
        return onnx_rules.SEVERAL[name](g, params, outs, *inputs)
    if name not in RULES:
        raise Unsupported(f"the primitive {name}, for which the converter to ONNX has no operator")
    return [RULES[name](g, params, outs[0], *inputs)]


def _called(g: Graph, name: str, out: Any, numbers: dict, arguments: Any) -> Value:
    if name not in CALLS:
        raise Unsupported(f"the operation {name}, for which the converter to ONNX has no operator")
    return CALLS[name](g, out, numbers, *arguments)


def _known(eqn: Any, inputs: list[Any]) -> bool:
    """Whether an equation can be worked out here: small, and of nothing but constants."""
    shapes = [v.aval.shape for v in eqn.outvars]
    fixed = all(isinstance(x, np.ndarray) for x in inputs) and all(map(static, shapes))
    small = fixed and all(np.prod(shape, initial=1) <= SMALL for shape in shapes)
    return small and eqn.primitive.name not in ("dim_as_value", "scan", "while", "cond")


def _scan(g: Graph, params: dict, outs: list, inputs: list[Any]) -> list[Value]:
    """jax.lax.scan as ONNX's Scan, whose body reads constants from around it."""
    jaxpr, fixed, kept = params["jaxpr"], params["num_consts"], params["num_carry"]
    begin, lines = [g.whole(x) for x in inputs[fixed : fixed + kept]], [g.whole(x) for x in inputs[fixed + kept :]]
    body = Graph(g)
    carry = [body.input(g.name("carry"), x.shape, x.dtype) for x in begin]
    now = [body.input(g.name("now"), x.shape[1:], x.dtype) for x in lines]
    consts = [np.asarray(c) for c in jaxpr.consts]
    for x in evaluated(body, jaxpr.jaxpr, consts, [*inputs[:fixed], *carry, *now]):
        # A value from outside has to be one of the body's own to come out of it.
        x = body.whole(read(body, x))
        body.outputs.append((g.name("out"), x))
    directions = (int(params["reverse"]),)
    names = g.made(
        "Scan",
        [*begin, *lines],
        len(outs),
        "",
        body=body,
        num_scan_inputs=len(lines),
        scan_input_directions=directions * len(lines),
        scan_output_directions=directions * (len(outs) - kept),
    )
    return [Value(n, tuple(o.shape), np.dtype(o.dtype), tuple(o.shape)) for n, o in zip(names, outs, strict=True)]
