"""A model as a GGUF file of an architecture that llama.cpp knows. Codes are moved, never rounded.

What the file will say is held against the model before anything is written: its metadata are read as `gguf_model`
reads them, and must describe the same decoder. Source: as there.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxllm.checkpoint.gguf import GGUF
from jaxllm.checkpoint.gguf_archs import ARCHS
from jaxllm.checkpoint.gguf_model import described
from jaxllm.checkpoint.gguf_types import TYPES, TensorType
from jaxllm.config import Attention, ModelConfig, MoE, Rope, params_shape
from jaxllm.errors import JaxllmError
from jaxllm.families import model_config
from jaxllm.families.layouts import deinterleave, rotary_rows
from jaxllm.progress import progress
from jaxllm.quant import Format, QTensor
from jaxllm.quant.qtensor import levels

# model_type -> architecture
KINDS = {"llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
KINDS |= {
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "granite": "granite",
    "olmo2": "olmo2",
}
FACTORED = ("llama",)  # architectures for which llama.cpp reads factors of the rotary frequencies
BLOCK = 32  # columns that share a scale
PARTS = {
    "mixer.pre": "attn_norm",
    "mixer.post": "post_attention_norm",
    "mixer.o": "attn_output",
    **{f"mixer.{x}": f"attn_{x}" for x in ("q", "k", "v", "q_norm", "k_norm")},
    "ffn.pre": "ffn_norm",
    "ffn.post": "post_ffw_norm",
    "ffn.router": "ffn_gate_inp",
    **{f"ffn.{x}": f"ffn_{x}" for x in ("gate", "up", "down")},
}
ENDS = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
SUFFIX = {"w": "weight", "b": "bias"}
Scalars = dict[str, Any]


@dataclass(frozen=True)
class Held:
    """A tensor that is not in a file; as `gguf.Tensor` otherwise."""

    name: str
    kind: TensorType
    shape: tuple[int, ...]
    data: np.ndarray | None = None
    path: pathlib.Path = pathlib.Path("the model")

    def read(self) -> np.ndarray:
        """Its bytes: u8 [nbytes]."""
        return self.data.view(np.uint8)


def refuses(config: ModelConfig, values: Mapping[str, Any], formats: Mapping[str, Format]) -> str | None:
    """Why a model cannot be a GGUF file that llama.cpp computes alike; None where it can.

    values: its config.json; formats: of its packed parameters, by path."""
    kind = KINDS.get(values.get("model_type"))
    if kind is None:
        return (
            f"GGUF files are written of {', '.join(KINDS)}, and this is {values.get('model_type', 'of no type')}"
        )
    if not all(isinstance(b.mixer, Attention) for b in config.blocks):
        return "it has layers other than attention"
    if kind == "llama" and any(b.mixer.window for b in config.blocks):
        return "llama.cpp has no sliding window in this architecture"
    if kind not in FACTORED and (_factors(_rope(config)) != 1).any():
        return "llama.cpp has no such scaling of rotary frequencies in this architecture"
    for path, f in formats.items():
        if not _taken(f):
            return (
                f"{path} is in {f.name}, which no type of GGUF holds exactly; int4_g32 is Q4_0, int8_g32 is Q8_0"
            )
        if params_shape(config)[path][-1] % BLOCK:
            return f"{path} has {params_shape(config)[path][-1]} columns, and GGUF packs {BLOCK} at a time"
    return _lost(config, kind)


def _taken(f: Format) -> bool:
    whole = f.levels == "int" and f.zero is None and not f.activations and not f.global_scale
    return whole and f.bits in (4, 8) and f.scale == "float16" and bool(f.group) and f.group % BLOCK == 0


def _lost(config: ModelConfig, kind: str) -> str | None:
    """What a GGUF file would not say of the model."""
    try:
        tensors = {t.name: t for t in _abstract(config)}
        metadata = {"general.architecture": kind, **metadata_of(config, kind)}
        fields, family = described(GGUF(pathlib.Path("the model"), metadata, tensors))
        found = model_config(family, fields)
    except JaxllmError as error:
        return str(error)
    wrong = next(_differences(replace(found, dtype=config.dtype), config, "config"), None)
    return f"a file of the architecture {kind} would say otherwise: {wrong}" if wrong else None


def _abstract(config: ModelConfig) -> Iterator[Held]:
    f32 = TYPES[0]
    for path, shape in params_shape(config).items():
        yield Held(name_of(path, shape), f32, shape)
    if (factors := _factors(_rope(config))).any() and (factors != 1).any():
        yield Held("rope_freqs.weight", f32, factors.shape, factors)


def _differences(a: Any, b: Any, where: str) -> Iterator[str]:
    if hasattr(b, "__dataclass_fields__") and type(a) is type(b):
        for name in b.__dataclass_fields__:
            yield from _differences(getattr(a, name), getattr(b, name), f"{where}.{name}")
    elif isinstance(b, tuple) and isinstance(a, tuple) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differences(x, y, f"{where}[{i}]")
    elif isinstance(a, float) and isinstance(b, float | int):
        if not np.isclose(a, b, rtol=1e-5, atol=0):
            yield f"{where} as {a}, and it is {b}"
    elif a != b:
        yield f"{where} as {a}, and it is {b}"


# ---- metadata -------------------------------------------------------------------------------------------


def metadata_of(config: ModelConfig, kind: str) -> Scalars:
    """The architecture's keys, all but the tokenizer's: int, float or str each."""
    m, ffn = config.blocks[0].mixer, config.blocks[0].ffn
    keys = {
        "context_length": config.max_len,
        "embedding_length": config.width,
        "block_count": len(config.blocks),
        "vocab_size": config.vocab,
        "feed_forward_length": ffn.hidden,
        "attention.head_count": m.heads,
        "attention.head_count_kv": m.kv_heads,
        "attention.key_length": m.head_dim,
        "attention.value_length": m.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm.eps,
    }
    if isinstance(ffn, MoE):
        keys |= {"expert_count": ffn.experts, "expert_used_count": ffn.top_k}
        keys |= {"expert_feed_forward_length": ffn.hidden} if kind != "llama" else {}
    keys |= _rotary(config) | _own(config, kind)
    return {f"{kind}.{name}": value for name, value in keys.items()}


def _rotary(config: ModelConfig) -> Scalars:
    rope, sliding = _rope(config), [b.mixer for b in config.blocks if b.mixer.window]
    keys = {"rope.dimension_count": rope.dims, "rope.freq_base": _base(rope)}
    if (linear := 1 / rope.inv_freq[0]) != 1:
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": linear}
    if sliding:
        keys["attention.sliding_window"] = sliding[0].window
    if sliding and sliding[0].rope and sliding[0].rope != rope:
        keys["rope.freq_base_swa"] = _base(sliding[0].rope)
    return keys


def _own(config: ModelConfig, kind: str) -> Scalars:
    """What one architecture says and the others do not."""
    m = config.blocks[0].mixer
    if kind == "gemma2":
        return {"attn_logit_softcapping": m.softcap, "final_logit_softcapping": config.logit_softcap}
    if kind == "granite":
        scales = {"attention.scale": m.scale, "residual_scale": config.blocks[0].residual}
        return scales | {"embedding_scale": config.embed_scale, "logit_scale": 1 / config.logit_scale}
    return {}


def _rope(config: ModelConfig) -> Rope:
    """The rotary table of layers that see everything, or of all."""
    ropes = [b.mixer.rope for b in config.blocks if b.mixer.rope]
    full = [b.mixer.rope for b in config.blocks if b.mixer.rope and not b.mixer.window]
    return [*full, *ropes, Rope((1.0,))][0]


def _base(rope: Rope) -> float:
    """theta of inv_freq[i] = theta ** (-2 i / dims) / inv_freq[0], rounded where that changes nothing."""
    if len(rope.inv_freq) < 2:
        return 10000.0
    base = (rope.inv_freq[1] / rope.inv_freq[0]) ** (-rope.dims / 2)
    near = float(f"{base:.6g}")
    return near if abs(near / base - 1) < 1e-6 else base


def _factors(rope: Rope) -> np.ndarray:
    """f32 [dims / 2]: what plain frequencies of the base are divided by; 1 where they are those of the model."""
    table = np.array(rope.inv_freq) / rope.inv_freq[0]
    plain = _base(rope) ** (-2 * np.arange(len(table)) / rope.dims)
    factors = (plain / table).astype(np.float32)
    return np.where(np.isclose(factors, 1, rtol=1e-5), np.float32(1), factors)


# ---- tensors --------------------------------------------------------------------------------------------


def name_of(path: str, shape: tuple[int, ...]) -> str:
    """GGUF's name of the parameter at a path. Raises JaxllmError where it has none."""
    stem, _, leaf = path.rpartition(".")
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", stem)
    name = PARTS.get(found[2]) if found else ENDS.get(stem)
    if name is None or leaf not in SUFFIX:
        raise JaxllmError(f"its architecture has no tensor for {path}")
    stacked = "_exps" if len(shape) == 3 else ""
    return f"{f'blk.{found[1]}.' if found else ''}{name}{stacked}.{SUFFIX[leaf]}"


def tensors(config: ModelConfig, kind: str, flat: Mapping[str, Any]) -> Iterator[tuple[str, int, np.ndarray]]:
    """(name, number of its type, bytes u8 [.., out, bytes of a row]) of each parameter, one after the other."""
    for path, leaf in flat.items():
        name = name_of(path, tuple(leaf.shape))
        block = config.blocks[int(path.split(".")[1])] if path.startswith("layers.") else None
        turned = (
            [(heads, dims, at) for heads, dims, at in rotary_rows(path, tuple(leaf.shape), block)] if block else []
        )
        if not isinstance(leaf, QTensor):
            x = np.asarray(leaf)
            for rows in turned if ARCHS[kind].interleaved else ():
                x = interleave(x, *rows)
            yield name, *_plain(path, x)
            continue
        parts = {k: np.asarray(part) for k, part in leaf.row_parts().items()}
        for rows in turned if ARCHS[kind].interleaved else ():
            parts = {k: interleave(part, *rows) for k, part in parts.items()}
        yield name, *packed(replace(leaf, **parts))
    if (factors := _factors(_rope(config))).any() and (factors != 1).any():
        yield "rope_freqs.weight", 0, factors.view(np.uint8)


def interleave(x: np.ndarray, heads: int, dims: int, at: int) -> np.ndarray:
    """The inverse of `deinterleave`: halves of each head's rotary rows -> pairs of neighbours."""
    order = deinterleave(np.arange(x.shape[0]), heads, dims, at=at)
    return x[np.argsort(order)]


def _plain(path: str, x: np.ndarray) -> tuple[int, np.ndarray]:
    """Vectors and routers are always f32."""
    if x.ndim < 2 or ".router." in path:
        x = x.astype(np.float32)
    number = {"float32": 0, "float16": 1, "bfloat16": 30}[x.dtype.name]
    return number, np.ascontiguousarray(x).view(np.uint8)


def packed(q: QTensor) -> tuple[int, np.ndarray]:
    """(2, bytes) as Q4_0, or (8, bytes) as Q8_0, of codes that `refuses` has taken."""
    codes = levels(q).astype(np.int8)
    codes = codes.reshape(*codes.shape[:-1], -1, BLOCK)
    scale = np.repeat(q.scale, q.columns_per_scale // BLOCK, -1)[..., None]
    scale = np.ascontiguousarray(scale).view(np.uint8)
    if q.format.bits == 4:
        fields = (codes + 8).astype(np.uint8)
        number, codes = 2, fields[..., : BLOCK // 2] | fields[..., BLOCK // 2 :] << np.uint8(4)
    else:
        number, codes = 8, codes.view(np.uint8)
    blocks = np.concatenate([scale, codes], -1)
    return number, blocks.reshape(*blocks.shape[:-2], -1)


# ---- the file -------------------------------------------------------------------------------------------


def write_gguf(
    path: pathlib.Path, config: ModelConfig, values: Mapping[str, Any], flat: Mapping[str, Any], more: Scalars
) -> None:
    """Write a model that `refuses` takes: parameters by path, and `more` metadata (its name, its tokenizer).

    Tensors are made one at a time, twice: their sizes come before them in the file."""
    import gguf

    kind = KINDS[values["model_type"]]
    writer = gguf.GGUFWriter(path, kind)
    for key, value in (metadata_of(config, kind) | {"general.quantization_version": 2} | more).items():
        _add(writer, key, value)
    for name, number, data in tensors(config, kind, flat):
        type_ = gguf.GGMLQuantizationType(number)
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with progress(f"writing {path.name}", len(flat)) as advance:
        for _, _, data in tensors(config, kind, flat):
            writer.write_tensor_data(data)
            advance()
    writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)
