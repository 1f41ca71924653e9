"""Small random models from a ModelConfig alone, and a plain numpy forward to hold them against."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoint.canonical import nest
from jaxllm.config import MLA, MLP, Attention, Block, Mamba, ModelConfig, MoE, Norm, Rope, params_shape

RMS = Norm("rms", 1e-5)
ROPE = Rope(tuple(10000.0 ** -(i / 4) for i in range(4)))
VOCAB, WIDTH, MAX_LEN = 48, 32, 96


def attention(**changes) -> Attention:
    """Four heads of 8 over two key-value heads, rotary."""
    return Attention(**(dict(heads=4, kv_heads=2, head_dim=8, scale=8**-0.5, rope=ROPE) | changes))


def mla() -> MLA:
    return MLA(heads=4, nope_dim=6, v_dim=5, kv_rank=10, q_rank=12, rope=ROPE, scale=14**-0.5, norm=RMS)


def mlp() -> MLP:
    return MLP(40, "silu")


def moe(**changes) -> MoE:
    return MoE(**(dict(experts=6, top_k=2, hidden=24, act="silu", renorm=True, shared=16) | changes))


def mamba() -> Mamba:
    return Mamba(inner=24, states=4, kernel=3, dt_rank=5)


def config(*blocks: Block, **changes) -> ModelConfig:
    """A model of these blocks."""
    usual = dict(vocab=VOCAB, width=WIDTH, blocks=blocks, norm=RMS, tied=False, max_len=MAX_LEN)
    return ModelConfig(**(usual | changes))


def block(mixer=None, ffn=None, **changes) -> Block:
    return Block(mixer or attention(), ffn or mlp(), RMS, **changes)


CONFIGS = {
    "full": config(block(), block()),
    "window": config(block(attention(window=5)), block(attention(rope=None)), block(attention(chunk=6))),
    "mla": config(block(mla()), block(mla())),
    "moe": config(block(), block(ffn=moe())),
    "parallel": config(
        block(attention(rope=None, alibi=(0.5, 0.25, 0.125, 0.0625), sinks=True), parallel="shared"),
        block(parallel="split", post=True),
    ),
    "learned": config(block(attention(rope=None)), positions=0),
    "recurrent": config(block(), block(mamba())),
}
REWINDS = [name for name in CONFIGS if name != "recurrent"]


def params(config: ModelConfig, seed: int = 0, dtype: str = "float32") -> dict:
    """Random parameters of every shape; norms near one, so that nothing is left at a value that hides mistakes."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        noise = rng.standard_normal(shape).astype(np.float32)
        if len(shape) < 2:
            near = 1.0 if path.endswith(("norm.w", "pre.w", "post.w")) else 0.0
            return jnp.asarray(near + 0.2 * noise)
        return jnp.asarray(noise * (1.0 if path == "embed.w" else shape[-1] ** -0.5), dtype)

    return nest({path: leaf(path, shape) for path, shape in params_shape(config).items()})


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, shape).astype(np.int32)


# ---- the reference: attention and gated feed-forward blocks in float64, with a mask made by the caller -----


def reference(config: ModelConfig, params: dict, tokens: np.ndarray, masks: list[np.ndarray]) -> np.ndarray:
    """Logits f64 [T, V] of one row of tokens [T]; masks[i] bool [T, T] says what layer i's tokens see."""
    as64 = lambda tree: {k: as64(v) if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in tree.items()}
    x = np.asarray(params["embed"]["w"], np.float64)[tokens]
    for b, p, mask in zip(config.blocks, params["layers"], masks, strict=True):
        p = as64(p)
        x = x + _attend(b.mixer, p["mixer"], _rms(b.norm, p["mixer"]["pre"], x), mask)
        y = _rms(b.norm, p["ffn"]["pre"], x)
        gate = y @ p["ffn"]["gate"]["w"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ p["ffn"]["up"]["w"].T)) @ p["ffn"]["down"]["w"].T
    return _rms(config.norm, as64(params["norm"]), x) @ np.asarray(params["head"]["w"], np.float64).T


def _rms(n: Norm, p: dict, x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + n.eps) * p["w"]


def _attend(m: Attention, p: dict, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    T, group = len(x), m.heads // m.kv_heads
    q, k, v = (
        (x @ p[n]["w"].T).reshape(T, heads, m.head_dim)
        for n, heads in (("q", m.heads), ("k", m.kv_heads), ("v", m.kv_heads))
    )
    q, k = _turn(m.rope, q), _turn(m.rope, k)
    out = []
    for head in range(m.heads):
        scores = np.where(mask, q[:, head] @ k[:, head // group].T * m.scale, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out.append(weights / weights.sum(-1, keepdims=True) @ v[:, head // group])
    return np.concatenate(out, -1) @ p["o"]["w"].T


def _turn(rope: Rope | None, x: np.ndarray) -> np.ndarray:
    """Every pair (i, i + half) as a complex number, turned by its position times its frequency."""
    if rope is None:
        return x
    half = len(rope.inv_freq)
    turn = np.exp(1j * np.arange(len(x))[:, None, None] * np.asarray(rope.inv_freq))
    pairs = (x[..., :half] + 1j * x[..., half : 2 * half]) * turn
    return np.concatenate([pairs.real, pairs.imag, x[..., 2 * half :]], -1)


def causal(T: int, *, window: int | None = None, chunk: int | None = None, sinks: int = 0) -> np.ndarray:
    """bool [T, T]: token t sees s <= t, of those the last `window` and the first `sinks`, or its own chunk."""
    sees = np.zeros((T, T), bool)
    for t in range(T):
        for s in range(t + 1):
            near = window is None or t - s < window or s < sinks
            sees[t, s] = near and (chunk is None or s // chunk == t // chunk)
    return sees
