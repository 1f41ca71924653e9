"""Prompts to token ids, and room for them: what the shapes of the programs are."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from jaxllm import native
from jaxllm.config import ModelConfig, MoE
from jaxllm.errors import ContextError, JaxllmError, TokenizerError
from jaxllm.model import Model
from jaxllm.quant import QTensor
from jaxllm.state import State, init_state

Array = jax.Array
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]  # text, token ids, or chat messages
Overflow = Literal["error", "evict-oldest", "clear"]

PREFILL_CHUNK = 256
SMALL_MODEL = 2**29  # bytes: a decoding step of less takes a CPU some 10 or 20 ms
SMALLEST_STATE = 256  # slots; capacities are powers of two so that few programs serve every length


def steps_together(model: Model, x: Array) -> int:
    """Decoding steps of one program on the device of x, unless somebody asks for another number.

    A round trip is a millisecond on a CPU, and steps behind the last token are wasted: short ones are joined.
    Without the native kernels a loop would cost XLA's fast bf16 products, and experts that are not packed would be
    widened to f32 before it.
    """
    if next(iter(x.devices())).platform != "cpu":
        return 8
    layers = zip(model.config.blocks, model.params["layers"], strict=True)
    experts = [p["ffn"]["gate"]["w"] for block, p in layers if isinstance(block.ffn, MoE)]
    quick = native.unavailable() is None and all(isinstance(w, QTensor) for w in experts)
    return 4 if quick and model.nbytes < SMALL_MODEL else 1


def as_prompts(model: Model, prompts: Prompt | Sequence[Prompt], *, add_special: bool = True) -> list[list[int]]:
    """Token ids of one prompt or several: strings, token lists or chat messages.

    Raises TokenizerError for text without a tokenizer, JaxllmError for empty prompts and ids out of range.
    """
    _check_kind(prompts)
    single = isinstance(prompts, str) or (len(prompts) > 0 and is_item(prompts[0]))
    rows = [_tokens(model, p, add_special) for p in ([prompts] if single else prompts)]
    if not rows or not all(rows):
        raise JaxllmError("a prompt needs at least one token; got an empty one")
    bad = [t for row in rows for t in row if not 0 <= t < model.config.vocab]
    if bad:
        raise JaxllmError(f"token ids go from 0 to {model.config.vocab - 1}, got {bad[:5]}")
    return rows


def _check_kind(prompt: Any) -> None:
    """Raise JaxllmError for what is neither text nor a sequence."""
    array = isinstance(prompt, np.ndarray | Array) and prompt.ndim > 0
    if not array and not isinstance(prompt, Sequence):
        raise JaxllmError(f"a prompt is text, token ids or chat messages, got {reprlib.repr(prompt)}")


def is_item(first: Any) -> bool:
    """Whether something begins a single prompt (a token id or a message), not a batch of prompts."""
    return isinstance(first, int | np.integer | Mapping) or (
        isinstance(first, np.ndarray | Array) and first.ndim == 0
    )


def _tokens(model: Model, prompt: Prompt, add_special: bool) -> list[int]:
    _check_kind(prompt)
    if isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], Mapping)):
        if model.tokenizer is None:
            raise TokenizerError(
                f"{model.name} has no tokenizer files, so text cannot be read; give token ids, or put "
                "tokenizer.json or tokenizer.model beside its config.json"
            )
        if isinstance(prompt, str):
            return model.tokenizer.encode(prompt, add_special=add_special)
        return model.tokenizer.encode_chat(prompt)
    try:
        array = np.asarray(prompt)
    except ValueError:
        array = np.empty((0, 0))
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise JaxllmError(f"a prompt is text, token ids or chat messages, got {reprlib.repr(prompt)}")
    return [int(t) for t in array]


def bucket(length: int, config: ModelConfig) -> int:
    """Slots for `length` tokens: a power of two where the model allows it, so that few programs serve all."""
    size = max(SMALLEST_STATE, 1 << (length - 1).bit_length())
    return max(min(size, config.max_len), length)


def new_state(
    model: Model,
    rows: Sequence[Sequence[int]],
    new_tokens: int,
    chunk: int,
    *,
    overflow: Overflow = "error",
    max_len: int | None = None,
    sinks: int = 0,
    kv_format: str | None = None,
    spare: int = 0,
) -> State:
    """An empty state for these prompts and what will follow; arguments as in `generate`.

    spare: slots beyond, as far as the model's context has them, for drafts that may be taken back.

    Raises ContextError that says which limit is passed."""
    config = model.config
    make = partial(init_state, config, len(rows), chunk=chunk, kv_format=kv_format)
    longest = max(map(len, rows))
    limit = min(max_len or config.max_len, config.max_len)
    if overflow == "evict-oldest":
        return make(limit, window=limit, sinks=sinks)
    if sinks:
        raise ContextError("sinks belong to overflow='evict-oldest'; the other policies keep no tokens")
    held = longest + new_tokens - 1  # the last token is never fed
    size = limit if max_len else bucket(min(held + spare, limit), config)
    if overflow == "clear":
        return make(size)
    if overflow != "error":
        raise ContextError(f"overflow is 'error', 'evict-oldest' or 'clear', got {overflow!r}")
    if held > limit:
        raise ContextError(
            f"the longest prompt has {longest} tokens and {new_tokens} more were asked for, but the context is "
            f"{limit}; shorten them, or choose overflow='evict-oldest' or 'clear'"
        )
    return make(size)


def padded(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Rows as i32 [len(rows), width], zeros to the right of each."""
    out = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
