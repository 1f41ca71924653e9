"""Files of llama2.c: a header and the weights of a Llama, one after another, in one of three layouts.

Source: github.com/karpathy/llama2.c, export.py (legacy_export, version1_export, version2_export), as run.c and
runq.c read them. Version 0 has no magic number: a file is one where its first seven integers describe exactly
its length. Rotary pairs are neighbours in all of them.
"""

from __future__ import annotations

import math
import pathlib
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxllm.checkpoint.canonical import Values
from jaxllm.errors import CheckpointError, Notice
from jaxllm.families import family
from jaxllm.families.base import MANY, Family
from jaxllm.quant import FORMATS, QTensor

MAGIC = 0x616B3432  # "ak42"
HEADER = 256  # bytes, of versions 1 and 2
LARGEST = 2**24  # of any size a header gives
ENDS = [1, 2]  # stories end with the <s> of the next one, at which run.c stops, too

MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
GATED = ("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj")  # w1, w2, w3
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Header:
    """What the first bytes of a file say."""

    version: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    max_len: int
    tied: bool
    group: int | None = None  # weights that share a scale (version 2)

    @property
    def start(self) -> int:
        """Bytes before the first weight."""
        return HEADER if self.version else 28

    def faults(self) -> list[str]:
        """What makes it no Llama, in words."""
        sizes = {n: getattr(self, n) for n in ("width", "hidden", "heads", "kv_heads", "vocab", "max_len")}
        found = [f"{name} is {n}" for name, n in sizes.items() if not 1 <= n <= LARGEST]
        found += [] if 1 <= self.layers <= MANY else [f"layers is {self.layers}"]
        if self.group is not None and not 1 <= self.group <= LARGEST:
            found.append(f"the group size is {self.group}")
        if not found and (self.width % self.heads or self.heads % self.kv_heads or self.width // self.heads % 2):
            found.append(f"width {self.width}, {self.heads} heads and {self.kv_heads} kv heads do not go together")
        return found


class Place(NamedTuple):
    """Where a tensor lies: f32 values, or int8 codes and then the f32 scales of its groups."""

    start: int
    shape: tuple[int, ...]
    group: int | None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size + 4 * (self.size // self.group) if self.group else 4 * self.size


def recognised(path: pathlib.Path) -> bool:
    """Whether a file is llama2.c's: it has the magic number, or is a whole file of version 0."""
    try:
        return _magic(path) or _plausible(_header(path), path)
    except (OSError, CheckpointError):
        return False


def open_file(path: pathlib.Path) -> tuple[dict[str, Any], Family, Callable[[], dict], int]:
    """(config as Hugging Face spells it, family, opener of the readers, tokens) of a file. Reads the header only.

    The opener gives the family's tensor names -> reader of f32 arrays or, from version 2, of QTensors. A version
    2 weight whose groups run across its rows is expanded to f32 when it is read; a Notice says how many.
    Raises CheckpointError where the header is no Llama's or the file has another length.
    """
    header = _header(path)
    if faults := header.faults():
        raise CheckpointError(f"{path} is no llama2.c checkpoint: {'; '.join(faults)}; get the file again")
    _check_length(header, path)
    described = replace(family("llama"), interleaved=True)
    return _values(header), described, partial(_readers, header, path), header.vocab


def _magic(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == struct.pack("<I", MAGIC)


def _header(path: pathlib.Path) -> Header:
    try:
        with path.open("rb") as file:
            start = file.read(HEADER)
        if _magic(path):
            return _versioned(path, start)
        *sizes, vocab, max_len = struct.unpack("<7i", start[:28])
    except (OSError, struct.error) as error:
        raise CheckpointError(f"{path} is not a whole llama2.c checkpoint ({error}); get it again") from error
    return Header(0, *sizes, abs(vocab), max_len, tied=vocab > 0)


def _versioned(path: pathlib.Path, start: bytes) -> Header:
    version, *sizes, tied, group = struct.unpack("<8iBi", start[4:41])
    if version not in (1, 2) or tied not in (0, 1):
        raise CheckpointError(
            f"{path} is of version {version} with a shared classifier of {tied}; read are versions 0, 1 and 2 "
            "with 0 or 1: export it again with llama2.c's export.py"
        )
    return Header(version, *sizes, tied=bool(tied), group=group if version == 2 else None)


def _plausible(header: Header, path: pathlib.Path) -> bool:
    return not header.faults() and _length(header) == path.stat().st_size


def _check_length(header: Header, path: pathlib.Path) -> None:
    if header.group and (uneven := [n for n, p in _places(header) if p.group and p.size % p.group]):
        raise CheckpointError(f"{path}: groups of {header.group} do not divide {uneven[0]}; get the file again")
    want, size = _length(header), path.stat().st_size
    if want != size:
        raise CheckpointError(f"{path} should have {want} bytes by its header, and has {size}; get it again")


def _length(header: Header) -> int:
    *_, (_, last) = _places(header)
    return last.start + last.nbytes


def _places(h: Header) -> Iterator[tuple[str, Place]]:
    """Name -> place, in the order of the file; a name that starts with "." is no weight."""
    at = h.start
    for name, shape in _order(h):
        place = Place(at, shape, h.group if len(shape) == 2 else None)
        yield name, place
        at += place.nbytes


def _order(h: Header) -> Iterator[tuple[str, tuple[int, ...]]]:
    D, head = h.width, h.width // h.heads
    kv = h.kv_heads * head
    attention = zip(MATRICES, ((D, D), (kv, D), (kv, D), (D, D)), strict=True)
    gated = zip(GATED, ((h.hidden, D), (D, h.hidden), (h.hidden, D)), strict=True)
    embed, norm = ("model.embed_tokens", (h.vocab, D)), ("model.norm", (D,))
    before, after = ((name, (D,)) for name in NORMS)
    if h.version:
        parts = [*_each(h, before, after), norm, embed, *_each(h, *attention, *gated)]
    else:
        parts = [embed, *_each(h, before, *attention, after, *gated), norm]
        parts += [(".cos", (h.max_len * head // 2,)), (".sin", (h.max_len * head // 2,))]
    yield from parts if h.tied else [*parts, ("lm_head", embed[1])]


def _each(h: Header, *parts: tuple[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in parts:
        yield from ((f"model.layers.{i}.{name}", shape) for i in range(h.layers))


def _values(h: Header) -> dict[str, Any]:
    """config.json's values. What run.c fixes is stated: the base of the rotary angles and the norms' epsilon."""
    return dict(
        model_type="llama",
        vocab_size=h.vocab,
        hidden_size=h.width,
        intermediate_size=h.hidden,
        num_hidden_layers=h.layers,
        num_attention_heads=h.heads,
        num_key_value_heads=h.kv_heads,
        hidden_act="silu",
        max_position_embeddings=h.max_len,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=h.tied,
        eos_token_id=ENDS,
        torch_dtype="float32",
    )


def _readers(header: Header, path: pathlib.Path) -> dict[str, Callable[[], Values]]:
    places = {name: place for name, place in _places(header) if not name.startswith(".")}
    across = [name for name, p in places.items() if p.group and p.shape[1] % p.group]
    if across:
        warnings.warn(
            f"{path}: {len(across)} weights ({across[0]}, ...) are expanded to float32, because their groups of "
            f"{header.group} weights run across their rows",
            Notice,
            stacklevel=2,
        )
    return {f"{name}.weight": partial(_read, path, name, place) for name, place in places.items()}


def _read(path: pathlib.Path, name: str, place: Place) -> Values:
    if place.group is None:
        return _numbers(path, "<f4", place.size, place.start).reshape(place.shape)
    codes = _numbers(path, "i1", place.size, place.start)
    scale = _numbers(path, "<f4", place.size // place.group, place.start + place.size)
    if not (np.isfinite(scale).all() and (scale >= 0).all()):
        raise CheckpointError(
            f"{path}: the scales of {name} are not all finite and positive; the file is damaged, or of the first "
            "version 2, which had all scales at its end: export it again with llama2.c's export.py"
        )
    if place.shape[1] % place.group:
        return (codes.reshape(-1, place.group) * scale[:, None]).reshape(place.shape)
    packed = replace(FORMATS["int8_g32"], name=f"int8_g{place.group}", group=place.group, scale="float32")
    N, columns = place.shape
    codes, scale = codes.reshape(N, columns), scale.reshape(N, -1)
    return QTensor(codes, scale, format=packed, columns=columns, dtype_name="float32")


def _numbers(path: pathlib.Path, dtype: str, count: int, offset: int) -> np.ndarray:
    try:
        found = np.fromfile(path, dtype, count, offset=offset)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    if found.size != count:
        raise CheckpointError(f"{path} ends early; it was changed while it was read: load it again")
    return found
