"""`jaxllm train-heads`: what drafts for a model, trained by what the model says."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxllm import load
from jaxllm.commands import common
from jaxllm.commands.speculation import as_json
from jaxllm.model import Model

if TYPE_CHECKING:
    from jaxllm.heads import Kind, Trained

USAGE = "MODEL OUT --kind KIND --data FILE [options]"
SUMMARY = "train what drafts for a model"
DESCRIPTION = (
    "Train draft heads, or a small draft model, by what MODEL says of a text. Called again, it goes on where it "
    "was interrupted. Needs jaxllm[train]."
)
KINDS = ("medusa", "eagle", "draft")
# What each kind alone takes, and what it takes without.
OPTIONS = {"medusa": {"heads": 4, "layers": 1}, "eagle": {"rounds": 3}, "draft": {"layers": 2, "width": 128}}
LENGTH = 256  # tokens of a window
EVERY = 50  # steps between two lines, where there is no terminal


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or hub id, or 'bundled'")
    parser.add_argument("out", metavar="OUT", help="the folder to write; it may not exist yet")
    parser.add_argument(
        "--kind", metavar="KIND", choices=KINDS, required=True, help="what to train: medusa, eagle or draft"
    )
    parser.add_argument("--data", metavar="FILE", required=True, help="UTF-8 text to train on")
    parser.add_argument("--held-out", metavar="FILE", help="text to measure on (default: the end of the data)")
    parser.add_argument("--heads", metavar="K", type=common.whole, help="medusa: tokens ahead (default: 4)")
    parser.add_argument("--layers", metavar="N", type=common.whole, help="of each head (1), or of the draft (2)")
    parser.add_argument("--projections", action="store_true", help="medusa: a projection of its own for each head")
    parser.add_argument("--rounds", metavar="N", type=common.whole, help="eagle: all but one its own features (3)")
    parser.add_argument("--width", metavar="D", type=common.whole, help="draft: of the model (default: 128)")
    parser.add_argument("--steps", metavar="N", type=common.whole, default=1000, help="(default: 1000)")
    parser.add_argument("--batch", metavar="B", type=common.whole, default=8, help="windows a step (default: 8)")
    parser.add_argument("--rate", metavar="R", type=float, default=1e-3, help="learning rate (default: 0.001)")
    parser.add_argument("--own", metavar="S", type=float, default=0.0, help="share of the model's own words (0)")
    parser.add_argument("--seed", metavar="N", type=common.seed, default=0, help="of order and draws (default: 0)")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> None:
    _check(args)
    from jaxllm import heads

    heads.libraries()
    model = load(None if args.model == "bundled" else args.model)
    kind = make(args, model)
    length = min(LENGTH, model.config.max_len)
    settings = heads.Settings(args.steps, args.batch, length, args.rate, args.own, args.seed)
    tokens, held = texts(model, args, length)
    began = time.monotonic()
    with reporting(args.steps) as on_step:
        found = heads.train(model, kind, tokens, held, pathlib.Path(args.out), settings, on_step=on_step)
    report = {"seconds": round(time.monotonic() - began, 1), **summary(found)}
    common.write_json(report) if args.json else common.write(in_words(found, report["seconds"]))


def _check(args: argparse.Namespace) -> None:
    given = {name for options in OPTIONS.values() for name in options if getattr(args, name) is not None}
    given |= {"projections"} if args.projections else set()
    taken = {*OPTIONS[args.kind], *(["projections"] if args.kind == "medusa" else [])}
    if idle := sorted(given - taken):
        args.fail(f"--{idle[0]} is not for --kind {args.kind}")


def make(args: argparse.Namespace, target: Model) -> Kind:
    """What the arguments ask to train."""
    usual = OPTIONS[args.kind]
    chosen = {name: v if (v := getattr(args, name)) is not None else usual[name] for name in usual}
    if args.kind == "medusa":
        from jaxllm.heads_medusa import MedusaHeads

        return MedusaHeads(own=args.projections, **chosen)
    if args.kind == "eagle":
        from jaxllm.heads_eagle import eagle_head

        return eagle_head(target, **chosen)
    from jaxllm.heads_draft import SmallModel

    return SmallModel(**chosen)


def texts(model: Model, args: argparse.Namespace, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows to train on and windows held out, i32 [W, T]; without a text of their own, the last twentieth."""
    from jaxllm.heads import windows_of

    tokens = windows_of(model, common.file_text(args.data), length)
    if args.held_out:
        return tokens, windows_of(model, common.file_text(args.held_out), length)
    cut = len(tokens) - max(1, len(tokens) // 20)
    return tokens[: max(1, cut)], tokens[cut:]


@contextlib.contextmanager
def reporting(total: int) -> Iterator[Callable[[int, float, Sequence[float]], None]]:
    """What to tell of each step: a bar with the loss on a terminal, else a line now and then, on stderr."""
    recent: list[tuple[float, ...]] = []

    def line(done: int, loss: float, hits: Sequence[float]) -> str:
        recent.append((loss, *hits))
        mean = np.mean(recent[-EVERY:], 0)
        return f"step {done}/{total} loss {mean[0]:.4f} right " + " ".join(f"{h:.3f}" for h in mean[1:])

    if not sys.stderr.isatty():
        quietly = lambda text, done: done % EVERY == 0 and print(text, file=sys.stderr, flush=True)
        yield lambda done, loss, hits: quietly(line(done, loss, hits), done)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda *now: bar.update(task, completed=now[0], description=line(*now))


def summary(found: Trained) -> dict[str, Any]:
    """The object `--json` prints, besides the seconds."""
    steps = len(found.losses)
    last = found.losses[-max(1, steps // 10) :]
    drafts = as_json(found.speculation) if found.speculation else None
    return dict(folder=str(found.folder), steps=steps, loss=sum(last) / len(last), right=found.hits, drafts=drafts)


def in_words(found: Trained, seconds: float) -> str:
    """What was trained and how far it guesses."""
    lines = [f"{found.folder}: {len(found.losses)} steps in {seconds:.0f} s, loss {found.losses[-1]:.4f}"]
    if (drafts := found.speculation) is not None:
        share = " ".join(f"{a:.1%}" for a in drafts.acceptance)
        lines.append(
            f"on held-out text: {drafts.tokens_per_step:.2f} tokens a step of the model, drafts kept {share}"
        )
    return "\n".join(lines) + "\n"
