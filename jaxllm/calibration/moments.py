"""What activations are like on real text: one block at a time, so that memory holds one block's statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import layers
from jaxllm.calibration.reads import Read
from jaxllm.config import ModelConfig
from jaxllm.state import init_state
from jaxllm.taps import Taps

Array = jax.Array
Batches = Sequence[np.ndarray]  # the residual stream f32 [B, T, D], batch by batch

BATCH = 4096  # tokens that go through a block together
KEPT_ROWS = 256  # rows kept as they are, spread over the text


@dataclass(frozen=True)
class Moments:
    """An activation of K channels over `count` rows. Where experts read it, every part has a leading axis E."""

    count: np.ndarray  # [] or [E]
    mean_abs: np.ndarray  # f32 [K]
    max_abs: np.ndarray  # f32 [K]
    hessian: np.ndarray  # f64 [K, K], the mean of x x^T
    rows: np.ndarray  # f32 [R, K], some of them

    def scaled(self, s: np.ndarray) -> Moments:
        """The moments of x / s."""
        hessian = self.hessian / s[:, None] / s
        return Moments(self.count, self.mean_abs / s, self.max_abs / s, hessian, self.rows / s)

    def expert(self, e: int) -> Moments:
        """Those of one expert's rows."""
        return Moments(self.count[e], self.mean_abs[e], self.max_abs[e], self.hessian[e], self.rows)


def embedded(config: ModelConfig, params: dict, tokens: np.ndarray) -> list[np.ndarray]:
    """The residual stream entering the first block for tokens i32 [W, T], in batches of about BATCH tokens."""
    bare = replace(config, blocks=(), dtype="float32")
    parts = {**params, "layers": []}
    size = max(1, BATCH // tokens.shape[1])
    return [np.asarray(_embed(bare, parts, tokens[i : i + size])) for i in range(0, len(tokens), size)]


@partial(jax.jit, static_argnames="config")
def _embed(config: ModelConfig, params: dict, tokens: Array) -> Array:
    state = init_state(config, *tokens.shape)
    return layers.hidden(config, params, tokens, state, taps=Taps(keep=("embed",)))[2]["embed"]


def block_config(config: ModelConfig, i: int) -> ModelConfig:
    """A model that is block i alone, in f32. Equal blocks give equal configs, so that one program serves them."""
    return replace(
        config, blocks=config.blocks[i : i + 1], dtype="float32", positions=None, embed_norm=None, embed_scale=1.0
    )


def through(config: ModelConfig, p: dict, batches: Batches) -> list[np.ndarray]:
    """The residual stream after the one block of `config` with parameters p."""
    return [np.asarray(_block(config, p, x)) for x in batches]


def observe(config: ModelConfig, p: dict, batches: Batches, wanted: tuple[Read, ...]) -> dict[Read, Moments]:
    """Moments of what the reads of the one block of `config` see; the point "norm" is the final norm's output.

    p: the block's parameters, or the final norm's where `config` has no blocks (any index past the last block)."""
    total, kept = None, []
    for x in batches:
        total, rows = _observe(config, p, x, wanted, total)
        kept.append(rows)
    count = sum(x.shape[0] * x.shape[1] for x in batches)
    samples = [np.concatenate(rows)[:: max(1, 32 * len(kept) // KEPT_ROWS)] for rows in zip(*kept, strict=True)]
    return {r: _moments(part, rows, count) for r, part, rows in zip(wanted, total, samples, strict=True)}


def _moments(part: dict[str, Array], rows: np.ndarray, count: int) -> Moments:
    sums = {name: np.asarray(value, np.float64) for name, value in part.items()}
    count = sums.get("count", np.float64(count))
    some = np.maximum(count, 1)[..., None]
    return Moments(
        count,
        (sums["abs"] / some).astype(np.float32),
        sums["max"].astype(np.float32),
        sums["square"] / some[..., None],
        rows,
    )


def _kept(config: ModelConfig, p: dict, x: Array, keep: tuple[str, ...]) -> dict[str, Array]:
    """Taps of the block on x [B, T, D]: the embedding is replaced by x."""
    ends = {"w": jnp.ones(config.width), "b": jnp.zeros(config.width)}
    params = {"embed": {"w": jnp.zeros((1, config.width))}, "layers": [p], "norm": ends}
    if not config.blocks:
        params |= {"layers": [], "norm": p}
    taps = Taps(keep=keep, edit={"embed": lambda _: x})
    tokens = jnp.zeros(x.shape[:2], jnp.int32)
    return layers.hidden(config, params, tokens, init_state(config, *tokens.shape), taps=taps)[2]


@partial(jax.jit, static_argnames="config")
def _block(config: ModelConfig, p: dict, x: Array) -> Array:
    return _kept(config, p, x, ("layers.0.out",))["layers.0.out"]


@partial(jax.jit, static_argnames=("config", "wanted"))
def _observe(config: ModelConfig, p: dict, x: Array, wanted: tuple[Read, ...], total):
    names = {r: r.point if r.point == "norm" else f"layers.0.{r.point}" for r in wanted}
    chosen = ("layers.0.ffn.experts",) if any(r.routed for r in wanted) else ()
    kept = _kept(config, p, x, (*names.values(), *chosen))
    new, samples = [], []
    for read in wanted:
        rows = kept[names[read]].astype(jnp.float32)
        if read.routed:
            new.append(_routed_sums(rows, kept[chosen[0]], config))
            flat = rows.reshape(-1, rows.shape[-1])
        else:
            flat = rows.reshape(x.shape[0] * x.shape[1], -1)
            new.append(_sums(flat))
        samples.append(flat[:: max(1, flat.shape[0] // 32)][:32])
    return (new if total is None else [_added(a, b) for a, b in zip(total, new, strict=True)]), samples


def _sums(rows: Array) -> dict[str, Array]:
    magnitude = jnp.abs(rows)
    return {"abs": magnitude.sum(0), "max": magnitude.max(0), "square": rows.T @ rows}


def _routed_sums(rows: Array, expert: Array, config: ModelConfig) -> dict[str, Array]:
    """Sums for each expert: rows [B, T, K] that all a token's experts read, or [N, k, K], one for each."""
    m = config.blocks[0].ffn
    chosen = expert.reshape(-1)  # [B * T * k]
    rows = rows.reshape(-1, rows.shape[-1])
    if len(rows) < len(chosen):
        rows = jnp.repeat(rows, m.top_k, 0)

    def one(e):
        mine = jnp.where((chosen == e)[:, None], rows, 0)
        magnitude = jnp.abs(mine)
        return {"abs": magnitude.sum(0), "max": magnitude.max(0), "square": mine.T @ mine}

    sums = jax.lax.map(one, jnp.arange(m.experts))
    count = jnp.bincount(chosen, length=m.experts).astype(jnp.float32)
    return sums | {"count": count}


def _added(a: dict[str, Array], b: dict[str, Array]) -> dict[str, Array]:
    return {name: (jnp.maximum if name == "max" else jnp.add)(a[name], b[name]) for name in a}
