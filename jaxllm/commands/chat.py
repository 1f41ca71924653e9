"""`jaxllm chat`: a conversation in the terminal, or of the lines of a pipe."""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxllm.commands import common
from jaxllm.errors import ContextError, JaxllmError, TokenizerError
from jaxllm.model import Model

if TYPE_CHECKING:
    from jaxllm.generation import Prefix

USAGE = "[options]"
SUMMARY = "talk with a model that has a chat template"
DESCRIPTION = (
    "Talk with a model that has a chat template. /reset forgets the conversation, /exit or the end of the "
    "input leaves, Ctrl-C interrupts an answer and keeps what was said."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    common.model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before everything else")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=common.whole, default=512, help="of one answer (default: 512)"
    )
    common.decoding_arguments(parser)


def run(args: argparse.Namespace) -> None:
    sampler, seed = common.make_sampler(args)
    model = common.load_model(args)
    if model.tokenizer is None or model.tokenizer.chat_template is None:
        raise TokenizerError(
            f"{model.name} has no chat template, so it cannot hold a conversation; choose a chat model with "
            "--model, or continue plain text with `jaxllm generate`"
        )
    common.report_seed(args, seed)
    limit = min(args.max_len or model.config.max_len, model.config.max_len)
    start = [] if args.system is None else [{"role": "system", "content": args.system}]
    talk = Conversation(model, start, sampler, common.key_of(seed), args.max_new_tokens, limit)
    _converse(talk, sys.stdin.isatty())


def _converse(talk: Conversation, terminal: bool) -> None:
    while (line := _ask(terminal)) is not None:
        match line.strip():
            case "":
                continue
            case "/exit":
                return
            case "/reset":
                talk.reset()
            case said if said.startswith("/") and said[1:].isalpha():
                print(f"{said} is no command; there are /reset and /exit", file=sys.stderr)
            case said:
                _answer(talk, said, terminal)


def _ask(terminal: bool) -> str | None:
    """The next line, or None at the end of the input."""
    if terminal:
        with contextlib.suppress(ImportError):  # where it exists, lines can be edited and recalled
            import readline  # noqa: F401
    try:
        return input("> " if terminal else "")
    except EOFError:
        if terminal:
            common.write("\n")
        return None
    except UnicodeDecodeError as error:
        raise JaxllmError(f"the standard input is not UTF-8 text ({error}); convert it first") from error


def _answer(talk: Conversation, said: str, terminal: bool) -> None:
    try:
        talk.answer(said)
    except JaxllmError as error:
        if not terminal:  # a script should fail; a person can go on
            raise
        print(f"jaxllm: error: {error}", file=sys.stderr)


@dataclass
class Conversation:
    """What was said, and the cache that holds it."""

    model: Model
    start: list[dict[str, Any]]  # the system message, if any
    sampler: Any
    key: Any
    max_new_tokens: int
    limit: int  # tokens the context holds
    said: list[dict[str, Any]] = field(default_factory=list)
    prefix: Prefix | None = None
    turn: int = 0

    def reset(self) -> None:
        self.said, self.prefix = [], None

    def answer(self, text: str) -> None:
        """Write the model's answer as it comes. A refused or unanswered message leaves no trace.

        Raises ContextError where the conversation fills the context, TokenizerError where the template refuses.
        """
        asked = [*self.said, {"role": "user", "content": text}]
        row = self.model.tokenizer.encode_chat([*self.start, *asked])
        room = self.limit - len(row)
        if room < 1:
            raise ContextError(
                f"the conversation has {len(row)} tokens and the context {self.limit}; /reset begins a new one"
            )
        answer = self._stream(row, min(self.max_new_tokens, room))
        if answer:
            self.said = [*asked, {"role": "assistant", "content": answer}]

    def _stream(self, row: list[int], new_tokens: int) -> str:
        """The answer's text, written on the way; cut short by Ctrl-C, with the cache as it was before."""
        import jax

        from jaxllm import decode

        key = None if self.key is None else jax.random.fold_in(self.key, self.turn)
        self.turn += 1
        options = dict(sampler=self.sampler, key=key, max_len=self.limit, prefix=self.prefix)
        tokens, parts = decode.stream(self.model, row, max_new_tokens=new_tokens, **options), []
        try:
            while True:
                parts.append(next(tokens).text)
                common.write(parts[-1])
        except StopIteration as end:
            self.prefix = end.value
        except KeyboardInterrupt:
            tokens.close()
        common.write("\n")
        return "".join(parts)
