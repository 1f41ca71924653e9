"""Tiny random checkpoints made by transformers, saved as it saves them; norms and biases random too."""

from __future__ import annotations

import pathlib

# Two layers; cases whose layers follow a pattern ask for as many as show it.
COMMON = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def common(**changes) -> dict:
    """The usual tiny config with changes; a value of None removes the field."""
    merged = COMMON | changes
    return {k: v for k, v in merged.items() if v is not None or k in changes}


def build(model_type: str, values: dict, seed: int = 0, *, attn: str = "eager"):
    """A transformers model of random weights."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = CONFIG_MAPPING[model_type](**values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval().float()
    randomize(model, seed)
    return model


def randomize(model, seed: int = 0) -> None:
    """Random values everywhere, in norms and biases too: ones and zeros hide mistakes."""
    import torch

    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=g)
            if p.ndim < 2:
                p.add_(noise * 0.1)
            else:
                p.copy_(noise * max(p.shape[-1], 1) ** -0.5)
        for name, b in model.named_buffers():
            if "e_score_correction_bias" in name:
                b.copy_(torch.randn(b.shape, generator=g) * 0.1)


def save(model, folder: pathlib.Path) -> pathlib.Path:
    model.save_pretrained(folder)
    return folder
