"""What a decoding step of exported directories takes, beside live jaxllm without its own kernels, in turn.

    python benchmarks/exports.py MODEL DIR [DIR ...] [--format q4f16_1] [--dtype float32] [--rounds 5] [--steps 32]

MODEL, --format and --dtype are what the directories were exported from: "live" is its decode program, jitted here
within `ops.portable()`. Each directory runs in this process by the runner of its target, so all of them, and their
packages, have to go into one environment; run the command once for each where they do not. Medians of rounds.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import time
from typing import Any

import numpy as np

import jaxllm
from jaxllm import ops
from jaxllm.export import manifest as manifests
from jaxllm.export import target
from jaxllm.export.live import Live
from jaxllm.export.options import SIZES, Options, settled
from jaxllm.quant import quantize_model


class Portable(Live):
    """The live programs without jaxllm's own kernels."""

    def step(self, *args: Any) -> tuple[dict[str, np.ndarray], Any]:
        with ops.portable():
            return super().step(*args)


def seconds(runner: Any, sizes: Options, steps: int) -> float:
    """Of a decoding step behind one chunk of prompt."""
    full = np.full(sizes.batch, sizes.chunk, np.int32)
    tokens = np.arange(sizes.batch * sizes.chunk, dtype=np.int32).reshape(sizes.batch, -1) % 97
    _, state = runner.step("prefill", runner.start(), {"tokens": tokens, "n_new": full})
    one = {"tokens": tokens[:, :1], "n_new": np.ones_like(full)}
    _, state = runner.step("decode", state, one)
    began = time.perf_counter()
    for _ in range(steps):
        _, state = runner.step("decode", state, one)
    return (time.perf_counter() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folders", nargs="+", type=pathlib.Path)
    parser.add_argument("--format")
    parser.add_argument("--dtype")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32)
    args = parser.parse_args()
    model = jaxllm.load(args.model, dtype=args.dtype)
    model = quantize_model(model, args.format) if args.format else model
    opened = {folder: manifests.opened(folder) for folder in args.folders}
    sizes = settled(Options(**{k: opened[args.folders[0]][k] for k in SIZES}), model.config)
    ways: dict[str, Any] = {"live": Portable(model, sizes)}
    ways |= {str(f): target.find(m["target"]["name"]).run(f, m) for f, m in opened.items()}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.rounds + 1):
        for name, runner in ways.items():
            took = seconds(runner, sizes, args.steps)
            if turn:
                found[name].append(took)
    live = statistics.median(found["live"])
    print("| | ms a step | times live |\n|---|---|---|")
    for name, took in found.items():
        middle = statistics.median(took)
        print(f"| {name} | {1e3 * middle:.2f} | {middle / live:.2f} |")


if __name__ == "__main__":
    main()
