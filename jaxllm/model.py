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

import jax
import numpy as np

from jaxllm.checkpoint.canonical import assemble, flatten
from jaxllm.checkpoint.safetensors import read_folder
from jaxllm.config import ModelConfig
from jaxllm.errors import CheckpointError, ConfigError, MissingExtraError
from jaxllm.families import family, model_config
from jaxllm.progress import progress
from jaxllm.tokenizer import Tokenizer, load_tokenizer

BUNDLED = pathlib.Path(__file__).parent / "bundled"
DTYPES = ("float32", "bfloat16", "float16")
CONFIG_FILES = ("config.json",)
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.jinja", "*.txt", "chat_templates/*")


@dataclass(frozen=True)
class Model:
    """What `load` returns. Nothing in it changes; parameters are a nested dict of arrays [out, in]."""

    config: ModelConfig
    params: dict
    tokenizer: Tokenizer | None = None
    eos_ids: frozenset[int] = frozenset()  # any of them ends a generation
    defaults: Mapping[str, Any] = field(default_factory=dict)  # sampling values of generation_config.json
    name: str = ""

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
    """The folder of a model that ships with jaxllm: "target", or the smaller "draft"."""
    if which not in ("target", "draft"):
        raise CheckpointError(f"the bundled models are 'target' and 'draft', got {which!r}")
    return BUNDLED / which


def load(
    path_or_hub_id: str | os.PathLike | None = None,
    *,
    dtype: str | None = None,
    max_len: int | None = None,
    ignore: Iterable[str] = (),
    revision: str | None = None,
) -> Model:
    """Load a Hugging Face checkpoint: a folder, a hub id ("org/name"), or the bundled model by default.

    dtype: "float32", "bfloat16" or "float16" for matrices and activations; as stored if not given.
    max_len: positions wanted, where the rotary scaling depends on it (dynamic, longrope).
    ignore: config fields to pass over though jaxllm does not know them.
    revision: of the hub repository.

    Tensors are read one at a time: the peak is the parameters and one tensor more. Compiled programs are kept in
    a cache folder (see `compilation_cache`).

    Raises ConfigError, CheckpointError or TokenizerError, each listing everything wrong; MissingExtraError for a
    hub id without huggingface_hub.
    """
    compilation_cache()
    if dtype is not None and str(dtype) not in DTYPES:
        raise ConfigError(f"dtype should be one of {', '.join(DTYPES)}, got {dtype!r}")
    folder = find(path_or_hub_id, revision)
    values = read_config(folder)
    config = _config(folder, values, max_len, ignore)
    tokenizer = load_tokenizer(folder)
    readers = read_folder(folder)
    with progress(f"loading {folder.name}", len(readers)) as advance:
        params = assemble(
            readers,
            config,
            family(values.get("model_type")),
            place=lambda path, x: _place(x, dtype),
            source=str(folder),
            on_tensor=lambda name: advance(),
        )
    config = replace(config, dtype=str(params["embed"]["w"].dtype))
    eos, defaults = _generation(folder, values, tokenizer)
    return Model(config, params, tokenizer, eos, defaults, folder.name)


def load_config(
    path_or_hub_id: str | os.PathLike | None = None,
    *,
    max_len: int | None = None,
    ignore: Iterable[str] = (),
    revision: str | None = None,
) -> ModelConfig:
    """Only the ModelConfig, without reading weights; dtype is what config.json says of the file."""
    folder = find(path_or_hub_id, revision, files=CONFIG_FILES)
    values = read_config(folder)
    stored = str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch.")
    config = _config(folder, values, max_len, ignore)
    return replace(config, dtype=stored if stored in DTYPES else "float32")


def _config(folder, values, max_len, ignore) -> ModelConfig:
    try:
        return model_config(family(values.get("model_type")), values, context=max_len, ignore=ignore)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from None


def _place(x: np.ndarray, dtype: str | None) -> jax.Array:
    # Vectors (norms, biases) stay as stored: they cost nothing and are used in f32.
    if dtype is not None and x.ndim >= 2:
        x = x.astype(dtype)
    elif x.dtype == np.float64:
        x = x.astype(np.float32)
    # On a CPU the array takes over x's memory where it is aligned. Waiting keeps one tensor in flight.
    return jax.device_put(x).block_until_ready()


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
        if path.is_dir():
            return path
        found = path.exists()
    except OSError as error:
        raise CheckpointError(f"{str(path)[:200]} cannot be opened ({error.strerror}); give a folder") from error
    if found:
        raise CheckpointError(f"{path} is a file; give the folder that holds config.json and the weights")
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


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """config.json as a dict.

    Raises ConfigError where the file is missing or malformed, or the weights are quantized."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint") from error
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} should hold an object, got {type(values).__name__}")
    if method := values.get("quantization_config"):
        kind = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
        raise ConfigError(
            f"{path}: weights quantized with {kind!r} are not read yet; use the unquantized checkpoint"
        )
    return values


def _generation(folder, values, tokenizer) -> tuple[frozenset[int], dict[str, Any]]:
    """End tokens and sampling defaults: generation_config.json, else config.json, else the tokenizer's."""
    path = folder / "generation_config.json"
    given: Any = {}
    if path.is_file():
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise ConfigError(f"{path} is not valid JSON ({error}); download it again or delete it") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{path} should hold an object, got {type(given).__name__}")
    eos = next((e for e in (given.get("eos_token_id"), values.get("eos_token_id")) if e is not None), None)
    if eos is None and tokenizer is not None:
        eos = tokenizer.eos_id
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int for i in ids):
        raise ConfigError(
            f"{folder}: eos_token_id should be a token id or a list of them, got {reprlib.repr(eos)}"
        )
    return frozenset(ids), given


def compilation_cache() -> pathlib.Path | None:
    """Keep compiled programs in a folder, so that a second start does not compile again; the folder, or None.

    JAXLLM_CACHE names the folder, or turns it off ("off"); a jax_compilation_cache_dir that is already set stays.
    Called by `load`.
    """
    where = os.environ.get("JAXLLM_CACHE", "")
    if where.lower() in ("off", "0", "false", "no"):
        return None
    if jax.config.jax_compilation_cache_dir:
        return pathlib.Path(jax.config.jax_compilation_cache_dir)
    try:
        base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        folder = pathlib.Path(where).expanduser() if where else base / "jaxllm" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a read-only home, or none at all, is no reason not to run
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    return folder
