"""A GGUF file as a checkpoint: its metadata as config.json would say it, and its tensors under a family's rules.

Source: github.com/ggml-org/ggml, docs/gguf.md (the keys); github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py and
src/llama-model.cpp (what is stored, and what absent keys mean).
"""

from __future__ import annotations

import pathlib
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from jaxllm.checkpoint.canonical import Values
from jaxllm.checkpoint.gguf import GGUF, Tensor, read_gguf
from jaxllm.checkpoint.gguf_archs import ARCHS, SKIPPED, Arch
from jaxllm.checkpoint.gguf_keys import Keys
from jaxllm.checkpoint.gguf_types import floats, values
from jaxllm.errors import CheckpointError, ConfigError, JaxllmError, Notice
from jaxllm.families import family
from jaxllm.families.base import Family
from jaxllm.quant.qtensor import QTensor

Readers = dict[str, Callable[[], Values]]
STORED = {"F32": "float32", "F64": "float32", "F16": "float16"}  # others compute in bfloat16
ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>")
ENDS += ("<|eom_id|>", "<|end_of_text|>", "<EOT>", "<end_of_utterance>")  # each of them ends an answer
SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
SAMPLING |= {"penalty_repeat": "repetition_penalty"}


def open_file(path: pathlib.Path) -> tuple[dict[str, Any], Family, Callable[[], Readers], GGUF]:
    """(config as Hugging Face spells it, family, opener of the readers, what the file says) of a GGUF file.

    Only headers are read, and the few rotary factors that a file may hold as tensors. Raises CheckpointError for a
    malformed file, ConfigError for an architecture that is not known or metadata that is missing or no number.
    """
    file = read_gguf(path)
    config, found = described(file)
    return config, found, partial(_readers, file), file


def described(file: GGUF) -> tuple[dict[str, Any], Family]:
    """(config as Hugging Face spells it, family) of what a file says. Raises as `open_file` does."""
    path, kind = file.path, file.metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in ARCHS:
        known = ", ".join(sorted(ARCHS))
        raise ConfigError(f"{path}: the architecture {kind!r} is not known to jaxllm. Known are: {known}")
    keys = Keys(file, kind)
    try:
        config = _config(keys, ARCHS[kind])
    except JaxllmError:
        raise
    except (ArithmeticError, TypeError, ValueError, LookupError, AttributeError) as error:
        fault = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path}: the values of its metadata do not fit together ({fault})") from error
    return config, _family(config, keys, ARCHS[kind])


def _family(config: dict[str, Any], keys: Keys, arch: Arch) -> Family:
    """The family of that model type, with GGUF's names and layouts: no offsets in norms, matrices [out, in]."""
    rules = arch.rules(keys) if callable(arch.rules) else arch.rules
    layouts = dict(one_plus=None, conv1d=False, inside=None, interleaved=arch.interleaved)
    past = r"blk\.(\d+)\..*" if keys.raw("nextn_predict_layers") else None
    return replace(family(config["model_type"]), rules=rules, skip=SKIPPED, past_last=past, **layouts)


def _config(keys: Keys, arch: Arch) -> dict[str, Any]:
    config = _common(keys, arch) | {"hidden_act": arch.act}
    if arch.rotary:
        config |= _rotary(keys, config)
    config |= arch.more(keys, config)
    return {k: v for k, v in config.items() if v is not None} | keys.unread()


def _common(keys: Keys, arch: Arch) -> dict[str, Any]:
    """What nearly every architecture has."""
    vocab = keys.tensor("token_embd.weight").shape
    width, heads = keys.int("embedding_length"), keys.int("attention.head_count")
    head_dim = keys.int("attention.key_length", width // heads)
    if keys.number("attention.value_length", head_dim) != head_dim:
        keys.asked.discard("attention.value_length")  # it is told that it was not understood
    keys.skip("vocab_size|rope.scaling.finetuned|tensor_data_layout")
    return {
        "model_type": arch.model_type,
        "vocab_size": vocab[0],
        "hidden_size": width,
        "num_hidden_layers": keys.int("block_count") - keys.int("nextn_predict_layers", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.int("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": keys.int("feed_forward_length", 0) or None,
        "max_position_embeddings": keys.int("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", None),
        "layer_norm_eps": keys.number("attention.layer_norm_epsilon", None),
        "sliding_window": keys.int("attention.sliding_window", 0) or None,
        "tie_word_embeddings": "output.weight" not in keys.tensors,
        "dtype": STORED.get(keys.tensor("token_embd.weight").kind.name, "bfloat16"),
        "eos_token_id": _ends(keys.metadata) or None,
        **_pattern(keys),
    }


def _pattern(keys: Keys) -> dict[str, Any]:
    """Which layers slide: every one but each n-th, or as listed."""
    pattern = keys.raw("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        return {"layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern]}
    return {"sliding_window_pattern": keys.int("attention.sliding_window_pattern", None)}


def _rotary(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    """Base, rotated part and scaling."""
    head_dim = config["head_dim"]
    dims = keys.int("rope.dimension_count", head_dim)
    return {
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        # Half a dimension more, because the product with head_dim is rounded down.
        "partial_rotary_factor": (dims + 0.5) / head_dim,
        "rope_scaling": _scaling(keys, config["max_position_embeddings"]),
    }


def _scaling(keys: Keys, longest: int) -> dict[str, Any] | None:
    kind = keys.raw("rope.scaling.type") or "none"
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    original = keys.int("rope.scaling.original_context_length", longest)
    if "rope_freqs.weight" in keys.tensors:
        return {"rope_type": "factors", "factors": _numbers(keys.tensor("rope_freqs.weight"))}
    if "rope_factors_long.weight" in keys.tensors:
        return _longrope(keys, original)
    if kind == "yarn":
        return _yarn(keys, factor, original)
    if kind not in ("none", "linear"):
        raise ConfigError(f"{keys.path}: rope.scaling.type is {kind!r}; known are none, linear, yarn and longrope")
    return {"rope_type": "linear", "factor": factor} if factor not in (0, 1) else None


def _longrope(keys: Keys, original: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "long_factor": _numbers(keys.tensor("rope_factors_long.weight")),
        "short_factor": _numbers(keys.tensor("rope_factors_short.weight")),
        "attention_factor": keys.number("rope.scaling.attn_factor", 1.0),
        "original_max_position_embeddings": original,
    }


def _yarn(keys: Keys, factor: float, original: int) -> dict[str, Any]:
    """arXiv 2309.00071; the two factors of the amplitude multiply what the paper has."""
    found = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for name in ("beta_fast", "beta_slow"):
        found[name] = keys.number(f"rope.scaling.yarn_{name}", {"beta_fast": 32.0, "beta_slow": 1.0}[name])
    if keys.number("rope.scaling.yarn_ext_factor", 1.0) in (1.0, -1.0):
        keys.skip("rope.scaling.yarn_ext_factor")
    more = keys.number("rope.scaling.yarn_attn_factor", 1.0)
    if more != 1 and factor > 1:
        found["attention_factor"] = more * (1 + 0.1 * float(np.log(factor)))
    if log := keys.number("rope.scaling.yarn_log_multiplier", 0.0):
        # It raises the scale of the scores and leaves the amplitude alone; stored is a tenth of the model's value.
        found |= dict.fromkeys(("mscale", "mscale_all_dim"), round(10 * log, 6))
    return found


def _numbers(tensor: Tensor) -> list[float]:
    """The values of a small vector."""
    if len(tensor.shape) != 1 or tensor.shape[0] > 2**16:
        raise CheckpointError(f"{tensor.path}: {tensor.name} should be a vector, got shape {list(tensor.shape)}")
    return floats(tensor.kind, tensor.read(), tensor.shape).tolist()


def _ends(metadata: dict[str, Any]) -> list[int]:
    """Tokens that end an answer: those the metadata names, and those whose text says so."""
    named = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    tokens = metadata.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    if metadata.get("tokenizer.ggml.model") == "llama" and named[0] is None:
        named[0] = 2
    texts = {text: i for i, text in enumerate(tokens) if text in ENDS}
    if "<|return|>" in texts and "<|call|>" in texts:
        texts.pop("<|end|>", None)  # it ends a message there, of which an answer may have several
    ids = [i for i in named if type(i) is int and 0 <= i < max(len(tokens), 1)]
    return sorted({*ids, *texts.values()})


def generation(metadata: dict[str, Any]) -> dict[str, Any]:
    """The sampling values that the metadata recommends, as generation_config.json spells them."""
    found = {to: metadata.get(f"general.sampling.{name}") for name, to in SAMPLING.items()}
    numbers = {name: value for name, value in found.items() if type(value) in (int, float)}
    return numbers | ({"do_sample": True} if numbers else {})


# ---- tensors -----------------------------------------------------------------------------------------------


def _readers(file: GGUF) -> Readers:
    """Name -> reader of every tensor. One Notice where types that cannot stay packed are expanded."""
    grown = Counter(t.kind.name for t in file.tensors.values() if t.kind.expanded)
    if grown:
        kinds = ", ".join(f"{count} of {name}" for name, count in grown.items())
        warnings.warn(
            f"{file.path.name}: {grown.total()} tensors are expanded to bfloat16, because their types "
            f"({kinds}) look their values up in codebooks and cannot stay packed; they take 16 bits a weight",
            Notice,
            stacklevel=4,
        )
    scales = {name: t for name, t in file.tensors.items() if _scaled(name, file)}
    return {
        name: partial(_load, tensor, scales.get(name.removesuffix("weight") + "scale"))
        for name, tensor in file.tensors.items()
        if name not in scales
    }


def _scaled(name: str, file: GGUF) -> bool:
    """Whether it is the factor of a packed weight, of all of it or of each expert."""
    weight = file.tensors.get(name.removesuffix("scale") + "weight") if name.endswith(".scale") else None
    return weight is not None and weight.kind.name == "NVFP4"


def _load(tensor: Tensor, scale: Tensor | None) -> Values:
    x = values(tensor.kind, tensor.read(), tensor.shape)
    if scale is None or not isinstance(x, QTensor):
        return x
    factor = floats(scale.kind, scale.read(), scale.shape)
    if factor.size not in (1, int(np.prod(x.shape[:-2]))):
        raise CheckpointError(f"{scale.name} has {factor.size} values for the shape {list(x.shape)}")
    whole = np.broadcast_to(factor.reshape(-1, *(1,) * (x.ndim - 1)), (*x.shape[:-1], 1)[-x.ndim :])
    return replace(x, super_scale=np.ascontiguousarray(whole))
