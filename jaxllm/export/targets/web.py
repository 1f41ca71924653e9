"""A page that runs the model in a browser: ONNX for onnxruntime-web, on WebGPU or in WebAssembly.

One graph with ONNX Runtime's own operators reads prompts and single tokens, in float32 (not every GPU's browser has
16 bits); packed weights stay packed. It is verified by the runtime's build for CPUs, which has the same operators.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxllm.checkpoint.canonical import flatten
from jaxllm.config import ModelConfig, params_shape
from jaxllm.export import onnx_file, web_assets, web_page
from jaxllm.export.onnx_convert import NEW, converted
from jaxllm.export.onnx_graph import Graph, Unsupported
from jaxllm.export.onnx_packed import refused
from jaxllm.export.options import Options
from jaxllm.export.parameters import abstract, named
from jaxllm.export.program import Program, programs
from jaxllm.export.target import Built, Formats, Job, Target, Values

MODEL = "model.onnx"


def refuses(config: ModelConfig, values: Values, formats: Formats, options: Options) -> str | None:
    """Formats and options without operators, and programs with a primitive that has none."""
    if options.batch != 1:
        return "a page has one user; leave --batch out"
    if options.sampler != "logits":
        return "the page draws tokens itself; leave --sampler out"
    for path, f in formats.items():
        if reason := refused(f):
            return f"{path} is in {f.name}: {reason}; int4_g32, q4f16_1 and int8_g32 can be taken"
    try:
        leaves = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in params_shape(config).items()}
        program, _ = programs(_single(config), leaves, options)
        converted(program, options.chunk, _nothing, {})
    except Unsupported as unsupported:
        return f"it has {unsupported}"
    return None


def _nothing(name: str) -> np.ndarray:
    raise AssertionError(f"{name} was fetched while nothing is written")


def _single(config: ModelConfig) -> ModelConfig:
    return replace(config, dtype="float32")


def build(job: Job) -> Built:
    """The graph, its tensors and the page."""
    import onnx
    import onnxruntime

    arrays = named(flatten(job.model.params))
    pair = programs(_single(job.model.config), abstract(job.model.params), job.options)
    g, kept = merged(pair[0], job.options.chunk, lambda name: np.asarray(arrays[name]))
    parameters = onnx_file.write(job.folder, g, MODEL)
    built = tuple(_ports(program, kept) for program in pair)
    files = {program.name: {"onnx": MODEL} for program in built}
    versions = {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__, "opset": str(onnx_file.OPSET)}
    versions |= web_assets.versions()
    models = dict.fromkeys(("webgpu", "wasm"), (MODEL, *parameters))
    web_page.write(job, built[0], NEW, models)
    limits = {"tokens": f"1 to {job.options.chunk} of a call", "output_prefix": NEW}
    return Built(built, files, tuple(parameters), versions, limits)


def merged(program: Program, longest: int, fetch) -> tuple[Graph, set[str]]:
    """(the graph, names of the state arrays that it keeps): arrays of positions that begin alike and that the graph
    itself changes alike are one."""
    state = {name: x for name, x in program.specs[1].items() if name.endswith(".pos")}
    groups = {name: min(n for n, x in state.items() if x.shape == like.shape) for name, like in state.items()}
    while True:
        g = converted(program, longest, fetch, groups)
        came = {name.removeprefix(NEW): value.name for name, value in g.outputs}
        finer = {
            name: min(n for n in state if (groups[n], came[n]) == (groups[name], came[name])) for name in state
        }
        if finer == groups:
            break
        groups = finer
    kept = {name for name in program.specs[1] if groups.get(name, name) == name}
    g.outputs = [(name, x) for name, x in g.outputs if name == "logits" or name.removeprefix(NEW) in kept]
    return g, kept


def _ports(program: Program, kept: set[str]) -> Program:
    inputs = [p for p in program.inputs if p.name in kept or p.name == "tokens"]
    outputs = [p for p in program.outputs if p.name in kept or p.name == "logits"]
    return replace(program, inputs=tuple(inputs), outputs=tuple(outputs))


class Runner:
    """ONNX Runtime on this machine's CPU."""

    how = "executed"

    def __init__(self, folder: pathlib.Path, manifest: Mapping[str, Any]):
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        files = manifest["programs"]["prefill"]["files"]
        providers = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(folder / files["onnx"], settings, providers=providers)
        self._state = [p for p in manifest["programs"]["prefill"]["inputs"] if p["role"] == "state"]
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.where = f"onnxruntime {onnxruntime.__version__} on CPU"

    def start(self) -> dict[str, np.ndarray]:
        """An empty state."""
        return {p["name"]: np.full(p["shape"], p["initial"], p["dtype"]) for p in self._state}

    def step(self, program: str, state: Any, inputs: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Any]:
        """See `jaxllm.export.target.Runner`."""
        tokens = np.ascontiguousarray(inputs["tokens"][:, : int(inputs["n_new"][0])], np.int32)
        found = dict(zip(self._outputs, self._session.run(None, {"tokens": tokens} | state), strict=True))
        return {"logits": found["logits"]}, {name: found[NEW + name] for name in state}


TARGET = Target(
    name="web",
    summary="a page that chats in a browser: ONNX on WebGPU or WebAssembly",
    platforms=(),
    needs=("onnx", "onnxruntime"),
    extra="export-web",
    refuses=refuses,
    build=build,
    run=Runner,
)
