"""From a checkpoint to a verified directory: nothing under its name before that."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from jaxllm import quant
from jaxllm.checkpoint.source import open_source
from jaxllm.config import ModelConfig, params_shape
from jaxllm.errors import CheckpointError, ConfigError, MissingExtraError
from jaxllm.export import manifest as manifests
from jaxllm.export import verification
from jaxllm.export.options import Options, settled
from jaxllm.export.parameters import abstract
from jaxllm.export.program import programs
from jaxllm.export.target import Formats, Job, Target, check, find
from jaxllm.model import Model, config_of, load, quantize_files
from jaxllm.model import find as find_files
from jaxllm.progress import progress
from jaxllm.quant.formats import UNQUANTIZED, named

STAGES = 4  # parameters and programs, the live model, the artifact, the manifest


@dataclass(frozen=True)
class Exported:
    """A finished directory."""

    folder: pathlib.Path
    manifest: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())


def export(
    source: str | os.PathLike | Model | None,
    target: str,
    out: str | os.PathLike,
    *,
    format: str | None = None,
    dtype: str | None = None,
    options: Options | None = None,
) -> Exported:
    """Write a model (a checkpoint as `jaxllm.load` takes it, or a Model) as an artifact of a target.

    format: quantize to it on the way, tensor by tensor; dtype: of what is not quantized and of activations.
    options: sizes of the programs and what they give.

    The artifact is run in a fresh process and compared with the live model before `out` exists; where anything
    fails or differs, nothing is left. Raises ConfigError for a target that cannot take the model, ContextError for
    sizes the model cannot have and MissingExtraError for packages that are not there, all before any work;
    CheckpointError where `out` exists, and JaxllmError where the artifact is not the model.
    """
    made, out = find(target), pathlib.Path(out)
    options = options or Options()
    options = replace(options, platform=options.platform or next(iter(made.platforms), None))
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out} exists already; give a new folder, or delete this one first")
    if isinstance(source, Model) and dtype is not None:
        raise ConfigError(
            f"dtype={dtype!r} is for checkpoints; a Model has its dtype already, load it with another"
        )
    config, values = _described(source)
    config = replace(config, dtype=dtype or config.dtype)
    planned = manifests.formats_of(source) if isinstance(source, Model) else {}
    options = settled(options, config)
    check(made, config, values, planned | _planned(format, config), options)
    with _aside(out) as part, progress(f"exporting for {target}", STAGES) as advance:
        model = _loaded(source, format, dtype, part)
        check(made, model.config, model.values, manifests.formats_of(model), options)
        record = _written(made, model, options, part, advance)
        part.rename(out)
    return Exported(out, record)


def _described(source: str | os.PathLike | Model | None) -> tuple[ModelConfig, Mapping[str, Any]]:
    """(config, its config.json), without reading a weight."""
    if isinstance(source, Model):
        return source.config, source.values
    opened = open_source(find_files(source))
    return config_of(opened), opened.values


def _planned(format: str | None, config: ModelConfig) -> Formats:
    if format is None:
        return {}
    assigned = quant.recipe(named(format), config).assign(params_shape(config))
    return {path: f for path, f in assigned.items() if f is not None and f.name not in UNQUANTIZED}


@contextmanager
def _aside(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty folder beside `out`, which is deleted at the end unless it was moved away."""
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written ({error.strerror}); give another folder") from error
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _loaded(source, format: str | None, dtype: str | None, part: pathlib.Path) -> Model:
    """The model to export. Files are quantized to files, so that never more than a tensor is in memory twice."""
    if isinstance(source, Model):
        return quant.quantize_model(source, format) if format else source
    if format is None:
        return load(source, dtype=dtype)
    folder = part / "quantized"
    quantize_files(source, folder, format=format, dtype=dtype)
    model = load(folder)
    shutil.rmtree(folder)
    return replace(model, name=find_files(source).name, folder=None)


def _written(target: Target, model: Model, options: Options, part: pathlib.Path, advance) -> dict[str, Any]:
    """Build, run and compare in `part` -> the manifest, written there."""
    manifests.write_tokenizer(model, part)
    pair = programs(model.config, abstract(model.params), options)
    job = Job(model, options, pair, part)
    built = target.build(job)
    advance()
    asked = verification.reference(model, options, target.allowed(model.config, manifests.formats_of(model)))
    verification.write(part / verification.NAME, verification.thinned(asked))
    record = manifests.described(target, job, built)
    manifests.write(part, record, manifests.UNVERIFIED)
    advance()
    said = verification.answers(part, manifests.UNVERIFIED, asked)
    advance()
    record |= {"verification": verification.compared(asked, *said)}
    manifests.write(part, record)
    (part / manifests.UNVERIFIED).unlink()
    advance()
    return record


def verify(folder: str | os.PathLike) -> dict[str, Any]:
    """Run an exported directory again, in a fresh process, against what the live model said when it was exported
    -> the verification record of now.

    Raises CheckpointError for a directory that is not as it was exported, and JaxllmError where it computes
    something else."""
    folder = pathlib.Path(folder)
    manifest = manifests.opened(folder)
    target = find(manifest["target"]["name"])
    if reason := target.missing():
        raise MissingExtraError(reason)
    asked = verification.read(folder / verification.NAME)
    with progress(f"running {folder.name}", 1) as advance:
        said = verification.answers(folder, manifests.NAME, asked)
        advance()
    return verification.compared(asked, *said)
