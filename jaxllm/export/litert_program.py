"""Programs as LiteRT's converter takes them: parameters are arguments there, and become numbers of the file later.

So what is converted has the same size whatever the model weighs, and a model that the converter or the runtime
cannot take is known before a weight is read. Packed weights stand as the numbers that they mean; `litert_file`
puts their codes in their place.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from jaxllm import ops
from jaxllm.config import ModelConfig, params_shape
from jaxllm.errors import ConfigError
from jaxllm.export.options import Options
from jaxllm.export.program import Program, programs

STABLEHLO = "1.8.0"  # what the converter is sure to read
ABSENT = ("CUSTOM", "DELEGATE")  # operations that a program must not have, with all whose name begins as below
ABSENT_PREFIX = "STABLEHLO_"


@dataclass(frozen=True)
class Converted:
    """Programs as one flatbuffer, with a signature each and parameters among their inputs."""

    programs: tuple[Program, ...]
    data: bytes


@functools.lru_cache(maxsize=2)
def converted(
    config: ModelConfig, options: Options, made: Callable[..., tuple[Program, Program]] = programs
) -> Converted:
    """Prefill and decode of a model in float32, as `made` makes them of (config, leaves, options).

    Raises ConfigError for an operation that the converter or the runtime lacks."""
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in params_shape(config).items()}
    pair = made(config, leaves, options)
    return Converted(pair, convert([flat(program, apart(leaves)) for program in pair]))


def apart(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves, with a tuple of matrices for each [expert, out, in] that experts are taken from."""
    experts = lambda path, x: len(x.shape) == 3 and ".ffn." in path
    return {path: _matrices(x) if experts(path, x) else x for path, x in leaves.items()}


def _matrices(x) -> tuple:
    return tuple(jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for _ in range(x.shape[0]))


@dataclass(frozen=True)
class Flat:
    """A function of positional arrays, and what each is called."""

    name: str
    call: Any
    specs: tuple
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def flat(program: Program, parameters: Mapping[str, Any]) -> Flat:
    """A program whose parameters are these abstract arrays, or tuples of them ("NAME.0" and so on)."""
    _, state, inputs = program.specs
    specs, structure = jax.tree.flatten((parameters, state, inputs))
    names = [_named(path) for path, _ in jax.tree_util.tree_flatten_with_path((parameters, state, inputs))[0]]

    def call(*arrays):
        results, state = program.call(*jax.tree.unflatten(structure, arrays))
        return [*jax.tree.leaves(results), *jax.tree.leaves(state)]

    return Flat(program.name, call, tuple(specs), tuple(names), tuple(port.name for port in program.outputs))


def _named(path: tuple) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", None))) for key in path[1:])


def convert(flats: list[Flat]) -> bytes:
    """One flatbuffer with a signature for each. Raises ConfigError where that is not possible."""
    from litert_converter import converter_api_ext as converter
    from litert_converter.mlir import ir, passmanager

    context = ir.Context()
    converter.prepare_mlir_context(context)
    with context:
        module = converter.merge_modules([_module(one, converter, ir) for one in flats])
        settings = converter.ConvertToTFLConfig()
        settings.enable_x64 = False
        try:
            converter.run_convert_to_tfl_passes(module, passmanager.PassManager(), settings)
            data = converter.export_flatbuffer_to_bytes(module.operation)
        except (ValueError, RuntimeError, ir.MLIRError) as error:
            said = re.findall(r"error: (.*)", str(error)) or [str(error).strip()]
            raise ConfigError(f"LiteRT's converter cannot take it ({said[0][:200]})") from error
    if absent := sorted(set(operations(data)) & _absent()):
        raise ConfigError(f"LiteRT has no {', '.join(absent)}, which it needs")
    return data


def _module(one: Flat, converter, ir):
    from jax.extend.mlir.dialects import stablehlo

    with ops.portable(plain=True):
        made = export.export(jax.jit(one.call, keep_unused=True), platforms=["cpu"])(*one.specs)
    # Two MLIRs in one process know nothing of each other: bytes of a version that both know go between.
    data = stablehlo.serialize_portable_artifact_str(made.mlir_module(), STABLEHLO)
    taken = ir.Module.parse(stablehlo.deserialize_portable_artifact_str(data))
    converter.set_signature(taken.operation, one.name, list(one.inputs), list(one.outputs))
    return taken


def operations(data: bytes) -> list[str]:
    """Names of the kinds of operations in a flatbuffer."""
    from ai_edge_litert import schema_py_generated as schema

    names = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
    model = schema.Model.GetRootAs(data, 0)
    codes = [model.OperatorCodes(i) for i in range(model.OperatorCodesLength())]
    return [names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())] for code in codes]


def _absent() -> set[str]:
    from ai_edge_litert import schema_py_generated as schema

    return {*ABSENT, *(name for name in vars(schema.BuiltinOperator) if name.startswith(ABSENT_PREFIX))}
