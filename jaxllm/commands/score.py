"""`jaxllm score`: how probable texts are."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from jaxllm.commands import common

if TYPE_CHECKING:
    from jaxllm.generation import Scored

USAGE = "[TEXT ...] [--file FILE] [options]"
SUMMARY = "perplexity and bits per byte of texts"
DESCRIPTION = "How probable texts are: tokens, perplexity (per token) and bits per byte of each."


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("texts", metavar="TEXT", nargs="*", help="a text; - reads the standard input")
    parser.add_argument("--file", metavar="FILE", action="append", default=[], help="a UTF-8 file; repeatable")
    common.model_arguments(parser)
    parser.add_argument(
        "--stride", metavar="N", type=common.whole, help="step of windows over texts beyond the context"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, with each token's logprob")


def run(args: argparse.Namespace) -> None:
    from jaxllm import decode

    if not args.texts and not args.file:
        args.fail("there is nothing to score; give a TEXT, - for the standard input, or --file FILE")
    if args.texts.count("-") > 1:
        args.fail("the standard input (-) can be read once only")
    texts = [common.stdin_text() if t == "-" else t for t in args.texts]
    texts += [common.file_text(path) for path in args.file]
    names = [*args.texts, *args.file]
    model = common.load_model(args)
    scores = decode.score(model, texts, stride=args.stride)
    if args.json:
        common.write_json({"model": model.name, "scores": [_json(s) for s in scores]})
        return
    common.write(f"{'tokens':>8}  {'perplexity':>10}  {'bits/byte':>9}  text\n")
    for name, s in zip(names, scores, strict=True):
        common.write(f"{len(s.tokens):8}  {s.perplexity:10.4f}  {s.bits_per_byte:9.4f}  {_short(name)}\n")


def _short(name: str) -> str:
    line = " ".join(name.split())
    return line if len(line) <= 40 else f"{line[:37]}..."


def _json(s: Scored) -> dict[str, Any]:
    rows = zip(s.tokens, s.pieces, (None, *s.logprobs), strict=True)
    return {
        "tokens": len(s.tokens),
        "perplexity": s.perplexity,
        "bits_per_byte": s.bits_per_byte,
        "nll": s.nll,
        "logprobs": [{"id": i, "text": t, "logprob": p} for i, t, p in rows],
    }
