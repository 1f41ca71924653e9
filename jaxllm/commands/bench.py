"""`jaxllm bench`: how fast a model runs here, and how fast the machine would allow."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from jaxllm.commands import common
from jaxllm.commands.info import Sections, show, size

if TYPE_CHECKING:
    from jaxllm.bench import Work
    from jaxllm.model import Model

USAGE = "[MODEL | --shape NAME] [options]"
SUMMARY = "speed of a model here, beside the machine's limits"
DESCRIPTION = (
    "Tokens per second, time to the first token and memory of a model, and what this machine's memory and "
    "arithmetic would allow. Medians, with the smallest and the largest."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="checkpoint or hub id (default: bundled)")
    parser.add_argument("--shape", metavar="NAME", help="random weights of a usual size; a wrong name lists them")
    parser.add_argument("--format", metavar="F", help="of the weights, as `jaxllm quantize` makes it")
    parser.add_argument("--prompt", metavar="N", type=common.whole, default=512, help="to prefill (default: 512)")
    parser.add_argument("--new", metavar="N", type=common.whole, default=128, help="to decode (default: 128)")
    parser.add_argument("--batch", metavar="B", type=common.whole, default=1, help="rows (default: 1)")
    parser.add_argument("--rounds", metavar="N", type=common.whole, default=3, help="measured (default: 3)")
    parser.add_argument(
        "--starts", metavar="N", type=common.count, help="cold and warm new processes (default: as rounds)"
    )
    parser.add_argument(
        "--compare",
        metavar="PEER=PATH",
        action="append",
        default=[],
        help="in turn with another engine",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> None:
    from jaxllm import bench, peers
    from jaxllm.quant import named

    if args.model and args.shape:
        args.fail("--shape makes its own weights; leave out MODEL")
    if args.format:
        named(args.format)
    starts = args.rounds if args.starts is None else args.starts
    work = bench.Work(args.prompt, args.new, args.batch, args.rounds, starts)
    asked = dict(prompt=work.prompt, new=work.new, batch=work.batch)
    others = {name: partial(run, **asked) for name, run in map(peers.find, args.compare)}
    model = _model(args)
    found = _what(args, model, work) | bench.measure(model, work, peers=others)
    if starts:
        begun = bench.starts(model, None if args.shape or args.format else _path(args), work)
        found |= begun | {"spread": found["spread"] | begun["spread"]}
    found |= bench.machine()
    common.write_json(found) if args.json else show(sections(found))


def _path(args: argparse.Namespace) -> str:
    from jaxllm.model import bundled

    return args.model or str(bundled())


def _model(args: argparse.Namespace) -> Model:
    from jaxllm import load
    from jaxllm.quant import quantize_model
    from jaxllm.random_weights import random_model
    from jaxllm.shapes import described, shape

    if args.shape:
        values = shape(args.shape)
        return random_model(described(values), format=args.format, name=args.shape, values=values)
    model = load(args.model)
    return quantize_model(model, args.format) if args.format else model


def _what(args: argparse.Namespace, model: Model, work: Work) -> dict[str, Any]:
    from jaxllm import bench

    return {
        "model": model.name,
        "shape": args.shape,
        "format": bench.weight_format(model),
        "dtype": model.config.dtype,
        "parameters": model.size,
        "parameter_bytes": model.nbytes,
        "prompt_tokens": work.prompt,
        "decode_prompt_tokens": bench.DECODE_PROMPT,
        "new_tokens": work.new,
        "batch": work.batch,
        "rounds": work.rounds,
    }


# ---- the tables -----------------------------------------------------------------------------------------


def sections(found: dict[str, Any]) -> Sections:
    """Titles and rows of words for the object that --json prints."""
    title = f"{found['model']}: {size(found['parameter_bytes'])} in {found['format']}, batch {found['batch']}"
    line = partial(_line, found)
    speed = [
        line("decode", "decode_tok_s", "tokens/s"),
        ("    the memory allows", f"{found['decode_roofline_tok_s']:10,.1f} tokens/s"),
        ("    share", f"{found['bandwidth_share']:10.0%}".replace("%", " %")),
        line(f"prefill of {found['prompt_tokens']}", "prefill_tok_s", "tokens/s"),
        ("    arithmetic allows", f"{found['prefill_roofline_tok_s']:10,.1f} tokens/s"),
        ("    share", f"{found['matmul_share']:10.0%}".replace("%", " %")),
    ]
    if found["peak_rss_mb"] is not None:
        speed.append(("memory, at most", f"{found['peak_rss_mb']:10,.0f} MB"))
    return [(title, speed), *_starts(found), *_peers(found), ("this machine", _machine(found))]


def _line(found: dict[str, Any], name: str, key: str, unit: str) -> tuple[str, str]:
    """The median with its unit, and the smallest and the largest where there are several."""
    range_ = found["spread"][key]
    return name, f"{found[key]:10,.2f} {unit:10s} ({range_['min']:,.2f} to {range_['max']:,.2f})"


def _starts(found: dict[str, Any]) -> Sections:
    if "start" not in found:
        return []
    names = ("import", "load", "trace", "lower", "compile", "run")
    cold, warm = found["start"]["cold"], found["start"]["warm"]
    rows = [
        _line(found, "cold, nothing compiled", "ttft_cold_s", "s"),
        _line(found, "warm, programs kept", "ttft_warm_s", "s"),
        ("where it goes", f"{'cold':>10}  {'warm':>8}"),
    ]
    rows += [(f"    {name}", f"{cold[f'{name}_s']:10.2f}  {warm[f'{name}_s']:8.2f}") for name in names]
    programs = f"{cold['programs']:10.0f}  {warm['programs'] - warm['found']:8.0f}"
    return [("from a new process to the first token", [*rows, ("    programs compiled", programs)])]


def _peers(found: dict[str, Any]) -> Sections:
    return [(f"{name} {peer.get('version', '')}", _peer(peer)) for name, peer in found.get("peers", {}).items()]


def _peer(peer: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, key in (("decode", "decode_tok_s"), ("prefill", "prefill_tok_s")):
        if peer.get(key):
            word, value = _line(peer, name, key, "tokens/s")
            rows.append((word, f"{value}; jaxllm {peer[f'{key}_ratio']:.2f} times as fast"))
    if peer.get("ttft_s"):
        rows.append(_line(peer, "first token of a process", "ttft_s", "s"))
    return rows


def _machine(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        _line(found, "memory reads", "bandwidth_gb_s", "GB/s"),
        ("    by", found["bandwidth_by"]),
        _line(found, "bf16 products", "matmul_tflop_s", "TFLOP/s"),
        ("processor", f"{found['processor']}, {found['cores']} cores, {found['device_kind']}"),
        ("native CPU kernels", found["native_kernels"]),
        ("versions", ", ".join(f"{name} {v}" for name, v in found["versions"].items())),
    ]
