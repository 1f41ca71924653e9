"""What decoding returns: plain values that print well and show themselves in a notebook."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxllm.state import State

FinishReason = Literal["eos", "stop", "length"]
SKIPPED = -2  # in place of a token: this row got none in this step


@dataclass(frozen=True)
class Alternatives:
    """The most probable tokens at one position, best first, under the model's own distribution."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # natural logarithm


@dataclass(frozen=True)
class Token:
    """One emitted token, as `stream` yields it. text is what became final with it (perhaps nothing yet)."""

    id: int
    text: str
    logprob: float  # under the model's own distribution, before the sampler
    top: Alternatives | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Prefix:
    """Tokens a state already holds; give it to `generate` or `stream` to continue without computing them again."""

    tokens: tuple[int, ...]
    state: State = field(repr=False)


@dataclass(frozen=True)
class Scored:
    """Log-probabilities of given tokens: logprobs[i] belongs to tokens[i + 1], given those before it."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[Alternatives, ...] = ()
    text: str | None = None
    pieces: tuple[str, ...] = ()  # readable text of each token, where there is a tokenizer

    @property
    def nll(self) -> float:
        """Mean negative log-probability in nats per predicted token."""
        return -math.fsum(self.logprobs) / len(self.logprobs) if self.logprobs else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)

    @property
    def bits_per_byte(self) -> float:
        """Code length of the text in bits over its UTF-8 bytes; nan without text."""
        size = len(self.text.encode()) if self.text else 0
        return -math.fsum(self.logprobs) / math.log(2) / size if size else math.nan

    def _repr_html_(self) -> str:
        first = [(self.pieces[0], None, None)] if self.pieces else []
        return _page(first + _rows(self.pieces[1:], self.tokens[1:], self.logprobs, self.top))


@dataclass(frozen=True)
class Completion:
    """One row of a Generation. tokens are the generated ones; text ends before a stop string or end token."""

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    logprobs: tuple[float, ...]
    top: tuple[Alternatives, ...] = ()
    prompt: Scored | None = None
    pieces: tuple[str, ...] = ()
    names: dict[int, str] = field(default_factory=dict, repr=False)  # readable text of alternatives

    def _repr_html_(self) -> str:
        return _page(_rows(self.pieces, self.tokens, self.logprobs, self.top, self.names))


@dataclass(frozen=True)
class Timings:
    """Wall-clock seconds, compilation included where it happened."""

    prefill: float
    decode: float
    prompt_tokens: int
    new_tokens: int

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.decode if self.decode > 0 else math.nan


@dataclass(frozen=True)
class Speculation:
    """How speculative decoding went. A verification looks at the drafts of each row place by place."""

    new_tokens: int  # after the first of each row, which comes from the prompt
    verifications: int  # forwards of the target over a draft
    plain_steps: int  # forwards of the target without one
    looked_at: tuple[int, ...]  # drafts at each place whose turn came, over all rows and steps
    kept: tuple[int, ...]  # and those of them that were kept
    draft_seconds: float  # wall clock, prefill of the drafter included
    verify_seconds: float

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Share of drafts kept at each place, of those whose turn came."""
        return tuple(k / n if n else math.nan for k, n in zip(self.kept, self.looked_at, strict=True))

    @property
    def tokens_per_step(self) -> float:
        """New tokens, of all rows together, for each forward of the target."""
        steps = self.verifications + self.plain_steps
        return self.new_tokens / steps if steps else math.nan


@dataclass(frozen=True)
class Generation(Sequence):
    """Completions in the order of the prompts; with n samples a prompt, those of a prompt lie together."""

    completions: tuple[Completion, ...]
    timings: Timings
    seed: int | None = None  # of the key, where generate chose one itself
    prefix: Prefix | None = field(default=None, repr=False)  # of a single row: continue from here
    speculation: Speculation | None = None  # where it was asked for

    def __getitem__(self, i: Any) -> Any:
        return self.completions[i]

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def text(self) -> str:
        """The text of a single completion; use `texts` for several."""
        if len(self.completions) != 1:
            raise ValueError(f"this generation has {len(self.completions)} completions; use .texts")
        return self.completions[0].text

    @property
    def texts(self) -> tuple[str | None, ...]:
        return tuple(c.text for c in self.completions)

    def __str__(self) -> str:
        return "\n\n".join(c.text if c.text is not None else str(list(c.tokens)) for c in self.completions)

    def _repr_html_(self) -> str:
        return "<hr>".join(c._repr_html_() for c in self.completions)


# ---- tokens shaded by log-probability -------------------------------------------------------------------


def _rows(pieces, tokens, logprobs, top, names=None) -> list[tuple[str, float | None, str | None]]:
    pieces = pieces or tuple(f"{t} " for t in tokens)
    rows = []
    for i, (piece, logprob) in enumerate(zip(pieces, logprobs, strict=False)):
        rows.append((piece, logprob, _hover(logprob, top[i] if i < len(top) else None, names or {})))
    return rows


def _hover(logprob: float, top: Alternatives | None, names: dict[int, str]) -> str:
    lines = [f"{math.exp(logprob):.1%}  (log {logprob:.2f})"]
    if top:
        lines += [f"{math.exp(p):6.1%}  {names.get(i, i)!s}" for i, p in zip(top.ids, top.logprobs, strict=True)]
    return "\n".join(lines)


def _page(rows: Iterator | list) -> str:
    spans = []
    for piece, logprob, hover in rows:
        shade = 0.0 if logprob is None else min(1.0, -logprob / 6)
        title = f' title="{html.escape(hover, quote=True)}"' if hover else ""
        style = f"background:rgba(230,97,1,{0.55 * shade:.2f});border-radius:2px"
        spans.append(f'<span style="{style}"{title}>{html.escape(piece)}</span>')
    return f'<pre style="white-space:pre-wrap;line-height:1.5">{"".join(spans)}</pre>'
