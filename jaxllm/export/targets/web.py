"""A page that runs the model in a browser: ONNX for onnxruntime-web, on WebGPU or in WebAssembly.

One graph with ONNX Runtime's own operators reads prompts and single tokens, in float32 (not every GPU's browser
has 16 bits); packed weights stay packed. It is verified by the runtime's build for CPUs.
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
from jaxllm.errors import ConfigError, JaxllmError
from jaxllm.export import onnx_file, web_assets, web_page
from jaxllm.export.manifest import formats_of
from jaxllm.export.onnx_convert import NEW, converted
from jaxllm.export.onnx_graph import Graph, Unsupported
from jaxllm.export.onnx_packed import refused
from jaxllm.export.options import Options
from jaxllm.export.parameters import abstract, named
from jaxllm.export.program import Program, programs
from jaxllm.export.target import Built, Formats, Job, Target, Values

MODEL = "model.onnx"
BYTES = "model.int8.onnx"  # for WebAssembly, where packed weights are slow
BYTES_ALLOWED = 0.25  # difference of its logits, over the largest: weights are rounded again, and activations


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

    pair = programs(_single(job.model.config), abstract(job.model.params), job.options)
    try:
        models, kept = _models(job, pair[0])
    except Unsupported as unsupported:  # of what packed weights hold, which only they say
        raise ConfigError(f"the target web cannot take this model: it has {unsupported}") from unsupported
    parameters = dict.fromkeys(name for names in models.values() for name in names[1:])
    built = tuple(_ports(program, kept) for program in pair)
    files = {"onnx": MODEL} | ({"onnx_int8": BYTES} if models["wasm"][0] == BYTES else {})
    files = {program.name: files for program in built}
    versions = {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__, "opset": str(onnx_file.OPSET)}
    versions |= web_assets.versions()
    web_page.write(job, built[0], NEW, models)
    limits = {"tokens": f"1 to {job.options.chunk} of a call", "output_prefix": NEW}
    return Built(built, files, tuple(parameters), versions, limits)


def _models(job: Job, program: Program) -> tuple[dict[str, tuple[str, ...]], set[str]]:
    """(engine -> the files of its model, which are written; names of the state arrays that it keeps)."""
    arrays = named(flatten(job.model.params))
    fetch = lambda name: np.asarray(arrays[name])
    g, groups = merged(program, job.options.chunk, fetch)
    models = dict.fromkeys(("webgpu", "wasm"), (MODEL, *onnx_file.write(job.folder, g, MODEL)))
    if formats_of(job.model):
        g = only(converted(program, job.options.chunk, fetch, groups, bytes=True), groups)
        models["wasm"] = (BYTES, *onnx_file.write(job.folder, g, BYTES, "weights.int8"))
    return models, set(groups.values())


def merged(program: Program, longest: int, fetch) -> tuple[Graph, dict[str, str]]:
    """(the graph, state array -> the one that stands for it): arrays of positions that begin alike, and that the
    graph itself changes alike, are one."""
    state = program.specs[1]
    shapes = {name: x.shape if name.endswith(".pos") else name for name, x in state.items()}
    groups = {name: min(n for n in state if shapes[n] == shape) for name, shape in shapes.items()}
    while True:
        g = converted(program, longest, fetch, groups)
        came = {name.removeprefix(NEW): value.name for name, value in g.outputs}
        both = {name: (groups[name], came[name]) for name in state}
        finer = {name: min(n for n in state if both[n] == both[name]) for name in state}
        if finer == groups:
            return only(g, groups), groups
        groups = finer


def only(g: Graph, groups: Mapping[str, str]) -> Graph:
    """The graph with outputs of the arrays that stand for others."""
    kept = {"logits", *(NEW + first for first in groups.values())}
    g.outputs = [(name, x) for name, x in g.outputs if name in kept]
    return g


def _ports(program: Program, kept: set[str]) -> Program:
    inputs = [p for p in program.inputs if p.name in kept or p.name == "tokens"]
    outputs = [p for p in program.outputs if p.name in kept or p.name == "logits"]
    return replace(program, inputs=tuple(inputs), outputs=tuple(outputs))


class Runner:
    """ONNX Runtime on this machine's CPU. The model in bytes runs along with the other, and is held against it."""

    how = "executed"

    def __init__(self, folder: pathlib.Path, manifest: Mapping[str, Any]):
        program = manifest["programs"]["prefill"]
        self._sessions = {kind: _session(folder / name) for kind, name in program["files"].items()}
        self._state = [p for p in program["inputs"] if p["role"] == "state"]
        self._away = 0.0

    @property
    def where(self) -> str:
        """By what, and how far the model in bytes is away, of the largest logit."""
        import onnxruntime

        more = f"; int8 for WebAssembly is within {self._away:.1%}" if "onnx_int8" in self._sessions else ""
        return f"onnxruntime {onnxruntime.__version__} on CPU{more}"

    def start(self) -> dict[str, dict[str, np.ndarray]]:
        """An empty state of each model."""
        return {
            kind: {p["name"]: np.full(p["shape"], p["initial"], p["dtype"]) for p in self._state}
            for kind in self._sessions
        }

    def step(self, program: str, state: Any, inputs: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Any]:
        """See `jaxllm.export.target.Runner`."""
        tokens = np.ascontiguousarray(inputs["tokens"][:, : int(inputs["n_new"][0])], np.int32)
        said, after = {}, {}
        for kind, (session, names) in self._sessions.items():
            found = dict(zip(names, session.run(None, {"tokens": tokens} | state[kind]), strict=True))
            said[kind], after[kind] = found["logits"], {name: found[NEW + name] for name in state[kind]}
        if "onnx_int8" in said:
            self._compare(said["onnx"], said["onnx_int8"])
        return {"logits": said["onnx"]}, after

    def _compare(self, exact: np.ndarray, rounded: np.ndarray) -> None:
        away = float(np.abs(rounded - exact).max() / np.abs(exact).max())
        if not away <= BYTES_ALLOWED:
            raise JaxllmError(
                f"the model in bytes, for WebAssembly, differs by {away:.1%} of the largest logit, and "
                f"{BYTES_ALLOWED:.0%} is allowed"
            )
        self._away = max(self._away, away)


def _session(path: pathlib.Path) -> tuple[Any, list[str]]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    return session, [output.name for output in session.get_outputs()]


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
