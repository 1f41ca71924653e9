"""jaxllm's own folder: safetensors under canonical names, packed weights as they are in memory.

A folder has config.json (the source's, Hugging Face's spelling), model.safetensors or shards of it with the usual
index, and the tokenizer's files. An array is stored as its path ("norm.w"), a packed weight as its parts
("layers.0.mixer.q.w.codes", "...scale"). config.json's quantization_config says the rest:

    {"quant_method": "jaxllm", "version": 1, "formats": {name: fields of Format},
     "tensors": {path: {"format": name, "columns": in, "dtype": what it computes as}}}
"""

from __future__ import annotations

import json
import os
import pathlib
import reprlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from jaxllm.checkpoint.canonical import assemble
from jaxllm.checkpoint.safetensors import DTYPES, read_folder
from jaxllm.config import ModelConfig, params_shape
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.families.base import Family, Rule
from jaxllm.quant.describe import COMPUTED, head, is_head, readable, weight
from jaxllm.quant.formats import Format, as_json
from jaxllm.quant.qtensor import PARTS, QTensor
from jaxllm.quant.recipe import Recipe, converted

METHOD, VERSION = "jaxllm", 1
SHARD = 10**9  # bytes of tensors in one file, unless one tensor alone has more
HEADER = 2**16  # bytes before the first tensor of a file: a page boundary, and room for some 500 names
# What lies beside weights: the tokenizer, its chat templates, how to generate.
BESIDE = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.tiktoken")
BESIDE += ("chat_template*", "additional_chat_templates/*.jinja", "generation_config.json")
_NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}

Readers = dict[str, Callable[[], Any]]
Make = Callable[[Mapping[str, np.ndarray]], QTensor]


# ---- writing --------------------------------------------------------------------------------------------


class Writer:
    """Writes a folder tensor by tensor; it appears under its name whole, when `close` is done, or not at all.

        with Writer(folder) as writer:
            writer.put("norm.w", array)
            writer.close(values, beside(source_folder))

    Raises CheckpointError where there is something at `folder` already, or nothing can be written there.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = pathlib.Path(folder)
        self.tensors: dict[str, dict[str, Any]] = {}
        self.formats: dict[str, Format] = {}
        self.nbytes = 0
        self.dtype: str | None = None  # that of the embedding, which is the activations'
        self._shards: list[Shard] = []
        self._part = self.folder.with_name(f".{self.folder.name}.part-{os.getpid()}")
        if self.folder.exists() and not (self.folder.is_dir() and not any(self.folder.iterdir())):
            raise CheckpointError(f"{self.folder} exists already; give a new folder, or delete this one first")
        try:
            self._part.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be written ({error.strerror}); give another") from error

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        for shard in self._shards:
            shard.file.close()
        shutil.rmtree(self._part, ignore_errors=True)

    def put(self, path: str, leaf: Any) -> None:
        """Write the parameter at a canonical path: an array, or a QTensor. Device arrays are fetched."""
        if isinstance(leaf, QTensor):
            self._describe(path, leaf)
            for name, part in leaf.parts().items():
                self._array(f"{path}.{name}", np.asarray(part))
        elif isinstance(leaf, np.ndarray) or hasattr(leaf, "__array__"):
            self._array(path, np.asarray(leaf))
        else:
            kind = type(leaf).__name__
            raise CheckpointError(
                f"{path} is a {kind}, and a folder holds arrays and packed weights; merge it first"
            )
        if path == "embed.w":
            self.dtype = np.dtype(leaf.dtype).name

    def _describe(self, path: str, q: QTensor) -> None:
        key, n = q.format.name, 1
        while self.formats.setdefault(key, q.format) != q.format:
            n += 1
            key = f"{q.format.name}#{n}"
        self.tensors[path] = head(q, key)

    def _array(self, name: str, x: np.ndarray) -> None:
        if not self._shards or not self._shards[-1].takes(name, x):
            self._shards.append(Shard(self._part / f"{len(self._shards)}"))
        self._shards[-1].put(name, x)
        self.nbytes += x.nbytes

    def close(self, values: Mapping[str, Any], files: Mapping[str, bytes] | None = None) -> None:
        """Finish the folder and move it into place.

        values: the config, as Hugging Face spells config.json; files: name -> contents of what lies beside."""
        total = len(self._shards)
        where = {}
        for i, shard in enumerate(self._shards, 1):
            name = "model.safetensors" if total == 1 else f"model-{i:05}-of-{total:05}.safetensors"
            shard.close(self._part / name)
            where |= dict.fromkeys(shard.header, name)
        if total > 1:
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": where}
            _write_json(self._part / "model.safetensors.index.json", index)
        for name, data in (files or {}).items():
            (self._part / name).parent.mkdir(exist_ok=True)
            (self._part / name).write_bytes(data)
        _write_json(self._part / "config.json", self._config(values))
        self._part.rename(self.folder)

    def _config(self, values: Mapping[str, Any]) -> dict[str, Any]:
        formats = {key: as_json(f) for key, f in self.formats.items()}
        ours = {"quant_method": METHOD, "version": VERSION, "formats": formats, "tensors": self.tensors}
        kept = {name: value for name, value in values.items() if name not in ("torch_dtype", "dtype")}
        return kept | {"dtype": self.dtype, "quantization_config": ours}


class Shard:
    """One safetensors file being written: its header goes into room left free for it when all is known.

    Open a new one for a tensor that it does not take. Raises CheckpointError for a dtype that no file can hold.
    """

    def __init__(self, path: pathlib.Path):
        self.path, self.header, self.end, self.length = path, {}, 0, 2
        self.file = path.open("wb")
        self.file.seek(HEADER)

    def _entry(self, name: str, x: np.ndarray) -> dict[str, Any]:
        if x.dtype not in _NAMES:
            raise CheckpointError(f"{name}: arrays of dtype {x.dtype} cannot be stored; convert it first")
        return {"dtype": _NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [self.end, self.end + x.nbytes]}

    def takes(self, name: str, x: np.ndarray) -> bool:
        """Whether there is room left for a tensor and its name; an empty file takes any."""
        more = len(json.dumps({name: self._entry(name, x)}))
        return not self.header or (self.end + x.nbytes <= SHARD and self.length + more <= HEADER - 8)

    def put(self, name: str, x: np.ndarray) -> None:
        """Write a tensor behind those before."""
        self.header[name] = self._entry(name, x)
        self.length += len(json.dumps({name: self.header[name]}))
        self.file.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
        self.end += x.nbytes

    def close(self, path: pathlib.Path) -> None:
        """Write the header, and move the file to `path`."""
        self.file.seek(0)
        text = json.dumps(self.header).encode().ljust(HEADER - 8)
        self.file.write((HEADER - 8).to_bytes(8, "little") + text)
        self.file.close()
        self.path.rename(path)


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def beside(folder: pathlib.Path) -> dict[str, bytes]:
    """Name -> contents of a checkpoint folder's tokenizer, template and generation files."""
    found = {path for pattern in BESIDE for path in folder.glob(pattern) if path.is_file()}
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(found)}


@dataclass(frozen=True)
class Written:
    """What `convert` wrote."""

    weights: int  # values that the tensors stand for
    nbytes: int  # of all tensors
    formats: dict[str, int]  # name -> how many values are in that format; arrays under their dtype's name

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights


def convert(
    readers: Readers,
    family: Family,
    config: ModelConfig,
    values: Mapping[str, Any],
    folder: str | os.PathLike,
    *,
    recipe: Recipe,
    files: Mapping[str, bytes] | None = None,
    source: str = "the checkpoint",
    on_tensor: Callable[[str], None] = lambda name: None,
) -> Written:
    """Quantize a checkpoint into a new folder, reading, rounding and writing one tensor at a time.

    readers, family, values: those of the Source; files: what is to lie beside. Where a checkpoint has experts in
    tensors of their own, the experts of one matrix are stacked before they are rounded. Nothing is left behind
    where it fails. Raises ConfigError for a rule that decides about no weight, CheckpointError as `assemble`,
    `encode` and `Writer` do.
    """
    formats, counts = recipe.assign(params_shape(config)), {}
    with Writer(folder) as writer:

        def place(path: str, x: Any) -> None:
            leaf = converted(x, formats.get(path), recipe.dtype)
            writer.put(path, leaf)
            kind = leaf.format.name if isinstance(leaf, QTensor) else leaf.dtype.name
            counts[kind] = counts.get(kind, 0) + leaf.size

        assemble(readers, config, family, place=place, source=source, on_tensor=on_tensor)
        writer.close(values, files)
    return Written(sum(counts.values()), writer.nbytes, counts)


# ---- reading --------------------------------------------------------------------------------------------


def recognised(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a folder written here."""
    ours = values.get("quantization_config")
    return isinstance(ours, dict) and ours.get("quant_method") == METHOD


def open_folder(
    folder: pathlib.Path, values: Mapping[str, Any], family: Family
) -> tuple[dict[str, Any], Family, Callable[[], Readers]]:
    """(config values, family, readers) of a folder whose config.json is `values` and whose model_type `family` is.

    Raises ConfigError for a description that is malformed or of a later version."""
    packed = _described(folder / "config.json", values["quantization_config"])
    kept = {name: value for name, value in values.items() if name != "quantization_config"}
    return kept, identity(family), partial(_readers, folder, packed)


def identity(family: Family) -> Family:
    """The family of a checkpoint whose names and layouts are canonical already."""
    return Family(
        lambda c: replace(family.describe(c), unit_head=False),  # the stored head is of unit rows
        (Rule("(.*)", r"\1"),),
    )


def _described(where: pathlib.Path, ours: dict[str, Any]) -> dict[str, Make]:
    if ours.get("version") != VERSION:
        version = reprlib.repr(ours.get("version"))
        raise ConfigError(
            f"{where}: this jaxllm reads version {VERSION} of its own format, got {version}; update it"
        )
    formats, tensors = ours.get("formats"), ours.get("tensors")
    if not isinstance(formats, dict) or not isinstance(tensors, dict):
        raise ConfigError(f"{where}: quantization_config should have the objects formats and tensors")
    try:
        table = {name: readable(value) for name, value in formats.items()}
        return {path: _packed(path, value, table) for path, value in tensors.items()}
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _packed(path: str, value: Any, table: dict[str, Format]) -> Make:
    if not is_head(value):
        wanted = f"format, columns and dtype: columns should be a size, and dtype one of {', '.join(COMPUTED)}"
        raise ConfigError(f"{path} should have {wanted}; got {reprlib.repr(value)}")
    name = value["format"]
    if not isinstance(name, str) or name not in table:
        raise ConfigError(f"{path} is in the format {reprlib.repr(name)}, which formats does not list")
    return partial(weight, format=table[name], columns=value["columns"], dtype=value["dtype"])


def _readers(folder: pathlib.Path, packed: dict[str, Make]) -> Readers:
    arrays = read_folder(folder)
    readers: Readers = {}
    for path, make in packed.items():
        names = {part: f"{path}.{part}" for part in PARTS if f"{path}.{part}" in arrays}
        if not {"codes", "scale"} <= names.keys():
            raise CheckpointError(f"{folder}: {path} is packed, and its codes or its scale are missing")
        readers[path] = partial(_read, path, make, {part: arrays.pop(name) for part, name in names.items()})
    return arrays | readers


def _read(path: str, make: Make, parts: dict[str, Callable[[], np.ndarray]]) -> QTensor:
    read = {name: reader() for name, reader in parts.items()}
    try:
        return make(read)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; get the folder again") from None
