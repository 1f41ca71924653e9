"""Adapters as Hugging Face's PEFT saves them: adapter_config.json and adapter_model.safetensors.

Source: github.com/huggingface/peft, tuners/lora/config.py and layer.py. An adapter of a fused matrix is taken
apart as the matrix is: its parts share A, and B's rows are split; B's rows are put in jaxllm's rotary order.
"""

from __future__ import annotations

import math
import os
import pathlib
import re
import reprlib
from typing import Any

import numpy as np

from jaxllm.checkpoint.canonical import REAL, row_pieces
from jaxllm.checkpoint.safetensors import open_file
from jaxllm.config import ModelConfig, params_shape
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.families.base import Family
from jaxllm.files import read_object
from jaxllm.quant.adapted import Adapter

NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<part>[AB])(?(kind)|\.weight)")
# Fields that say nothing about what the saved tensors do.
SILENT = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform"),
    *("loftq_config", "lora_alpha", "lora_dropout", "megatron_config", "megatron_core", "peft_type"),
    *("peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config"),
    *("target_modules", "task_type", "use_rslora"),
}
# These start training from other base weights than the checkpoint's, and their adapters go with those.
OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
LARGEST = 2**20  # of a rank


def read_adapter(folder: str | os.PathLike, config: ModelConfig, family: Family) -> dict[str, Adapter]:
    """Canonical path -> the adapter of that weight, numpy arrays a [r, in] and b [out, r] as stored.

    config and family are the base model's. Raises ConfigError for a kind of adapter that is not plain LoRA (DoRA,
    trained biases or whole modules, an initialisation that changes the base), CheckpointError for a file that is
    missing, malformed, or not for this model.
    """
    folder = pathlib.Path(folder)
    values = _values(folder / "adapter_config.json")
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no adapter_model.safetensors; a .bin is a pickle: save it anew")
    modules: dict[str, dict[str, Any]] = {}
    readers = open_file(path)
    for name in sorted(readers):
        if (match := NAME.fullmatch(name)) is None:
            raise CheckpointError(f"{path} has {name!r}, which is no part of a LoRA; only those are read")
        modules.setdefault(match["module"], {})[(match["kind"] or "") + match["part"]] = readers[name]
    if not modules:
        raise CheckpointError(f"{path} has no adapter in it; save it again")
    found: dict[str, Adapter] = {}
    shapes = params_shape(config)
    for module, parts in modules.items():
        try:
            _put(found, _adapters(module, parts, values, config, family), shapes)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {module}: {error}") from None
    return found


def _put(found: dict[str, Adapter], more: dict[str, Adapter], shapes: dict[str, tuple[int, ...]]) -> None:
    for path, adapter in more.items():
        want, got = shapes.get(path), (adapter.b.shape[0], adapter.a.shape[1])
        if want != got or path in found:
            was = "was already given" if path in found else f"should be of {list(want or ())}, got {list(got)}"
            raise CheckpointError(f"the adapter of {path} {was}")
        found[path] = adapter


def _adapters(
    module: str, parts: dict[str, Any], values: dict[str, Any], config: ModelConfig, family: Family
) -> dict[str, Adapter]:
    """The adapters of the matrices inside one module."""
    table = parts.keys() == {"embedding_A", "embedding_B"}
    if not table and parts.keys() != {"A", "B"}:
        raise CheckpointError(f"an adapter has the parts A and B, got {', '.join(sorted(parts))}")
    first, second = (_matrix(parts[name]) for name in sorted(parts))
    # Of an embedding, A is [r, V] and B [D, r]: the table's own matrix [V, D] gets their product turned.
    a, b = (second.T, first.T) if table else (first, second)
    if a.shape[0] != b.shape[1]:
        raise CheckpointError(f"A {list(first.shape)} and B {list(second.shape)} are not of one rank")
    scale = _scale(module, a.shape[0], values)
    pieces = list(row_pieces(f"{module}.weight", b, config, family))
    if any(piece.index is not None or not piece.path.endswith(".w") for piece in pieces):
        raise CheckpointError("adapters of single experts are not read")
    return {piece.path: Adapter(a, piece.value, scale) for piece in pieces}


def _matrix(read: Any) -> np.ndarray:
    x = read()
    if x.ndim != 2 or x.dtype.name not in REAL or 0 in x.shape:
        raise CheckpointError(f"A and B should be matrices of floats, got {x.dtype.name} {list(x.shape)}")
    return x.astype(np.float32) if x.dtype == np.float64 else x


def _scale(module: str, rank: int, values: dict[str, Any]) -> float:
    alpha = _pattern(values, "alpha_pattern", module, "lora_alpha")
    if rank != (want := _pattern(values, "rank_pattern", module, "r")):
        raise CheckpointError(f"its rank is {rank}, and adapter_config.json says {want}")
    return alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def _pattern(values: dict[str, Any], name: str, module: str, usual: str) -> Any:
    """The value of the first pattern that is the end of the module's name, else the usual one."""
    for key, value in (values.get(name) or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return value
    return values[usual]


def _values(path: pathlib.Path) -> dict[str, Any]:
    values = read_object(path, ConfigError, "give the folder that PEFT saved")
    if problems := _problems(values):
        raise ConfigError(f"{path} is not of an adapter that jaxllm reads: {'; '.join(problems[:20])}")
    return values


def _problems(values: dict[str, Any]) -> list[str]:
    """Everything about an adapter's config that is malformed or beyond plain LoRA."""
    found = [] if values.get("peft_type") == "LORA" else [f"peft_type is {reprlib.repr(values.get('peft_type'))}"]
    for name in sorted(values.keys() - SILENT - {"bias", "init_lora_weights"}):
        if values[name]:
            found.append(f"{name} is {reprlib.repr(values[name])}")
    if values.get("bias", "none") != "none":
        found.append(f"bias is {reprlib.repr(values['bias'])}")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(OTHER_BASE):
        found.append(f"init_lora_weights is {start!r}, which changes the base; convert it to a plain LoRA")
    for name, right in (("r", _is_rank), ("lora_alpha", _is_alpha)):
        found += [] if right(values.get(name)) else [f"{name} is {reprlib.repr(values.get(name))}"]
    for name, right in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        table = values.get(name) or {}
        if not isinstance(table, dict) or not all(map(right, table.values())):
            found.append(f"{name} is {reprlib.repr(table)}")
        elif strange := [key for key in table if not re.fullmatch(r"[\w.^-]+", key)]:
            found.append(f"{name} has {reprlib.repr(strange[0])}, which is no name of a module")
    return found


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
