"""A model in hand: config, parameters, tokenizer. The only place that knows files and names together."""

from __future__ import annotations

import json
import os
import pathlib
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxllm import quant
from jaxllm.arena import Arena
from jaxllm.checkpoint import native, orbax
from jaxllm.checkpoint.canonical import Values, assemble, flatten
from jaxllm.checkpoint.source import Source, open_source
from jaxllm.config import ModelConfig, params_shape
from jaxllm.errors import CheckpointError, ConfigError, MissingExtraError
from jaxllm.families import model_config
from jaxllm.files import read_object
from jaxllm.progress import progress
from jaxllm.quant import Format
from jaxllm.tokenizer import Tokenizer, load_tokenizer
from jaxllm.tokenizer_gguf import from_metadata
from jaxllm.tokenizer_llama2c import load_beside

BUNDLED = pathlib.Path(__file__).parent / "bundled"
DTYPES = ("float32", "bfloat16", "float16")
CONFIG_FILES = ("config.json", "mlc-chat-config.json", "*-cache.json")
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.jinja", "*.txt", "chat_templates/*")
HUB_FILES += ("params_shard_*.bin",)  # of MLC-LLM; other .bin files are pickles


@dataclass(frozen=True)
class Model:
    """What `load` returns. Nothing in it changes; parameters are a nested dict of arrays [out, in]."""

    config: ModelConfig
    params: dict
    tokenizer: Tokenizer | None = None
    eos_ids: frozenset[int] = frozenset()  # any of them ends a generation
    defaults: Mapping[str, Any] = field(default_factory=dict)  # sampling values of generation_config.json
    name: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)  # the config it was made from, as config.json has it
    folder: pathlib.Path | None = None  # where its tokenizer's files lie

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(x.size for x in flatten(self.params).values())

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(x.nbytes for x in flatten(self.params).values())

    def pieces(self, ids: Iterable[int]) -> tuple[str, ...]:
        """Readable text of each token, for display; () without a tokenizer."""
        if self.tokenizer is None:
            return ()
        return tuple(self.tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids)

    def __repr__(self) -> str:
        c = self.config
        return (
            f"Model({self.name!r}, {self.size:,} parameters in {self.nbytes / 1e6:.1f} MB, "
            f"{len(c.blocks)} layers, width {c.width}, vocabulary {c.vocab}, {c.dtype})"
        )


def bundled(which: str = "target") -> pathlib.Path:
    """The folder of what ships with jaxllm: "target", a smaller "draft", or heads for it, "medusa" and "eagle"."""
    if which not in ("target", "draft", "medusa", "eagle"):
        raise CheckpointError(f"the bundled models are 'target', 'draft', 'medusa' and 'eagle', got {which!r}")
    return BUNDLED / which


def load(
    path_or_hub_id: str | os.PathLike | None = None,
    *,
    dtype: str | None = None,
    max_len: int | None = None,
    ignore: Iterable[str] = (),
    revision: str | None = None,
) -> Model:
    """Load a checkpoint: a folder, a GGUF or llama2.c file, a hub id ("org/name"); by default the bundled model.

    A folder may be Hugging Face's (plain or quantized safetensors), MLC-LLM's, Orbax's or jaxllm's own; packed
    weights stay packed (`jaxllm.quant.QTensor`), and one Notice names those that could not.

    dtype: "float32", "bfloat16" or "float16" for matrices and activations; as stored if not given. Packed
    weights keep their codes and are computed with in it.
    max_len: positions wanted, where the rotary scaling depends on it (dynamic, longrope).
    ignore: config fields to pass over though jaxllm does not know them.
    revision: of the hub repository.

    Tensors are read one at a time: the peak is the parameters and one tensor more.

    Raises ConfigError, CheckpointError or TokenizerError, each listing everything wrong; MissingExtraError for a
    hub id without huggingface_hub.
    """
    if dtype is not None and str(dtype) not in DTYPES:
        raise ConfigError(f"dtype should be one of {', '.join(DTYPES)}, got {dtype!r}")
    source = open_source(find(path_or_hub_id, revision))
    model = _without_params(source, _config(source, max_len, ignore))
    if source.saved is not None:
        return _restored(model, source.saved, dtype=dtype)
    readers, arena = source.readers(), Arena()
    with progress(f"loading {source.path.name}", len(readers)) as advance:
        params = assemble(
            readers,
            model.config,
            source.family,
            place=lambda path, x: arena.put(_of_dtype(x, dtype)),
            source=str(source.path),
            on_tensor=lambda name: advance(),
        )
    config = replace(model.config, dtype=str(params["embed"]["w"].dtype))
    return replace(model, config=config, params=params)


def load_orbax(
    folder: str | os.PathLike, *, sharding: orbax.Sharding | None = None, dtype: str | None = None
) -> Model:
    """Load a folder of `checkpoint.orbax.save_orbax`, every array placed by `sharding` as it is read.

    sharding: a jax.sharding.Sharding for all, or a function (path, jax.ShapeDtypeStruct) -> Sharding for each;
    "layers.0.mixer.q.w" is an array's path, and "layers.0.mixer.q.w.codes", ".scale" and so on those of the parts
    of a packed weight. dtype: as in `load`, which reads the same folders onto the default device.

    Raises CheckpointError for any other folder and a malformed one; MissingExtraError without orbax-checkpoint.
    """
    if dtype is not None and str(dtype) not in DTYPES:
        raise ConfigError(f"dtype should be one of {', '.join(DTYPES)}, got {dtype!r}")
    source = open_source(find(folder))
    if source.saved is None:
        raise CheckpointError(f"{source.path} was not written by save_orbax; read it with jaxllm.load")
    return _restored(_without_params(source, source.saved.config), source.saved, dtype=dtype, sharding=sharding)


def _restored(model: Model, saved: orbax.Saved, *, dtype: str | None, sharding=None) -> Model:
    config = replace(saved.config, dtype=dtype or saved.config.dtype)
    params = orbax.restore(saved, sharding=sharding, dtype=dtype)
    return replace(model, config=config, params=params, eos_ids=saved.eos_ids, defaults=saved.defaults)


def save(model: Model, folder: str | os.PathLike) -> None:
    """Write a model into a new folder of jaxllm's own format, whatever its weights came from; `load` reads it.

    Packed weights are stored as they are. Raises CheckpointError where `folder` exists or cannot be written, or
    the parameters are not those of the config; ConfigError for a model made by hand, without `values`.
    """
    if not model.values:
        raise ConfigError("the model has no values (its config.json); give Model(values=...) to save it")
    flat, shapes = flatten(model.params), params_shape(model.config)
    wrong = [p for p in {**shapes, **flat} if p not in flat or shapes.get(p) != tuple(flat[p].shape)]
    if wrong:
        raise CheckpointError(f"the parameters differ from what the config describes: {', '.join(wrong[:5])}")
    with native.Writer(folder) as writer:
        for path, leaf in flat.items():
            writer.put(path, leaf)
        writer.close(model.values, _beside(model))


def quantize_files(
    path_or_hub_id: str | os.PathLike | None,
    folder: str | os.PathLike,
    *,
    format: str | Format | None = None,
    rules: Iterable[tuple[str, Format | str | None]] = (),
    dtype: str | None = None,
    revision: str | None = None,
) -> native.Written:
    """Quantize a checkpoint (as `load` takes it) into a new folder that `load` reads, one tensor at a time.

    rules: (path pattern, format) pairs as of `quant.Recipe`, which come first; format: what the rest gets by its
    default rules (see `quant.recipe`), nothing without it. dtype: of what is not quantized and of the
    activations; the format's own, or as stored, if not given.

    The peak is the largest tensor, or, where each expert is a tensor of its own, the experts of one layer.
    Raises as `load` does; ConfigError for an unknown format and for a rule that decides about no weight,
    CheckpointError where there is something at `folder`.
    """
    source = open_source(find(path_or_hub_id, revision))
    model = _without_params(source, _config(source, None, ()))
    rules = tuple(rules)
    recipe = quant.recipe(format, model.config, first=rules) if format else quant.Recipe(rules)
    recipe = replace(recipe, dtype=dtype or recipe.dtype)
    readers = source.readers()
    with progress(f"quantizing {source.path.name}", len(readers)) as advance:
        return native.convert(
            readers,
            source.family,
            model.config,
            source.values,
            folder,
            recipe=recipe,
            files=_beside(model),
            source=str(source.path),
            on_tensor=lambda name: advance(),
        )


def _without_params(source: Source, config: ModelConfig) -> Model:
    tokenizer = _tokenizer(source)
    eos, defaults = _generation(source.folder, source.values, tokenizer)
    defaults = {**(source.generation or {}), **defaults}
    folder = source.folder if source.path.is_dir() else None
    return Model(config, {}, tokenizer, eos, defaults, source.path.name, source.values, folder)


def _beside(model: Model) -> dict[str, bytes]:
    """The tokenizer's own files where they are still there, others that make the same one where not."""
    files = native.beside(model.folder) if model.folder and model.folder.is_dir() else {}
    if model.tokenizer is not None and not any(name.startswith(("tokenizer", "vocab")) for name in files):
        files |= model.tokenizer.files()
    generation = {**model.defaults} | ({"eos_token_id": sorted(model.eos_ids)} if model.eos_ids else {})
    return files | ({"generation_config.json": json.dumps(generation).encode()} if generation else {})


def load_config(
    path_or_hub_id: str | os.PathLike | None = None,
    *,
    max_len: int | None = None,
    ignore: Iterable[str] = (),
    revision: str | None = None,
) -> ModelConfig:
    """Only the ModelConfig, without reading weights; dtype is what config.json says of the file."""
    return config_of(open_source(find(path_or_hub_id, revision, files=CONFIG_FILES)), max_len, ignore)


def config_of(source: Source, max_len: int | None = None, ignore: Iterable[str] = ()) -> ModelConfig:
    """The ModelConfig of a checkpoint that is open already; arguments and dtype as in `load_config`."""
    config = _config(source, max_len, ignore)
    if source.saved is not None:
        return config
    values = source.values
    stored = str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch.")
    return replace(config, dtype=stored if stored in DTYPES else "float32")


def _tokenizer(source: Source) -> Tokenizer | None:
    if source.metadata is not None:
        return from_metadata(source.metadata, source.path)
    if source.tokens is not None:
        return load_beside(source.folder, source.tokens)
    return load_tokenizer(source.folder)


def _config(source: Source, max_len, ignore) -> ModelConfig:
    if source.saved is not None:
        config = source.saved.config
        if max_len not in (None, config.max_len):
            raise ConfigError(f"{source.path} was saved for {config.max_len} positions; load what it came from")
        return config
    try:
        return model_config(source.family, source.values, context=max_len, ignore=ignore)
    except ConfigError as error:
        where = source.path / "config.json" if source.path.is_dir() else source.path
        raise ConfigError(f"{where}: {error}") from None


def _of_dtype(x: Values, dtype: str | None) -> Values:
    # Vectors (norms, biases) stay as stored: they cost nothing and are used in f32.
    if dtype is not None and x.ndim >= 2:
        return x.astype(dtype)
    return x.astype(np.float32) if x.dtype == np.float64 else x


def find(
    path_or_hub_id: str | os.PathLike | None,
    revision: str | None = None,
    *,
    files: Iterable[str] = HUB_FILES,
) -> pathlib.Path:
    """The local folder of a checkpoint; where the name is a hub id, `files` (patterns) are downloaded first.

    Raises CheckpointError where there is nothing of that name, MissingExtraError without huggingface_hub."""
    if path_or_hub_id is None:
        return bundled()
    if not isinstance(path_or_hub_id, str | os.PathLike):
        raise CheckpointError(f"expected a folder or a hub id, got {reprlib.repr(path_or_hub_id)}")
    path = pathlib.Path(path_or_hub_id)
    try:
        if path.is_dir() or path.is_file():
            return path
    except OSError as error:
        raise CheckpointError(f"{str(path)[:200]} cannot be opened ({error.strerror}); give a folder") from error
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_hub_id)):
        raise CheckpointError(f"there is no folder {path}, and it is not a hub id of the form organisation/name")
    return _download(str(path_or_hub_id), revision, files)


def _download(name: str, revision: str | None, files: Iterable[str]) -> pathlib.Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError(
            f"there is no folder {name!r}, and fetching it from the hub needs huggingface_hub: "
            "pip install 'jaxllm[hub]'"
        ) from error
    try:
        return pathlib.Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # which errors its network library raises depends on the version
        raise CheckpointError(
            f"there is no folder {name!r}, and the hub did not give it ({type(error).__name__}: {error}); "
            "check the name, the network and, for gated models, HF_TOKEN"
        ) from error


def _generation(folder, values, tokenizer) -> tuple[frozenset[int], dict[str, Any]]:
    """End tokens and sampling defaults: generation_config.json, else config.json, else the tokenizer's."""
    path = folder / "generation_config.json"
    given = read_object(path, ConfigError, "download it again or delete it") if path.is_file() else {}
    eos = next((e for e in (given.get("eos_token_id"), values.get("eos_token_id")) if e is not None), None)
    if eos is None and tokenizer is not None:
        eos = tokenizer.eos_id
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int for i in ids):
        raise ConfigError(
            f"{folder}: eos_token_id should be a token id or a list of them, got {reprlib.repr(eos)}"
        )
    return frozenset(ids), given
