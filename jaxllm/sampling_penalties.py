"""Steps that look at earlier tokens: repetition, frequency and presence penalties, and DRY.

B rows, V vocabulary, N remembered tokens, S breakers, L tokens in the longest breaker.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxllm.errors import SamplerError
from jaxllm.sampling_steps import Keys, Past, Step, per_row, stack_ids, stack_scalars


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class RepetitionPenalty(Step):
    """Divide positive logits of tokens in prompt or output, multiply negative ones (arXiv:1909.05858)."""

    penalty: Array  # f32 [] or [B], 1 = off
    reads: ClassVar[tuple[str, ...]] = ("prompt", "counts")
    neutral: ClassVar[Mapping[str, float]] = {"penalty": 1.0}

    def __call__(self, logits: Array, context: Past = None, key: Keys = None) -> Array:
        """See `Step`."""
        penalty = per_row("repetition_penalty", self.penalty, logits)
        seen = _read(self, context, "prompt") | (_read(self, context, "counts") > 0)
        return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class FrequencyPenalty(Step):
    """Subtract penalty times the number of times the token was generated (OpenAI API reference)."""

    penalty: Array  # f32 [] or [B], 0 = off
    reads: ClassVar[tuple[str, ...]] = ("counts",)
    neutral: ClassVar[Mapping[str, float]] = {"penalty": 0.0}

    def __call__(self, logits: Array, context: Past = None, key: Keys = None) -> Array:
        """See `Step`."""
        penalty = per_row("frequency_penalty", self.penalty, logits)
        return logits - penalty * _read(self, context, "counts")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class PresencePenalty(Step):
    """Subtract penalty from every token that was generated at all (OpenAI API reference)."""

    penalty: Array  # f32 [] or [B], 0 = off
    reads: ClassVar[tuple[str, ...]] = ("counts",)
    neutral: ClassVar[Mapping[str, float]] = {"penalty": 0.0}

    def __call__(self, logits: Array, context: Past = None, key: Keys = None) -> Array:
        """See `Step`."""
        penalty = per_row("presence_penalty", self.penalty, logits)
        return logits - penalty * (_read(self, context, "counts") > 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Dry(Step):
    """Penalise tokens that would prolong a sequence already said ("Don't repeat yourself").

    A token that would follow n >= allowed_length tokens matching the newest n loses
    multiplier * base ** (n - allowed_length). No match reaches back over a breaker, and a breaker of
    one token is never penalised. Source: text-generation-webui, pull request 5677; breakers as in
    llama.cpp, on token ids.
    """

    multiplier: Array  # f32 [] or [B], 0 = off
    base: Array  # f32 [] or [B], >= 1
    allowed_length: Array  # i32 [] or [B], >= 1
    breakers: Array | None = None  # i32 [S, L] or [B, S, L], filled up on the right with -1
    last_n: Array | None = None  # i32 [] or [B]: how many tokens are looked at; None = window
    window: int = field(default=1024, metadata={"static": True})  # how many the context keeps
    reads: ClassVar[tuple[str, ...]] = ("recent",)
    neutral: ClassVar[Mapping[str, float]] = {"multiplier": 0.0, "base": 1.0, "allowed_length": 1}

    def __call__(self, logits: Array, context: Past = None, key: Keys = None) -> Array:
        """See `Step`."""
        multiplier, base, allowed = (per_row(f"dry_{n}", getattr(self, n), logits) for n in self.neutral)
        back, breakers = self._newest_first(logits, context), self._breakers()
        repeats = jnp.minimum(_repeats(back), _since_breaker(back, breakers))
        followers = jnp.pad(back, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
        worst = _largest(logits.shape, followers, jnp.where(repeats >= allowed, repeats, 0))
        ceiling = 88.7 / jnp.log(jnp.maximum(base, 1 + 1e-6))  # base ** ceiling still fits f32
        penalty = multiplier * base ** jnp.minimum(worst - allowed, ceiling)
        spared = _single_breakers(logits.shape, breakers)
        return logits - jnp.where((worst > 0) & ~spared, penalty, 0.0)

    def _newest_first(self, logits: Array, context: Past) -> Array:
        back = _read(self, context, "recent")[:, : -self.window - 1 : -1]
        last_n = per_row("dry_last_n", self._last_n(), logits)
        return jnp.where(jnp.arange(back.shape[1]) < last_n, back, -1)

    def _last_n(self) -> Array | int:
        return self.window if self.last_n is None else self.last_n

    def _breakers(self) -> Array | np.ndarray:
        return np.full((1, 1), -1, np.int32) if self.breakers is None else self.breakers

    @classmethod
    def stack(cls, rows: Sequence[Self | None]) -> Self:
        """See `Step.stack`; breakers are filled up to one shape [B, S, L]."""
        off = cls(*cls.neutral.values(), last_n=0)
        filled = [off if r is None else r for r in rows]
        numbers = [stack_scalars([getattr(r, n) for r in filled]) for n in cls.neutral]
        breakers = stack_ids([r._breakers() for r in filled], ndim=2)
        last_n = stack_scalars([r._last_n() for r in filled])
        return cls(*numbers, breakers, last_n, max(r.window for r in rows if r is not None))


def _read(step: Step, context: Past, name: str) -> Array:
    value = getattr(context, name, None)
    if value is None:
        raise SamplerError(
            f"{type(step).__name__} reads context.{name}, which is absent: "
            "make the context with init_context(sampler, vocab, prompts) and pass it on."
        )
    return value


@jax.jit
def _repeats(back: Array) -> Array:
    """For each k, how many of the newest tokens also stand k places earlier: i32 [B, N], newest first."""
    n = back.shape[1]
    padded = jnp.pad(back, ((0, 0), (0, n)), constant_values=-2)

    def any_matching(carry):
        return jnp.any(carry[1])

    def one_longer(carry):
        j, matching, length = carry
        newest = lax.dynamic_slice_in_dim(padded, j, 1, 1)
        matching &= (lax.dynamic_slice_in_dim(padded, j, n, 1) == newest) & (newest >= 0)
        return j + 1, matching, length + matching

    start = jnp.broadcast_to(jnp.arange(n) > 0, back.shape)
    return lax.while_loop(any_matching, one_longer, (0, start, jnp.zeros_like(back)))[2]


def _since_breaker(back: Array, breakers: Array) -> Array:
    """Tokens since the end of the last breaker, N where there is none: i32 [B, 1]."""
    n, most = back.shape[1], breakers.shape[-1]
    later = jnp.pad(back, ((0, 0), (most - 1, 0)), constant_values=-2)
    spans = jnp.stack([later[:, most - 1 - j :][:, :n] for j in range(most)], -1)  # [B, N, L]
    breakers = jnp.asarray(breakers).reshape(-1, *breakers.shape[-2:])  # [1 or B, S, L]
    same = (spans[:, :, None] == breakers[:, None]) | (breakers[:, None] < 0)
    starts = jnp.all(same, -1) & (breakers[:, None, :, 0] >= 0)  # [B, N, S]
    lengths = jnp.sum(breakers >= 0, -1)[:, None]
    since = jnp.arange(n)[None, :, None] + 1 - lengths
    return jnp.min(jnp.where(starts, since, n), (1, 2))[:, None]


def _single_breakers(shape: tuple[int, int], breakers: Array) -> Array:
    """bool [B, V]: the token alone is a breaker."""
    single = jnp.where(jnp.all(breakers[..., 1:] < 0, -1), breakers[..., 0], -1)
    single = jnp.broadcast_to(single, (shape[0], single.shape[-1]))
    return _largest(shape, single, jnp.ones_like(single)) > 0


def _largest(shape: tuple[int, int], ids: Array, values: Array) -> Array:
    """i32 [B, V]: the largest value given to each id, 0 where none; ids i32 [B, M], -1 = nothing."""
    rows = jnp.arange(shape[0])[:, None]
    ids = jnp.where(ids < 0, shape[1], ids)
    return jnp.zeros(shape, jnp.int32).at[rows, ids].max(values, mode="drop")
