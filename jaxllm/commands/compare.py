"""`jaxllm compare`: what one model loses against another."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from typing import TYPE_CHECKING

from jaxllm import load
from jaxllm.commands import common
from jaxllm.commands.info import Sections, show, size
from jaxllm.model import DTYPES

if TYPE_CHECKING:
    from jaxllm.comparison import Comparison, Estimate, Outside
    from jaxllm.model import Model

USAGE = "A [B] --text FILE [options]"
SUMMARY = "what one model loses against another, on a text"
DESCRIPTION = (
    "How the predictions of B differ from those of the reference A on a text: perplexity, divergence, top-1 "
    "agreement, and the error layer by layer. Any two models of one vocabulary."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="the reference: checkpoint or hub id")
    parser.add_argument("b", metavar="B", nargs="?", help="the other one; or none, with --format")
    parser.add_argument("--format", metavar="F", help="B is A, its weights rounded to this format")
    parser.add_argument("--text", metavar="FILE", required=True, action="append", help="UTF-8; repeatable")
    parser.add_argument("--context", metavar="N", type=common.whole, help="tokens of a window (default: 512)")
    parser.add_argument("--windows", metavar="N", type=common.whole, help="the most windows to read")
    for side in "ab":
        parser.add_argument(f"--dtype-{side}", metavar="TYPE", choices=DTYPES, help=f"as {side.upper()} is loaded")
    parser.add_argument("--transformers", action="store_true", help="A is run by transformers itself (float32)")
    parser.add_argument("--picture", metavar="OUT.png", help="draw the layers' errors and the divergences")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> None:
    from jaxllm.comparison import compare, picture

    _check(args)
    texts = [common.file_text(path) for path in args.text]
    a, b = _models(args)
    found = compare(a, b, texts, context=args.context, windows=args.windows)
    if args.picture:
        picture(found, args.picture)
    if args.json:
        common.write_json(found.as_dict())
        return
    show(sections(found))


def _check(args: argparse.Namespace) -> None:
    if (args.b is None) == (args.format is None):
        args.fail("name a second model B, or give --format F to compare A with A in that format")
    if args.format and args.dtype_b:
        args.fail("--format brings its own dtype for B; leave out --dtype-b")
    if args.transformers and args.dtype_a:
        args.fail("--transformers runs A in float32; leave out --dtype-a")


def _models(args: argparse.Namespace) -> tuple[Model | Outside, Model]:
    from jaxllm.comparison import from_transformers
    from jaxllm.quant.recipe import quantize_model

    ours = None if args.transformers and args.b else load(args.a, dtype=args.dtype_a)
    if args.format:
        b = quantize_model(ours, args.format)
        b = dataclasses.replace(b, name=f"{b.name} {args.format}")
    else:
        b = load(args.b, dtype=args.dtype_b)
    return from_transformers(args.a) if args.transformers else ours, b


# ---- the tables -----------------------------------------------------------------------------------------


def sections(found: Comparison) -> Sections:
    """Titles and rows of words."""
    both = [_side(f"A: {found.a.name}", found.a), _side(f"B: {found.b.name}", found.b)]
    read = f"{found.tokens:,} tokens in windows of {found.context}: {found.windows}"
    layers = [
        (f"layer {i}", f"{x.drift:10.5f} {x.own:12.5f}  {_bar(x.own, max(y.own for y in found.layers))}")
        for i, x in enumerate(found.layers)
    ]
    title = "relative errors: stream so far, and what the layer adds (on A's inputs)"
    return [*both, (f"B against A, {read}", _figures(found)), *[(title, layers)] * bool(layers)]


def _side(title: str, side) -> tuple[str, list[tuple[str, str]]]:
    return title, [
        ("perplexity", f"{side.perplexity:.4f} ± {side.perplexity_error:.4f}"),
        ("nats per token", _estimate(side.nll)),
        ("size", f"{size(side.nbytes)}, {side.parameters:,} parameters"),
        ("bits per weight", f"{side.bits_per_weight:.3f}"),
    ]


def _figures(found: Comparison) -> list[tuple[str, str]]:
    quantiles = {"median": 0.5, "99.9th percentile": 0.999, "largest": 1.0}
    return [
        ("nats per token, B - A", _estimate(found.difference)),
        ("KL(A || B), mean", f"{found.kl_mean:.3e}"),
        *((f"    {name}", f"{found.kl_quantile(q):.3e}") for name, q in quantiles.items()),
        ("same most likely token", f"{found.agreement:.2%}".replace("%", " %")),
        ("largest logit difference", f"{found.largest_logit_difference:.4g}"),
    ]


def _estimate(e: Estimate) -> str:
    """The mean with both its standard errors: from windows, and from tokens."""
    windows = "" if math.isnan(e.window_error) else f"{e.window_error:.6f} (windows), "
    return f"{e.mean:.6f} ± {windows}{e.token_error:.6f} (tokens)"


def _bar(value: float, most: float) -> str:
    plain = sys.stdout.encoding is None or "utf" not in sys.stdout.encoding.lower()
    return ("#" if plain else "█") * round(24 * value / most) if most > 0 else ""
