"""Which linear maps of a block read the same activation, and where a scale of that activation can be folded.

Paths are those inside a block ("mixer.q"). A scale s of an activation's channels changes nothing when whatever
makes the activation is divided by s and whatever reads it is multiplied by s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jaxllm.config import MLA, MLP, Attention, Block, DeltaNet, Mamba, Mamba2, ModelConfig, MoE, ShortConv

LINEAR = ("silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "relu2")  # a gated layer is linear in `up`


@dataclass(frozen=True)
class Read:
    """One activation [B, T, ..] of a block and the linears that read it."""

    point: str  # its tap
    linears: tuple[str, ...]  # paths of weights [out, in] or [experts, out, in], without ".w"
    maker: str | None = None  # path of the norm or linear that takes a scale of it exactly; None: nothing does
    repeat: int = 1  # each row of the maker feeds this many runs of channels (query heads of a kv head)
    head: int = 0  # channels of a head, where rows of the maker are repeated
    routed: bool = False  # each expert reads only the rows sent to it


def reads(b: Block) -> tuple[Read, ...]:
    """What can be calibrated of a block, in the order of its computation."""
    return (*_mixer(b), *(_ffn(b) if b.ffn else ()))


def _mixer(b: Block) -> Iterator[Read]:
    m, names = b.mixer, [f"mixer.{name}" for name in _ENTRY[type(b.mixer)](b.mixer)]
    together = b.parallel == "shared" and isinstance(b.ffn, MLP)
    alone = b.ffn is None or b.parallel != "shared"
    yield Read(
        "mixer.in",
        (*names, *(_feeding(b.ffn) if together else ())),
        "mixer.pre" if b.pre and (alone or together) else None,
    )
    if isinstance(m, MLA):
        yield Read("mixer.heads", ("mixer.o",))
    if isinstance(m, Attention) and m.out_norm:
        yield Read("mixer.joined", ("mixer.o",), "mixer.out_norm")
    elif isinstance(m, Attention):
        yield Read("mixer.joined", ("mixer.o",), None if m.clip else "mixer.v", m.heads // m.kv_heads, m.head_dim)


_ENTRY: dict[type, Callable[[Any], tuple[str, ...]]] = {
    Attention: lambda m: ("q", "k", "v", *(("gate",) if m.gate else ())),
    MLA: lambda m: ("q_a" if m.q_rank else "q", "kv_a"),
    DeltaNet: lambda m: ("qkv", "z", "b", "a"),
    Mamba: lambda m: ("in",),
    Mamba2: lambda m: ("in",),
    ShortConv: lambda m: ("in",),
}


def _ffn(b: Block) -> Iterator[Read]:
    m = b.ffn
    if isinstance(m, MoE):
        yield Read("ffn.in", ("ffn.gate", "ffn.up"), routed=True)
        yield Read("ffn.routed", ("ffn.down",), routed=True)
        if m.shared:
            yield Read("ffn.in", ("ffn.shared.gate", "ffn.shared.up"))
            yield Read("ffn.hidden", ("ffn.shared.down",), _up(MLP(m.shared, m.act), "ffn.shared"))
        return
    if b.parallel != "shared":
        yield Read("ffn.in", _feeding(m), "ffn.pre" if b.pre else None)
    yield Read("ffn.hidden", ("ffn.down",), _up(m, "ffn"))


def _feeding(m: MLP) -> tuple[str, ...]:
    return ("ffn.gate", "ffn.up") if m.gated else ("ffn.up",)


def _up(m: MLP, path: str) -> str | None:
    if m.norm:
        return f"{path}.norm"
    exact = m.act in LINEAR if m.gated else m.act == "relu"
    return f"{path}.up" if exact else None


def last(config: ModelConfig) -> Read:
    """The read of the head: the final norm's output. A tied head cannot take a scale."""
    return Read("norm", ("embed" if config.tied else "head",), None if config.tied else "norm")
