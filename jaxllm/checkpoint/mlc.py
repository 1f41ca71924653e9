"""MLC-LLM's weight folders: mlc-chat-config.json, an index and raw shards. Codes stay packed as they are.

Source of the numbers' meaning: github.com/mlc-ai/mlc-llm, python/mlc_llm/quantization. The fp8 kinds are read as
weights; their activation scales are not, as activations keep the model's dtype here.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.checkpoint.canonical import Values, destination, pieces
from jaxllm.checkpoint.mlc_index import Index, Stored, check_sums, index_file, read, read_index
from jaxllm.checkpoint.mlc_names import architecture, config_values, described
from jaxllm.config import ModelConfig, params_shape
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.families import model_config
from jaxllm.families.base import Family
from jaxllm.files import read_object
from jaxllm.progress import progress
from jaxllm.quant import FORMATS, Format, QTensor, dequantize
from jaxllm.quant.qtensor import pack

Readers = dict[str, Callable[[], Values]]

CONFIG = "mlc-chat-config.json"
GROUP = tuple(name for name, f in FORMATS.items() if name[:2] in ("q3", "q4") and f.group in (32, 40))
PLAIN = ("q0f16", "q0bf16", "q0f32")
# The rest of MLC-LLM's schemes: the format and the dtype of what is not quantized.
OTHERS = {
    "q4f16_autoawq": ("uint4_g128", "float16"),
    "q4f16_awq": ("uint4_g128", "float16"),
    "e4m3_e4m3_f16": ("fp8_e4m3_tensor", "float16"),
    "e4m3_e4m3_f16_max_calibrate": ("fp8_e4m3_tensor", "float16"),
    "e5m2_e5m2_f16": ("fp8_e5m2_tensor", "float16"),
    "fp8_e4m3fn_bf16_block_scale": ("fp8_e4m3_block", "bfloat16"),
    "fp8_e4m3fn_bf16_block_scale_static_activation": ("fp8_e4m3_block", "bfloat16"),
}
PARTS = ("q_weight", "q_scale", "q_calibration_scale", "qweight", "qzeros", "scales")
SAMPLING = ("temperature", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
EXPANDED = ("positions", "router", "shared_gate", "k_b", "v_b")  # small, and used otherwise than in a product
EMBEDDINGS = ("embed", "positions")  # never transposed, whatever the scheme's layout


@dataclass(frozen=True)
class Folder:
    """An MLC-LLM weight folder, of which only headers are read."""

    path: pathlib.Path
    chat: Mapping[str, Any]  # mlc-chat-config.json
    values: Mapping[str, Any]  # the model's config as config.json spells it
    family: Family
    format: Format
    block: tuple[int, int]  # rows and columns that share a scale in the fp8 block schemes


def recognised(folder: pathlib.Path) -> bool:
    """Whether it holds an index of MLC-LLM's, and no safetensors."""
    return index_file(folder) is not None and not any(folder.glob("*.safetensors"))


def open_folder(path: pathlib.Path) -> Folder:
    """What mlc-chat-config.json says.

    Raises ConfigError where it is missing, malformed, or of an architecture or scheme that is not read."""
    chat = _chat(path / CONFIG)
    try:
        format = scheme(chat.get("quantization"))
        arch = architecture(chat.get("model_type"))
        recorded = chat.get("model_config")
        if not isinstance(recorded, dict):
            raise ConfigError("it should hold model_config; make it again with `mlc_llm gen_config`")
        values = config_values(arch, recorded)
    except ConfigError as error:
        raise ConfigError(f"{path / CONFIG}: {error}") from None
    values |= {k: chat[k] for k in ("bos_token_id", "pad_token_id") if chat.get(k) is not None}
    values |= {"eos_token_id": e} if (e := _ends(chat)) is not None else {}
    return Folder(path, chat, values, described(arch), format, _block_size(recorded))


def _chat(path: pathlib.Path) -> dict[str, Any]:
    made = "get it too, or make it with `mlc_llm gen_config`"
    missing = f"{path.parent} holds weights of MLC-LLM without {CONFIG}; {made}"
    return read_object(path, ConfigError, "download it again", missing=missing)


def scheme(name: Any) -> Format:
    """The format of a quantization name of MLC-LLM's.

    Raises ConfigError for one that is not read."""
    if name == "q4f16_ft":
        raise ConfigError(
            "q4f16_ft orders its codes for one generation of NVIDIA GPUs, and how is not recorded; convert the "
            "model again with q4f16_1"
        )
    if name in GROUP or name in PLAIN:
        return FORMATS[name]
    if isinstance(name, str) and name in OTHERS:
        base, dtype = OTHERS[name]
        return replace(FORMATS[base], name=name, dtype=dtype, ends=False)
    known = ", ".join((*PLAIN, *GROUP, *OTHERS))
    raise ConfigError(f"quantization {str(name)[:60]!r} is none of MLC-LLM's that jaxllm reads: {known}")


def _ends(chat: Mapping[str, Any]) -> Any:
    template = chat.get("conv_template")
    stops = template.get("stop_token_ids") if isinstance(template, dict) else None
    return chat["eos_token_id"] if chat.get("eos_token_id") is not None else stops or None


def _block_size(recorded: Mapping[str, Any]) -> tuple[int, int]:
    size = recorded.get("weight_block_size")
    if isinstance(size, list) and len(size) == 2 and all(type(n) is int and 0 < n < 2**20 for n in size):
        return size[0], size[1]
    return 128, 128


def sampling(folder: Folder) -> dict[str, Any]:
    """The sampling values of mlc-chat-config.json, named as generation_config.json names them."""
    return {k: folder.chat[k] for k in SAMPLING if type(folder.chat.get(k)) in (int, float)}


def readers(folder: Folder) -> Readers:
    """Name -> reader of every tensor the model needs, after every shard was compared with its md5.

    Raises CheckpointError for an index that does not describe its shards, a shard whose md5 differs, and parts
    of a packed weight that are missing."""
    found = tensors(folder, checked_index(folder.path))
    absorbed = [name for name in found if name.endswith(".w_uk")]
    if absorbed and not any(name.endswith(".w_uk_scale_inv") for name in found):
        drop = ".kv_b_proj.weight"  # the same values, which the absorbed factors hold unquantized
    else:
        drop = (".w_uk", ".w_uv", ".w_uk_scale_inv", ".w_uv_scale_inv")
    return {name: partial(_needed, folder, name, r) for name, r in found.items() if not name.endswith(drop)}


def checked_index(path: pathlib.Path) -> Index:
    """The index of the folder at `path`, its shards compared with their md5.

    Raises CheckpointError where they differ, or the index is malformed."""
    file = index_file(path)
    if file is None:
        raise CheckpointError(f"{path} has no index of MLC-LLM's (tensor-cache.json); give the folder that has")
    index = read_index(file)
    with progress(f"checking {path.name}", len(index.shards)) as advance:
        check_sums(index.shards, advance)
    return index


def _needed(folder: Folder, name: str, reader: Callable[[], Values]) -> Values:
    x, place = reader(), destination(name, folder.family)
    expand = isinstance(x, QTensor) and place and place[1].rpartition(".")[2] in EXPANDED
    return dequantize(x) if expand else x


def tensors(folder: Folder, index: Index) -> Readers:
    """Name -> reader of all tensors in the order of the index; "X.weight" gives what its parts are together."""
    if index.tensors and all(t.name.startswith("param_") for t in index.tensors):
        raise CheckpointError(
            f"{folder.path} numbers its tensors, as MLC-LLM did in 2023, and does not say which is which; convert "
            "the model again"
        )
    groups: dict[str, dict[str, Stored]] = {}
    for t in index.tensors:
        stem, _, last = t.name.rpartition(".")
        if last in PARTS:
            groups.setdefault(f"{stem}.weight", {})[last] = t
        elif t.name.endswith(".weight_scale_inv"):
            groups.setdefault(t.name.removesuffix("_scale_inv"), {})["scale_inv"] = t
        elif last != "activation_scale":
            groups.setdefault(t.name, {})["plain"] = t
    config = model_config(folder.family, folder.values)
    columns = partial(_columns, folder.family, config, params_shape(config))
    return {name: partial(_read, folder, name, parts, columns) for name, parts in groups.items()}


def _read(folder: Folder, name: str, parts: dict[str, Stored], columns: Callable) -> Values:
    kinds = [kind for kind in KINDS if set(parts) & set(kind)]
    if len(kinds) != 1 or not set(kinds[0][:1]) <= set(parts) <= set(kinds[0]):
        raise CheckpointError(
            f"{name} is given as {', '.join(sorted(parts))}, which makes no weight; convert again"
        )
    x = KINDS[kinds[0]](folder, name, {key: read(part) for key, part in parts.items()}, columns)
    if isinstance(x, np.ndarray) and folder.format.dtype == "float32" and x.dtype == ml_dtypes.bfloat16:
        return x.astype(np.float32)  # from a "-b16" index
    return x


def _columns(family: Family, config: ModelConfig, shapes: dict, name: str, rows: tuple[int, ...]) -> int | None:
    """The in axis that the config gives the weight `name` [*rows, in]; None where it has no place for it.

    Files hold whole groups and do not say how much of the last one is filled."""
    blank = np.broadcast_to(np.float32(0), (*rows, 1))
    first = next(iter(pieces(name, blank, config, replace(family, one_plus=None))))
    return shapes[first.path][-1] if first.path in shapes else None


# ---- kinds of weight -------------------------------------------------------------------------------------

Arrays = dict[str, np.ndarray]


def _plain(folder: Folder, name: str, parts: Arrays, columns: Callable) -> Values:
    if "scale_inv" not in parts:
        return parts["plain"]
    return _block(folder, name, parts["plain"], parts["scale_inv"])


def _quantized(folder: Folder, name: str, parts: Arrays, columns: Callable) -> QTensor:
    f = folder.format
    if f.name in GROUP:
        return _group(folder, name, parts, columns)
    if not f.levels.startswith("float8"):
        raise CheckpointError(f"{name} has q_weight, but the scheme is {f.name}; get {CONFIG} of these files")
    codes = parts["q_weight"].view(np.dtype(f.levels))
    per = np.ones(1, np.float32) if "q_scale" not in parts else parts["q_scale"].astype(np.float32).reshape(-1)
    if codes.ndim < 2 or per.size not in (1, codes[..., 0, 0].size):
        raise CheckpointError(f"{name} has {per.size} scales, which do not fit its shape {list(codes.shape)}")
    per = per.reshape(codes.shape[:-2] if per.size > 1 else (1,) * (codes.ndim - 2))
    scale = np.broadcast_to(per[..., None, None], (*codes.shape[:-1], 1)).copy()
    return QTensor(codes, scale, format=f, columns=codes.shape[-1], dtype_name=f.dtype)


def _group(folder: Folder, name: str, parts: Arrays, columns: Callable) -> QTensor:
    f, words, scale = folder.format, parts["q_weight"], parts.get("q_scale")
    place = destination(name, folder.family)
    if scale is None or words.ndim < 2 or words.ndim != scale.ndim or words.dtype != np.uint32:
        raise CheckpointError(f"{name} should be words of codes and their scales; convert the model again")
    if f.axis == "KN" and words.ndim == 2 and not (place and place[1] in EMBEDDINGS):
        words, scale = np.ascontiguousarray(words.T), np.ascontiguousarray(scale.T)
    if words.shape != (*scale.shape[:-1], scale.shape[-1] * WORDS):
        raise CheckpointError(f"{name}: words {list(words.shape)} do not go with scales {list(scale.shape)}")
    K = columns(name, words.shape[:-1])
    K = scale.shape[-1] * f.group if K is None else K
    if -(-K // f.group) != scale.shape[-1]:
        raise CheckpointError(
            f"{name} has {scale.shape[-1]} groups of {f.group} columns a row, and its config wants {K} columns"
        )
    codes, high = from_words(words, f.bits)
    scale = scale.astype(np.dtype(f.scale), copy=False)
    return QTensor(codes, scale, high=high, format=f, columns=K, dtype_name=f.dtype)


WORDS = 4  # words a group: 8 codes of 4 bits or 10 of 3 in each


def from_words(words: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray | None]:
    """MLC-LLM's u32 words of 4-bit codes (8 in each) or 3-bit codes (10) -> packed codes u8, and the high plane.

    Raises CheckpointError where bits are set that stand for nothing."""
    if bits == 4:
        return words.view(np.uint8), None
    if (words >> 30).any():
        raise CheckpointError(
            "words of ten 3-bit codes should have their last two bits 0; convert the model again"
        )
    fields = np.stack([((words >> (3 * i)) & 7).astype(np.uint8) for i in range(10)], -1)
    return pack(fields.reshape(*words.shape[:-1], -1), 3)


def _awq(folder: Folder, name: str, parts: Arrays, columns: Callable) -> QTensor:
    if set(parts) != {"qweight", "qzeros", "scales"} or any(x.ndim != 2 for x in parts.values()):
        raise CheckpointError(f"{name} should have matrices qweight, qzeros and scales; convert the model again")
    words, zeros, scale = (parts[k] for k in ("qweight", "qzeros", "scales"))
    if words.shape[0] == scale.shape[0]:  # the older layout: words and scales [out, ..], nibbles in order
        codes, zero = (_nibbles(x, range(8)) for x in (words, zeros))
    else:
        codes, zero = (_nibbles(x, GEMM).T for x in (words, zeros))
        scale = scale.T
    if zero.shape != scale.shape or len(codes) != len(scale) or codes.shape[1] % (8 * scale.shape[1]):
        shapes = " ".join(f"{key} {list(x.shape)}" for key, x in parts.items())
        raise CheckpointError(f"{name}: {shapes} do not fit; convert the model again")
    K = codes.shape[1]
    packed, _ = pack(np.ascontiguousarray(codes), 4)
    zero, scale = np.ascontiguousarray(zero), np.ascontiguousarray(scale)
    f = replace(folder.format, group=K // scale.shape[1])
    return QTensor(packed, scale, zero=zero, format=f, columns=K, dtype_name=f.dtype)


GEMM = (0, 4, 1, 5, 2, 6, 3, 7)  # where AutoAWQ's GEMM layout has the nibbles of eight neighbours


def _nibbles(words: np.ndarray, places: Sequence[int]) -> np.ndarray:
    """Words of 32 bits [n, m] -> codes u8 [n, 8 m], the i-th of eight from nibble places[i]."""
    words = words.view(np.uint32)
    fields = [((words >> np.uint32(4 * place)) & 15).astype(np.uint8) for place in places]
    return np.stack(fields, -1).reshape(words.shape[0], -1)


def _block(folder: Folder, name: str, codes: np.ndarray, scale: np.ndarray) -> QTensor:
    rows, group = folder.block
    if not folder.format.levels.startswith("float8") or codes.dtype != np.dtype(folder.format.levels):
        raise CheckpointError(
            f"{name} has block scales and {codes.dtype} values; the scheme is {folder.format.name}"
        )
    N, K = codes.shape[-2:]
    want = (*codes.shape[:-2], -(-N // rows), -(-K // group))
    if scale.shape != want:
        raise CheckpointError(f"the block scales of {name} should be {list(want)}, got {list(scale.shape)}")
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -K % group)]) if K % group else codes
    scale = np.repeat(scale.astype(np.float32), rows, -2)[..., :N, :]
    f = replace(folder.format, group=group)
    return QTensor(codes, scale, format=f, columns=K, dtype_name=f.dtype)


# The parts that make one kind of weight, the first of which there must be -> how.
KINDS: dict[tuple[str, ...], Callable[[Folder, str, Arrays, Callable], Values]] = {
    ("plain", "scale_inv"): _plain,
    ("q_weight", "q_scale", "q_calibration_scale"): _quantized,
    ("qweight", "qzeros", "scales"): _awq,
}
