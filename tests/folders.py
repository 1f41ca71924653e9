"""Tiny checkpoint folders of random weights, written without torch: a Llama of 2 layers and width 16."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxllm.config import params_shape
from jaxllm.families import family, model_config

CONFIG: dict[str, Any] = dict(
    model_type="llama",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    hidden_act="silu",
    tie_word_embeddings=False,
)
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
HUB = (  # canonical path -> name on the hub
    (r"embed\.w", "model.embed_tokens.weight"),
    (r"norm\.w", "model.norm.weight"),
    (r"head\.w", "lm_head.weight"),
    (r"layers\.(\d+)\.mixer\.pre\.w", r"model.layers.\1.input_layernorm.weight"),
    (r"layers\.(\d+)\.ffn\.pre\.w", r"model.layers.\1.post_attention_layernorm.weight"),
    (r"layers\.(\d+)\.mixer\.([qkvo])\.w", r"model.layers.\1.self_attn.\2_proj.weight"),
    (r"layers\.(\d+)\.ffn\.(gate|up|down)\.w", r"model.layers.\1.mlp.\2_proj.weight"),
)

Tensors = dict[str, np.ndarray]


def hub_name(path: str) -> str:
    pattern, to = next((p, to) for p, to in HUB if re.fullmatch(p, path))
    return re.sub(pattern, to, path)


def tensors(config: Mapping[str, Any] = CONFIG, dtype: str = "float32", seed: int = 0) -> Tensors:
    """Random values by hub name, as `config` wants them."""
    rng = np.random.default_rng(seed)
    shapes = params_shape(model_config(family(config["model_type"]), config))
    return {hub_name(path): _random(rng, shape).astype(DTYPES[dtype]) for path, shape in shapes.items()}


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    x = rng.standard_normal(shape, np.float32)
    return 1 + x / 10 if len(shape) == 1 else x * shape[-1] ** -0.5


def write(
    folder: pathlib.Path,
    weights: Tensors | None = None,
    *,
    config: Mapping[str, Any] = CONFIG,
    files: int = 1,
    generation: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """A checkpoint folder: config.json and its weights in one file, or in several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    if generation is not None:
        write_json(folder / "generation_config.json", generation)
    weights = tensors(config) if weights is None else weights
    if files == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    index = {}
    for i in range(files):
        part = {n: weights[n] for n in list(weights)[i::files]}
        index |= dict.fromkeys(part, name := f"model-{i + 1:05d}-of-{files:05d}.safetensors")
        save_file(part, folder / name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    return folder


def write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
