"""What every peer measures, and the JSON line it prints. A script makes an engine and calls `main(engine)`.

decode_tok_s: greedy, after a prompt of 32 tokens; batch * new tokens over the time from the first to the last.
prefill_tok_s: batch * prompt tokens over the time to the first token. Both in a warm process, nothing reused from
the call before. ttft_s: from the start of the process to the first token of the first call (32 tokens of prompt).
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import time

BEGAN = time.time()
DECODE_PROMPT = 32


class Engine:
    """What a peer's script defines."""

    names = ()  # of the engines the script runs; --engine chooses

    def load(self, model: str, options: argparse.Namespace) -> int:
        """Load it and return the number of tokens in the vocabulary."""
        raise NotImplementedError

    def version(self) -> str:
        """Name and version, and what else decides about its speed."""
        raise NotImplementedError

    def generate(self, prompts: list[list[int]], new: int) -> list[float]:
        """`new` tokens for each prompt, greedily, past any end token -> clock at the start and after each."""
        raise NotImplementedError


def process_began() -> float:
    """Seconds since 1970 at which this process was started (Linux; elsewhere when this module was loaded)."""
    try:
        ticks = int(pathlib.Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError):
        return BEGAN


def peak_rss() -> float | None:
    """The most bytes this process has held (Linux). getrusage's count would begin with the parent's memory."""
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("VmHWM"))


def prompts(vocab: int, batch: int, length: int, turn: int) -> list[list[int]]:
    """Seeded, and others on each turn, so that no cache of prompts can answer."""
    draw = random.Random(1000 + turn)
    low, high = min(300, vocab // 2), min(vocab, 49000)
    return [[draw.randrange(low, high) for _ in range(length)] for _ in range(batch)]


def main(engine: Engine) -> None:
    """Measure once and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the engine's own files")
    parser.add_argument("--engine", choices=engine.names, default=engine.names[0])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", default="bfloat16", help="where the engine lets one choose")
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(options.threads)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    print(json.dumps(measure(engine, options)), flush=True)
    os._exit(0)  # some engines' threads outlive their interpreter


def measure(engine: Engine, options: argparse.Namespace) -> dict[str, object]:
    """The object that is printed."""
    began = process_began()
    loading = time.time()
    vocab = engine.load(options.model, options)
    loaded = time.time()
    first = engine.generate(prompts(vocab, options.batch, DECODE_PROMPT, 0), 2)
    clock = time.perf_counter()
    ttft = time.time() - (clock - first[1]) - began
    engine.generate(prompts(vocab, options.batch, options.prompt, 1), 1)  # whatever is done once a shape
    stamps = engine.generate(prompts(vocab, options.batch, DECODE_PROMPT, 2), options.new + 1)
    filled = engine.generate(prompts(vocab, options.batch, options.prompt, 3), 1)
    peak = peak_rss()
    return {
        "engine": options.engine,
        "version": engine.version(),
        "decode_tok_s": options.batch * options.new / (stamps[-1] - stamps[1]),
        "prefill_tok_s": options.batch * options.prompt / (filled[1] - filled[0]),
        "ttft_s": ttft,
        "load_s": loaded - loading,
        "peak_rss_mb": None if peak is None else peak / 1e6,
    }
