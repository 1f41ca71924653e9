"""`jaxllm export`: a model as programs, parameters and a manifest that run without jaxllm."""

from __future__ import annotations

import argparse
import time
from typing import Any

from jaxllm.commands import common
from jaxllm.model import DTYPES

USAGE = "MODEL --target T --out DIR [options] | verify DIR"
SUMMARY = "programs and weights that run without jaxllm"
DESCRIPTION = "Write a checkpoint for a target's runtime, and believe it once a fresh process has run it."
MLC = {  # MLC-LLM's names, which are taken, too
    "--context": "--context-window-size",
    "--chunk": "--prefill-chunk-size",
    "--window": "--sliding-window-size",
    "--sinks": "--attention-sink-size",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="MODEL", nargs="?", help="checkpoint folder, file or hub id, or `verify`"
    )
    parser.add_argument("folder", metavar="DIR", nargs="?", help="after verify: what was exported")
    parser.add_argument("--target", metavar="T", help="what to make; list: all, and what they need")
    parser.add_argument("--out", metavar="DIR", help="the directory to write; it may not exist yet")
    parser.add_argument("--platform", metavar="P", help="of the target (default: its first)")
    parser.add_argument("--format", metavar="NAME", help="quantize on the way, as `quantize` does")
    parser.add_argument("--dtype", metavar="TYPE", choices=DTYPES, help="of the rest and of activations")
    for name, kind, usual, help in (
        ("--context", common.whole, None, "tokens of a row (default: up to 4096)"),
        ("--chunk", common.whole, None, "tokens a prefill takes (default: 256)"),
        ("--window", common.whole, None, "newest tokens to keep, without a context"),
        ("--sinks", common.count, 0, "first tokens that a window keeps"),
    ):
        parser.add_argument(name, metavar="N", type=kind, default=usual, help=help)
        parser.add_argument(MLC[name], metavar="N", type=kind, dest=name[2:], help=argparse.SUPPRESS)
    parser.add_argument(
        "--kernels",
        metavar="K",
        choices=("portable", "pallas"),
        default="portable",
        help="pallas: jaxllm's own for the platform, inside the programs",
    )
    parser.add_argument(
        "--symbolic",
        metavar="SIZES",
        type=lambda text: tuple(text.split(",")),
        default=(),
        help="sizes that callers say: batch, length or batch,length",
    )
    parser.add_argument("--batch", metavar="B", type=common.whole, default=1, help="rows (default: 1)")
    parser.add_argument(
        "--sampler",
        metavar="S",
        choices=("logits", "in-graph", "penalties"),
        default="logits",
        help="logits; in-graph: a token; penalties: one by penalties, too",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> None:
    began = time.monotonic()
    if args.target == "list":
        found = listed()
        common.write_json(found) if args.json else common.write(_table(found))
    elif args.source == "verify":
        _verify(args)
    else:
        _export(args, began)


def _verify(args: argparse.Namespace) -> None:
    from jaxllm.export.build import verify

    if not args.folder:
        args.fail("verify needs the directory: verify DIR")
    record = verify(args.folder)
    common.write_json(record) if args.json else common.write(f"{args.folder}: {_in_words(record)}\n")


def _export(args: argparse.Namespace, began: float) -> None:
    from jaxllm.export.build import export
    from jaxllm.export.options import Options

    if args.folder:
        args.fail(f"unexpected {args.folder!r} behind the model; --out names the directory to write")
    if not args.source or not args.target or not args.out:
        args.fail("give a MODEL, --target and --out, or verify DIR, or --target list")
    options = Options(
        args.context,
        args.chunk or Options.chunk,
        args.batch,
        args.window,
        args.sinks,
        "in-graph" if args.sampler == "penalties" else args.sampler,
        args.platform,
        args.sampler == "penalties",
        args.kernels,
        args.symbolic,
    )
    made = export(args.source, args.target, args.out, format=args.format, dtype=args.dtype, options=options)
    seconds, record = time.monotonic() - began, made.manifest["verification"]
    report = {"folder": str(made.folder), "bytes": made.nbytes, "seconds": round(seconds, 3)} | record
    words = f"{made.folder}: {made.nbytes / 1e6:,.1f} MB in {seconds:.1f} s; {_in_words(record)}\n"
    common.write_json(report) if args.json else common.write(words)


def _in_words(record: dict[str, Any]) -> str:
    ties = f" ({record['near_ties']} near ties)" if record["near_ties"] else ""
    return (
        f"{record['verified']} by {record['where']}\n"
        f"  {record['tokens_equal']} of {record['tokens']} greedy tokens are the live model's{ties}; "
        f"{record['compared']} differ by up to {record['max_difference']:.2e}, {record['allowed']:.2e} is allowed"
    )


def listed() -> list[dict[str, Any]]:
    """Every target: what it is, its platforms, and what it needs."""
    from jaxllm.export import target

    found = [target.find(name) for name in target.names()]
    return [
        {
            "name": t.name,
            "summary": t.summary,
            "platforms": list(t.platforms),
            "needs": list(t.needs),
            "extra": t.extra,
            "missing": t.missing(),
        }
        for t in found
    ]


def _table(found: list[dict[str, Any]]) -> str:
    lines = []
    for t in found:
        state = "ready" if t["missing"] is None else t["missing"]
        lines += [f"{t['name']:12}{t['summary']}"]
        lines += [f"{'':12}platforms: {', '.join(t['platforms'])}"] * bool(t["platforms"]) + [f"{'':12}{state}"]
    return "\n".join(lines) + "\n"
