"""Tokens to text as they come: whole characters only, and nothing after a stop string or an end token."""

from __future__ import annotations

from collections.abc import Sequence

from jaxllm.errors import JaxllmError, TokenizerError
from jaxllm.generation import FinishReason
from jaxllm.tokenizer import Tokenizer


class Text:
    """The text of one row. `push` returns what became final with a token, and why the row ended, if it did."""

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str], ends: frozenset[int]):
        self.detokenizer = tokenizer.detokenizer() if tokenizer else None
        self.stops, self.ends = stops, ends
        self.held = ""  # decoded, but perhaps the beginning of a stop string

    def push(self, token: int) -> tuple[str, FinishReason | None]:
        if token in self.ends:
            return self.flush(), "eos"
        if self.detokenizer is None:
            return "", None
        return self._release(self.detokenizer.push(token))

    def flush(self) -> str:
        """What is left when the row ends without a stop string."""
        rest = self.detokenizer.flush() if self.detokenizer else ""
        text, _ = self._release(rest)
        text, self.held = text + self.held, ""
        return text

    def _release(self, text: str) -> tuple[str, FinishReason | None]:
        self.held += text
        found = [at for at in (self.held.find(s) for s in self.stops) if at >= 0]
        if found:
            out, self.held = self.held[: min(found)], ""
            return out, "stop"
        keep = max((_overlap(self.held, s) for s in self.stops), default=0)
        cut = len(self.held) - keep
        out, self.held = self.held[:cut], self.held[cut:]
        return out, None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def stop_strings(
    stop: str | int | Sequence[str | int] | None, tokenizer: Tokenizer | None
) -> tuple[tuple[str, ...], frozenset[int]]:
    """(strings, token ids) of a `stop` argument.

    Raises TokenizerError for strings without a tokenizer, JaxllmError for anything else than strings and ids."""
    items = [] if stop is None else [stop] if isinstance(stop, str | int) else list(stop)
    if not all(isinstance(s, str | int) and s != "" for s in items):
        raise JaxllmError(f"stop is a string, a token id or a list of them, none empty; got {stop!r}")
    strings = tuple(s for s in items if isinstance(s, str))
    if strings and tokenizer is None:
        raise TokenizerError("stop strings need a tokenizer, and this model has none; give token ids")
    return strings, frozenset(s for s in items if isinstance(s, int))
