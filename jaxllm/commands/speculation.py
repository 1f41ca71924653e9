"""What the commands that generate say of speculative decoding."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from jaxllm import bundled, load
from jaxllm.commands.common import whole
from jaxllm.model import Model

if TYPE_CHECKING:
    from jaxllm.generation import Speculation
    from jaxllm.spec_decode import Drafter, Speculative

_COPY = {
    "float32": "q4f32_1",
    "bfloat16": "q4bf16_1",
    "float16": "q4f16_1",
}  # the target's copy for --self, by dtype


class Guess(argparse.Action):
    """Which drafter was asked for, and with what: (name, value or None)."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Set it, once."""
        if (before := getattr(namespace, self.dest)) is not None:
            parser.error(f"argument {option_string}: not allowed with argument --{before[0]}")
        setattr(namespace, self.dest, (option_string.removeprefix("--"), values if values != [] else None))


def arguments(parser: argparse.ArgumentParser) -> None:
    """What guesses ahead, one at most."""
    add = partial(parser.add_argument, dest="guess", action=Guess, default=None)
    guessers = ("--draft", "--medusa", "--eagle")
    add(*guessers, metavar="OF", nargs="?", help="guess ahead with a model or heads (default: bundled)")
    add("--self", metavar="N", nargs="?", type=whole, help="with N own layers (default: a 4-bit copy)")
    add("--ngram", "--mtp", nargs=0, help="with what was said; own predictor (or --lookahead)")
    add("--lookahead", nargs=0, help=argparse.SUPPRESS)  # its help stands above: all of it has to fit a screen


def make(args: argparse.Namespace, model: Model) -> Speculative | None:
    """What the arguments ask for. The text is the same as without, for the same seed."""
    if args.guess is None:
        return None
    from jaxllm.spec_decode import Speculative

    return Speculative(_drafter(*args.guess, model, args))


def _drafter(name: str, value: Any, model: Model, args: argparse.Namespace) -> Drafter:
    if name == "ngram":
        from jaxllm.draft_ngram import NGram

        return NGram()
    if name == "lookahead":
        from jaxllm.draft_lookahead import Lookahead

        return Lookahead()
    if name == "medusa":
        from jaxllm.draft_medusa import load_medusa

        return load_medusa(value or bundled("medusa"), model)
    if name in ("eagle", "mtp"):
        return _head(name, value, model, args)
    from jaxllm.draft_model import DraftModel, early_exit
    from jaxllm.quant import quantize_model

    if name == "draft":
        draft = load(value or bundled("draft"), dtype=args.dtype)
    else:
        draft = early_exit(model, value) if value else quantize_model(model, _COPY[model.config.dtype])
    return DraftModel(draft, choice="couple")


def _head(name: str, value: str | None, model: Model, args: argparse.Namespace) -> Drafter:
    """A tree of EAGLE's; a chain of a predictor, which knows the next token best, and before recurrent layers."""
    from jaxllm.draft_head import DraftHead
    from jaxllm.draft_medusa import trees_fit
    from jaxllm.head_files import load_eagle, load_predictor

    if name == "mtp":
        return DraftHead(load_predictor(args.model, model), (1,) * 4, "couple")
    head = load_eagle(value or bundled("eagle"), model)
    return DraftHead(head) if trees_fit(model.config) else DraftHead(head, (1,) * 4, "couple")


def as_json(report: Speculation) -> dict[str, Any]:
    """The object `--json` prints of it."""
    return asdict(report) | {"acceptance": report.acceptance, "tokens_per_step": report.tokens_per_step}
