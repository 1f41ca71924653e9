"""A Core ML package for iOS, iPadOS and macOS: prefill and decode as functions that share weights and states.

Programs are traced once and written as MIL; what Core ML would compute is worked out here by `mil_interp` from the
package as it was saved.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxllm.checkpoint.canonical import flatten
from jaxllm.config import ModelConfig, params_shape
from jaxllm.errors import ConfigError
from jaxllm.export import mil_convert, mil_interp, mil_program, mil_weights, shipped
from jaxllm.export.mil_file import quiet
from jaxllm.export.mil_program import Traced
from jaxllm.export.options import Options
from jaxllm.export.program import Program, programs
from jaxllm.export.target import Built, Formats, Job, Target, Values
from jaxllm.quant import QTensor

PACKAGE = "model.mlpackage"
EXAMPLE = "generate.swift"
DTYPES = ("float32", "float16")


# ---- before any work ------------------------------------------------------------------------------------


def refuses(config: ModelConfig, values: Values, formats: Formats, options: Options) -> str | None:
    """What Core ML has no such thing of; found in the program itself, traced without a weight."""
    if options.sampler != "logits":
        return "Core ML has no operators on the bits of random numbers; leave --sampler out"
    dtypes = {f.dtype for f in formats.values()} - {None} or {config.dtype}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        found = " and ".join(sorted(dtypes))
        return f"it computes in {found}, and Core ML has {' and '.join(DTYPES)}; give --dtype float16"
    shapes = params_shape(config)
    found = (mil_weights.refusal(path, f) for path, f in formats.items())
    if reason := next(filter(None, found), None):
        return reason
    config = replace(config, dtype=dtypes.pop())
    leaves = {path: jax.ShapeDtypeStruct(shape, config.dtype) for path, shape in shapes.items()}
    made = (mil_program.traced(p, options.sinks) for p in programs(config, leaves, options))
    return next(filter(None, (mil_convert.refusal(t.closed.jaxpr) for t in made)), None)


# ---- the package ----------------------------------------------------------------------------------------


def build(job: Job) -> Built:
    """model.mlpackage, with both programs as functions."""
    params = flatten(job.model.params)
    if reason := next(filter(None, (mil_weights.odd(k, x) for k, x in params.items() if _packed(x))), None):
        raise ConfigError(f"the target coreml cannot take this model: {reason}")
    dense = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in params.items()}
    made = programs(job.model.config, dense, job.options)
    with quiet():
        for program in made:
            _save(mil_program.traced(program, job.options.sinks), params, _alone(job.folder, program))
        _join(job.folder, made)
    for program in made:
        shutil.rmtree(_alone(job.folder, program))
    _readable(job.folder)
    shutil.copyfile(pathlib.Path(shipped.__file__).with_name(EXAMPLE), job.folder / EXAMPLE)
    files = sorted(str(p.relative_to(job.folder)) for p in (job.folder / PACKAGE).rglob("*") if p.is_file())
    endings = {"model": ".mlmodel", "weights": ".bin", "index": ".json"}
    kinds = {kind: next(name for name in files if name.endswith(ending)) for kind, ending in endings.items()}
    ported = tuple(map(mil_program.ports, made))
    return Built(ported, {p.name: kinds for p in ported}, (kinds["weights"],), versions())


def _readable(folder: pathlib.Path) -> None:
    """Files and folders of the package by everybody whom the artifact's own folder is open to."""
    rights = folder.stat().st_mode & 0o777
    for path in [folder / PACKAGE, *(folder / PACKAGE).rglob("*")]:
        path.chmod(rights if path.is_dir() else rights & 0o666)


def versions() -> dict[str, str]:
    """Of what writes the package, and what it needs."""
    with quiet():
        import coremltools as ct

    return {"jax": jax.__version__, "coremltools": ct.__version__, "iOS": "18", "macOS": "15"}


def _packed(leaf: Any) -> bool:
    return isinstance(leaf, QTensor)


def _alone(folder: pathlib.Path, program: Program) -> pathlib.Path:
    return folder / f"{program.name}.mlpackage"


def _save(traced: Traced, params: Mapping[str, Any], path: pathlib.Path) -> None:
    """One program as a package of its own."""
    from coremltools.converters.mil.mil import Program as Module

    module = Module()
    module.add_function("main", _function(traced, params))
    _convert(module).save(str(path))


def _convert(module: Any) -> Any:
    """A program of MIL as it is, checked and tidied."""
    import coremltools as ct

    return ct.convert(
        module,
        source="milinternal",
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.CLEANUP,
        skip_model_load=True,
    )


def _function(traced: Traced, params: Mapping[str, Any]) -> Any:
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function

    held = mb.state_tensor_placeholder
    given = {name: mb.placeholder(shape=x.shape, dtype=_type(x)) for name, x in traced.inputs.items()}
    given |= {name: held(shape=x.shape, dtype=_type(x)) for name, x in traced.states.items()}
    with Function(given, opset_version=ct.target.iOS18) as function:
        converter = mil_convert.Converter(mb)
        weights = [_value(mb, params[name]) for name in traced.parameters]
        states = [mb.read_state(input=function.inputs[name]) for name in traced.states]
        inputs = [function.inputs[name] for name in traced.inputs]
        found = converter.run(traced.closed.jaxpr, traced.closed.consts, [*weights, *states, *inputs])
        results, after = found[: len(traced.results)], found[len(traced.results) :]
        for (name, spec), x in zip(traced.states.items(), after, strict=True):
            mb.coreml_update_state(state=function.inputs[name], value=converter.full(x, spec.shape))
        named = zip(traced.results.items(), results, strict=True)
        function.set_outputs([mb.identity(x=converter.full(x, s.shape), name=name) for (name, s), x in named])
    return function


def _value(mb: Any, leaf: Any) -> Any:
    return mil_weights.constant(mb, leaf) if _packed(leaf) else np.asarray(leaf)


def _type(x: Any) -> Any:
    from coremltools.converters.mil.mil import types

    return {"float32": types.fp32, "float16": types.fp16, "int32": types.int32}[x.dtype.name]


def _join(folder: pathlib.Path, made: tuple[Program, ...]) -> None:
    """The packages as one, each weight once."""
    import coremltools as ct

    plan = ct.utils.MultiFunctionDescriptor()
    for program in made:
        plan.add_function(str(_alone(folder, program)), "main", program.name)
    plan.default_function_name = made[-1].name
    ct.utils.save_multifunction(plan, str(folder / PACKAGE))


# ---- the package, interpreted ---------------------------------------------------------------------------


class Runner:
    """The saved package, operator by operator in numpy."""

    how = "compiled"

    def __init__(self, folder: pathlib.Path, manifest: Mapping[str, Any]):
        self._package = mil_interp.Package(folder / PACKAGE)
        self._rows = manifest["batch"]
        self.where = f"Core ML's operators in numpy {np.__version__}, as documented for iOS 18; no Apple device"

    def start(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Every state's zeros, and how many tokens each row has seen."""
        return self._package.empty("decode"), np.zeros(self._rows, np.int32)

    def step(self, program: str, state: Any, inputs: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Any]:
        """See `jaxllm.export.target.Runner`."""
        states, length = state
        results, states = self._package.run(program, inputs | {mil_program.LENGTH: length}, states)
        return results, (states, length + inputs["n_new"])


TARGET = Target(
    name="coreml",
    summary="a Core ML package for iOS 18, macOS 15 and newer",
    platforms=(),
    needs=("coremltools",),
    extra="export-coreml",
    refuses=refuses,
    build=build,
    run=Runner,
)
