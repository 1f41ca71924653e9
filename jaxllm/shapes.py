"""The usual sizes of models, as their publishers' config.json gives them: what to measure without any weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.families import family, model_config


def _sizes(kind: str, width: int, hidden: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any):
    shared = dict(hidden_act="silu", rms_norm_eps=1e-5, dtype="bfloat16", max_position_embeddings=8192)
    return shared | dict(
        model_type=kind,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        **more,
    )


_LLAMA3 = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0)
_LLAMA3 |= dict(original_max_position_embeddings=8192)
_ROPE_32 = dict(rope_theta=500000.0, rope_scaling=_LLAMA3 | {"factor": 32.0}, max_position_embeddings=131072)
_ROPE_8 = _ROPE_32 | dict(rope_scaling=_LLAMA3 | {"factor": 8.0})
_QWEN3 = dict(head_dim=128, rope_theta=1e6, rms_norm_eps=1e-6, max_position_embeddings=40960)
_TIED, _UNTIED = dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)

# Name -> config.json.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "smollm2-135m": _sizes("llama", 576, 1536, 30, 9, 3, 49152, rope_theta=1e5, **_TIED),
    "smollm2-360m": _sizes("llama", 960, 2560, 32, 15, 5, 49152, rope_theta=1e5, **_TIED),
    "smollm2-1.7b": _sizes("llama", 2048, 8192, 24, 32, 32, 49152, rope_theta=130000.0, **_TIED),
    "qwen3-0.6b": _sizes("qwen3", 1024, 3072, 28, 16, 8, 151936, **_TIED) | _QWEN3,
    "qwen3-1.7b": _sizes("qwen3", 2048, 6144, 28, 16, 8, 151936, **_TIED) | _QWEN3,
    "qwen3-4b": _sizes("qwen3", 2560, 9728, 36, 32, 8, 151936, **_TIED) | _QWEN3,
    "qwen3-8b": _sizes("qwen3", 4096, 12288, 36, 32, 8, 151936, **_UNTIED) | _QWEN3,
    "qwen3-30b-a3b": _sizes("qwen3_moe", 2048, 6144, 48, 32, 4, 151936, **_UNTIED)
    | _QWEN3
    | dict(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True),
    "llama-3.2-1b": _sizes("llama", 2048, 8192, 16, 32, 8, 128256, head_dim=64, **_TIED) | _ROPE_32,
    "llama-3.2-3b": _sizes("llama", 3072, 8192, 28, 24, 8, 128256, head_dim=128, **_TIED) | _ROPE_32,
    "llama-3.1-8b": _sizes("llama", 4096, 14336, 32, 32, 8, 128256, **_UNTIED) | _ROPE_8,
    "mistral-7b": _sizes("mistral", 4096, 14336, 32, 32, 8, 32768, rope_theta=1e6, sliding_window=None, **_UNTIED)
    | dict(max_position_embeddings=32768),
    "mixtral-8x7b": _sizes("mixtral", 4096, 14336, 32, 32, 8, 32000, rope_theta=1e6, **_UNTIED)
    | dict(num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=32768, sliding_window=None),
}


def shape(name: str) -> Mapping[str, Any]:
    """The config.json of a shape.

    Raises ConfigError for an unknown name, with the nearest ones."""
    if name in SHAPES:
        return SHAPES[name]
    near = difflib.get_close_matches(name, SHAPES, n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else ";"
    raise ConfigError(f"there is no shape {name[:80]!r}{hint} There are {', '.join(SHAPES)}")


def described(values: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json, in the dtype that it names."""
    return replace(model_config(family(values["model_type"]), values), dtype=values["dtype"])
