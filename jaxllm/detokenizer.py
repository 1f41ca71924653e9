"""Token ids to text one at a time, exactly as decoding them all at once would give it.

A decoder of the tokenizers library is a chain of parts, each from a list of tokens to a list of tokens, whose
outputs are joined at the end. Here every part is a stage that takes one token and gives what is final; the
chains of byte-level BPE and of sentencepiece models can be run so. Source: github.com/huggingface/tokenizers,
tokenizers/src/decoders.
"""

import codecs
import dataclasses
import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxllm.errors import TokenizerError
from jaxllm.tokenizer_files import byte_alphabet

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer:
    """Ids to text one at a time: all that push and the last flush return, joined, is decode of all ids.

    Costs the same for every token. Text is held back only as long as a later id could change it: an unfinished
    character, or (sentencepiece) a run of byte tokens, which decode reads as a whole or not at all.
    """

    def __init__(
        self,
        spelling: Callable[[int], str],
        parts: Sequence[Mapping[str, Any]],
        skipped: frozenset[int] = frozenset(),
    ):
        """spelling: id to token, refusing bad ids; parts: see decoder_parts; skipped: ids that give no text."""
        self._spelling, self._parts, self._skipped = spelling, parts, skipped
        self._stages = stages(parts)

    def push(self, id: int) -> str:
        """The text that became final with this id, often one token's, maybe empty."""
        spelling = self._spelling(id)
        if operator.index(id) in self._skipped:
            return ""
        return "".join(_through([spelling], self._stages))

    def flush(self) -> str:
        """The text held back (an unfinished character becomes U+FFFD); afterwards a new text may begin."""
        rest: list[str] = []
        for stage in self._stages:
            rest = _through(rest, [stage]) + stage.end()
        self._stages = stages(self._parts)
        return "".join(rest)


class _Stage:
    """One part of a decoder, token by token; subclasses follow the decode_chain of their namesakes."""

    def push(self, token: str) -> list[str]:
        raise NotImplementedError

    def end(self) -> list[str]:
        return []


class _Bytes(_Stage):
    """ByteLevel: letters stand for bytes, a token with any other letter for its own UTF-8."""

    def __init__(self) -> None:
        self._alphabet = {char: byte for byte, char in enumerate(byte_alphabet())}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: str) -> list[str]:
        known = all(char in self._alphabet for char in token)
        return [self._decoder.decode(bytes(map(self._alphabet.get, token)) if known else token.encode())]

    def end(self) -> list[str]:
        return [self._decoder.decode(b"", final=True)]


class _ByteFallback(_Stage):
    """ByteFallback: a run of <0xNN> tokens is text if all of it is UTF-8, else one U+FFFD a byte."""

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, token: str) -> list[str]:
        if match := BYTE_TOKEN.fullmatch(token):
            self._run.append(int(match[1], 16))
            return []
        return [*self.end(), token]

    def end(self) -> list[str]:
        if not (run := bytes(self._run)):
            return []
        self._run.clear()
        try:
            return [run.decode()]
        except UnicodeDecodeError:
            return ["\ufffd" * len(run)]


@dataclasses.dataclass
class _Replace(_Stage):
    """Replace: every occurrence of a text in a token by another."""

    old: str
    new: str

    def push(self, token: str) -> list[str]:
        return [token.replace(self.old, self.new)]


@dataclasses.dataclass
class _Strip(_Stage):
    """Strip: up to `most` of one character off the front of each token, or of the whole text after Fuse."""

    char: str
    most: int
    whole: bool
    begun: int = 0  # characters dropped so far
    done: bool = False

    def push(self, token: str) -> list[str]:
        if not self.whole:
            self.begun, self.done = 0, False
        while token and not self.done:
            self.done = self.begun >= self.most or token[0] != self.char
            if not self.done:
                token, self.begun = token[1:], self.begun + 1
        return [token]


@dataclasses.dataclass
class _Metaspace(_Stage):
    """Metaspace: the replacement is a space, or, if one was put in front, nothing in the first token."""

    char: str
    drop: bool

    def push(self, token: str) -> list[str]:
        text = token.replace(self.char, "" if self.drop else " ")
        self.drop = False
        return [text]


@dataclasses.dataclass
class _Spaced(_Stage):
    """No decoder: tokens with a space between."""

    gap: str = ""

    def push(self, token: str) -> list[str]:
        text, self.gap = self.gap + token, " "
        return [text]


def _through(tokens: list[str], parts: Iterable[_Stage]) -> list[str]:
    for part in parts:
        tokens = [out for token in tokens for out in part.push(token)]
    return tokens


def decoder_parts(backend: Any) -> list[dict[str, Any]]:
    """The backend's decoder as a flat list of its JSON parts, [] where it has none."""
    from tokenizers import Tokenizer as Shell
    from tokenizers.models import BPE

    if backend.decoder is None:
        return []
    shell = Shell(BPE())  # an empty tokenizer, because a full one takes long to write as JSON
    shell.decoder = backend.decoder
    return _flat(json.loads(shell.to_str())["decoder"])


def _flat(part: dict[str, Any]) -> list[dict[str, Any]]:
    if part["type"] != "Sequence":
        return [part]
    return [leaf for inner in part["decoders"] for leaf in _flat(inner)]


def stages(parts: Sequence[Mapping[str, Any]]) -> list[_Stage]:
    """A fresh stage for every part of a decoder. TokenizerError for a part that cannot be streamed."""
    if not parts:
        return [_Spaced()]
    made, fused = [], False
    for part in parts:
        if part["type"] == "Fuse":
            fused = True
        elif (stage := _stage(part, fused)) is not None:
            made.append(stage)
        else:
            raise TokenizerError(
                f"The tokenizer's decoder has a part that cannot be streamed: {dict(part)}. "
                "Decode whole texts instead."
            )
    return made


def _stage(part: Mapping[str, Any], fused: bool) -> _Stage | None:
    match part:
        case {"type": "ByteLevel"} if not fused:
            return _Bytes()
        case {"type": "ByteFallback"} if not fused:
            return _ByteFallback()
        case {"type": "Replace", "pattern": {"String": old}, "content": new} if not fused or len(old) == 1:
            return _Replace(old, new)
        case {"type": "Strip", "content": char, "start": most, "stop": 0}:
            return _Strip(char, most, fused)
        case {"type": "Metaspace", "replacement": char, **rest} if not fused:
            return _Metaspace(char, rest.get("prepend_scheme", "always") != "never")
    return None
