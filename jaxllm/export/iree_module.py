"""Both programs of an export as one module for IREE's compiler: parameters outside it, the state inside.

    module @model {
      util.global private @"parameter.norm.w" = #flow.parameter.named<"model"::"norm.w"> : tensor<256xf32>
      util.global private mutable @"state.layers.0.k" = ...
      func.func public @reset() { ... }
      func.func public @prefill(%tokens, %n_new) -> logits { ... call @prefill.main(...) ... }
      func.func public @decode(%tokens, %n_new) -> logits { ... }
    }

Globals that begin with one value, or that a function gives one value, share their memory (IREE 3.13), and what
is then written into one appears in the others. So each begins with bits of its own, and `reset` makes each empty
state from what the global holds, in a way that the compiler cannot see through.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir

from jaxllm.export.program import Port, Program

NAME, SCOPE = "model", "model"  # of the module, and of its parameters
LENGTH = "length"  # a state that is never negative
SHIFTS = {
    "stablehlo.shift_right_logical": stablehlo.shift_right_logical,
    "stablehlo.shift_left": stablehlo.shift_left,
}


def module(programs: Sequence[tuple[Program, bytes]]) -> str:
    """The text of the module, of each program and its portable StableHLO.

    Operations are in MLIR's generic form, which changes less from version to version than the pretty one."""
    converted = [(program, *_converted(program.name, data)) for program, data in programs]
    program, _, types, _ = converted[0]
    lines = [f"module @{NAME} {{", *_globals(program.inputs, types), *_reset(program.inputs, types)]
    for program, functions, types, results in converted:
        lines += [*_entry(program, types, results), *functions]
    return "\n".join([*lines, "}", ""])


# ---- what JAX lowered -----------------------------------------------------------------------------------


def _converted(name: str, data: bytes) -> tuple[list[str], list[str], list[str]]:
    """(functions as text, private and named `name.` and more; types of main's arguments; types of its results)."""
    with mlir.make_ir_context():
        parsed = ir.Module.parse(stablehlo.deserialize_portable_artifact_str(data))
        functions = list(parsed.body)
        for function in functions:
            _rename(function.operation, name)
            _widen_shifts(function.operation)
        main = next(f for f in functions if f.attributes["sym_name"].value == f"{name}.main")
        kind = main.attributes["function_type"].value
        text = [f.operation.get_asm(print_generic_op_form=True) for f in functions]
        return text, [str(t) for t in kind.inputs], [str(t) for t in kind.results]


def _rename(op: ir.Operation, name: str) -> None:
    """Put `name.` before every symbol, and leave out what only JAX reads."""
    attributes = op.attributes
    if "sym_name" in attributes:
        attributes["sym_name"] = ir.StringAttr.get(f"{name}.{attributes['sym_name'].value}")
        attributes["sym_visibility"] = ir.StringAttr.get("private")
        for unread in ("arg_attrs", "res_attrs"):
            if unread in attributes:
                del attributes[unread]
    for used in ("callee", "decomposition"):
        if used in attributes:
            attributes[used] = ir.FlatSymbolRefAttr.get(f"{name}.{attributes[used].value}")
    for region in op.regions:
        for block in region:
            for inner in block:
                _rename(inner.operation, name)


def _widen_shifts(op: ir.Operation) -> None:
    """Shift bytes as integers of 32 bits: IREE 3.13 compiles no others for GPUs without bytes."""
    for inner in [inner.operation for region in op.regions for block in region for inner in block]:
        _widen_shifts(inner)
        shift = SHIFTS.get(inner.name)
        if shift is None or str(inner.results[0].type.element_type) != "ui8":
            continue
        kind = inner.results[0].type
        with ir.InsertionPoint(inner), inner.location:
            wide = ir.RankedTensorType.get(kind.shape, ir.IntegerType.get_unsigned(32))
            operands = [stablehlo.convert(wide, x) for x in inner.operands]
            narrow = stablehlo.convert(kind, shift(*operands))
        inner.results[0].replace_all_uses_with(narrow)
        inner.erase()


# ---- what is around it ----------------------------------------------------------------------------------


def _signless(kind: str) -> str:
    """A type as globals and public functions have it: tensor<4xui8> is tensor<4xi8>."""
    return kind.replace("xui", "xi").replace("<ui", "<i")


def _integer(kind: str, dtype: str) -> str:
    """The type of integers of the same width."""
    return f"{kind[: max(kind.rfind('x'), kind.find('<')) + 1]}i{8 * np.dtype(dtype).itemsize}>"


def _globals(ports: Sequence[Port], types: Sequence[str]) -> Iterator[str]:
    for i, (port, kind) in enumerate(zip(ports, types, strict=True)):
        head = f'  util.global private {"mutable " if port.role == "state" else ""}@"{port.role}.{port.name}" ='
        if port.role == "parameter":
            yield f'{head} #flow.parameter.named<"{SCOPE}"::"{port.name}"> : {_signless(kind)}'
        if port.role == "state":
            yield f"{head} dense<0x{i + 1:0{2 * np.dtype(port.dtype).itemsize}X}> : {_signless(kind)}"


def _reset(ports: Sequence[Port], types: Sequence[str]) -> Iterator[str]:
    states = [(port, kind) for port, kind in zip(ports, types, strict=True) if port.role == "state"]
    length = next(kind for port, kind in states if port.name == LENGTH)
    yield "  func.func public @reset() {"
    yield f'    %length = util.global.load @"state.{LENGTH}" : {length}'
    yield f"    %sign = stablehlo.constant dense<31> : {length}"
    yield f"    %zeros = stablehlo.shift_right_arithmetic %length, %sign : {length}"
    yield f"    %first = stablehlo.slice %zeros [0:1] : ({length}) -> tensor<1xi32>"
    yield "    %zero = stablehlo.reshape %first : (tensor<1xi32>) -> tensor<i32>"
    for i, (port, kind) in enumerate(states):
        yield from _emptied(i, port, kind)
    yield "    return\n  }"


def _emptied(i: int, port: Port, kind: str) -> Iterator[str]:
    """Stores what the state holds, and zero, plus its initial value."""
    number, zero = _integer(kind, port.dtype), _integer("tensor<>", port.dtype)
    initial = port.initial if kind == number else f"{port.initial}.0"
    yield f'    %held_{i} = util.global.load @"state.{port.name}" : {kind}'
    yield f"    %bits_{i} = stablehlo.bitcast_convert %held_{i} : ({kind}) -> {number}"
    yield f"    %zero_{i} = stablehlo.convert %zero : (tensor<i32>) -> {zero}"
    yield f"    %mask_{i} = stablehlo.broadcast_in_dim %zero_{i}, dims = [] : ({zero}) -> {number}"
    yield f"    %none_{i} = stablehlo.and %bits_{i}, %mask_{i} : {number}"
    yield f"    %null_{i} = stablehlo.bitcast_convert %none_{i} : ({number}) -> {kind}"
    yield f"    %from_{i} = stablehlo.constant dense<{initial}> : {kind}"
    yield f"    %made_{i} = stablehlo.add %null_{i}, %from_{i} : {kind}"
    yield f'    util.global.store %made_{i}, @"state.{port.name}" : {kind}'


def _entry(program: Program, types: Sequence[str], results: Sequence[str]) -> Iterator[str]:
    """The public function of a program: its inputs in the order of the ports, and its results."""
    arguments = list(zip(program.inputs, types, strict=True))
    given = list(zip(program.outputs, results, strict=True))
    taken = ", ".join(f"%given_{i}: {_signless(t)}" for i, (p, t) in enumerate(arguments) if p.role == "input")
    back = ", ".join(_signless(t) for p, t in given if p.role == "result")
    yield f"  func.func public @{program.name}({taken}) -> ({back}) {{"
    for i, (port, kind) in enumerate(arguments):
        yield from _argument(i, port, kind)
    called = ", ".join(f"%in_{i}" for i in range(len(arguments)))
    kind = f"({', '.join(types)}) -> ({', '.join(results)})"
    yield f'    %out:{len(results)} = call @"{program.name}.main"({called}) : {kind}'
    for i, (port, kind) in enumerate(given):
        if port.role == "state":
            yield f'    util.global.store %out#{i}, @"state.{port.name}" : {kind}'
    own = ", ".join(f"%out#{i}" for i, (p, _) in enumerate(given) if p.role == "result")
    yield f"    return {own} : {back}\n  }}"


def _argument(i: int, port: Port, kind: str) -> Iterator[str]:
    if port.role != "input":
        yield f'    %given_{i} = util.global.load @"{port.role}.{port.name}" : {_signless(kind)}'
    yield f"    %in_{i} = stablehlo.bitcast_convert %given_{i} : ({_signless(kind)}) -> {kind}"
