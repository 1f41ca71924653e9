"""What the commands that generate say of speculative decoding."""

from __future__ import annotations

import argparse
from dataclasses import asdict
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


def arguments(parser: argparse.ArgumentParser) -> None:
    """--draft, --self, --ngram and --lookahead, one of them at most."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--draft", metavar="MODEL", nargs="?", const="", help="guess ahead with a model (default: bundled)"
    )
    group.add_argument(
        "--self", metavar="N", nargs="?", const=0, type=whole, help="with N own layers (default: a 4-bit copy)"
    )
    group.add_argument("--ngram", action="store_true", help="with what was said; --lookahead: own guesses, too")
    # Its help stands above: all of it has to fit a screen.
    group.add_argument("--lookahead", action="store_true", help=argparse.SUPPRESS)


def make(args: argparse.Namespace, model: Model) -> Speculative | None:
    """What the arguments ask for. The text is the same as without, for the same seed."""
    if args.draft is None and args.self is None and not (args.ngram or args.lookahead):
        return None
    from jaxllm.spec_decode import Speculative

    return Speculative(_drafter(args, model))


def _drafter(args: argparse.Namespace, model: Model) -> Drafter:
    if args.ngram:
        from jaxllm.draft_ngram import NGram

        return NGram()
    if args.lookahead:
        from jaxllm.draft_lookahead import Lookahead

        return Lookahead()
    from jaxllm.draft_model import DraftModel, early_exit
    from jaxllm.quant import quantize_model

    if args.draft is not None:
        draft = load(args.draft or bundled("draft"), dtype=args.dtype)
    else:
        draft = early_exit(model, args.self) if args.self else quantize_model(model, _COPY[model.config.dtype])
    return DraftModel(draft, choice="couple")


def as_json(report: Speculation) -> dict[str, Any]:
    """The object `--json` prints of it."""
    return asdict(report) | {"acceptance": report.acceptance, "tokens_per_step": report.tokens_per_step}
