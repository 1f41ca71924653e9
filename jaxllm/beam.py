"""Beam search: the most probable continuations, several hypotheses kept side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import layers
from jaxllm.config import ModelConfig
from jaxllm.decode import prefill
from jaxllm.errors import JaxllmError
from jaxllm.generation import Completion, Generation, Timings
from jaxllm.model import Model
from jaxllm.prompts import PREFILL_CHUNK, Prompt, as_prompts, new_state
from jaxllm.state import State, select_rows

Array = jax.Array


@partial(jax.jit, static_argnames=("config", "beams"))
def candidates(
    config: ModelConfig, params: dict, x: Array, scores: Array, *, beams: int
) -> tuple[Array, Array, Array, Array]:
    """The 2 * beams best next tokens of each prompt: total scores, beams, tokens, own log-probabilities.

    x [P * beams, D]: newest hidden vectors; scores f32 [P, beams]: sums of log-probabilities.
    """
    logprobs = jax.nn.log_softmax(layers.logits(config, params, x), -1)
    logprobs = logprobs.reshape(scores.shape[0], -1)
    total = (logprobs.reshape(*scores.shape, -1) + scores[..., None]).reshape(len(scores), -1)
    best, at = jax.lax.top_k(total, 2 * beams)
    return best, at // config.vocab, at % config.vocab, jnp.take_along_axis(logprobs, at, 1)


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def extend(config: ModelConfig, params: dict, state: State, rows: Array, tokens: Array) -> tuple[State, Array]:
    """Rows i32 [B] of the state continue with tokens i32 [B] -> (state, newest hidden vectors [B, D])."""
    x, state, _ = layers.hidden(config, params, tokens[:, None], select_rows(state, rows))
    return state, x[:, 0]


@dataclass
class _Hypotheses:
    """The beams of one prompt on the host: running ones in order of score, finished ones with their scores."""

    beams: int
    length_penalty: float
    early_stopping: bool
    running: list[tuple[tuple[int, ...], tuple[float, ...]]] = field(default_factory=list)
    finished: list[tuple[float, tuple[int, ...], tuple[float, ...], str]] = field(default_factory=list)

    def normalised(self, total: float, length: int) -> float:
        return total / length**self.length_penalty

    def step(self, best, parents, tokens, logprobs, ends: frozenset[int]) -> list[tuple[int, int, float]]:
        """Take the candidates -> [(parent beam, token, score)] of the beams that run on."""
        chosen, grown = [], []
        for rank, (score, parent, token, own) in enumerate(zip(best, parents, tokens, logprobs, strict=True)):
            ids, values = self.running[parent]
            ids, values = (*ids, int(token)), (*values, float(own))
            if int(token) in ends:
                if rank < self.beams:
                    self.finish(float(score), ids, values, "eos")
            elif len(chosen) < self.beams:
                chosen.append((int(parent), int(token), float(score)))
                grown.append((ids, values))
        self.running = grown
        return chosen

    def finish(self, total: float, ids, values, reason: str) -> None:
        self.finished.append((self.normalised(total, len(ids)), ids, values, reason))
        self.finished = sorted(self.finished, key=lambda f: -f[0])[: self.beams]

    def done(self, best_running: float, length: int) -> bool:
        """Whether no running beam can still enter the finished ones, as the highest attainable score tells."""
        if len(self.finished) < self.beams:
            return False
        return self.early_stopping or self.finished[-1][0] >= self.normalised(best_running, length)


def beam_search(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    *,
    beams: int = 4,
    max_new_tokens: int = 128,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    n: int = 1,
    eos: Sequence[int] | None = None,
    max_len: int | None = None,
    prefill_chunk_size: int = PREFILL_CHUNK,
    add_special: bool = True,
) -> Generation:
    """The n best of `beams` hypotheses for each prompt, by sum of log-probabilities / length ** length_penalty.

    A hypothesis ends with an end token; a prompt ends when `beams` have ended and none running can pass them
    (with early_stopping, at once), or after max_new_tokens. As in transformers' generate(num_beams=...).

    Raises ContextError, TokenizerError or JaxllmError before anything is computed.
    """
    began = time.perf_counter()
    rows = as_prompts(model, prompts, add_special=add_special)
    if not 1 <= n <= beams or max_new_tokens < 1 or 2 * beams > model.config.vocab:
        raise JaxllmError(
            f"beam search needs 1 <= n <= beams <= vocabulary / 2 and max_new_tokens >= 1; got n={n}, "
            f"beams={beams}, max_new_tokens={max_new_tokens}, vocabulary {model.config.vocab}"
        )
    ends = model.eos_ids if eos is None else frozenset(eos)
    chunk = min(prefill_chunk_size, model.config.max_len)
    state = new_state(model, rows, max_new_tokens, chunk, max_len=max_len)
    state, x = prefill(model, rows, state)
    jax.block_until_ready(x)
    prefilled = time.perf_counter()
    every = [_Hypotheses(beams, length_penalty, early_stopping, [((), ())] * beams) for _ in rows]
    _search(model, every, state, x, max_new_tokens, ends)
    seconds = time.perf_counter() - prefilled
    found = [_completion(model, row, f) for row, h in zip(rows, every, strict=True) for f in h.finished[:n]]
    counts = sum(map(len, rows)), sum(len(c.tokens) for c in found)
    return Generation(tuple(found), Timings(prefilled - began, seconds, *counts))


def _search(
    model: Model, every: list[_Hypotheses], state: State, x: Array, most: int, ends: frozenset[int]
) -> None:
    """Run all prompts to their end; their hypotheses are filled in place."""
    prompts, beams = len(every), every[0].beams
    # All beams of a prompt begin equal; only the first may be chosen from.
    scores = np.full((prompts, beams), -1e9, np.float32)
    scores[:, 0] = 0
    rows = np.repeat(np.arange(prompts, dtype=np.int32), beams)
    state, x = select_rows(state, rows), x[rows]
    done = [False] * prompts
    for length in range(1, most + 1):
        parts = jax.device_get(candidates(model.config, model.params, x, scores, beams=beams))
        rows, tokens = np.arange(prompts * beams, dtype=np.int32), np.zeros(prompts * beams, np.int32)
        for p, hypotheses in enumerate(every):
            if done[p]:
                continue
            chosen = hypotheses.step(*(part[p] for part in parts), ends)
            at = slice(p * beams, (p + 1) * beams)
            rows[at] = [p * beams + parent for parent, _, _ in chosen]
            tokens[at] = [token for _, token, _ in chosen]
            scores[p] = [score for _, _, score in chosen]
            done[p] = hypotheses.done(float(scores[p, 0]), length)
        if all(done) or length == most:
            break
        state, x = extend(model.config, model.params, state, rows, tokens)
    for p, hypotheses in enumerate(every):
        if not done[p]:
            for score, (ids, values) in zip(scores[p], hypotheses.running, strict=True):
                hypotheses.finish(float(score), ids, values, "length")


def _completion(model: Model, prompt: list[int], finished) -> Completion:
    _, ids, logprobs, reason = finished
    shown = ids[:-1] if reason == "eos" else ids
    text = model.tokenizer.decode(shown) if model.tokenizer else None
    return Completion(tuple(prompt), ids, text, reason, logprobs, pieces=model.pieces(ids))
