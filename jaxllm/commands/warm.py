"""`jaxllm warm`: compile what `generate` and `chat` run, before anybody waits for it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jaxllm.commands import common
from jaxllm.commands.info import size
from jaxllm.errors import JaxllmError

if TYPE_CHECKING:
    from jaxllm.model import Model

USAGE = "[MODEL] [options]"
SUMMARY = "compile a model's programs ahead, for fast starts"
DESCRIPTION = (
    "Fill the cache of compiled programs with those that greedy `generate` and `chat` run with this model, so "
    "that they start without compiling. With --format no weights are read: programs do not depend on them."
)
USUAL = 1024  # tokens of prompt and answer


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="checkpoint or hub id (default: bundled)")
    parser.add_argument("--format", metavar="F", help="as `jaxllm quantize` will have made its weights")
    parser.add_argument(
        "--max-len", metavar="N", type=common.whole, help=f"as commands will have it (default: up to {USUAL})"
    )
    parser.add_argument("--batch", metavar="B", type=common.whole, default=1, help="rows (default: 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> None:
    from jaxllm import programs

    folder = programs.keep_programs()
    if folder is None:
        raise JaxllmError(
            "compiled programs are kept nowhere: JAXLLM_CACHE turns it off, or its folder cannot be made; "
            "set JAXLLM_CACHE to a folder that can be written"
        )
    began, before = time.monotonic(), programs.size(folder)
    model = _model(args)
    slots = fill(model, args.max_len, args.batch)
    count, nbytes = programs.size(folder)
    found = {
        "folder": str(folder),
        "added": count - before[0],
        "programs": count,
        "bytes": nbytes,
        "slots": slots,
        "seconds": round(time.monotonic() - began, 3),
    }
    common.write_json(found) if args.json else common.write(_in_words(found))


def _model(args: argparse.Namespace) -> Model:
    from jaxllm import load, load_config
    from jaxllm.quant import named
    from jaxllm.random_weights import random_model

    if not args.format:
        return load(args.model)
    named(args.format)
    return random_model(load_config(args.model), format=args.format)


def fill(model: Model, max_len: int | None, batch: int) -> list[int]:
    """Run, once each, every program that greedy decoding of `batch` rows needs -> the `sizes` they are for."""
    from jaxllm.progress import progress

    found = sizes(model, max_len)
    with progress("compiling", len(found)) as advance:
        for slots in found:
            _run_all(model, slots, batch)
            advance()
    return found


def sizes(model: Model, max_len: int | None) -> list[int]:
    """The states that commands make: those of `generate` for up to max_len tokens (default USUAL), and exactly
    max_len with --max-len or, where the model can chat, all of its context.
    """
    from jaxllm.prompts import bucket

    most = model.config.max_len
    longest = min(max_len or USUAL, most)
    lengths = [*(1 << i for i in range((longest - 1).bit_length())), longest]
    exact = {longest} if max_len else set()
    if model.tokenizer is not None and model.tokenizer.chat_template is not None and not max_len:
        exact = {most}
    return sorted({bucket(length, model.config) for length in lengths} | exact)


def _run_all(model: Model, slots: int, batch: int) -> None:
    """A short prompt and three tokens with a state of `slots`, as each command makes them."""
    from jaxllm import decode

    new = min(3, slots)
    decode.generate(model, [[1]] * batch, max_new_tokens=new, eos=(), max_len=slots)
    if batch > 1:
        return
    prefix = _last(decode.stream(model, [1], max_new_tokens=new, eos=(), max_len=slots))
    if slots > 4:  # a conversation goes on, from some tokens back
        other = (prefix.tokens[-1] + 1) % model.config.vocab
        row = [*prefix.tokens[:-1], other]
        _last(decode.stream(model, row, max_new_tokens=1, eos=(), max_len=slots, prefix=prefix))


def _last(tokens: Iterator) -> Any:
    """What a generator returns when all is read."""
    while True:
        try:
            next(tokens)
        except StopIteration as end:
            return end.value


def _in_words(found: dict[str, Any]) -> str:
    slots = ", ".join(map(str, found["slots"]))
    return (
        f"{found['added']} programs added in {found['seconds']:.1f} s, for up to {slots} tokens\n"
        f"{found['folder']}: {found['programs']} programs, {size(found['bytes'])}\n"
    )
