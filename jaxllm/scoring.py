"""Log-probabilities of given text: perplexity, prompt log-probabilities, comparison of models."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import layers, sampling
from jaxllm.config import ModelConfig
from jaxllm.errors import ContextError
from jaxllm.generation import Alternatives, Scored
from jaxllm.model import Model
from jaxllm.progress import progress
from jaxllm.prompts import PREFILL_CHUNK, Prompt, as_prompts, bucket, is_item, padded
from jaxllm.state import State, init_state

Array = jax.Array


@partial(jax.jit, static_argnames=("config", "top"), donate_argnames="state")
def score_chunk(
    config: ModelConfig, params: dict, state: State, tokens: Array, targets: Array, n_new: Array, *, top: int
) -> tuple[State, Array, Array, Array]:
    """Append tokens [B, C] -> (state, log-probability f32 [B, C] of targets [B, C], top ids and values
    [B, C, top])."""
    x, state, _ = layers.hidden(config, params, tokens, state, n_new=n_new)
    own = jax.nn.log_softmax(layers.logits(config, params, x), -1)
    logprob = jnp.take_along_axis(own, targets[..., None], 2)[..., 0]
    return state, logprob, *sampling.top_logprobs(own, top)


def score(
    model: Model,
    texts: Prompt | Sequence[Prompt],
    *,
    logprobs: int = 0,
    stride: int | None = None,
    batch_size: int = 8,
    prefill_chunk_size: int = PREFILL_CHUNK,
    add_special: bool = True,
) -> list[Scored]:
    """Log-probability of every token of every text (all but the first, which nothing precedes).

    stride: texts longer than the context are cut into windows that begin `stride` tokens after one another; a
    token counts once, in the first window that holds it. Without it such a text is a ContextError.
    """
    rows = as_prompts(model, texts, add_special=add_special)
    single = isinstance(texts, str) or is_item(texts[0])
    given = [texts] if single else list(texts)
    limit = model.config.max_len
    if stride is None and max(map(len, rows)) > limit:
        raise ContextError(
            f"a text of {max(map(len, rows))} tokens exceeds the context of {limit}; pass stride={limit // 2}"
        )
    windows = [(i, start, end) for i, row in enumerate(rows) for start, end in _windows(len(row), limit, stride)]
    scored = _score_windows(model, rows, windows, logprobs, batch_size, prefill_chunk_size)
    return [
        dataclasses.replace(s, text=t if isinstance(t, str) else None) for s, t in zip(scored, given, strict=True)
    ]


def _windows(length: int, limit: int, stride: int | None) -> list[tuple[int, int]]:
    if length <= limit:
        return [(0, length)]
    if stride is None or not 0 < stride <= limit:
        raise ContextError(f"stride goes from 1 to the context of {limit}, got {stride}")
    starts = range(0, length - limit + stride, stride)
    return [(s, min(s + limit, length)) for s in starts]


def score_rows(model: Model, rows: list[list[int]], top: int) -> list[Scored]:
    """`score` of token ids that fit the context, with `top` alternatives at each position."""
    return _score_windows(model, rows, [(i, 0, len(r)) for i, r in enumerate(rows)], top, 8, PREFILL_CHUNK)


def _score_windows(model, rows, windows, top, batch_size, chunk) -> list[Scored]:
    logprobs: list[list[float]] = [[] for _ in rows]
    tops: list[list[Alternatives]] = [[] for _ in rows]
    with progress("scoring", len(windows)) as advance_bar:
        for at in range(0, len(windows), batch_size):
            batch = windows[at : at + batch_size]
            pieces = [rows[i][start:end] for i, start, end in batch]
            for (i, start, _), (values, best) in zip(
                batch, _score_batch(model, pieces, top, chunk, batch_size), strict=True
            ):
                new = len(logprobs[i]) - start  # overlapping windows: only tokens not yet counted
                logprobs[i] += values[new:].tolist()
                tops[i] += best[new:]
                advance_bar()
    return [
        Scored(tuple(row), tuple(lp), tuple(t), None, model.pieces(row))
        for row, lp, t in zip(rows, logprobs, tops, strict=True)
    ]


def _score_batch(model, rows, top, chunk, batch_size) -> list[tuple[np.ndarray, list[Alternatives]]]:
    """Log-probabilities [n - 1] and alternatives of each row; rows are padded to one batch size."""
    config, count = model.config, len(rows)
    rows = rows + [[0]] * (min(batch_size, 1 << (count - 1).bit_length()) - count)
    longest = max(map(len, rows))
    chunk = min(chunk, config.max_len)
    state = init_state(config, len(rows), bucket(longest, config), chunk=chunk)
    ids = padded(rows, -(-longest // chunk) * chunk + 1)
    lengths = np.array([len(r) for r in rows])
    outs = []
    for start in range(0, longest, chunk):
        n_new = np.clip(lengths - start, 0, chunk).astype(np.int32)
        tokens, targets = ids[:, start : start + chunk], ids[:, start + 1 : start + chunk + 1]
        state, *out = score_chunk(config, model.params, state, tokens, targets, n_new, top=top)
        outs.append(jax.device_get(out))
    logprob, best, values = (np.concatenate(parts, 1) for parts in zip(*outs, strict=True))
    return [
        (
            logprob[i, : n - 1],
            [
                Alternatives(tuple(a.tolist()), tuple(b.tolist()))
                for a, b in zip(best[i, : n - 1], values[i, : n - 1], strict=True)
                if top
            ],
        )
        for i, n in enumerate(lengths[:count])
    ]
