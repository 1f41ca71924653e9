"""What a target is. A new one is a file in `targets/` with a `TARGET`, found by its name; nothing else changes."""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError, MissingExtraError
from jaxllm.export import targets
from jaxllm.export.options import Options
from jaxllm.export.program import Program
from jaxllm.model import Model
from jaxllm.quant import Format

# By the dtype of activations. Programs that do the same in another order were within 1e-6, 2e-3 and 1e-2.
ALLOWED = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
PACKED = 5e-2  # where one side rounds activations to 8 bits beside packed weights, as the CPU's kernels do: 1.5e-2
Formats = Mapping[str, Format]  # path of each packed parameter -> its format
Values = Mapping[str, Any]  # the checkpoint's config.json; empty for a model made by hand


def allowed(config: ModelConfig, formats: Formats) -> float:
    """How far a logit may be from the live model's, over the largest one, where a target says nothing else."""
    rounded = formats and config.dtype != "float32"  # f32 activations are taken as they are
    return max(ALLOWED[config.dtype], PACKED) if rounded else ALLOWED[config.dtype]


@dataclass(frozen=True)
class Job:
    """What a target builds from."""

    model: Model
    options: Options  # settled: every size is said, and the platform
    programs: tuple[Program, Program]  # prefill and decode; a target may have programs of its own instead
    folder: pathlib.Path  # empty, but for the tokenizer's files; what is written there is the artifact
    source: pathlib.Path | None = None  # the checkpoint that `model` was loaded from; None: it was given as it is


@dataclass(frozen=True)
class Built:
    """What a target made of a Job."""

    programs: tuple[Program, Program]  # those that were built: their ports go into the manifest
    files: Mapping[str, Mapping[str, str]]  # program -> kind -> file; both may name one file
    parameters: tuple[str, ...]  # files that hold parameters
    versions: Mapping[str, str]  # of what made them, and of their formats
    limits: Mapping[str, Any] = field(default_factory=dict)  # whatever else a loader must know


class Runner(Protocol):
    """An artifact in a process that runs it."""

    how: str  # "executed" on the platform itself, "simulated", or "compiled" there and interpreted here
    where: str  # by what, in words

    def start(self) -> Any:
        """An empty state; None where the artifact keeps it inside. Where the batch is symbolic: start(rows)."""

    def step(self, program: str, state: Any, inputs: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Any]:
        """(results, state) of "prefill" or "decode"; inputs and results are the manifest's, by name."""


@dataclass(frozen=True)
class Target:
    """One kind of artifact."""

    name: str
    summary: str
    platforms: tuple[str, ...]  # choices of --platform, the usual one first; () where there is no choice
    needs: tuple[str, ...]  # modules that building and running import
    extra: str | None  # of jaxllm, which brings them
    refuses: Callable[[ModelConfig, Values, Formats, Options], str | None]  # why it cannot take a model, or None
    build: Callable[[Job], Built]
    run: Callable[[pathlib.Path, Mapping[str, Any]], Runner]  # of a directory and its manifest
    allowed: Callable[[ModelConfig, Formats], float] = allowed  # difference of a logit, over the largest
    penalties: bool = False  # whether a sampler inside may remember what was said, in the state
    pallas: tuple[str, ...] = ()  # platforms for which its programs can have jaxllm's kernels in them
    symbolic: tuple[str, ...] = ()  # which sizes it can leave open, of options.SYMBOLS

    def missing(self) -> str | None:
        """Which modules are not installed, with the command that brings them."""
        absent = [name for name in self.needs if not _installed(name)]
        if not absent:
            return None
        return f"the target {self.name} needs {' and '.join(absent)}: pip install 'jaxllm[{self.extra}]'"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor is the package that it would be in
        return False


def names() -> list[str]:
    """Of all targets."""
    return sorted(module.name for module in pkgutil.iter_modules(targets.__path__))


def find(name: str) -> Target:
    """The target of that name. Raises ConfigError where there is none."""
    if name not in names():
        raise ConfigError(f"there is no target {name!r}; there are {', '.join(names())}")
    return importlib.import_module(f"{targets.__name__}.{name}").TARGET


def check(target: Target, config: ModelConfig, values: Values, formats: Formats, options: Options) -> None:
    """Raise ConfigError where the target cannot take a model, MissingExtraError where it lacks a package."""
    if options.platform not in (target.platforms or (None,)):
        known = f"its platforms are {', '.join(target.platforms)}" if target.platforms else "it has no platforms"
        raise ConfigError(f"the target {target.name} knows no platform {options.platform!r}; {known}")
    if options.penalties and not target.penalties:
        raise ConfigError(f"the target {target.name} has no penalties in its sampler; give --sampler in-graph")
    if options.kernels != "portable" and options.platform not in target.pallas:
        where = f"on {' and '.join(target.pallas)} alone" if target.pallas else "on no platform"
        raise ConfigError(f"the target {target.name} has kernels of Pallas {where}; give --kernels portable")
    if fixed := [name for name in options.symbolic if name not in target.symbolic]:
        raise ConfigError(f"the target {target.name} wants its {fixed[0]} said; leave it out of what is symbolic")
    if reason := target.refuses(config, values, formats, options):
        raise ConfigError(f"the target {target.name} cannot take this model: {reason}")
    if reason := target.missing():
        raise MissingExtraError(reason)
