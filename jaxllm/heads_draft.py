"""Training a small draft model: at every token it learns to say what the target says."""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import layers
from jaxllm.checkpoint import native
from jaxllm.checkpoint.canonical import nest
from jaxllm.config import ModelConfig, params_shape
from jaxllm.draft_model import DraftModel
from jaxllm.errors import JaxllmError
from jaxllm.families import family, model_config
from jaxllm.files import write_whole
from jaxllm.heads import Leaves, Seen, guess
from jaxllm.model import Model, load

Array = jax.Array
# Canonical paths, and the names that Llama's checkpoints have for them.
ENDS = {"embed.w": "model.embed_tokens", "norm.w": "model.norm"}
INSIDE = {"mixer.pre.w": "input_layernorm", "ffn.pre.w": "post_attention_layernorm"}
INSIDE |= {f"mixer.{k}.w": f"self_attn.{k}_proj" for k in "qkvo"}
INSIDE |= {f"ffn.{k}.w": f"mlp.{k}_proj" for k in ("gate", "up", "down")}


@dataclass(frozen=True)
class SmallModel:
    """A Llama-style model of the target's vocabulary. width: a multiple of head_dim; three times it is hidden."""

    layers: int = 2
    width: int = 128
    head_dim: int = 64
    drafts: int = 4  # of the chain it is measured with
    features: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if min(self.layers, self.head_dim, self.drafts) < 1 or self.head_dim % 2 or self.width % self.head_dim:
            raise JaxllmError(
                f"a draft model has at least one layer and a width that is a multiple of {self.head_dim}, got "
                f"{self.layers} layers of {self.width}"
            )

    def values(self, target: ModelConfig) -> dict[str, Any]:
        """Its config.json."""
        heads = self.width // self.head_dim
        return dict(
            architectures=["LlamaForCausalLM"],
            model_type="llama",
            vocab_size=target.vocab,
            hidden_size=self.width,
            intermediate_size=3 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 2) if heads % 2 == 0 else heads,
            head_dim=self.head_dim,
            max_position_embeddings=target.max_len,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            hidden_act="silu",
            tie_word_embeddings=True,
            torch_dtype=target.dtype,
        )

    def config(self, target: ModelConfig) -> ModelConfig:
        """What it is."""
        return model_config(family("llama"), self.values(target))

    def start(self, target: Model, seed: int) -> Leaves:
        """Normal matrices, those that add to the residual stream smaller."""
        rng, leaves = np.random.default_rng(seed), {}
        for path, shape in params_shape(self.config(target.config)).items():
            inside = path.endswith((".o.w", ".down.w"))
            std = shape[-1] ** -0.5 / (2 * self.layers) ** (0.5 * inside) if path != "embed.w" else 0.02
            x = rng.standard_normal(shape) * std if len(shape) > 1 else np.ones(shape)
            leaves[path] = jnp.asarray(x, jnp.float32)
        return leaves

    def loss(self, config: ModelConfig, params: dict, leaves: Leaves, seen: Seen) -> tuple[Array, Array]:
        """As of `heads.Kind`."""
        logits, _ = layers.forward(self.config(config), nest(leaves), seen.tokens)
        cost, right = guess(logits, seen.logprobs)
        return cost, right[None]

    def write(self, target: Model, leaves: Leaves, held: np.ndarray, folder: pathlib.Path) -> None:
        """As of `heads.Kind`; the target's tokenizer lies beside."""
        from safetensors.numpy import save

        tensors = {_published(path): np.asarray(jnp.asarray(x, target.config.dtype)) for path, x in leaves.items()}
        files = native.beside(target.folder) if target.folder else {}
        files |= {"config.json": json.dumps(self.values(target.config), indent=1).encode() + b"\n"}
        for name, data in {**files, "model.safetensors": save(tensors)}.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_whole(folder / name, data)

    def drafter(self, target: Model, folder: pathlib.Path) -> DraftModel:
        """As of `heads.Kind`."""
        return DraftModel(load(folder), (1,) * self.drafts)


def _published(path: str) -> str:
    if path in ENDS:
        return f"{ENDS[path]}.weight"
    _, i, leaf = path.split(".", 2)
    return f"model.layers.{i}.{INSIDE[leaf]}.weight"
