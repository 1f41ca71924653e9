"""A .tflite file for LiteRT, on Android and elsewhere; run here by its interpreter."""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np

from jaxllm.checkpoint.canonical import flatten
from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.export import litert_file, litert_program
from jaxllm.export.options import Options
from jaxllm.export.program import Program
from jaxllm.export.target import ALLOWED, PACKED, Built, Formats, Job, Target, Values

FILE = "model.tflite"
NEEDS = ("litert_converter", "ai_edge_litert")


def refuses(config: ModelConfig, values: Values, formats: Formats, options: Options) -> str | None:
    """Formats whose codes would not be ours, and programs that LiteRT cannot have: they are converted to find out."""
    for path, format in formats.items():
        if reason := litert_file.unfit(format):
            return f"{path} is in {format.name}: {reason}"
    if not all(importlib.util.find_spec(name) for name in NEEDS):
        return None  # the missing package is what has to be said
    try:
        litert_program.converted(config, options)
    except ConfigError as error:
        return str(error)
    return None


def allowed(config: ModelConfig, formats: Formats) -> float:
    """LiteRT rounds activations to 8 bits beside packed weights, whatever they are here."""
    return max(PACKED, ALLOWED[config.dtype]) if formats else ALLOWED[config.dtype]


def build(job: Job) -> Built:
    """model.tflite: prefill and decode, and the parameters once."""
    made = litert_program.converted(job.model.config, job.options)
    kinds = litert_file.write(job.folder / FILE, made.data, flatten(job.model.params))
    programs = tuple(map(_without_parameters, made.programs))
    files = {program.name: {"tflite": FILE} for program in programs}
    versions = {name: version(name) for name in ("litert-converter", "ai-edge-litert")}
    counts = {kind: sum(k == kind for k in kinds.values()) for kind in sorted(set(kinds.values()))}
    return Built(programs, files, (FILE,), versions, {"matrices": counts})


def _without_parameters(program: Program) -> Program:
    return replace(program, inputs=tuple(port for port in program.inputs if port.role != "parameter"))


class Runner:
    """LiteRT's interpreter on this machine's CPU."""

    def __init__(self, folder: pathlib.Path, manifest: Mapping[str, Any]):
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(str(folder / FILE))
        self._interpreter = interpreter  # the runners below only borrow it
        self._programs = {name: interpreter.get_signature_runner(name) for name in manifest["programs"]}
        self._ports = manifest["programs"]["decode"]["inputs"]
        self.how, self.where = "executed", f"LiteRT on cpu, ai-edge-litert {version('ai-edge-litert')}"

    def start(self) -> dict[str, np.ndarray]:
        """Every array of the state full of its initial value."""
        state = [port for port in self._ports if port["role"] == "state"]
        return {port["name"]: np.full(port["shape"], port["initial"], port["dtype"]) for port in state}

    def step(
        self, program: str, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """See `jaxllm.export.target.Runner`."""
        found = self._programs[program](**state, **inputs)
        return {k: x for k, x in found.items() if k not in state}, {k: found[k] for k in state}


TARGET = Target(
    name="litert",
    summary="one .tflite file for LiteRT, on Android and elsewhere",
    platforms=(),
    needs=NEEDS,
    extra="export-litert",
    refuses=refuses,
    build=build,
    run=Runner,
    allowed=allowed,
)
