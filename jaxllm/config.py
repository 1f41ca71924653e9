"""What a decoder is, as frozen data. A ModelConfig determines the parameter tree and the state tree.

Letters in the shapes, here and everywhere: B batch, T new tokens, S cache slots, D width, H heads, K kv heads,
G = H/K, h head dim, F hidden, E experts, V vocabulary, r latent rank, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "relu2", "clamped_swiglu"]


@dataclass(frozen=True)
class Norm:
    """RMSNorm or LayerNorm over the last axis; weights are stored as the factor itself, never as `1 + w`."""

    kind: Literal["rms", "layer"]
    eps: float
    bias: bool = False


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of halves: every scaling scheme is a frequency table and an amplitude."""

    inv_freq: tuple[float, ...]  # radians per position; rotates the first 2 * len dims of a head
    amplitude: float = 1.0

    @property
    def dims(self) -> int:
        return 2 * len(self.inv_freq)


@dataclass(frozen=True)
class QKNorm:
    """A norm of queries and keys."""

    norm: Norm
    over: Literal["head", "heads", "full"]  # weights [h], [H, h] or [H * h]
    after_rope: bool = False


@dataclass(frozen=True)
class QueryScale:
    """Queries grow with their position: 1 + log(floor((position + 1) / every) + 1) * factor."""

    every: float
    factor: float


@dataclass(frozen=True)
class Attention:
    """Softmax attention of H heads over K cached key-value heads; what is None or False is left out."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None = None
    window: int | None = None  # a query sees the last `window` positions, itself included
    chunk: int | None = None  # a query sees only its own block of `chunk` positions
    softcap: float | None = None
    qk_norm: QKNorm | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    clip: float | None = None  # q, k and v are clipped to [-clip, clip]
    alibi: tuple[float, ...] | None = None  # slope per head, H values
    sinks: bool = False  # a learned logit per head that takes probability and gives nothing
    gate: bool = False  # the heads' output is multiplied by sigmoid(a projection of x)
    out_norm: Norm | None = None  # of the heads' output [H * h], before it is projected
    query_scale: QueryScale | None = None


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention, absorbed: the cache holds one latent of rank r and one rotary key per token."""

    heads: int
    nope_dim: int
    v_dim: int
    kv_rank: int
    q_rank: int | None
    rope: Rope
    scale: float
    norm: Norm
    bias: bool = False


@dataclass(frozen=True)
class Mamba:
    """Selective state space (Mamba): state [inner, states] per row."""

    inner: int
    states: int
    kernel: int
    dt_rank: int
    conv_bias: bool = True
    bias: bool = False
    inner_eps: float | None = None  # of an RMSNorm without weights over each of the time step, B and C


@dataclass(frozen=True)
class Mamba2:
    """State space duality (Mamba-2): state [heads, head_dim, states] per row; groups of heads share B and C."""

    heads: int
    head_dim: int
    groups: int
    states: int
    kernel: int
    norm: Norm
    dt_limit: tuple[float, float] = (0.0, math.inf)
    conv_bias: bool = True
    bias: bool = False

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def conv_width(self) -> int:
        return self.inner + 2 * self.groups * self.states


@dataclass(frozen=True)
class DeltaNet:
    """Gated delta rule (linear attention that decays and corrects itself): state [v_heads, k_dim, v_dim]."""

    k_heads: int
    v_heads: int
    k_dim: int
    v_dim: int
    kernel: int
    norm: Norm

    @property
    def conv_width(self) -> int:
        return 2 * self.k_heads * self.k_dim + self.v_heads * self.v_dim


@dataclass(frozen=True)
class ShortConv:
    """A short convolution between two gates: the only state is its last kernel - 1 inputs."""

    width: int
    kernel: int
    bias: bool = False


@dataclass(frozen=True)
class MLP:
    """Feed-forward of every token: two matrices, or three where gated."""

    hidden: int
    act: Activation
    gated: bool = True
    bias: bool = False
    norm: Norm | None = None  # of the hidden activations, before the last matrix


@dataclass(frozen=True)
class MoE:
    """Routed experts. `score`: softmax before the choice, softmax of the chosen, sigmoid, or SparseMixer."""

    experts: int
    top_k: int
    hidden: int
    act: Activation
    score: Literal["softmax", "softmax_topk", "sigmoid", "sparsemixer"] = "softmax"
    renorm: bool = False
    scale: float = 1.0
    correction: bool = False  # a bias added for the choice only
    groups: tuple[int, int] | None = None  # (groups of experts, groups kept)
    shared: int = 0  # hidden size of the expert every token visits
    shared_gate: bool = False
    bias: bool = False
    router_bias: bool = False
    weigh: Literal["output", "input"] = "output"  # where the routing weight multiplies
    jitter: float = 0.0  # SparseMixer: experts within 2 * jitter of the best share its probability


Mixer = Attention | MLA | Mamba | Mamba2 | DeltaNet | ShortConv


@dataclass(frozen=True)
class Block:
    """One layer: x + mixer(norm(x)), then + ffn(norm(x)); `parallel` reads both from the same x."""

    mixer: Mixer
    ffn: MLP | MoE | None
    norm: Norm
    pre: bool | Literal["ffn"] = True  # a norm before each sublayer, or the feed-forward alone
    post: bool = False  # a norm after each sublayer, before the residual add
    parallel: Literal["shared", "split"] | None = None  # one norm for both sublayers, or one each
    residual: float = 1.0

    def normed(self, name: str) -> bool:
        """Whether there is a norm before a sublayer, "mixer" or "ffn"."""
        return self.pre is True or self.pre == name


@dataclass(frozen=True)
class ModelConfig:
    """A whole decoder: embedding, blocks, final norm and head. Hashable, so that jit takes it as static."""

    vocab: int
    width: int
    blocks: tuple[Block, ...]
    norm: Norm
    tied: bool
    max_len: int  # positions the model was made for
    dtype: str = "float32"  # activations and cache
    embed_scale: float = 1.0
    embed_norm: Norm | None = None
    positions: int | None = None  # learned positions; the table's first row is position -positions
    head_bias: bool = False
    unit_head: bool = False  # the head's rows are scaled to length 1 when they are loaded
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def __hash__(self) -> int:
        # jit hashes its static arguments on every call: 116 against 9 microseconds at 80 blocks.
        try:
            return self.__dict__["_hash"]
        except KeyError:
            value = hash(tuple(getattr(self, f.name) for f in fields(self)))
            object.__setattr__(self, "_hash", value)
            return value


Shapes = Iterator[tuple[str, tuple[int, ...]]]


def params_shape(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter. Matrices are [out, in]; the source of truth for loading and sharding."""
    shapes = {"embed.w": (config.vocab, config.width)}
    shapes |= _norm("norm", config.norm, config.width)
    if config.embed_norm:
        shapes |= _norm("embed_norm", config.embed_norm, config.width)
    if config.positions is not None:
        shapes["positions.w"] = (config.max_len + config.positions, config.width)
    if not config.tied:
        shapes["head.w"] = (config.vocab, config.width)
    if config.head_bias:
        shapes["head.b"] = (config.vocab,)
    for i, block in enumerate(config.blocks):
        shapes |= {f"layers.{i}.{k}": v for k, v in _block(block, config.width)}
    return shapes


def _norm(path: str, n: Norm, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{path}.{leaf}": shape for leaf in ("w", "b")[: 1 + n.bias]}


def _linear(path: str, out: int, into: int, bias: bool = False) -> Shapes:
    yield f"{path}.w", (out, into)
    if bias:
        yield f"{path}.b", (out,)


def _block(b: Block, D: int) -> Shapes:
    for name in ("mixer", "ffn") if b.ffn else ("mixer",):
        if b.normed(name) and not (name == "ffn" and b.parallel == "shared"):
            yield from _norm(f"{name}.pre", b.norm, D).items()
        if b.post:
            yield from _norm(f"{name}.post", b.norm, D).items()
    yield from ((f"mixer.{k}", v) for k, v in _MIXER[type(b.mixer)](b.mixer, D))
    if b.ffn:
        yield from ((f"ffn.{k}", v) for k, v in _FFN[type(b.ffn)](b.ffn, D))


def _attention(m: Attention, D: int) -> Shapes:
    h = m.head_dim
    yield from _linear("q", m.heads * h, D, m.qkv_bias)
    yield from _linear("k", m.kv_heads * h, D, m.qkv_bias)
    yield from _linear("v", m.kv_heads * h, D, m.qkv_bias)
    yield from _linear("o", D, m.heads * h, m.out_bias)
    if m.gate:
        yield from _linear("gate", m.heads * h, D, m.qkv_bias)
    if m.out_norm:
        yield from _norm("out_norm", m.out_norm, m.heads * h).items()
    if m.sinks:
        yield "sinks", (m.heads,)
    if m.qk_norm:
        for name, heads in (("q_norm", m.heads), ("k_norm", m.kv_heads)):
            shape = {"head": (h,), "heads": (heads, h), "full": (heads * h,)}[m.qk_norm.over]
            yield from _norm(name, m.qk_norm.norm, *shape).items()


def _mla(m: MLA, D: int) -> Shapes:
    if m.q_rank:
        yield from _linear("q_a", m.q_rank, D, m.bias)
        yield from _norm("q_norm", m.norm, m.q_rank).items()
    yield from _linear("q", m.heads * (m.nope_dim + m.rope.dims), m.q_rank or D)
    yield from _linear("kv_a", m.kv_rank + m.rope.dims, D, m.bias)
    yield from _norm("kv_norm", m.norm, m.kv_rank).items()
    yield "k_b", (m.heads, m.kv_rank, m.nope_dim)
    yield "v_b", (m.heads, m.v_dim, m.kv_rank)
    yield from _linear("o", D, m.heads * m.v_dim, m.bias)


def _mamba(m: Mamba, D: int) -> Shapes:
    yield from _linear("in", 2 * m.inner, D, m.bias)
    yield from _conv(m.inner, m.kernel, m.conv_bias)
    yield from _linear("x", m.dt_rank + 2 * m.states, m.inner)
    yield from _linear("dt", m.inner, m.dt_rank, True)
    yield from _linear("out", D, m.inner, m.bias)
    yield "a_log", (m.inner, m.states)
    yield "d", (m.inner,)


def _mamba2(m: Mamba2, D: int) -> Shapes:
    yield from _linear("in", m.inner + m.conv_width + m.heads, D, m.bias)
    yield from _conv(m.conv_width, m.kernel, m.conv_bias)
    yield from _norm("norm", m.norm, m.inner).items()
    yield from _linear("out", D, m.inner, m.bias)
    yield from ((name, (m.heads,)) for name in ("a_log", "d", "dt_bias"))


def _delta_net(m: DeltaNet, D: int) -> Shapes:
    yield from _linear("qkv", m.conv_width, D)
    yield from _conv(m.conv_width, m.kernel, False)
    for name, out in (("z", m.v_heads * m.v_dim), ("b", m.v_heads), ("a", m.v_heads)):
        yield from _linear(name, out, D)
    yield from _norm("norm", m.norm, m.v_dim).items()
    yield from _linear("out", D, m.v_heads * m.v_dim)
    yield from ((name, (m.v_heads,)) for name in ("a_log", "dt_bias"))


def _short_conv(m: ShortConv, D: int) -> Shapes:
    yield from _linear("in", 3 * m.width, D, m.bias)
    yield from _conv(m.width, m.kernel, m.bias)
    yield from _linear("out", D, m.width, m.bias)


def _conv(channels: int, kernel: int, bias: bool) -> Shapes:
    yield from _linear("conv", channels, kernel, bias)


def _mlp(m: MLP, D: int) -> Shapes:
    if m.gated:
        yield from _linear("gate", m.hidden, D, m.bias)
    yield from _linear("up", m.hidden, D, m.bias)
    yield from _linear("down", D, m.hidden, m.bias)
    if m.norm:
        yield from _norm("norm", m.norm, m.hidden).items()


def _moe(m: MoE, D: int) -> Shapes:
    yield from _linear("router", m.experts, D, m.router_bias)
    if m.correction:
        yield "router.correction", (m.experts,)
    for name, out, into in (("gate", m.hidden, D), ("up", m.hidden, D), ("down", D, m.hidden)):
        yield f"{name}.w", (m.experts, out, into)
        if m.bias:
            yield f"{name}.b", (m.experts, out)
    if m.shared:
        shared = MLP(m.shared, m.act)
        yield from ((f"shared.{k}", v) for k, v in _mlp(shared, D))
    if m.shared_gate:
        yield from _linear("shared_gate", 1, D)


_MIXER = {
    Attention: _attention,
    MLA: _mla,
    Mamba: _mamba,
    Mamba2: _mamba2,
    DeltaNet: _delta_net,
    ShortConv: _short_conv,
}
_FFN = {MLP: _mlp, MoE: _moe}
