"""The steps a Sampler is made of: temperature, truncation, biases and masks, each logits [B, V] -> logits.

Every number of a step is an array, one value or one per row; only the type of a step is structure.
B rows, V vocabulary, N ids. Penalties, which look at earlier tokens, are in `sampling_penalties`.

Nothing here sorts: the tokens of largest score whose weights reach a target are found by
bisection over the bits of the score (`keep_until`), which is exact and on CPU far cheaper than
sorting the vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxllm.errors import SamplerError

_COLD = 1e-5  # temperatures below this are greedy: dividing by them would overflow f32
_TINY = float(np.finfo(np.float32).tiny)  # a positive target that any kept token reaches


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Context:
    """What penalties look at; a field is None where no step reads it. Made by `init_context`."""

    prompt: Array | None  # bool [B, V]: the token occurs in the prompt
    counts: Array | None  # i32 [B, V]: how often the token was generated
    recent: Array | None  # i32 [B, N]: last tokens of prompt and output, oldest first, -1 = none yet


Past = Context | None
Keys = Array | None


@dataclass(frozen=True, eq=False)
class Step:
    """One transformation of logits: f32 [B, V] -> f32 [B, V], -inf where a token is removed.

    Numbers are scalars [] (every row) or one per row [B]. A row whose tokens are all removed stays so.
    """

    reads: ClassVar[tuple[str, ...]] = ()  # the fields of Context it needs
    random: ClassVar[bool] = False  # whether it needs a key per row
    neutral: ClassVar[Mapping[str, float]] = {}  # the values with which it does nothing

    def __call__(self, logits: Array, context: Past = None, key: Keys = None) -> Array:
        """Transform logits f32 [B, V]; `key` is one typed key per row [B], read by random steps only."""
        raise NotImplementedError

    @classmethod
    def stack(cls, rows: Sequence[Self | None]) -> Self:
        """One step for all rows: values [B]; None stands for a row without this step."""
        names = [f.name for f in fields(cls)]
        columns = [[cls.neutral[n] if r is None else getattr(r, n) for r in rows] for n in names]
        return cls(*map(stack_scalars, columns))


# --- pieces shared by steps ---------------------------------------------------------------------


def log_softmax(logits: Array) -> Array:
    """jax.nn.log_softmax over the last axis, except that a row of -inf stays -inf, not NaN."""
    top = jnp.max(logits, -1, keepdims=True)
    shifted = logits - jnp.where(top == -jnp.inf, 0.0, top)
    total = jnp.sum(jnp.exp(shifted), -1, keepdims=True)
    return jnp.where(total == 0, -jnp.inf, shifted - jnp.log(total))


def only(logits: Array, keep: Array) -> Array:
    """The logits where keep, -inf elsewhere."""
    return jnp.where(keep, logits, -jnp.inf)


def per_row(name: str, value: Array, logits: Array) -> Array:
    """A value [] stays, a value [B] becomes [B, 1]; SamplerError for any other shape."""
    value = jnp.asarray(value)
    if value.ndim == 0:
        return value
    if value.shape != logits.shape[:1]:
        raise SamplerError(
            f"{name} has shape {value.shape} but the logits have {logits.shape[0]} rows: "
            "give one value for all rows, or one per row."
        )
    return value[:, None]


@jax.jit
def keep_until(score: Array, weight: Array, target: Array) -> Array:
    """The fewest tokens of largest score whose weights sum to `target`; ties in order of index.

    score f32 [B, V], weight [B, V] (not negative), target [] or [B, 1] (positive) -> bool [B, V].
    Finds the last score kept bit by bit: 32 masked sums.
    """
    rank = _order_bits(score)

    def bit(i, edge):
        higher = edge | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        mass = jnp.sum(jnp.where(rank >= higher, weight, 0), -1, keepdims=True)
        return jnp.where(mass >= target, higher, edge)

    edge = lax.fori_loop(0, 32, bit, jnp.zeros((*score.shape[:-1], 1), jnp.uint32))
    above, tied = rank > edge, rank == edge

    def first_tied():
        shares = jnp.where(tied, weight, 0)
        before = jnp.cumsum(shares, -1) - shares
        mass = jnp.sum(jnp.where(above, weight, 0), -1, keepdims=True)
        return tied & (mass + before < target)

    several = jnp.any(jnp.sum(tied, -1) > 1)  # seldom: spares a cumulative sum over V
    return above | lax.cond(several, first_tied, lambda: tied)


def _order_bits(x: Array) -> Array:
    """f32 -> u32 that compares as the floats do."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # -0.0 equals 0.0
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _entropy(logprobs: Array) -> Array:
    terms = jnp.where(logprobs == -jnp.inf, 0.0, jnp.exp(logprobs) * logprobs)
    return -jnp.sum(terms, -1, keepdims=True)  # nats, [B, 1]


def _is_best(logits: Array) -> Array:
    return jnp.arange(logits.shape[-1]) == jnp.argmax(logits, -1, keepdims=True)


def _check_width(name: str, array: Array, logits: Array) -> None:
    if array.shape not in (logits.shape, logits.shape[-1:]):
        rows, width = logits.shape
        raise SamplerError(
            f"{name} has shape {array.shape}: logits of shape [{rows}, {width}] need "
            f"[{width}], or [{rows}, {width}] for one set per row."
        )


# --- rows with different values in one batch (numpy: this runs on the host) ---------------------


def one_row(value: np.ndarray, ndim: int) -> np.ndarray:
    """The single row of a value that has `ndim` dimensions a row, given bare or with a leading [1]."""
    value = np.asarray(value)
    if value.ndim == ndim + 1 and value.shape[0] == 1:
        return value[0]
    if value.ndim != ndim:
        raise SamplerError(
            f"merge takes one sampler per row, but found a value of shape {value.shape}: "
            "give every row a sampler of its own, with the values of one row."
        )
    return value


def stack_scalars(rows: Sequence[np.ndarray]) -> np.ndarray:
    """B values, each [] or [1] -> [B], f32 or i32."""
    values = np.stack([one_row(row, 0) for row in rows])
    return values.astype(np.float32 if values.dtype.kind == "f" else np.int32)


def stack_ids(rows: Sequence[np.ndarray], *, ndim: int = 1, fill: float = -1) -> np.ndarray:
    """B arrays of `ndim` dimensions -> [B, ...], filled up at the end of each axis to one shape."""
    rows = [one_row(row, ndim) for row in rows]
    shape = np.max([row.shape for row in rows], axis=0)
    gaps = [[(0, most - size) for most, size in zip(shape, r.shape, strict=True)] for r in rows]
    return np.stack([np.pad(r, g, constant_values=fill) for r, g in zip(rows, gaps, strict=True)])


def stack_dense(rows: Sequence[np.ndarray | None], fill: float) -> np.ndarray:
    """B rows, each [V] or [1, V], None being a row of `fill` -> [B, V]."""
    given = [None if row is None else one_row(row, 1) for row in rows]
    widths = {len(row) for row in given if row is not None}
    if len(widths) > 1:
        raise SamplerError(
            f"merge found values for vocabularies of {sorted(widths)} tokens: "
            "all samplers of a batch must be made for one vocabulary."
        )
    blank = np.full(widths.pop(), fill)
    return np.stack([blank if row is None else row for row in given])


# --- temperature --------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Greedy(Step):
    """All mass on the largest logit, the first index on ties."""

    def __call__(self, logits: Array, context: Past = None, key: Keys = None) -> Array:
        """Log-probabilities: 0 at the best token, -inf elsewhere."""
        return jnp.where(_is_best(logits) & (logits > -jnp.inf), 0.0, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Temperature(Step):
    """Divide the logits; 0 (anything below 1e-5) is greedy."""

    temperature: Array  # f32 [] or [B]
    neutral: ClassVar[Mapping[str, float]] = {"temperature": 1.0}

    def __call__(self, logits: Array, context: Past = None, key: Keys = None) -> Array:
        """See `Step`."""
        return _scaled(logits, per_row("temperature", self.temperature, logits))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class DynamicTemperature(Step):
    """Temperature between temperature - delta and temperature + delta, rising with the entropy.

    The entropy is divided by that of a uniform choice among the tokens left and raised to
    `exponent` (llama.cpp's temp_ext). A delta of 0 is a plain temperature.
    """

    temperature: Array  # f32 [] or [B]
    delta: Array  # f32 [] or [B]
    exponent: Array  # f32 [] or [B]
    neutral: ClassVar[Mapping[str, float]] = {"temperature": 1.0, "delta": 0.0, "exponent": 1.0}

    def __call__(self, logits: Array, context: Past = None, key: Keys = None) -> Array:
        """See `Step`."""
        names = ("temperature", "delta", "exponent")
        middle, delta, exponent = (per_row(n, getattr(self, n), logits) for n in names)
        left = jnp.sum(logits > -jnp.inf, -1, keepdims=True)
        most = jnp.log(jnp.maximum(left, 2).astype(jnp.float32))
        share = jnp.clip(_entropy(log_softmax(logits)) / most, 0.0, 1.0)
        low, high = jnp.maximum(middle - delta, 0.0), middle + delta
        dynamic = low + (high - low) * share**exponent
        return _scaled(logits, jnp.where(delta > 0, dynamic, middle))


@jax.jit
def _scaled(logits: Array, temperature: Array) -> Array:
    """logits / temperature; a temperature below _COLD keeps only the best token. [] or [B, 1]."""
    cold = temperature < _COLD
    warm = logits / jnp.where(cold, 1.0, temperature)

    def frozen():
        return jnp.where(cold, only(logits, _is_best(logits)), warm)

    return lax.cond(jnp.any(cold), frozen, lambda: warm)


# --- truncation ---------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TopK(Step):
    """Keep exactly the k largest, ties in order of index; 0 keeps all (arXiv:1805.04833)."""

    k: Array  # i32 [] or [B]
    neutral: ClassVar[Mapping[str, float]] = {"k": 0}

    def __call__(self, logits: Array, context: Past = None, key: Keys = None) -> Array:
        """See `Step`."""
        k = per_row("top_k", self.k, logits)
        kept = keep_until(logits, jnp.ones_like(logits, jnp.int32), jnp.maximum(k, 1))
        return only(logits, (k <= 0) | kept)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TopP(Step):
    """Keep the fewest most probable tokens of total probability >= p (arXiv:1904.09751); 1 keeps all."""

    p: Array  # f32 [] or [B]
    neutral: ClassVar[Mapping[str, float]] = {"p": 1.0}

    def __call__(self, logits: Array, context: Past = None, key: Keys = None) -> Array:
        """See `Step`."""
        p = per_row("top_p", self.p, logits)
        kept = keep_until(logits, jnp.exp(log_softmax(logits)), jnp.maximum(p, _TINY))
        return only(logits, (p >= 1) | kept)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class MinP(Step):
    """Keep tokens at least p times as probable as the best one (arXiv:2407.01082); 0 keeps all."""

    p: Array  # f32 [] or [B]
    neutral: ClassVar[Mapping[str, float]] = {"p": 0.0}

    def __call__(self, logits: Array, context: Past = None, key: Keys = None) -> Array:
        """See `Step`."""
        p = jnp.clip(per_row("min_p", self.p, logits), 0.0, 1.0)
        return only(logits, logits >= jnp.max(logits, -1, keepdims=True) + jnp.log(p))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Typical(Step):
    """Keep the tokens whose surprise is nearest the entropy, up to a total probability >= p; 1 keeps all.

    Locally typical sampling (arXiv:2202.00666).
    """

    p: Array  # f32 [] or [B]
    neutral: ClassVar[Mapping[str, float]] = {"p": 1.0}

    def __call__(self, logits: Array, context: Past = None, key: Keys = None) -> Array:
        """See `Step`."""
        p = per_row("typical_p", self.p, logits)
        logprobs = log_softmax(logits)
        distance = jnp.abs(logprobs + _entropy(logprobs))  # inf for removed tokens
        kept = keep_until(-distance, jnp.exp(logprobs), jnp.maximum(p, _TINY))
        return only(logits, (p >= 1) | kept)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TopNSigma(Step):
    """Keep logits within n standard deviations of the largest (arXiv:2411.07641); 0 keeps all."""

    n: Array  # f32 [] or [B]
    neutral: ClassVar[Mapping[str, float]] = {"n": 0.0}

    def __call__(self, logits: Array, context: Past = None, key: Keys = None) -> Array:
        """See `Step`; removed tokens do not count in the deviation."""
        n = per_row("top_n_sigma", self.n, logits)
        left = logits > -jnp.inf
        count = jnp.maximum(jnp.sum(left, -1, keepdims=True), 1)
        mean = jnp.sum(jnp.where(left, logits, 0.0), -1, keepdims=True) / count
        variance = jnp.sum(jnp.where(left, logits - mean, 0.0) ** 2, -1, keepdims=True) / count
        floor = jnp.max(logits, -1, keepdims=True) - n * jnp.sqrt(variance)
        return only(logits, (n <= 0) | (logits >= floor))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class XTC(Step):
    """Exclude top choices: with `probability`, remove all tokens of probability >= threshold but the least.

    A probability of 0, or a threshold above 0.5, does nothing; a probability of 1 always acts. Of
    equals the last index is the least. Source: text-generation-webui, pull request 6335.
    """

    probability: Array  # f32 [] or [B]
    threshold: Array  # f32 [] or [B]
    random: ClassVar[bool] = True
    neutral: ClassVar[Mapping[str, float]] = {"probability": 0.0, "threshold": 0.5}

    def __call__(self, logits: Array, context: Past = None, key: Keys = None) -> Array:
        """See `Step`."""
        threshold = per_row("xtc_threshold", self.threshold, logits)
        chance = jax.vmap(jax.random.uniform)(key)[:, None]  # in [0, 1)
        acts = chance < per_row("xtc_probability", self.probability, logits)
        probs = jnp.exp(log_softmax(logits))
        top = (probs >= threshold) & (probs > 0)
        least = jnp.min(jnp.where(top, logits, jnp.inf), -1, keepdims=True)
        index = jnp.arange(logits.shape[-1])
        spared = jnp.max(jnp.where(top & (logits == least), index, -1), -1, keepdims=True)
        return only(logits, ~(acts & (threshold <= 0.5) & top & (index != spared)))


# --- bias, bans, masks --------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class LogitBias(Step):
    """Add a bias to the logits of every token (ids None), or of a few tokens."""

    bias: Array  # f32 [V] or [B, V]; with ids: f32, their shape
    ids: Array | None = None  # i32 [N] or [B, N], -1 = nothing

    def __call__(self, logits: Array, context: Past = None, key: Keys = None) -> Array:
        """See `Step`."""
        if self.ids is not None:
            return logits.at[_cells(self.ids, logits)].add(self.bias, mode="drop")
        _check_width("logit_bias", self.bias, logits)
        return logits + self.bias

    @classmethod
    def stack(cls, rows: Sequence[Self | None]) -> Self:
        """See `Step.stack`; stays a list of ids unless some row is dense."""
        widths = [r.bias.shape[-1] for r in rows if r is not None and r.ids is None]
        if widths:
            return cls(stack_dense([r and r._dense(widths[0]) for r in rows], 0.0))
        nothing = cls(np.zeros(1, np.float32), np.full(1, -1, np.int32))
        filled = [nothing if r is None else r for r in rows]
        bias = stack_ids([r.bias for r in filled], fill=0)
        return cls(bias, stack_ids([r.ids for r in filled]))

    def _dense(self, width: int) -> Array:
        return self.bias if self.ids is None else self(jnp.zeros((1, width), jnp.float32))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Ban(Step):
    """Remove tokens."""

    tokens: Array  # i32 [N] or [B, N] ids (-1 = none), or bool [V] or [B, V], True = banned

    def __call__(self, logits: Array, context: Past = None, key: Keys = None) -> Array:
        """See `Step`."""
        if self.tokens.dtype != bool:
            return logits.at[_cells(self.tokens, logits)].set(-jnp.inf, mode="drop")
        _check_width("banned", self.tokens, logits)
        return only(logits, ~self.tokens)

    @classmethod
    def stack(cls, rows: Sequence[Self | None]) -> Self:
        """See `Step.stack`; stays a list of ids unless some row is a mask."""
        widths = [r.tokens.shape[-1] for r in rows if r is not None and r.tokens.dtype == bool]
        if widths:
            return cls(stack_dense([r and r._mask(widths[0]) for r in rows], False))
        nothing = np.full(1, -1, np.int32)
        return cls(stack_ids([nothing if r is None else r.tokens for r in rows]))

    def _mask(self, width: int) -> Array:
        if self.tokens.dtype == bool:
            return self.tokens
        return self(jnp.zeros((1, width), jnp.float32)) < 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Mask(Step):
    """Keep only allowed tokens: how a grammar, through a `MaskCallback`, constrains decoding.

    Before each step the decode loop calls the callback with the tokens so far and samples with
    Sampler((Mask(allowed), *sampler.steps)): first in the chain, so that truncation counts allowed
    tokens only. Wrapped the same way at each step, the structure is the same and nothing recompiles.
    """

    allowed: Array  # bool [V] or [B, V]

    def __call__(self, logits: Array, context: Past = None, key: Keys = None) -> Array:
        """See `Step`."""
        _check_width("allowed", self.allowed, logits)
        return only(logits, self.allowed)

    @classmethod
    def stack(cls, rows: Sequence[Self | None]) -> Self:
        """See `Step.stack`; a row without a mask allows everything."""
        return cls(stack_dense([r and r.allowed for r in rows], True))


def _cells(ids: Array, logits: Array) -> tuple[Array, Array]:
    """Index of ids i32 [N] or [B, N] in logits [B, V]; -1 points outside, to be dropped."""
    ids = jnp.where(ids < 0, logits.shape[-1], ids)
    return jnp.arange(logits.shape[0])[:, None], ids if ids.ndim == 2 else ids[None]
