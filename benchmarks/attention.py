"""Attention to a cache: the native kernel against XLA's own code, in turn (A B A B ...), as a table in Markdown.

    python benchmarks/attention.py [--rounds 7] [--slots 192,1024,4096] [--new 1,4,512] [--shape 8,4,64]

For each length of the cache and each number of new tokens: the median time of one call, and the rate at which the
native kernel reads the cache. Caches are plain or packed (int8, fp8, int4); XLA expands the packed ones first.
Several caches are taken in turn, as those of layers are, so that one does not stay in the processor's cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import native, ops
from jaxllm.errors import JaxllmError
from jaxllm.quant.cache import KV_FORMATS, empty, quantized

Array = jax.Array
LAYERS = 8


def layers(shape: tuple[int, ...], dtype: jnp.dtype, held: str) -> list[tuple]:
    """Keys and values [B, K, S, h] of LAYERS layers, plain or packed."""
    rng = np.random.default_rng(0)
    made = [jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2 * LAYERS)]
    if held != "plain":
        made = [quantized(x, empty(held, shape, dtype)) for x in made]
    return list(zip(made[::2], made[1::2], strict=True))


def program(q: Array, caches: list[tuple], mask: Array) -> Callable[[], Array]:
    """All layers, one after the other: the result of each is the next one's query."""

    def all_layers(q, caches, mask):
        for k, v in caches:
            q = ops.attend(q, k, v, mask, scale=q.shape[-1] ** -0.5)
        return q

    compiled = jax.jit(all_layers).lower(q, caches, mask).compile()
    return lambda: compiled(q, caches, mask).block_until_ready()


def in_turn(programs: list[Callable], rounds: int, least: float = 0.05) -> list[float]:
    """Median seconds of a call of each; a round is at least `least` seconds of each."""
    times: list[list[float]] = [[] for _ in programs]
    counts = []
    for call in programs:
        call()
        start = time.perf_counter()
        call()
        counts.append(max(1, int(least / (time.perf_counter() - start))))
    for _ in range(rounds):
        for call, count, found in zip(programs, counts, times, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                call()
            found.append((time.perf_counter() - start) / count)
    return [statistics.median(found) for found in times]


def line(shape: tuple[int, int, int], dtype: jnp.dtype, held: str, S: int, T: int, rounds: int) -> str:
    """A row of the table."""
    K, G, h = shape
    caches = layers((1, K, S, h), dtype, held)
    mask = jnp.asarray(np.arange(S) <= S - T + np.arange(T)[:, None])[None]
    q = jnp.asarray(np.random.default_rng(1).standard_normal((1, T, K, G, h)), dtype)
    own = program(q, caches, mask)
    with ops.portable():
        xla = program(q, caches, mask)
    a, b = (1e6 * t / LAYERS for t in in_turn([own, xla], rounds))
    read = sum(x.nbytes for x in jax.tree.leaves(caches)) / LAYERS
    return f"| {held} | {S} | {T} | {a:.1f} | {b:.1f} | {b / a:.2f} | {read / a / 1e3:.1f} |"


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slots", type=numbers, default=[192, 1024, 4096], help="lengths of the cache")
    parser.add_argument("--new", type=numbers, default=[1, 4, 512], help="new tokens")
    parser.add_argument("--shape", type=numbers, default=[8, 4, 64], help="kv heads, queries each, head size")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    options = parser.parse_args()
    if reason := native.unavailable():
        raise JaxllmError(f"there is nothing to compare with XLA: {reason}")
    print(f"{native.describe()}; kv heads, queries each, head size: {options.shape}; {options.dtype}\n")
    print("| cache | slots | new tokens | native, us | XLA, us | XLA / native | native, GB/s of cache |")
    print("|---|---|---|---|---|---|---|")
    for held in ("plain", *KV_FORMATS):
        for S in options.slots:
            for T in (t for t in options.new if t <= S):
                args = tuple(options.shape), jnp.dtype(options.dtype), held, S, T, options.rounds
                print(line(*args), flush=True)


if __name__ == "__main__":
    main()
