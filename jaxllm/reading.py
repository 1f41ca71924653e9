"""Prompts into a state, in chunks of one size, and what the reading leaves behind.

B rows, C tokens of a chunk, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import layers
from jaxllm.config import ModelConfig
from jaxllm.errors import ContextError
from jaxllm.model import Model
from jaxllm.prompts import padded
from jaxllm.state import State, select_rows

Array = jax.Array


@dataclass(frozen=True)
class Read:
    """What reading the prompts leaves, besides the state."""

    last: Array  # [B, D]  each row's newest hidden vector, after the final norm
    # [P, C, width] of one chunk after the other: the activations that were asked for, of P prompts that B / P rows
    # each continue, one after the other. What lies behind a prompt's last token is padding.
    features: tuple[Array, ...] = ()


@partial(jax.jit, static_argnames=("config", "features"), donate_argnames="state")
def prefill_chunk(
    config: ModelConfig,
    params: dict,
    state: State,
    last: Array,
    tokens: Array,
    n_new: Array,
    *,
    features: tuple[str, ...] = (),
) -> tuple[State, Array, Array | None]:
    """Append tokens i32 [B, C] (n_new i32 [B] real) -> (state, each row's newest hidden vector [B, D], features).

    last [B, D] is that vector of rows without new tokens; features as of `layers.featured`."""
    x, state, kept = layers.featured(config, params, tokens, state, features, n_new=n_new)
    newest = jnp.take_along_axis(x, jnp.maximum(n_new - 1, 0)[:, None, None], 1)[:, 0]
    return state, jnp.where((n_new > 0)[:, None], newest, last), kept


def read(
    model: Model, rows: Sequence[Sequence[int]], state: State, features: tuple[str, ...] = ()
) -> tuple[State, Read]:
    """Append prompts of any lengths to a state, and keep the activations of these names (see `taps`).

    The state is consumed (its memory is reused). Raises ContextError where a row does not fit.
    """
    chunk, longest = state.chunk, max(map(len, rows))
    lengths = np.array([len(r) for r in rows])
    held = np.asarray(state.length)
    if state.capacity is not None and np.max(held + lengths) > state.capacity:
        raise ContextError(
            f"a row would hold {np.max(held + lengths)} tokens; the state has room for {state.capacity}"
        )
    last, every = np.zeros((len(rows), model.config.width), jnp.dtype(model.config.dtype)), []
    ids = padded(rows, -(-longest // chunk) * chunk)
    for start in range(0, longest, chunk):
        n_new = np.clip(lengths - start, 0, chunk).astype(np.int32)
        args = (state, last, ids[:, start : start + chunk], n_new)
        state, last, kept = prefill_chunk(model.config, model.params, *args, features=features)
        every.append(kept)
    return state, Read(last, tuple(every) if features else ())


def prefill(model: Model, rows: Sequence[Sequence[int]], state: State) -> tuple[State, Array]:
    """`read` without features -> (state, last [B, D]: each row's newest hidden vector)."""
    state, found = read(model, rows, state)
    return state, found.last


def forked(state: State, found: Read, n: int) -> tuple[State, Read]:
    """The same for n rows of each prompt, one after the other."""
    if n == 1:
        return state, found
    fork = jnp.repeat(jnp.arange(len(found.last)), n)
    return select_rows(state, fork), Read(found.last[fork], found.features)
