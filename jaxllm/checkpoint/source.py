"""What a path holds: a Source, whichever format its files are in. Nothing but headers is read here."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxllm.checkpoint import gguf, gguf_model, llama2c, mlc, native, orbax, packed
from jaxllm.checkpoint.canonical import Values
from jaxllm.checkpoint.safetensors import read_folder, read_metadata
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.families import family
from jaxllm.families.base import Family
from jaxllm.files import read_object

Readers = dict[str, Callable[[], Values]]


@dataclass(frozen=True)
class Source:
    """A checkpoint as `model.load` takes it."""

    path: pathlib.Path  # the folder or file; tokenizer and generation config lie in the folder
    values: dict[str, Any]  # its config, as Hugging Face spells config.json
    family: Family | None  # None where `saved` is given
    readers: Callable[[], Readers]  # opens the files: the family's tensor names -> reader of each
    metadata: dict[str, Any] | None = None  # of a file that carries its own tokenizer (GGUF)
    generation: dict[str, Any] | None = None  # sampling values that lie elsewhere than in generation_config.json
    packed_files: tuple[pathlib.Path, ...] = ()  # local files that hold packed weights; none for plain ones
    tokens: int | None = None  # of the vocabulary that lies beside under whatever name (llama2.c)
    saved: orbax.Saved | None = None  # of a folder that holds our own config and tree, and no single tensors

    @property
    def folder(self) -> pathlib.Path:
        if self.saved is not None:
            return self.saved.folder
        carries_all = self.metadata is not None  # whatever lies beside such a file is of something else
        return self.path if self.path.is_dir() or carries_all else self.path.parent

    @property
    def packed_bytes(self) -> int | None:
        """Bytes of the files with packed weights, about what `load` makes of them; None for plain weights."""
        return sum(file.stat().st_size for file in self.packed_files) or None


def open_source(path: pathlib.Path) -> Source:
    """The checkpoint at `path`, its format told by its files' contents.

    Raises ConfigError or CheckpointError where there is none, or it is malformed."""
    if path.is_file():
        return _open_file(path)
    if orbax.recognised(path):
        saved = orbax.open_folder(path)
        return Source(path, saved.values, None, partial(orbax.no_readers, path), saved=saved)
    if mlc.recognised(path):
        folder = mlc.open_folder(path)
        readers, shards = partial(mlc.readers, folder), tuple(path.glob("params_shard_*.bin"))
        return Source(
            path, folder.values, folder.family, readers, generation=mlc.sampling(folder), packed_files=shards
        )
    if not (path / "config.json").is_file() and (file := gguf.in_folder(path)):
        return _open_file(file)
    values = read_config(path)
    family = _family(path / "config.json", values)
    files = tuple(path.glob("*.safetensors"))
    if native.recognised(values):
        return Source(path, *native.open_folder(path, values, family), packed_files=files)
    if _explained(path / "config.json", packed.check, values):
        return Source(path, values, family, partial(_read_packed, path, values), packed_files=files)
    return Source(path, values, family, partial(read_folder, path))


def _read_packed(path: pathlib.Path, values: dict[str, Any]) -> Readers:
    explained = partial(packed.packed, metadata=partial(read_metadata, path))
    return _explained(path, explained, values, read_folder(path))


def _open_file(path: pathlib.Path) -> Source:
    if gguf.recognised(path):
        values, described, readers, file = gguf_model.open_file(path)
        defaults = gguf_model.generation(file.metadata)
        return Source(path, values, described, readers, file.metadata, defaults, packed_files=file.files)
    if llama2c.recognised(path):
        values, described, readers, tokens = llama2c.open_file(path)
        return Source(path, values, described, readers, tokens=tokens)
    raise CheckpointError(f"{path} is not a file of a format that is read alone; give the folder it lies in")


def _family(where: pathlib.Path, values: dict[str, Any]) -> Family:
    return _explained(where, family, values.get("model_type"))


def _explained(where: pathlib.Path, call: Callable[..., Any], *arguments: Any) -> Any:
    """What the call gives; its errors say where what they speak of lies."""
    try:
        return call(*arguments)
    except (ConfigError, CheckpointError) as error:
        raise type(error)(f"{where}: {error}") from None


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """config.json as a dict.

    Raises ConfigError where the file is missing or malformed."""
    missing = f"{folder} has no config.json; give the folder of a Hugging Face checkpoint"
    return read_object(folder / "config.json", ConfigError, "download it again", missing=missing)
