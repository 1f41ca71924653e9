"""Model type -> Family, collected from the files beside this one."""

from __future__ import annotations

import difflib
from typing import Any

from jaxllm.errors import ConfigError
from jaxllm.families import (
    bitnet,
    cohere,
    deepseek,
    gemma,
    glm,
    gpt,
    lfm2,
    llama,
    llama4,
    mamba,
    moe,
    neox,
    olmo,
    qwen,
    qwen_next,
    remote,
)
from jaxllm.families.base import Family
from jaxllm.families.fields import shown

FAMILIES: dict[str, Family] = {
    **llama.FAMILIES,
    **qwen.FAMILIES,
    **gemma.FAMILIES,
    **glm.FAMILIES,
    **olmo.FAMILIES,
    **cohere.FAMILIES,
    **llama4.FAMILIES,
    **remote.FAMILIES,
    **gpt.FAMILIES,
    **neox.FAMILIES,
    **moe.FAMILIES,
    **deepseek.FAMILIES,
    **mamba.FAMILIES,
    **lfm2.FAMILIES,
    **qwen_next.FAMILIES,
    **bitnet.FAMILIES,
}

# Known, and not yet to be had: what is missing.
REFUSED = {
    "rwkv": "its time-mixing recurrence",
    "rwkv5": "its time-mixing recurrence",
    "rwkv6": "its time-mixing recurrence",
    "rwkv7": "its time-mixing recurrence",
    "jamba": "its mix of Mamba and attention layers",
    "falcon_h1": "its parallel Mamba-2 and attention mixers",
    "granitemoehybrid": "its mix of Mamba-2 and attention layers",
    "zamba2": "its shared attention blocks",
    "qwen3_5": "its mixer",
    "qwen3_5_moe": "its mixer",
}


def family(model_type: Any) -> Family:
    """The Family of config.json's model_type.

    Raises ConfigError for one that is refused or unknown, with the nearest names."""
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if isinstance(model_type, str) and model_type in REFUSED:
        raise ConfigError(f"model type {model_type!r} is not implemented: jaxllm lacks {REFUSED[model_type]}")
    near = difflib.get_close_matches(str(model_type)[:80], FAMILIES, n=3) if isinstance(model_type, str) else []
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise ConfigError(
        f"model type {shown(model_type)} is not known to jaxllm{hint} Known are: {', '.join(sorted(FAMILIES))}"
    )
