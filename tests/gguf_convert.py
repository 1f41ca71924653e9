"""Turn a tiny Hugging Face folder into a GGUF file, as llama.cpp's convert_hf_to_gguf.py does.

Tensor names come from the `gguf` package's own map, layouts and keys from the converter's documentation of itself.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]
Config = dict[str, Any]
REORDERED = (
    "llama|mistral3|smollm3|granite|granitemoe|minicpm|internlm2|baichuan|arcee|olmo|deepseek"  # by the converter
)
PLUS_ONE = "gemma|gemma2|gemma3|nemotron"
RENAMED = {  # where the map has no name for what transformers calls it
    "hunyuan-dense": ((r"query_layernorm", "q_norm"), (r"key_layernorm", "k_norm")),
    "bloom": ((r"^transformer\.", ""),),
    "chatglm": ((r"^transformer\.", ""),),
    "deepseek": ((r"mlp\.shared_experts\.0\.", "mlp.shared_experts."),),
    "internlm2": ((r"^output\.", "output."),),
}


def write(path: pathlib.Path, architecture: str, metadata: Config, tensors: dict[str, Any]) -> pathlib.Path:
    """A GGUF file by the `gguf` package. Metadata that does not name its section belongs to the architecture;
    tensors are arrays, or (bytes, type) of what is quantized already."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        full = key if key.split(".")[0] in ("general", "tokenizer", "split") else f"{architecture}.{key}"
        add(writer, full, value)
    for name, x in tensors.items():
        data, kind = x if isinstance(x, tuple) else (x, None)
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def convert(folder: pathlib.Path, path: pathlib.Path, architecture: str, **changes: Any) -> pathlib.Path:
    """`folder` (config.json and model.safetensors) as a GGUF file of f32; changes: metadata that differs."""
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    config = {**config, **config.pop("text_config", {})}
    tensors = arranged(architecture, load_file(folder / "model.safetensors"), config)
    tensors |= rope_tensors(config)
    metadata = {k: v for k, v in (keys(architecture, config) | changes).items() if v is not None}
    return write(path, architecture, metadata, tensors)


def first(config: Config, names: str, default: Any = None) -> Any:
    return next((config[n] for n in names.split("|") if config.get(n) is not None), default)


# ---- tensors -----------------------------------------------------------------------------------------------


def arranged(architecture: str, tensors: Tensors, config: Config) -> Tensors:
    layout: Callable[[Tensors, Config], Tensors] = LAYOUTS.get(architecture, lambda t, c: t)
    tensors = merged_experts(layout(tensors, config))
    if re.fullmatch(PLUS_ONE, architecture):
        tensors = {n: x + 1 if n.endswith("norm.weight") else x for n, x in tensors.items()}
    if re.fullmatch(REORDERED, architecture):
        tensors = {n: reordered(n, x, config) for n, x in tensors.items()}
    return {gguf_name(n, architecture): x for n, x in tensors.items() if "rotary" not in n}


def gguf_name(name: str, architecture: str) -> str:
    import gguf

    if name.startswith(("blk.", "output", "token_")) and architecture != "internlm2":
        return name
    for pattern, to in RENAMED.get(architecture, ()):
        name = re.sub(pattern, to, name)
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    known = gguf.get_tensor_name_map(kind, 99)
    found = known.get_name(name.replace("_correction_bias", "_correction.bias"), (".weight", ".bias"))
    if found is None:
        assert name.startswith("blk."), name
        return name
    return found


def reordered(name: str, x: np.ndarray, config: Config) -> np.ndarray:
    """Rows of queries and keys, halves of each head -> pairs of neighbours."""
    found = re.search(r"\b(?:([qk])_proj|attention\.w([qk]))\.(weight|bias)$", name)
    if not found:
        return x
    heads = first(config, "num_attention_heads")
    if "k" in found.groups()[:2]:
        heads = first(config, "num_key_value_heads", heads)
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def merged_experts(tensors: Tensors) -> Tensors:
    out, found = {}, {}
    for name, x in tensors.items():
        match = re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)\.weight", name)
        if match:
            found.setdefault((match[1], match[3]), {})[int(match[2])] = x
        else:
            out[name] = x
    for (stem, part), experts in found.items():
        stem = re.sub(r"model\.(layers\.\d+)\.block_sparse_moe", r"\1.feed_forward", stem)
        out[f"{stem}.experts.{part}.weight"] = np.stack([experts[i] for i in sorted(experts)])
    return out


def grouped(tensors: Tensors, config: Config) -> Tensors:
    """query_key_value of each head or group -> all queries, all keys, all values."""
    heads = first(config, "num_attention_heads|n_head")
    groups = 1 if config.get("multi_query") and not config.get("new_decoder_architecture") else None
    if config["model_type"] == "falcon":
        groups = groups or first(config, "num_kv_heads|n_head_kv", heads)
    else:
        groups = heads

    def apart(x):
        x = x.reshape(groups, heads // groups + 2, -1, *x.shape[1:])
        return np.concatenate([p.reshape(-1, *x.shape[3:]) for p in (x[:, :-2], x[:, -2], x[:, -1])])

    return {n: apart(x) if "query_key_value" in n else x for n, x in tensors.items()}


def gpt2(tensors: Tensors, config: Config) -> Tensors:
    turned = re.compile(r".*\.(c_attn|c_proj|c_fc)\.weight")
    return {n: x.T if turned.fullmatch(n) else x for n, x in tensors.items()}


def granitemoe(tensors: Tensors, config: Config) -> Tensors:
    out = {}
    for n, x in tensors.items():
        layer = re.match(r"model\.layers\.(\d+)\.block_sparse_moe\.(input|output)_linear", n)
        if layer and layer[2] == "input":
            gate, up = np.split(x, 2, 1)
            out |= {f"blk.{layer[1]}.ffn_gate_exps.weight": gate, f"blk.{layer[1]}.ffn_up_exps.weight": up}
        else:
            out[f"blk.{layer[1]}.ffn_down_exps.weight" if layer else n] = x
    return out


def gpt_oss(tensors: Tensors, config: Config) -> Tensors:
    out = {}
    for n, x in tensors.items():
        found = re.fullmatch(r"model\.layers\.(\d+)\.(self_attn\.sinks|mlp\.experts\.(\w+?)_proj(_bias)?)", n)
        if not found:
            out[n] = x
            continue
        stem, leaf = f"blk.{found[1]}.", "bias" if found[4] else "weight"
        x = x if x.ndim < 3 else x.swapaxes(1, 2)
        if found[3] == "gate_up":
            out |= {f"{stem}ffn_gate_exps.{leaf}": x[:, 0::2], f"{stem}ffn_up_exps.{leaf}": x[:, 1::2]}
        else:
            out[f"{stem}ffn_down_exps.{leaf}" if found[3] else f"{stem}attn_sinks.weight"] = x
    return out


def stablelm(tensors: Tensors, config: Config) -> Tensors:
    out = {n: x for n, x in tensors.items() if "_layernorm.norms" not in n}
    for i in range(config["num_hidden_layers"]):
        for which, heads in (("q", config["num_attention_heads"]), ("k", config["num_key_value_heads"])):
            stem = f"model.layers.{i}.self_attn.{which}_layernorm.norms"
            if f"{stem}.0.weight" in tensors:
                rows = [tensors[f"{stem}.{h}.weight"] for h in range(heads)]
                out[f"blk.{i}.attn_{which}_norm.weight"] = np.stack(rows)
    return out


def older(config: Config) -> bool:
    """Which of the two layouts of latent attention a file gets: those without q_lora_rank the first one."""
    return config.get("q_lora_rank") is None


def deepseek2(tensors: Tensors, config: Config) -> Tensors:
    """The up-projection of keys and values in two, as newer files have it."""
    out, heads = {}, config["num_attention_heads"]
    if older(config):
        return tensors
    for n, x in tensors.items():
        layer = re.match(r"model\.layers\.(\d+)\.self_attn\.kv_b_proj", n)
        if not layer:
            out[n] = x
            continue
        k, v = np.split(x.reshape(heads, -1, x.shape[1]), [config["qk_nope_head_dim"]], 1)
        out |= {f"blk.{layer[1]}.attn_k_b.weight": k.swapaxes(1, 2), f"blk.{layer[1]}.attn_v_b.weight": v}
    return out


def baichuan(tensors: Tensors, config: Config) -> Tensors:
    out = {}
    for n, x in tensors.items():
        parts = np.split(x, 3) if "W_pack" in n else [x]
        names = [n.replace("W_pack", f"{p}_proj") for p in "qkv"] if "W_pack" in n else [n]
        out |= dict(zip(names, parts, strict=True))
    return out


def internlm2(tensors: Tensors, config: Config) -> Tensors:
    out, groups = {}, config["num_key_value_heads"]
    for n, x in tensors.items():
        if "wqkv" in n:
            y = x.reshape(groups, config["num_attention_heads"] // groups + 2, -1, *x.shape[1:])
            parts = [p.reshape(-1, *x.shape[1:]) for p in (y[:, :-2], y[:, -2], y[:, -1])]
            out |= {n.replace("wqkv", f"w{p}"): part for p, part in zip("qkv", parts, strict=True)}
        else:
            out[n] = x
    return out


LAYOUTS = {
    "gpt2": gpt2,
    "gptneox": grouped,
    "falcon": grouped,
    "bloom": grouped,
    "granitemoe": granitemoe,
    "gpt-oss": gpt_oss,
    "stablelm": stablelm,
    "deepseek2": deepseek2,
    "baichuan": baichuan,
    "internlm2": internlm2,
}


# ---- metadata ----------------------------------------------------------------------------------------------


def rope_of(config: Config) -> Config:
    r = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return r.get("full_attention", r)


def rope_tensors(config: Config) -> Tensors:
    """The factors of llama3 and longrope scaling, which are tensors."""
    r = rope_of(config)
    if r.get("rope_type") == "llama3":
        base, dims = (
            r["rope_theta"],
            first(config, "head_dim", config["hidden_size"] // config["num_attention_heads"]),
        )
        out = []
        for i in range(0, dims, 2):
            wave = 2 * math.pi * base ** (i / dims)
            low = r["original_max_position_embeddings"] / r["low_freq_factor"]
            high = r["original_max_position_embeddings"] / r["high_freq_factor"]
            smooth = (r["original_max_position_embeddings"] / wave - r["low_freq_factor"]) / (
                r["high_freq_factor"] - r["low_freq_factor"]
            )
            between = 1 / ((1 - smooth) / r["factor"] + smooth)
            out.append(1.0 if wave < high else r["factor"] if wave > low else between)
        return {"rope_freqs.weight": np.asarray(out, np.float32)}
    if r.get("rope_type") == "longrope":
        return {f"rope_factors_{k}.weight": np.asarray(r[f"{k}_factor"], np.float32) for k in ("long", "short")}
    return {}


def keys(architecture: str, config: Config) -> Config:
    width, heads = first(config, "hidden_size|n_embd|d_model"), first(config, "num_attention_heads|n_head|n_heads")
    eps = "layer_norm_eps|layer_norm_epsilon|norm_epsilon|norm_eps"
    found = {
        "block_count": first(config, "num_hidden_layers|n_layer|n_layers|num_layers"),
        "context_length": first(config, "max_position_embeddings|n_positions|max_seq_len|seq_length", 2048),
        "embedding_length": width,
        "feed_forward_length": first(config, "intermediate_size|n_inner|ffn_hidden_size", 4 * width),
        "attention.head_count": heads,
        "attention.head_count_kv": first(config, "num_key_value_heads|num_kv_heads|multi_query_group_num"),
        "attention.layer_norm_rms_epsilon": first(config, "rms_norm_eps|layernorm_epsilon"),
        "attention.layer_norm_epsilon": first(config, eps),
        "general.file_type": 0,
        "vocab_size": first(config, "vocab_size|padded_vocab_size"),
    }
    return found | rope_keys(config) | KEYS.get(architecture, lambda c: {})(config)


def rope_keys(config: Config) -> Config:
    r = rope_of(config)
    heads = first(config, "num_attention_heads|n_head|n_heads")
    head_dim = first(config, "head_dim|kv_channels", first(config, "hidden_size|n_embd|d_model") // heads)
    found = {"rope.freq_base": first({**config, **r}, "rope_theta|rotary_emb_base")}
    part = first({**config, **r}, "partial_rotary_factor|rotary_pct", 1.0)
    found |= {"rope.dimension_count": int(head_dim * part) if found["rope.freq_base"] else None}
    if config.get("head_dim"):
        found |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if r.get("rope_type") in ("linear", "yarn"):
        found |= {"rope.scaling.type": r["rope_type"], "rope.scaling.factor": float(r["factor"])}
    if r.get("rope_type") == "yarn":
        found |= {"rope.scaling.original_context_length": r["original_max_position_embeddings"]}
    if r.get("rope_type") == "longrope":
        old = first({**config, **r}, "original_max_position_embeddings")
        scale = config["max_position_embeddings"] / old
        factor = math.sqrt(1 + math.log(scale) / math.log(old)) if scale > 1 else 1.0
        found |= {"rope.scaling.attn_factor": factor, "rope.scaling.original_context_length": old}
    return found


def experts(config: Config) -> Config:
    return {
        "expert_count": first(config, "num_local_experts|num_experts|n_routed_experts"),
        "expert_used_count": first(config, "num_experts_per_tok|experts_per_token"),
        "expert_feed_forward_length": first(config, "moe_intermediate_size"),
    }


def gemma(config: Config) -> Config:
    names = {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    }
    found = {key: first(config, field) for key, field in names.items()}
    return found | {"attention.sliding_window": config.get("sliding_window")}


def granite(config: Config) -> Config:
    names = {"attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier"}
    names |= {"residual_scale": "residual_multiplier", "logit_scale": "logits_scaling"}
    return {key: float(config[field]) for key, field in names.items() if config.get(field)}


def minicpm(config: Config) -> Config:
    return {
        "embedding_scale": float(config["scale_emb"]),
        "residual_scale": config["scale_depth"] / config["num_hidden_layers"] ** 0.5,
        "logit_scale": config["hidden_size"] / config["dim_model_base"],
    }


def routed(config: Config) -> Config:
    return experts(config) | {
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_shared_count": first(config, "n_shared_experts", 0),
        "expert_weights_scale": float(first(config, "routed_scaling_factor", 1.0)),
        "expert_weights_norm": bool(config.get("norm_topk_prob")),
    }


def router_groups(config: Config) -> Config:
    return {"expert_group_count": config.get("n_group"), "expert_group_used_count": config.get("topk_group")}


def latent(config: Config) -> Config:
    turned, rank = config["qk_rope_head_dim"], config["kv_lora_rank"]
    r = rope_of(config)
    found = {
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": config.get("q_lora_rank"),
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + turned,
        "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + turned,
        "attention.value_length_mla": config["v_head_dim"],
        "rope.dimension_count": turned,
        "expert_gating_func": 2 if config["model_type"] == "deepseek_v3" else 1,
    }
    if older(config):
        width, values = found.pop("attention.key_length_mla"), found.pop("attention.value_length_mla")
        found |= {"attention.key_length": width, "attention.value_length": values}
        found |= {"attention.head_count_kv": config["num_attention_heads"]}
    log = {"rope.scaling.yarn_log_multiplier": 0.1 * r["mscale_all_dim"]} if r.get("mscale_all_dim") else {}
    limited = config.get("topk_method") != "greedy"
    return routed(config) | (router_groups(config) if limited else {}) | found | log


def sharing(config: Config) -> Config:
    return experts(config) | {"expert_shared_feed_forward_length": config["shared_expert_intermediate_size"]}


def mpt(config: Config) -> Config:
    attn = config.get("attn_config") or {}
    found = {"attention.clamp_kqv": attn.get("clip_qkv"), "attention.head_count_kv": None}
    return found | {"attention.max_alibi_bias": float(attn.get("alibi_bias_max", 8))}


def window(config: Config) -> Config:
    return {"attention.sliding_window": config.get("sliding_window")}


def listed(config: Config) -> Config:
    """The layers that slide, one by one."""
    kinds = config.get("layer_types") if config.get("sliding_window") else None
    return {"attention.sliding_window_pattern": kinds and [kind == "sliding_attention" for kind in kinds]}


def chatglm(config: Config) -> Config:
    half = {"rope.dimension_count": config["kv_channels"] // 2}
    return half | {"rope.freq_base": 10000.0 * config.get("rope_ratio", 1.0)}


def _one(name: str, field: str) -> Callable[[Config], Config]:
    return lambda config: {name: config.get(field)}


KEYS: dict[str, Callable[[Config], Config]] = {
    "llama": lambda c: experts(c) if "num_local_experts" in c else window(c),
    "mistral3": window,
    "qwen": _one("context_length", "seq_length"),
    "qwen2moe": sharing,
    "qwen3moe": experts,
    "olmoe": lambda c: experts(c) | _one("attention.clamp_kqv", "clip_qkv")(c),
    "olmo": _one("attention.clamp_kqv", "clip_qkv"),
    "olmo2": lambda c: window(c) | listed(c),
    "phi3": window,
    "phimoe": experts,
    "gemma2": gemma,
    "gemma3": gemma,
    "gptneox": _one("use_parallel_residual", "use_parallel_residual"),
    "stablelm": _one("use_parallel_residual", "use_parallel_residual"),
    "falcon": lambda c: {"attention.head_count_kv": 1} if not c.get("new_decoder_architecture") else {},
    "starcoder": lambda c: {"attention.head_count_kv": 1},
    "bloom": lambda c: {"context_length": first(c, "seq_length", 2048)},
    "mpt": mpt,
    "command-r": _one("logit_scale", "logit_scale"),
    "cohere2": lambda c: window(c) | _one("logit_scale", "logit_scale")(c),
    "deepseek": routed,
    "deepseek2": latent,
    "glm4moe": lambda c: routed(c) | router_groups(c) | {"expert_gating_func": 2},
    "gpt-oss": lambda c: experts(c) | window(c) | {"expert_feed_forward_length": c["intermediate_size"]},
    "granite": granite,
    "granitemoe": lambda c: granite(c) | experts(c),
    "minicpm": minicpm,
    "exaone4": window,
    "chatglm": chatglm,
}
