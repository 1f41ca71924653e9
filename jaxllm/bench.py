"""How fast a model runs on this machine, beside what the machine could do at most.

The ceiling of decoding is memory: every token reads the weights and the cache once. That of prefill is arithmetic.
Both are measured in the same rounds as the model, because a machine is not equally fast every minute (the roofline
of Williams, Waterman and Patterson, 2009).
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import decode, native, ops
from jaxllm.checkpoint.canonical import flatten
from jaxllm.config import MLA, Attention, ModelConfig, MoE, params_shape
from jaxllm.errors import JaxllmError
from jaxllm.model import Model, save
from jaxllm.prompts import PREFILL_CHUNK, bucket
from jaxllm.quant import QTensor
from jaxllm.startup import peak_rss
from jaxllm.state import KV, Latent, init_state

DECODE_PROMPT = 32  # tokens before those whose speed is measured
READ_BYTES = 2**29  # several times any last-level cache but the largest
PRODUCT = (512, 4096, 8192)  # rows, in, out: large enough that only arithmetic counts

Measured = Callable[[], dict[str, Any]]  # measures a peer once
Samples = dict[str, list[float]]  # name of a figure -> its value in each round


@dataclass(frozen=True)
class Work:
    """What is measured."""

    prompt: int = 512  # tokens of the prefill
    new: int = 128  # tokens decoded after DECODE_PROMPT
    batch: int = 1
    rounds: int = 3
    starts: int = 3  # of new processes, cold and warm each; 0: none


def median(values: list[float]) -> float | None:
    """The median, or None of nothing."""
    return statistics.median(values) if values else None


def spread(samples: Samples) -> dict[str, dict[str, float]]:
    """The smallest and the largest of each figure."""
    return {name: {"min": min(values), "max": max(values)} for name, values in samples.items() if values}


# ---- what a token costs ---------------------------------------------------------------------------------


def bytes_per_step(model: Model, work: Work) -> float:
    """Bytes that one decoding step of all rows reads: every weight it uses once, and the filled part of the cache.

    Of an embedding that is not the head, only the rows looked up; of routed experts, the share that `batch` rows
    choose where all are equally probable.
    """
    flat, config = flatten(model.params), model.config
    weights = sum(leaf.nbytes * _read_share(path, config, work.batch) for path, leaf in flat.items())
    held = DECODE_PROMPT + work.new
    slots = bucket(held, config)
    state = jax.eval_shape(lambda: init_state(config, work.batch, slots, chunk=min(PREFILL_CHUNK, config.max_len)))
    return weights + sum(_filled(cache, DECODE_PROMPT + work.new / 2) for cache in state.layers)


def _read_share(path: str, config: ModelConfig, batch: int) -> float:
    if path == "embed.w" and not config.tied:
        return min(1.0, batch / config.vocab)
    if path == "positions.w":
        return min(1.0, batch / config.max_len)
    experts, chosen = _routed(path, config)
    return 1 - (1 - chosen / experts) ** batch


def _routed(path: str, config: ModelConfig) -> tuple[int, int]:
    """(experts, of them chosen by a token) of a weight; (1, 1) where it is no routed expert's."""
    names = path.split(".")
    if names[0] != "layers":
        return 1, 1
    ffn = config.blocks[int(names[1])].ffn
    routed = isinstance(ffn, MoE) and names[2] == "ffn" and names[3] in ("gate", "up", "down")
    return (ffn.experts, ffn.top_k) if routed else (1, 1)


def _filled(cache: Any, tokens: float) -> float:
    """Bytes of a layer's cache that hold `tokens` tokens of each row; of a recurrent state, all."""
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache))
    return size * min(1.0, tokens / cache.pos.shape[1]) if isinstance(cache, KV | Latent) else size


def flops_per_token(config: ModelConfig, prompt: int) -> float:
    """Multiplications and additions of products for each of `prompt` tokens; the head runs once for all."""
    total = 2 * config.width * config.vocab / prompt
    for path, shape in params_shape(config).items():
        if path.startswith("layers.") and len(shape) >= 2:
            experts, chosen = _routed(path, config)
            total += 2 * float(np.prod(shape)) * chosen / experts
    return total + sum(_scores(block.mixer, prompt) for block in config.blocks)


def _scores(m: Any, prompt: int) -> float:
    match m:
        case Attention():
            seen = min(prompt / 2, m.window or prompt)
            return 4 * m.heads * m.head_dim * seen
        case MLA():
            return 2 * m.heads * (2 * m.kv_rank + m.rope.dims) * prompt / 2
    return 0.0


# ---- what the machine can do ----------------------------------------------------------------------------


def reader(size: int = READ_BYTES) -> tuple[Callable[[], float], str]:
    """(a function that reads `size` bytes with all threads -> GB/s, what does the reading)."""
    if reason := native.unavailable():
        by, run, shape = f"XLA's maximum of rows (native kernels: {reason})", lambda x: x.max(-1), (-1, 2**14)
    else:
        by, run, shape = "native kernel", native.read, (-1,)
    if jax.default_backend() != "cpu":
        by, run, shape = "XLA's maximum of rows", lambda x: x.max(-1), (-1, 2**14)
    x = jnp.ones(size // 4, jnp.uint32).reshape(shape)
    return _rate(jax.jit(run), (x,), x.nbytes / 1e9), by


def multiplier(shape: tuple[int, int, int] = PRODUCT) -> Callable[[], float]:
    """A function that multiplies bf16 matrices of (rows, in, out) by `ops.matmul` -> TFLOP/s."""
    m, k, n = shape
    x, w = jnp.ones((m, k), jnp.bfloat16), jnp.full((n, k), 0.01, jnp.bfloat16)
    return _rate(jax.jit(ops.matmul), (x, w), 2 * m * k * n / 1e12)


def _rate(run: Callable, arguments: tuple, amount: float) -> Callable[[], float]:
    jax.block_until_ready(run(*arguments))  # compiled, and its memory touched

    def once() -> float:
        began = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        return amount / (time.perf_counter() - began)

    return once


# ---- what the model does --------------------------------------------------------------------------------


def _rows(config: ModelConfig, batch: int, length: int, turn: int) -> list[list[int]]:
    return np.random.default_rng(turn).integers(0, config.vocab, (batch, length)).tolist()


def decode_rate(model: Model, work: Work, turn: int = 0) -> float:
    """Tokens per second of all rows, greedy: work.new steps after a prompt of DECODE_PROMPT tokens."""
    rows = _rows(model.config, work.batch, DECODE_PROMPT, turn)
    made = decode.generate(model, rows, max_new_tokens=work.new + 1, eos=())
    return work.batch * work.new / made.timings.decode


def prefill_rate(model: Model, work: Work, turn: int = 0) -> float:
    """Prompt tokens per second of all rows, until each has its first token."""
    rows = _rows(model.config, work.batch, work.prompt, turn)
    made = decode.generate(model, rows, max_new_tokens=1, eos=())
    return work.batch * work.prompt / (made.timings.prefill + made.timings.decode)


def measure(
    model: Model,
    work: Work,
    *,
    peers: Mapping[str, Measured] | None = None,
    read: int = READ_BYTES,
) -> dict[str, Any]:
    """Figures of a model in this process, and of peers in turn with it (A B A B); see `report` for their names.

    peers: name -> a function that measures it once. Raises ContextError where the prompt or what follows does not
    fit the model's context.
    """
    decode_rate(model, work), prefill_rate(model, work)  # compiled
    held = peak_rss()
    reading, by = reader(read)
    multiplying = multiplier()
    ours: Samples = {"decode_tok_s": [], "prefill_tok_s": [], "bandwidth_gb_s": [], "matmul_tflop_s": []}
    others: dict[str, list[dict[str, Any]]] = {name: [] for name in peers or {}}
    for turn in range(work.rounds):
        figures = decode_rate(model, work, turn), prefill_rate(model, work, turn), reading(), multiplying()
        for name, figure in zip(ours, figures, strict=True):
            ours[name].append(figure)
        for name, peer in (peers or {}).items():
            others[name].append(peer())
    return report(model, work, ours, by, held) | ({"peers": compare(ours, others)} if others else {})


def report(model: Model, work: Work, samples: Samples, by: str, held: int | None) -> dict[str, Any]:
    """The medians, the ceilings and the shares of them that are reached."""
    figures = {name: median(values) for name, values in samples.items()}
    step, flops = bytes_per_step(model, work), flops_per_token(model.config, work.prompt)
    decode_most = figures["bandwidth_gb_s"] * 1e9 / step * work.batch
    prefill_most = figures["matmul_tflop_s"] * 1e12 / flops
    return figures | {
        "bandwidth_by": by,
        "bytes_per_step": round(step),
        "decode_roofline_tok_s": decode_most,
        "bandwidth_share": figures["decode_tok_s"] / decode_most,
        "flops_per_token": round(flops),
        "prefill_roofline_tok_s": prefill_most,
        "matmul_share": figures["prefill_tok_s"] / prefill_most,
        "peak_rss_mb": None if held is None else held / 1e6,
        "spread": spread(samples),
    }


def compare(ours: Samples, others: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Medians of each peer's rounds, and ours over theirs."""
    found = {}
    for name, rounds in others.items():
        samples = {key: [r[key] for r in rounds] for key, value in rounds[0].items() if isinstance(value, float)}
        rates = [key for key in ("decode_tok_s", "prefill_tok_s") if samples.get(key)]
        ratios = {f"{key}_ratio": median(ours[key]) / median(samples[key]) for key in rates}
        words = {key: value for key, value in rounds[0].items() if isinstance(value, str)}
        found[name] = words | {key: median(v) for key, v in samples.items()} | ratios | {"spread": spread(samples)}
    return found


# ---- starts ---------------------------------------------------------------------------------------------


def starts(model: Model, path: str | None, work: Work) -> dict[str, Any]:
    """What new processes need to their first token, with an empty and with a filled cache of programs.

    path: what `load` takes to get this model; None: it is written to a temporary folder first. Raises JaxllmError
    where a process fails."""
    with tempfile.TemporaryDirectory(prefix="jaxllm-bench-") as temporary:
        folder = pathlib.Path(temporary)
        if path is None:
            path = str(folder / "model")
            save(model, path)
        cold, warm = [], []
        for i in range(work.starts):
            cold.append(_start(path, folder / f"programs{i}"))
            warm.append(_start(path, folder / f"programs{i}"))
    return _start_report(cold, warm)


def _start(path: str, programs: pathlib.Path) -> dict[str, float]:
    command = [sys.executable, "-m", "jaxllm.startup", path, "--prompt", str(DECODE_PROMPT)]
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    package = str(pathlib.Path(__file__).resolve().parents[1])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (package, env.get("PYTHONPATH"))))
    env["JAXLLM_CACHE"] = str(programs)
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise JaxllmError(f"a new process did not reach its first token: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def _start_report(cold: list[dict[str, float]], warm: list[dict[str, float]]) -> dict[str, Any]:
    samples: Samples = {
        "ttft_cold_s": [r["ttft_s"] for r in cold],
        "ttft_warm_s": [r["ttft_s"] for r in warm],
        "compile_s": [r["compile_s"] for r in cold],
    }
    parts = {kind: {name: median([r[name] for r in runs]) for name in runs[0]} for kind, runs in
             (("cold", cold), ("warm", warm)) if runs}  # fmt: skip
    return {name: median(v) for name, v in samples.items()} | {"start": parts, "spread": spread(samples)}


# ---- where ----------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    packages = {name: version(name) for name in ("jax", "jaxlib", "numpy")}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device_kind": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": cores,
        "native_kernels": native.describe(),
        "versions": {"python": platform.python_version()} | packages,
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def weight_format(model: Model) -> str:
    """The format most of the model's weights are in."""
    counts: dict[str, int] = {}
    for leaf in flatten(model.params).values():
        name = leaf.format.name if isinstance(leaf, QTensor) else str(leaf.dtype)
        counts[name] = counts.get(name, 0) + leaf.size
    return max(counts, key=counts.__getitem__)
