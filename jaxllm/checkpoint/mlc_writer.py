"""Writing MLC-LLM's weight folders: the files its converter would write, byte for byte.

Source: python/mlc_llm/loader/huggingface_loader.py (order), quantization/group_quantization.py (numbers) and
tvm.contrib.tvmjs.dump_tensor_cache (files). `python -m jaxllm.checkpoint.mlc_writer SRC OUT --format q4f16_1`.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxllm.checkpoint import mlc, native
from jaxllm.checkpoint.canonical import IGNORED, Values
from jaxllm.checkpoint.mlc_files import Written, chat_config, in_place, tokenizer_files
from jaxllm.checkpoint.mlc_names import ARCHITECTURES, Architecture, Fused
from jaxllm.checkpoint.source import Source, open_source
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.families import model_config
from jaxllm.progress import progress
from jaxllm.quant import FORMATS, Format, QTensor, dequantize
from jaxllm.quant.encode import encode
from jaxllm.quant.qtensor import unpack

SCHEMES = (*mlc.PLAIN, *mlc.GROUP)
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
EMBEDDING = re.compile(r".*\b(embed_tokens|embed_in|wte|wpe|embd|embedding|tok_embeddings)\.weight")
LAST = ("head.weight", "lm_head.weight", "lm_head.linear.weight", "embed_out.weight")
LAST_OF_ALL = re.compile(r"(head|lm_head|lm_head\.linear|embed_out|output|transformer\.output_layer)\.weight")
ROUTER_MOST = 256  # experts up to which MLC-LLM leaves a router unquantized
WIDE_BIAS = re.compile(r".*\.dense_(h_to_4h|4h_to_h)\.bias")  # of gpt_neox: f32 whatever the scheme


class Made(NamedTuple):
    """A tensor of MLC-LLM's, and the source's tensors it is made of."""

    name: str
    parts: tuple[str, ...]
    stacked: int = 0  # experts, each of len(parts) / stacked tensors; 0: not a stack


def write_mlc(
    source: str | os.PathLike, out: str | os.PathLike, quantization: str, *, rounding: str = "even"
) -> pathlib.Path:
    """Convert a checkpoint folder (Hugging Face's, or MLC-LLM's of another scheme) to MLC-LLM's files in `out`.

    quantization: one of SCHEMES. rounding: "even" as MLC-LLM since April 2026 everywhere and before it on CUDA;
    "away", halves away from zero, as it was elsewhere. Shards and index are what its own converter on a CPU
    makes; mlc-chat-config.json has the conversation template "LM" (text as it is), which `mlc_llm gen_config` and
    an export for the target mlc change. Tensors are made one at a time: the peak is one of them, packed and not,
    and a shard of 32 MB.

    Returns `out`. Raises ConfigError for an unknown scheme or rounding and an architecture that MLC-LLM lacks;
    CheckpointError where `out` already holds weights or the source lacks tensors.
    """
    format = _format(quantization, rounding)
    out, folder = pathlib.Path(out), open_source(pathlib.Path(source))
    if any(out.glob("params_shard_*.bin")) or any(out.glob("*-cache*.json")):
        raise CheckpointError(f"{out} already holds weights of MLC-LLM; give another folder, or remove them")
    with in_place(out) as part:
        if mlc.recognised(folder.folder):
            _rewrite(folder.folder, part, format)
        else:
            _convert(folder, part, format)
    return out


def _format(quantization: str, rounding: str) -> Format:
    if quantization not in SCHEMES:
        raise ConfigError(f"MLC-LLM's schemes that are written are {', '.join(SCHEMES)}; got {quantization!r}")
    if rounding not in ("even", "away"):
        raise ConfigError(f"rounding should be 'even' or 'away', got {rounding!r}")
    return replace(FORMATS[quantization], rounding=rounding)


# ---- from the hub's names --------------------------------------------------------------------------------


def _convert(source: Source, part: pathlib.Path, format: Format) -> None:
    kind = source.values.get("model_type")
    arch = ARCHITECTURES.get(kind)
    if source.saved is not None or native.recognised(source.values) or not source.path.is_dir():
        raise ConfigError(
            f"{source.path} is no checkpoint of Hugging Face's or MLC-LLM's; those are what is converted"
        )
    if arch is None or arch.fused is None:
        known = ", ".join(name for name, a in ARCHITECTURES.items() if a.fused is not None)
        raise ConfigError(f"model type {str(kind)[:60]!r} is not written for MLC-LLM; these are: {known}")
    readers = source.readers()
    files = _by_file(readers)
    tied = model_config(source.family, source.values).tied
    makes = plan(arch, [name for names in files.values() for name in names], tied=tied)
    written = Written(part)
    with progress(f"writing {format.name}", len(makes)) as advance:
        for made in makes:
            _put(written, made, _value(made, readers, arch, source.values, format), format)
            advance()
    written.close(loaded(makes, files, {name: _size(reader) for name, reader in readers.items()}))
    tokenizer_files(source.folder, part)
    chat_config(source.folder, part, kind, dict(source.values), format.name)


def _by_file(readers: Mapping[str, Callable[[], Values]]) -> dict[pathlib.Path | None, list[str]]:
    """The names in each file, as its own library lists them: sorted, or as the index of several has them."""
    files: dict[pathlib.Path | None, list[str]] = {}
    for name, reader in readers.items():
        files.setdefault(getattr(reader, "path", None), []).append(name)
    return files if len(files) > 1 else {path: sorted(names) for path, names in files.items()}


def _size(reader: Callable[[], Values]) -> int:
    shape = getattr(reader, "shape", None)
    return int(np.prod(reader().shape if shape is None else shape, dtype=np.int64))


def plan(arch: Architecture, names: Sequence[str], *, tied: bool) -> list[Made]:
    """What MLC-LLM makes of the source's tensors, in its order: that of the first part in `names`.

    Raises CheckpointError where a tensor lacks the others it is kept with."""
    there, makes = set(names), {}
    unused = {"lm_head.weight"} if arch.head == "never" or (tied and arch.head == "tied") else set()
    for name in names:
        if IGNORED.fullmatch(name) or name in unused:
            continue
        for made in _made(arch, name, there):
            if absent := [p for p in made.parts if p not in there]:
                raise CheckpointError(
                    f"the checkpoint has {name} but not {absent[0]}, which MLC-LLM keeps with it"
                )
            makes.setdefault(made.name, made)
    if arch.head == "always" and not any(LAST_OF_ALL.fullmatch(m) for m in makes):
        embedding = [n for n in names if re.fullmatch(r"(.*\.)?(embed_tokens|wte)\.weight", n)]
        if not (tied and embedding):
            raise CheckpointError("MLC-LLM wants the head of this architecture, and the checkpoint has none")
        makes["lm_head.weight"] = Made("lm_head.weight", (embedding[0],))
    return list(makes.values())


def _made(arch: Architecture, name: str, there: set[str]) -> Iterator[Made]:
    for pattern, targets in arch.copies:
        if match := re.fullmatch(pattern, name):
            yield from (Made(match.expand(to), (name,)) for to in targets)
    for fused in arch.fused:
        if made := _fused(arch, fused, name, there):
            yield made
            return
    yield Made(_renamed(arch, name), (name,))


def _fused(arch: Architecture, fused: Fused, name: str, there: set[str]) -> Made | None:
    choices = "|".join(re.escape(part).replace(r"\*", r"\d+") for part in fused.parts)
    match = re.fullmatch(rf"(.*\.)?({choices})\.(weight|bias)", name)
    if not match:
        return None
    before, leaf = match[1] or "", match[3]
    names = [f"{before}{part}.{leaf}" for part in fused.parts]
    stacked = 0
    if "*" in fused.parts[0]:
        while names[0].replace("*", str(stacked)) in there:
            stacked += 1
        names = [n.replace("*", str(expert)) for expert in range(stacked) for n in names]
    return Made(_renamed(arch, f"{before}{fused.target}.{leaf}"), tuple(names), stacked)


def _renamed(arch: Architecture, name: str) -> str:
    for pattern, to in arch.names:
        new, count = re.subn(rf"^{pattern}", to, name, count=1)
        if count:
            return new
    return name


def _value(made: Made, readers: Mapping, arch: Architecture, values: Mapping, format: Format) -> np.ndarray:
    parts = [readers[name]() for name in made.parts]
    parts = [dequantize(x, np.float32) if isinstance(x, QTensor) else x for x in parts]
    if made.stacked:
        each = len(parts) // made.stacked
        parts = [np.stack([np.concatenate(parts[i : i + each]) for i in range(0, len(parts), each)])]
    x = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return arch.turn(made.name, x, values)


def loaded(makes: Sequence[Made], files: Mapping[Any, Sequence[str]], sizes: Mapping[str, int]) -> int:
    """The parameters that MLC-LLM counts: those of every file it loads, again where it loads one again."""
    place = {name: file for file, names in files.items() for name in names}
    counts = {file: sum(sizes[n] for n in names if not IGNORED.fullmatch(n)) for file, names in files.items()}
    held: set = set()
    total = sum(counts.values()) if len(files) == 1 else 0
    for made in makes if len(files) > 1 else ():
        wanted = {place[name] for name in made.parts}
        if new := wanted - held:
            held = (held & wanted) | new
            total += sum(counts[file] for file in new)
    return total


# ---- into its files --------------------------------------------------------------------------------------


def _put(written: Written, made: Made, x: np.ndarray, format: Format) -> None:
    wide = format.dtype if not WIDE_BIAS.fullmatch(made.name) else "float32"
    x = np.asarray(x).astype(DTYPES[wide])
    if not _is_quantized(made.name, x.shape, format):
        written.add(made.name, x)
        return
    _put_codes(written, made.name, encode(x, format))


def _is_quantized(name: str, shape: tuple[int, ...], format: Format) -> bool:
    if format.name in mlc.PLAIN or len(shape) < 2 or not name.endswith(".weight"):
        return False
    if name.endswith("gate.weight") and shape[0] <= ROUTER_MOST:
        return False
    return format.ends or not (EMBEDDING.fullmatch(name) or name in LAST)


def _put_codes(written: Written, name: str, q: QTensor) -> None:
    words, scale = to_words(q), np.asarray(q.scale)
    if q.format.axis == "KN" and words.ndim == 2 and not EMBEDDING.fullmatch(name):
        words, scale = words.T, scale.T
    stem = name.removesuffix("weight")
    written.add(f"{stem}q_weight", words)
    written.add(f"{stem}q_scale", scale.astype(DTYPES[q.format.dtype]))


def to_words(q: QTensor) -> np.ndarray:
    """The codes of q as MLC-LLM's u32 words [.., N, words]; the inverse of `from_words`."""
    if q.format.bits == 4:
        return np.ascontiguousarray(q.codes).view(np.uint32)
    codes = unpack(np.asarray(q.codes), np.asarray(q.high), 3).astype(np.uint32)
    codes = codes.reshape(*codes.shape[:-1], -1, 10)
    return sum((codes[..., i] << np.uint32(3 * i) for i in range(1, 10)), codes[..., 0])


# ---- from its own names ----------------------------------------------------------------------------------


def _rewrite(path: pathlib.Path, part: pathlib.Path, format: Format) -> None:
    folder, index = mlc.open_folder(path), mlc.checked_index(path)
    written, readers = Written(part), mlc.tensors(folder, index)
    with progress(f"writing {format.name}", len(readers)) as advance:
        for name, reader in readers.items():
            x = reader()
            if isinstance(x, QTensor) and x.format.name == format.name:
                _put_codes(written, name, x)
            else:
                x = dequantize(x, np.float32) if isinstance(x, QTensor) else x
                _put(written, Made(name, ()), x, format)
            advance()
    bits, size = index.metadata.get("BitsPerParam"), index.metadata.get("ParamBytes")
    known = all(isinstance(v, int | float) and 0 < v < 2**60 for v in (bits, size))
    written.close(round(size * 8 / bits) if known else written.values)
    tokenizer_files(path, part)
    chat_config(path, part, folder.chat["model_type"], dict(folder.values), format.name)


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m jaxllm.checkpoint.mlc_writer SRC OUT --format q4f16_1`."""
    parser = argparse.ArgumentParser(description="Convert a checkpoint folder to MLC-LLM's weights.")
    parser.add_argument("source", help="folder of a Hugging Face checkpoint, or of MLC-LLM's weights")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--format", required=True, choices=SCHEMES)
    parser.add_argument("--rounding", default="even", choices=("even", "away"), help="of halves (default: even)")
    given = parser.parse_args(arguments)
    print(write_mlc(given.source, given.out, given.format, rounding=given.rounding))


if __name__ == "__main__":
    main()
