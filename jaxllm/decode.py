"""Prompts to tokens: prefill in chunks of one size, then the same step again and again."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import layers, sampling
from jaxllm.config import ModelConfig
from jaxllm.errors import ContextError, JaxllmError
from jaxllm.generation import SKIPPED, Alternatives, Completion, Generation, Prefix, Scored, Timings, Token
from jaxllm.model import Model
from jaxllm.prompts import PREFILL_CHUNK, Overflow, Prompt, as_prompts, new_state, steps_together
from jaxllm.reading import Read, forked, prefill, prefill_chunk, read
from jaxllm.sampling import GREEDY, Context, MaskCallback, Sampler
from jaxllm.scoring import score, score_rows
from jaxllm.state import Recurrent, State, evict, rewind
from jaxllm.state import kv_format as state_format
from jaxllm.stopping import Text, stop_strings

__all__ = ["Overflow", "Prompt", "advance", "generate", "prefill", "prefill_chunk", "score", "stream"]

Array = jax.Array


# ---- the step ---------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """What one decoding step hands to the next."""

    state: State
    token: Array  # i32 [B]  the newest token, not yet in the state
    context: Context | None
    keys: Array | None  # typed key [B]
    step: Array  # i32 [B]  tokens emitted so far


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Emitted:
    """What one step tells the host."""

    token: Array  # i32 [B], -1 where nothing was allowed
    logprob: Array  # f32 [B] under the model's own distribution
    top_ids: Array  # i32 [B, top]
    top_logprobs: Array  # f32 [B, top]


def _choose(config, params, sampler, top, x, carry: Carry) -> tuple[Carry, Emitted]:
    """Sample from the newest hidden vectors x [B, D]; a row's key is its own, folded with the step."""
    logits = layers.logits(config, params, x)
    keys = None if carry.keys is None else jax.vmap(jax.random.fold_in)(carry.keys, carry.step)
    token, _ = sampling.sample(sampler, logits, keys, carry.context)
    own = jax.nn.log_softmax(logits, -1)
    logprob = jnp.take_along_axis(own, jnp.maximum(token, 0)[:, None], 1)[:, 0]
    context = sampling.observe(carry.context, token, jnp.ones(token.shape, bool))
    carry = dataclasses.replace(carry, token=token, context=context, step=carry.step + 1)
    return carry, Emitted(token, logprob, *sampling.top_logprobs(own, top))


@partial(jax.jit, static_argnums=(0, 3))
def choose(config: ModelConfig, params: dict, sampler: Sampler, top: int, x: Array, carry: Carry):
    """The first token, from a prompt's newest hidden vectors x [B, D] -> (carry, Emitted of one step)."""
    carry, out = _choose(config, params, sampler, top, x, carry)
    return carry, _one(out)


def _one(out: Any) -> Any:
    """With a leading axis [1] of steps."""
    return jax.tree.map(lambda a: a[None], out)


Step = tuple[Emitted, Array | None]


def _advance(config, params, sampler, top, features, carry: Carry) -> tuple[Carry, Step]:
    """One decoding step: the newest token enters the state, the next is drawn."""
    tokens = jnp.maximum(carry.token, 0)[:, None]
    x, state, kept = layers.featured(config, params, tokens, carry.state, features)
    carry, out = _choose(config, params, sampler, top, x[:, 0], dataclasses.replace(carry, state=state))
    return carry, (out, None if kept is None else kept[:, 0])


@partial(jax.jit, static_argnames=("config", "top", "steps", "features"), donate_argnames="carry")
def advance(
    config: ModelConfig,
    params: dict,
    sampler: Sampler,
    top: int,
    carry: Carry,
    *,
    steps: int = 1,
    features: tuple[str, ...] = (),
) -> tuple[Carry, Step]:
    """`steps` decoding steps in one program -> (carry, (Emitted, features)), both with a leading axis [steps].

    features: activations by name, as in `layers.featured`, of tokens that enter the state [steps, B, width]."""
    step = partial(_advance, config, params, sampler, top, features)
    if steps == 1:
        carry, out = step(carry)
        return carry, _one(out)
    # A loop on the device saves a round trip a token.
    return jax.lax.scan(lambda c, _: step(c), carry, length=steps)


# ---- the loop -------------------------------------------------------------------------------------------


class Speculates(Protocol):
    """What may take the place of the loop below: `spec_decode.Speculative`."""

    @property
    def nodes(self) -> int:
        """Most tokens it appends to the state at once."""

    @property
    def features(self) -> tuple[str, ...]:
        """The activations of every prompt token that it reads (see `taps`)."""

    def run(self, model: Model, plan: Plan, state: State, found: Read) -> Any:
        """An iterable of what `_loop` yields, SKIPPED where a row got no token; its `report()` ends the result."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything the loop needs besides the model."""

    rows: list[list[int]]  # prompts, one for each row of the output
    new_tokens: int
    sampler: Sampler
    keys: Array | None
    top: int
    mask: MaskCallback | None
    room: Mapping[str, Any]  # overflow, max_len, sinks and kv_format, as `new_state` takes them
    free: bool  # whether a step can start before the host has seen the one before
    steps: int  # decoding steps per program


def first_token(model: Model, plan: Plan, state: State, last: Array) -> tuple[Carry, Emitted]:
    """What `prefill` left becomes the first token of every row -> (carry, Emitted of one step)."""
    context = sampling.init_context(plan.sampler, model.config.vocab, plan.rows)
    # numpy's zeros: jax's own would be a small program each, compiled at every first start.
    zero = np.zeros(len(plan.rows), np.int32)
    carry = Carry(state, zero, context, plan.keys, zero)
    sampler = _masked(plan, [[] for _ in plan.rows])
    return choose(model.config, model.params, sampler, plan.top, last, carry)


def _masked(plan: Plan, so_far: Sequence[Sequence[int]]) -> Sampler:
    """The sampler of the next step: with the callback's mask in front, where there is one."""
    if plan.mask is None:
        return plan.sampler
    allowed = np.asarray(plan.mask(so_far), bool)
    return Sampler((sampling.Mask(jnp.asarray(allowed)), *plan.sampler.steps))


def _loop(model: Model, plan: Plan, state: State, found: Read) -> Iterator[tuple[Emitted, State]]:
    """What each step emitted (numpy, [B] each), and a state that holds at least the tokens before it."""
    carry, many = first_token(model, plan, state, found.last)
    so_far: list[list[int]] = [[] for _ in plan.rows]
    held = np.array(jax.device_get(state.length))
    while True:
        ahead = plan.free and len(so_far[0]) + 1 < plan.new_tokens
        current = carry.state
        if ahead:  # the device works on the next step while the host reads this one
            args = (model.config, model.params, plan.sampler, plan.top, carry)
            carry, (following, _) = advance(*args, steps=plan.steps)
            current = carry.state
        for out in unstacked(jax.device_get(many)):
            if np.any(out.token < 0):
                raise JaxllmError("no token can follow: the logits are not numbers, or nothing is allowed")
            for row, token in zip(so_far, out.token, strict=True):
                row.append(int(token))
            yield out, current
            if len(so_far[0]) >= plan.new_tokens:
                return
        if not ahead:
            carry, held = _make_room(carry, held) if plan.room["overflow"] == "clear" else (carry, held)
            args = (model.config, model.params, _masked(plan, so_far), plan.top, carry)
            carry, (following, _) = advance(*args)
            held = held + 1
        many = following


def unstacked(many: Emitted) -> Iterator[Emitted]:
    """One after the other, from a leading axis of steps."""
    for i in range(len(many.token)):
        yield jax.tree.map(lambda a, i=i: a[i], many)


def _make_room(carry: Carry, held: np.ndarray) -> tuple[Carry, np.ndarray]:
    """Rows whose state is full start again from nothing but their newest token."""
    full = held >= carry.state.capacity
    if not full.any():
        return carry, held
    state = evict(carry.state, "all", rows=jnp.asarray(full))
    return dataclasses.replace(carry, state=state), np.where(full, 0, held)


def _keys(sampler: Sampler, key: Array | None, count: int, n: int) -> tuple[Array | None, int | None]:
    """One typed key per row: `key` itself (or key[i]) for row i, folded with the number of the sample."""
    seed = None
    if sampler.greedy:
        return None, None
    if key is None:
        seed = secrets.randbits(31)
        key = jax.random.key(seed)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise JaxllmError("key should be a typed key (jax.random.key(seed)), or one for each prompt")
    if key.ndim == 0:
        key = jnp.broadcast_to(key, (count,))
    if key.shape != (count,):
        raise JaxllmError(f"there are {count} prompts and keys of shape {key.shape}; give one key, or one each")
    if n > 1:
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
        key = fold(key, jnp.arange(n)).reshape(-1)
    return key, seed


# ---- for users ------------------------------------------------------------------------------------------


class _Row:
    """One completion being written."""

    def __init__(self, model: Model, prompt: list[int], strings, ends, most: int):
        self.model, self.prompt, self.most = model, tuple(prompt), most
        self.text = Text(model.tokenizer, strings, ends)
        self.tokens: list[Token] = []
        self.reason: str | None = None

    def push(self, id: int, logprob: float, top: Alternatives | None) -> Token | None:
        """The next token, unless there was none or the row has ended already."""
        if self.reason is not None or id == SKIPPED:
            return None
        text, self.reason = self.text.push(id)
        if self.reason is None and len(self.tokens) + 1 == self.most:
            text, self.reason = text + self.text.flush(), "length"
        self.tokens.append(Token(id, text, logprob, top, self.reason))
        return self.tokens[-1]

    def completion(self, scored: Scored | None) -> Completion:
        ids = tuple(t.id for t in self.tokens)
        top = tuple(t.top for t in self.tokens if t.top is not None)
        others = sorted({i for a in top for i in a.ids})
        names = dict(zip(others, self.model.pieces(others), strict=False))
        return Completion(
            self.prompt,
            ids,
            "".join(t.text for t in self.tokens) if self.model.tokenizer else None,
            self.reason,
            tuple(t.logprob for t in self.tokens),
            top,
            scored,
            self.model.pieces(ids),
            names,
        )


def generate(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    sampler: Sampler = GREEDY,
    key: Array | None = None,
    n: int = 1,
    stop: str | int | Sequence[str | int] | None = None,
    eos: Sequence[int] | None = None,
    logprobs: int = 0,
    prompt_logprobs: bool = False,
    mask: MaskCallback | None = None,
    max_len: int | None = None,
    overflow: Overflow = "error",
    sinks: int = 0,
    prefill_chunk_size: int = PREFILL_CHUNK,
    add_special: bool = True,
    prefix: Prefix | None = None,
    steps: int | None = None,
    kv_format: str | None = None,
    speculative: Speculates | None = None,
) -> Generation:
    """Continue one prompt or a batch of any lengths: text, token ids or chat messages.

    sampler: from `sampling.sampler(...)`; its numbers may be one per completion. key: a typed key used by every
    row, or one for each prompt; a row's tokens depend on its key and prompt alone, not on its batch. Without one
    a seed is drawn and reported. n: completions of each prompt, from one prefill.
    stop: strings or token ids that end a row; eos: ids that end it instead of the checkpoint's own, () for none.
    logprobs: how many alternatives to report for each token; prompt_logprobs: score the prompts too.
    mask: called before each step with each row's new tokens, gives bool [B, V] of what may follow, drafts too.
    max_len: the tokens a row has room for (default: what it needs, up to the model's context). overflow: what
    happens beyond: "error" (before anything runs), "evict-oldest" (the first `sinks` and the newest stay), or
    "clear" (the row goes on from its newest token alone).
    prefix: tokens and state of an earlier single-row call, reused as far as the prompt begins with them.
    steps: decoding steps in one device program (default 8; on CPU 4 of a small model, else 1).
    kv_format: "int8", "fp8" or "int4" keeps keys and values of past tokens in so many bits (see `init_state`).
    speculative: a `spec_decode.Speculative`, for fewer forwards of the model and the same distribution of tokens.

    Raises ContextError, SamplerError, TokenizerError or JaxllmError before anything is computed.
    """
    began = time.perf_counter()
    rows = as_prompts(model, prompts, add_special=add_special)
    strings, ids = stop_strings(stop, model.tokenizer)
    ends = ids | (model.eos_ids if eos is None else frozenset(eos))
    scored = score_rows(model, rows, logprobs) if prompt_logprobs else [None] * len(rows)
    plan, state, found, seed = _prepare(
        model, rows, max_new_tokens, sampler, key, n, logprobs, mask, max_len, overflow, sinks,
        prefill_chunk_size, prefix, steps, kv_format, speculative,
    )  # fmt: skip
    outputs = [_Row(model, p, strings, ends, max_new_tokens) for p in plan.rows]
    jax.block_until_ready(found.last)
    prefilled = time.perf_counter()
    made = _steps(speculative, model, plan, state, found)
    del found  # features of long prompts are large, and a drafter has read them now
    for out, now in made:
        held = now
        for j, row in enumerate(outputs):
            row.push(*_read(out, j, logprobs))
        if all(row.reason for row in outputs):
            break
    finished = time.perf_counter()
    timings = Timings(
        prefilled - began, finished - prefilled, sum(map(len, rows)), sum(len(r.tokens) for r in outputs)
    )
    completions = tuple(r.completion(scored[j // n]) for j, r in enumerate(outputs))
    prefix = _prefix(outputs[0], held) if len(outputs) == 1 else None
    return Generation(completions, timings, seed, prefix, made.report() if speculative else None)


def _steps(speculative: Speculates | None, *start: Any) -> Iterable[tuple[Emitted, State]]:
    return _loop(*start) if speculative is None else speculative.run(*start)


def _read(out: Emitted, row: int, logprobs: int) -> tuple[int, float, Alternatives | None]:
    top = None
    if logprobs:
        top = Alternatives(tuple(out.top_ids[row].tolist()), tuple(out.top_logprobs[row].tolist()))
    return int(out.token[row]), float(out.logprob[row]), top


def stream(
    model: Model,
    prompt: Prompt,
    *,
    max_new_tokens: int = 128,
    sampler: Sampler = GREEDY,
    key: Array | None = None,
    stop: str | int | Sequence[str | int] | None = None,
    eos: Sequence[int] | None = None,
    logprobs: int = 0,
    mask: MaskCallback | None = None,
    max_len: int | None = None,
    overflow: Overflow = "error",
    sinks: int = 0,
    prefill_chunk_size: int = PREFILL_CHUNK,
    add_special: bool = True,
    prefix: Prefix | None = None,
    kv_format: str | None = None,
    speculative: Speculates | None = None,
) -> Iterator[Token]:
    """Tokens of one completion as they are made; the same tokens as `generate`, with the same arguments.

    The generator returns a Prefix (the value of `yield from`): what to pass to continue. It may be closed or
    interrupted at any time; the model and a given prefix stay as they were.
    """
    rows = as_prompts(model, prompt, add_special=add_special)
    if len(rows) != 1:
        raise JaxllmError(f"stream takes one prompt, got {len(rows)}; use generate for several")
    strings, ids = stop_strings(stop, model.tokenizer)
    ends = ids | (model.eos_ids if eos is None else frozenset(eos))
    plan, state, found, _ = _prepare(
        model, rows, max_new_tokens, sampler, key, 1, logprobs, mask, max_len, overflow, sinks,
        prefill_chunk_size, prefix, None if speculative else 1, kv_format, speculative,
    )  # fmt: skip
    row = _Row(model, rows[0], strings, ends, max_new_tokens)
    made = _steps(speculative, model, plan, state, found)
    del found
    for out, now in made:
        held = now
        yield row.push(*_read(out, 0, logprobs))
        if row.reason:
            break
    return _prefix(row, held)


def _prepare(
    model, rows, new_tokens, sampler, key, n, top, mask, max_len, overflow, sinks, chunk, prefix, steps, kv_format,
    speculative,
) -> tuple[Plan, State, Read, int | None]:  # fmt: skip
    """Check everything, prefill, fork: (plan, state, what the prompts left, seed)."""
    if speculative is not None:
        _check_speculative(overflow, steps)
    counts = {"max_new_tokens": new_tokens, "n": n, "prefill_chunk_size": chunk, "steps": steps or 1}
    if wrong := {k: v for k, v in counts.items() if not isinstance(v, int) or v < 1}:
        raise JaxllmError(f"{wrong} should be whole numbers of at least 1")
    if not 0 <= top <= model.config.vocab:
        raise JaxllmError(f"logprobs goes from 0 to {model.config.vocab}, got {top}")
    keys, seed = _keys(sampler, key, len(rows), n)
    at_once, features = (speculative.nodes, speculative.features) if speculative else (1, ())
    chunk = min(max(chunk, at_once), model.config.max_len)
    prefix = None if features else prefix  # a state has none of the features of its tokens
    reused = _reuse(prefix, rows, new_tokens, overflow, kv_format, at_once)
    room = dict(overflow=overflow, max_len=max_len, sinks=sinks, kv_format=kv_format)
    if reused is None:
        state, rest = new_state(model, rows, new_tokens, chunk, spare=at_once - 1, **room), rows
    else:
        state, rest = reused
    state, found = forked(*read(model, rest, state, features), n)
    free = mask is None and overflow != "clear" and _can_rewind(state)
    steps = (steps or steps_together(model, found.last)) if free else 1
    each = [row for row in rows for _ in range(n)]
    return Plan(each, new_tokens, sampler, keys, top, mask, room, free, steps), state, found, seed


def _check_speculative(overflow: Overflow, steps: int | None) -> None:
    if overflow == "clear":
        raise JaxllmError(
            "speculative decoding does not go with overflow='clear', which would forget what drafts continue; "
            "choose 'evict-oldest', or leave one out"
        )
    if steps is not None:
        raise JaxllmError("speculative decoding does not go with steps: leave one out")


def _can_rewind(state: State) -> bool:
    return not any(isinstance(c, Recurrent) for c in state.layers)


def _reuse(
    prefix: Prefix | None,
    rows: list[list[int]],
    new_tokens: int,
    overflow: Overflow,
    kv_format: str | None,
    at_once: int,
):
    """(state cut back to what the prompt shares with the prefix, the rest of the prompt), or None."""
    if prefix is None:
        return None
    if len(rows) != 1:
        raise JaxllmError(f"a prefix continues a single prompt, got {len(rows)}")
    row, state = rows[0], prefix.state
    shared = next((i for i, (a, b) in enumerate(zip(row, prefix.tokens, strict=False)) if a != b), None)
    shared = min(len(prefix.tokens) if shared is None else shared, len(row) - 1)
    evicting = state.capacity is None
    fits = evicting or len(row) + new_tokens - 1 <= state.capacity
    back = len(prefix.tokens) - shared
    if (
        not fits
        or state.chunk < at_once
        or kv_format != state_format(state)
        or evicting != (overflow == "evict-oldest")
        or shared <= 0
        or (back and not _can_rewind(state))
        or (evicting and back)
    ):
        return None
    try:
        state = rewind(state, shared) if back else state
    except ContextError:  # a ring has forgotten what the rest of the prompt would see
        return None
    # The loop reuses the memory of its state; the caller's prefix must stay valid.
    return jax.tree.map(jnp.copy, state), [row[shared:]]


def _prefix(row: _Row, state: State) -> Prefix | None:
    """The tokens whose keys and values are in the state: all but the newest, which was never fed."""
    tokens = (*row.prompt, *(t.id for t in row.tokens[:-1]))
    length = int(np.asarray(state.length)[0])
    if length < len(tokens):  # cleared on the way
        return None
    if length > len(tokens):
        if not _can_rewind(state):
            return None
        state = rewind(state, len(tokens))
    return Prefix(tokens, state)
