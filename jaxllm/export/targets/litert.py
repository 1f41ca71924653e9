"""A file for LiteRT, on Android and elsewhere, run here by its interpreter; or a bundle for LiteRT-LM's engine."""

from __future__ import annotations

import importlib.util
import itertools
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np

from jaxllm.checkpoint.canonical import flatten
from jaxllm.config import ModelConfig
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.export import litert_file, litert_lm, litert_program
from jaxllm.export.options import Options
from jaxllm.export.program import Program, programs
from jaxllm.export.target import ALLOWED, Built, Formats, Job, Target, Values
from jaxllm.tokenizer import load_tokenizer

FILE = "model.tflite"
BUNDLE = "litert-lm"
NEEDS = ("litert_converter", "ai_edge_litert", "litert_lm_builder")
ROUNDED = 8e-2  # of the largest logit; measured: up to 4e-2 behind 30 layers
PROMPT, SPOKEN = "def main(argv):\n", 16  # what the engine and the interpreter go on with, and for how long
Named = dict[str, np.ndarray]


def refuses(config: ModelConfig, values: Values, formats: Formats, options: Options) -> str | None:
    """Formats whose codes would not be ours, and programs that LiteRT cannot have, which converting them shows."""
    for path, format in formats.items():
        if reason := litert_file.unfit(format):
            return f"{path} is in {format.name}: {reason}"
    if options.sampler != "logits":
        return (
            "LiteRT has no operations on bits, which drawing needs; leave --sampler out and draw from the logits"
        )
    if options.platform == BUNDLE and (reason := litert_lm.refuses(config, options)):
        return reason
    if not all(importlib.util.find_spec(name) for name in NEEDS):
        return None  # the missing package is what has to be said
    try:
        _converted(config, options)
    except ConfigError as error:
        return str(error)
    return None


def _converted(config: ModelConfig, options: Options) -> litert_program.Converted:
    made = litert_lm.conventional if options.platform == BUNDLE else programs
    return litert_program.converted(replace(config, dtype="float32"), options, made)


def allowed(config: ModelConfig, formats: Formats) -> float:
    """LiteRT rounds activations to 8 bits a row beside packed weights, whatever they are here."""
    return max(ROUNDED, ALLOWED[config.dtype]) if formats else ALLOWED[config.dtype]


def build(job: Job) -> Built:
    """model.tflite, prefill and decode with the parameters once; or the same within model.litertlm."""
    bundle = job.options.platform == BUNDLE
    if bundle and job.model.tokenizer is None:
        raise ConfigError("LiteRT-LM takes text, and this model has no tokenizer; the platform tflite needs none")
    made = _converted(job.model.config, job.options)
    kinds = litert_file.write(job.folder / FILE, made.data, flatten(job.model.params))
    if bundle:
        litert_lm.bundle(job.model, job.folder / FILE, job.folder, job.options)
        (job.folder / FILE).unlink()
    file = litert_lm.FILE if bundle else FILE
    pair = tuple(map(_without_parameters, made.programs))
    files = {program.name: {file.rpartition(".")[2]: file} for program in pair}
    versions = {name.replace("_", "-"): version(name.replace("_", "-")) for name in NEEDS}
    counts = {kind: sum(k == kind for k in kinds.values()) for kind in sorted(set(kinds.values()))}
    return Built(pair, files, (file,), versions, {"matrices": counts})


def _without_parameters(program: Program) -> Program:
    return replace(program, inputs=tuple(port for port in program.inputs if port.role != "parameter"))


def runner(folder: pathlib.Path, manifest: Mapping[str, Any]) -> Runner | Conventional:
    """Of either kind of file."""
    return (Conventional if manifest["target"]["platform"] == BUNDLE else Runner)(folder, manifest)


class Runner:
    """LiteRT's interpreter on this machine's CPU."""

    def __init__(self, folder: pathlib.Path, manifest: Mapping[str, Any]):
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(**self._source(folder))
        self._interpreter = interpreter  # the runners below only borrow it
        self._programs = {name: interpreter.get_signature_runner(name) for name in manifest["programs"]}
        self._ports = manifest["programs"]["decode"]["inputs"]
        self.how, self.where = "executed", f"LiteRT on cpu, ai-edge-litert {version('ai-edge-litert')}"

    def _source(self, folder: pathlib.Path) -> dict[str, Any]:
        return {"model_path": str(folder / FILE)}

    def start(self) -> dict[str, np.ndarray]:
        """Every array of the state full of its initial value."""
        state = [port for port in self._ports if port["role"] == "state"]
        return {port["name"]: np.full(port["shape"], port["initial"], port["dtype"]) for port in state}

    def step(self, program: str, state: Named, inputs: Named) -> tuple[Named, Named]:
        """See `jaxllm.export.target.Runner`."""
        found = self._programs[program](**state, **inputs)
        return {k: x for k, x in found.items() if k not in state}, {k: found[k] for k in state}

    def greedy(self, ids: list[int], chunk: int) -> Iterator[int]:
        """The tokens that one row goes on with, without end."""
        state = self.start()
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            tokens = np.array([part + [0] * (chunk - len(part))], np.int32)
            results, state = self.step(
                "prefill", state, {"tokens": tokens, "n_new": np.array([len(part)], np.int32)}
            )
        while True:
            yield (token := int(results["logits"].argmax()))
            one = {"tokens": np.array([[token]], np.int32), "n_new": np.ones(1, np.int32)}
            results, state = self.step("decode", state, one)


class Conventional(Runner):
    """The interpreter, called as LiteRT-LM's engine calls it; and the engine beside it, where it is installed."""

    def __init__(self, folder: pathlib.Path, manifest: Mapping[str, Any]):
        super().__init__(folder, manifest)
        if importlib.util.find_spec("litert_lm"):
            self._compare(folder, manifest)
            self.where += f"; and LiteRT-LM {version('litert-lm-api')}, which says the same"

    def _source(self, folder: pathlib.Path) -> dict[str, Any]:
        return {"model_content": litert_lm.section(folder / litert_lm.FILE)}

    def start(self) -> tuple[dict[str, np.ndarray], int]:
        """The caches, and how many tokens they hold."""
        return super().start(), 0

    def step(self, program: str, state: tuple[Named, int], inputs: Named) -> tuple[Named, tuple[Named, int]]:
        """All tokens but the newest to prefill, and that one to decode, which gives logits."""
        (caches, length), n = state, int(inputs["n_new"][0])
        if n > 1:
            caches = self._read(caches, length, inputs["tokens"], n - 1)
        newest = {"tokens": inputs["tokens"][:, n - 1 : n], "input_pos": np.array([length + n - 1], np.int32)}
        results, caches = super().step("decode", caches, newest)
        return {"logits": results["logits"][:, 0]}, (caches, length + n)

    def _read(self, caches: Named, length: int, tokens: np.ndarray, n: int) -> Named:
        t = np.arange(tokens.shape[1], dtype=np.int32)
        inputs = {
            "tokens": np.where(t < n, tokens, 0),
            "input_pos": np.where(t < n, length + t, 0).astype(np.int32),
        }
        return super().step("prefill", caches, inputs)[1]

    def _compare(self, folder: pathlib.Path, manifest: Mapping[str, Any]) -> None:
        """Raise CheckpointError where the engine's greedy text is not the interpreter's."""
        tokenizer = load_tokenizer(folder)
        ends = manifest["tokenizer"]["eos_ids"]
        found = list(itertools.islice(self.greedy(tokenizer.encode(PROMPT), manifest["chunk"]), SPOKEN))
        kept = list(itertools.takewhile(lambda token: token not in ends, found))
        ours, theirs = tokenizer.decode(kept), litert_lm.speak(folder / litert_lm.FILE, PROMPT, SPOKEN)
        if ours.strip() != theirs.strip():
            raise CheckpointError(f"LiteRT-LM says {theirs!r} where its own programs say {ours!r}")


TARGET = Target(
    name="litert",
    summary="one file for LiteRT on Android and elsewhere, or for LiteRT-LM",
    platforms=("tflite", BUNDLE),
    needs=NEEDS,
    extra="export-litert",
    refuses=refuses,
    build=build,
    run=runner,
    allowed=allowed,
)
