"""`jaxllm quantize`: a checkpoint in fewer bits, tensor by tensor."""

from __future__ import annotations

import argparse
import pathlib
import time
import warnings
from dataclasses import replace
from typing import Any

from jaxllm.checkpoint.canonical import flatten
from jaxllm.checkpoint.mlc_index import INDEXES, read_index
from jaxllm.checkpoint.native import Written
from jaxllm.commands import common
from jaxllm.config import params_shape
from jaxllm.errors import CheckpointError, Notice
from jaxllm.model import DTYPES, Model, find, load, quantize_files, save
from jaxllm.quant import QTensor, Recipe, quantize_model, read_recipe
from jaxllm.quant import recipe as make_recipe

USAGE = "SOURCE OUT (--format NAME | --bits B) [options]"
SUMMARY = "a checkpoint in fewer bits"
DESCRIPTION = (
    "Round a checkpoint's weights to a format and write it as a new folder, which every command takes as "
    "--model. One tensor is in memory at a time; OUT appears when it is whole."
)
HOW = ("clip", "gptq", "awq", "awq+gptq", "smooth", "smooth+gptq")  # calibration.METHODS


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="checkpoint folder, file or hub id")
    parser.add_argument("out", metavar="OUT", help="the folder to write; it may not exist yet")
    parser.add_argument(
        "--format", metavar="NAME", help="q4f16_1, int8_g32, nf4, ...; a wrong name lists them all"
    )
    parser.add_argument("--recipe", metavar="FILE", help="JSON rules that come before the format's own")
    parser.add_argument(
        "--dtype", metavar="TYPE", choices=DTYPES, help="of the rest and of activations (default: the format's)"
    )
    parser.add_argument(
        "--calibrate", metavar="HOW", choices=HOW, help=f"round by what text needs: {', '.join(HOW)}"
    )
    parser.add_argument(
        "--bits", metavar="B", type=float, help="instead of --format: mix formats, B bits a weight on average"
    )
    parser.add_argument("--text", metavar="FILE", help="to calibrate on (default: Python's own library)")
    parser.add_argument(
        "--to", choices=("jaxllm", "mlc"), default="jaxllm", help="mlc: the files MLC-LLM's converter would write"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, bytes as numbers")


def run(args: argparse.Namespace) -> None:
    _check(args)
    began = time.monotonic()
    if args.to == "mlc":
        _report(args, _for_mlc(args), began)
        return
    given = read_recipe(pathlib.Path(args.recipe)) if args.recipe else None
    rules, dtype = (given.rules, args.dtype or given.dtype) if given else ((), args.dtype)
    if args.calibrate or args.bits is not None:
        written = _measured(args, rules, dtype)
    else:
        written = quantize_files(args.source, args.out, format=args.format, rules=rules, dtype=dtype)
    _report(args, written, began)


def _for_mlc(args: argparse.Namespace) -> Written:
    from jaxllm.checkpoint.mlc_writer import write_mlc

    if args.recipe or args.dtype or args.calibrate or not args.format:
        args.fail("--to mlc takes --format alone: its schemes have no recipes, and say the dtype")
    index = read_index(write_mlc(find(args.source), args.out, args.format) / INDEXES[0])
    weights = round(index.metadata["ParamBytes"] * 8 / index.metadata["BitsPerParam"])
    return Written(weights, sum(shard.nbytes for shard in index.shards), {args.format: weights})


def _report(args: argparse.Namespace, written: Written, began: float) -> None:
    report = as_json(args.out, written, time.monotonic() - began)
    common.write_json(report) if args.json else common.write(_in_words(report))


def _check(args: argparse.Namespace) -> None:
    if args.bits is not None and (args.format or args.recipe):
        args.fail("--bits chooses the formats itself; leave out --format and --recipe")
    if not args.format and not args.recipe and args.bits is None:
        args.fail("give --format or --recipe, or both, or --bits")
    if args.text and not args.calibrate and args.bits is None:
        args.fail("--text is for --calibrate and --bits")


def _measured(args: argparse.Namespace, rules: tuple, dtype: str | None) -> Written:
    """Quantize by what the whole model does on text, and write it."""
    from jaxllm import calibration

    if pathlib.Path(args.out).exists():  # before minutes of work
        raise CheckpointError(f"{args.out} exists already; give a new folder, or delete this one first")
    model = load(args.source)
    tokens = calibration.windows(model, common.file_text(args.text) if args.text else None)
    if args.bits is not None:
        mix = calibration.mix(model, args.bits, tokens)
        if not args.json:
            common.write(mix.table() + "\n")
        recipe = mix.recipe()
    else:
        recipe = make_recipe(args.format, model.config, first=rules) if args.format else Recipe(rules)
    recipe = replace(recipe, dtype=dtype or recipe.dtype)
    if not args.calibrate:
        made = quantize_model(model, recipe)
    else:
        made = calibration.calibrate(model, recipe, tokens, method=args.calibrate)
        _notice_unobserved(model, recipe)
    save(made, args.out)
    return _written(made)


def _notice_unobserved(model: Model, recipe: Recipe) -> None:
    from jaxllm.calibration import unobserved

    plain = unobserved(model.config, recipe.assign(params_shape(model.config)))
    if plain:
        some = f"{len(plain)} weights were rounded plainly, their inputs are not observed: {', '.join(plain[:4])}"
        warnings.warn(some + (" ..." if len(plain) > 4 else ""), Notice, stacklevel=2)


def _written(model: Model) -> Written:
    counts: dict[str, int] = {}
    for leaf in flatten(model.params).values():
        kind = leaf.format.name if isinstance(leaf, QTensor) else leaf.dtype.name
        counts[kind] = counts.get(kind, 0) + leaf.size
    return Written(model.size, model.nbytes, counts)


def as_json(folder: str, written: Written, seconds: float) -> dict[str, Any]:
    """The object `--json` prints; `formats` counts the weights in each."""
    return {
        "folder": folder,
        "weights": written.weights,
        "bytes": written.nbytes,
        "bits_per_weight": round(written.bits_per_weight, 4),
        "formats": written.formats,
        "seconds": round(seconds, 3),
    }


def _in_words(report: dict[str, Any]) -> str:
    lines = [
        f"{report['folder']}: {report['weights']:,} weights in {report['bytes'] / 1e6:,.1f} MB, "
        f"{report['bits_per_weight']:.2f} bits each, in {report['seconds']:.1f} s"
    ]
    lines += [f"  {name:12} {count:>16,}" for name, count in report["formats"].items()]
    return "\n".join(lines) + "\n"
