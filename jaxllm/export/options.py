"""What an export is asked for: sizes of its programs and what they give."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import jax

from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError, ContextError
from jaxllm.state import State, init_state

STEPS = 32  # tokens after a prompt that every export is verified with
SIZES = ("context", "window", "sinks", "chunk", "batch")  # fields of Options that a manifest has
SYMBOLS = {"batch": "B", "length": "T"}  # what may be open -> its letter in layouts: rows, tokens of a prefill
USUAL_CONTEXT = 4096  # tokens, unless more are asked for: a cache of 131,072 would be larger than most models


@dataclass(frozen=True)
class Options:
    """Sizes are fixed in the programs. Names in parentheses are MLC-LLM's."""

    context: int | None = None  # tokens a row has room for (context_window_size); None with a window
    chunk: int = 256  # tokens a prefill takes at once (prefill_chunk_size)
    batch: int = 1  # rows of both programs
    window: int | None = None  # newest tokens that are kept (sliding_window_size); length is then unlimited
    sinks: int = 0  # first tokens that are never evicted (attention_sink_size)
    sampler: Literal["logits", "in-graph"] = "logits"  # what the programs give: logits, or the token drawn
    platform: str | None = None  # one of the target's; None: its first
    penalties: bool = False  # a sampler inside can penalise tokens that were said
    kernels: Literal["portable", "pallas"] = "portable"  # jaxllm's own for the platform, inside the programs
    symbolic: tuple[str, ...] = ()  # of SYMBOLS: what is said when a program is called; `batch` rows are verified

    def state(self, config: ModelConfig) -> State:
        """An empty state of these sizes. Raises ContextError where the model has none such."""
        room = self.window or self.context
        return init_state(config, self.batch, room, chunk=self.chunk, window=self.window, sinks=self.sinks)


def settled(options: Options, config: ModelConfig) -> Options:
    """The options with every size said, for a model. Raises ContextError for sizes that the model cannot
    have, and ConfigError for a name that no size has, and for penalties without a sampler."""
    if options.window is not None and options.context is not None:
        raise ContextError(
            f"a window of {options.window} tokens has no context: it goes on for ever; leave one of them out"
        )
    if unknown := [name for name in options.symbolic if name not in SYMBOLS]:
        raise ConfigError(f"what may be symbolic is {' and '.join(SYMBOLS)}, not {unknown[0]!r}")
    if options.penalties and options.sampler != "in-graph":
        raise ConfigError("penalties in the programs want the sampler in them; give sampler='in-graph'")
    context = options.context
    if options.window is None and context is None:
        context = min(config.max_len, USUAL_CONTEXT)
    if context is not None and context <= STEPS:
        raise ContextError(f"an export is verified with {STEPS} tokens after a prompt; give a context of more")
    room = options.window or context
    options = replace(options, context=context, chunk=min(options.chunk, room))
    jax.eval_shape(lambda: options.state(config))  # says what is wrong with them, and allocates nothing
    return options
