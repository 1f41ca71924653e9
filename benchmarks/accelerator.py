"""Are the kernels of a TPU or GPU right, and how much of it do prefill and decoding use? One line of JSON each.

    python benchmarks/accelerator.py [--models llama-1b,llama-8b,qwen3-30b] [--formats bf16,q4f16_1,fp8_e4m3]

First what the machine can do, measured in this run: the rate of a copy (bytes read and written) and of a bf16
product. Then every kernel against f64 on the host; a wrong one makes the exit code 1. Then decoding at batch 1, 8
and 64 with 1024 tokens in the cache, as a share of the copy's rate: the bytes that a step must read (weights, of
experts those that are visited on average, and the cache) in the time it took; and prefill of 512, 4096 and 32,768
tokens in chunks of 512, as a share of the product's rate: 2 operations a weight, 4 a visible slot, head and dim.

Weights are random and made on the device, activations bf16. A model that does not fit gives a line with "error".
--toy runs all of it at sizes for a CPU, with kernels interpreted: it measures nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import kernels, layers
from jaxllm.checkpoint.canonical import nest
from jaxllm.config import MLP, Attention, Block, ModelConfig, MoE, Norm, QKNorm, Rope, params_shape
from jaxllm.kernels import attention, dense, grouped
from jaxllm.quant import QTensor, dequantize, encode, named
from jaxllm.state import init_state

Array = jax.Array
BF16 = jnp.bfloat16


def model(width, blocks, heads, kv_heads, head_dim, ffn, vocab, *, tied=False, theta=5e5, qk_norm=None):
    """A decoder of equal blocks of attention and feed-forward, bf16, for 65,536 tokens."""
    rope = Rope(tuple(theta ** -(2 * i / head_dim) for i in range(head_dim // 2)))
    mixer = Attention(heads, kv_heads, head_dim, head_dim**-0.5, rope=rope, qk_norm=qk_norm)
    norm = Norm("rms", 1e-5)
    block = Block(mixer, ffn, norm)
    return ModelConfig(vocab, width, (block,) * blocks, norm, tied, max_len=65536, dtype="bfloat16")


PER_HEAD = QKNorm(Norm("rms", 1e-6), "head")
MODELS = {
    "llama-1b": model(2048, 16, 32, 8, 64, MLP(8192, "silu"), 128256, tied=True),
    "llama-8b": model(4096, 32, 32, 8, 128, MLP(14336, "silu"), 128256),
    "qwen3-30b": model(
        2048, 48, 32, 4, 128, MoE(128, 8, 768, "silu", renorm=True), 151936, theta=1e6, qk_norm=PER_HEAD
    ),
    "toy": model(64, 2, 4, 2, 16, MLP(96, "silu"), 128, tied=True),
    "toy-moe": model(64, 2, 4, 2, 16, MoE(4, 2, 32, "silu", renorm=True), 128, qk_norm=PER_HEAD),
}
FORMATS = ("bf16", "q4f16_1", "fp8_e4m3")


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    batches: tuple[int, ...] = (1, 8, 64)
    prompts: tuple[int, ...] = (512, 4096, 32768)
    chunk: int = 512
    context: int = 1024  # tokens in the cache before decoding
    steps: int = 32  # decoded in one program
    copy: int = 2**29  # bf16 numbers
    product: int = 8192  # rows, columns of a square product
    matrix: tuple[int, int] = (2048, 4096)  # of the kernels that are checked
    rounds: int = 3


TOY = Sizes((1, 2), (16, 32), 16, 16, 2, 2**12, 32, (32, 128), 1)


# ---- the machine ------------------------------------------------------------------------------------------


def fastest(f, rounds: int) -> float:
    """Seconds of one call of f() -> arrays, the fastest of so many after one that compiles."""
    jax.block_until_ready(f())
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(f())
        times.append(time.perf_counter() - began)
    return min(times)


def peaks(sizes: Sizes) -> dict[str, float]:
    """What this machine reaches: bytes/s of a copy and operations/s of a bf16 product, ten of each at a time."""
    x = jnp.zeros(sizes.copy, BF16)
    a = jnp.ones((sizes.product, sizes.product), BF16)
    copy = jax.jit(lambda x: jax.lax.fori_loop(0, 10, lambda _, x: x + BF16(1), x))
    product = jax.jit(lambda a: jax.lax.fori_loop(0, 10, lambda _, x: (x @ a) * BF16(1 / sizes.product), a))
    return {
        "copy_bytes_per_s": 10 * 2 * x.nbytes / fastest(partial(copy, x), sizes.rounds),
        "matmul_flop_per_s": 10 * 2 * sizes.product**3 / fastest(partial(product, a), sizes.rounds),
    }


# ---- are the kernels right? -------------------------------------------------------------------------------


def checks(sizes: Sizes, platform: str, interpret: bool) -> Iterator[dict]:
    """A line for each kernel and shape: its largest error over the largest value, and the bound."""
    how = dict(platform=platform, interpret=interpret)
    rng = np.random.default_rng(0)
    N, K = sizes.matrix
    for name in ("q4f16_1", "q4bf16_1", "uint4_g128", "int8_g64", "int8", "fp8_e4m3", "fp8_e5m2_tensor", "mxfp4"):
        q = encode(rng.standard_normal((N, K)).astype(np.float32), named(name))
        w = np.asarray(dequantize(q, np.float32), np.float64)
        for rows in (1, 8, 100):
            x = jnp.asarray(rng.standard_normal((rows, K)), BF16)
            if dense.refuses(x, q, platform):
                continue
            got = jax.jit(partial(dense.matmul, **how))(x, jax.tree.map(jnp.asarray, q))
            yield _checked("matmul", f"{name} {rows}x{K}x{N}", got, np.asarray(x, np.float64) @ w.T)
    yield from _checked_experts(rng, N, K, how)
    yield from _checked_attention(rng, how)


def _checked_experts(rng, N: int, K: int, how: dict) -> Iterator[dict]:
    stack = rng.standard_normal((4, N, K)).astype(np.float32)
    for name in ("plain", "q4f16_1", "mxfp4"):
        q = jnp.asarray(stack, BF16) if name == "plain" else encode(stack, named(name))
        w = np.asarray(q if name == "plain" else dequantize(q, np.float32), np.float64)
        for rows in (3, 200):
            owner = np.sort(rng.choice([0, 2, 3], rows))
            x = jnp.asarray(rng.standard_normal((rows, K)), BF16)
            if grouped.refuses(x, q, how["platform"]):
                continue
            run = jax.jit(partial(grouped.grouped_matmul, **how))
            got = run(x, jax.tree.map(jnp.asarray, q), jnp.asarray(owner, jnp.int32))
            want = np.stack([w[e] @ row for e, row in zip(owner, np.asarray(x, np.float64), strict=True)])
            yield _checked("grouped_matmul", f"{name} {rows}x{K}x4x{N}", got, want)


def _checked_attention(rng, how: dict) -> Iterator[dict]:
    for B, T, K, G, h, S in ((1, 1, 8, 4, 64, 1024), (3, 1, 2, 4, 128, 640), (2, 5, 4, 2, 64, 512)):
        q, k, v = (
            jnp.asarray(rng.standard_normal(s), BF16) for s in ((B, T, K, G, h), (B, K, S, h), (B, K, S, h))
        )
        if attention.refuses(q, k, v, how["platform"]):
            continue
        mask = np.arange(S) <= np.linspace(S // 3, S - 1, B * T).astype(int).reshape(B, T, 1)
        sinks = jnp.asarray(rng.standard_normal((K, G)), jnp.float32)
        got = jax.jit(partial(attention.attend, scale=0.2, softcap=20.0, **how))(q, k, v, jnp.asarray(mask), sinks)
        scores = np.einsum("btkgh,bksh->bktgs", *(np.asarray(a, np.float64) for a in (q, k))) * 0.2
        scores = np.where(mask[:, None, :, None], np.tanh(scores / 20) * 20, -np.inf)
        powers = np.exp(scores)
        total = powers.sum(-1, keepdims=True) + np.exp(np.asarray(sinks, np.float64))[:, None, :, None]
        want = np.einsum("bktgs,bksh->btkgh", powers / total, np.asarray(v, np.float64))
        yield _checked("attend", f"{B}x{T}x{K}x{G}x{h} over {S}", got, want)


def _checked(op: str, case: str, got: Array, want: np.ndarray) -> dict:
    """bf16 operands: 8 bits each, errors of sums grow with the root of their length like the sums themselves."""
    error = float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())
    return dict(kind="kernel", op=op, case=case, error=error, bound=2e-2, right=bool(error <= 2e-2))


# ---- models -----------------------------------------------------------------------------------------------


def random_params(config: ModelConfig, format: str, key: Array) -> dict:
    """Random weights on the device, matrices in `format`; the embedding and the router stay bf16."""
    flat = {}
    for i, (path, shape) in enumerate(params_shape(config).items()):
        plain = format == "bf16" or len(shape) < 2 or path.startswith("embed") or "router" in path
        make = _plain if plain else partial(_packed, format=format)
        flat[path] = make(jax.random.fold_in(key, i), shape=shape)
    return nest(flat)


@partial(jax.jit, static_argnames="shape")
def _plain(key: Array, *, shape: tuple[int, ...]) -> Array:
    return jnp.ones(shape, BF16) if len(shape) < 2 else jax.random.normal(key, shape, BF16) * shape[-1] ** -0.5


@partial(jax.jit, static_argnames=("shape", "format"))
def _packed(key: Array, *, shape: tuple[int, ...], format: str) -> QTensor:
    """Codes of any value; scales such that the numbers have the spread of `_plain`."""
    row = encode(np.random.default_rng(0).standard_normal((1, shape[-1])).astype(np.float32), named(format))
    parts = {
        name: jnp.broadcast_to(jnp.asarray(part[0]), (*shape[:-1], *part.shape[1:]))
        for name, part in row.parts().items()
    }
    like, spread = parts["codes"], parts["scale"] * shape[-1] ** -0.5
    if like.dtype == jnp.uint8:
        codes = jax.random.bits(key, like.shape, jnp.uint8)
    else:
        codes = (jax.random.normal(key, like.shape, BF16) * 100).astype(like.dtype)
    return replace(row, **parts | {"codes": codes, "scale": spread.astype(row.scale.dtype)}, dtype_name="bfloat16")


def weight_bytes(config: ModelConfig, params: dict, rows: int) -> float:
    """What one step for so many rows reads: each matrix once, of experts those that are visited on average."""
    total = params["embed"]["w"].nbytes if config.tied else params["head"]["w"].nbytes
    for block, layer in zip(config.blocks, params["layers"], strict=True):
        for path, leaf in jax.tree_util.tree_leaves_with_path(layer):
            routed = isinstance(block.ffn, MoE) and "ffn" in str(path) and "router" not in str(path)
            missed = (1 - block.ffn.top_k / block.ffn.experts) ** rows if routed and leaf.ndim == 3 else 0.0
            total += leaf.nbytes * (1 - missed)
    return total


def active_weights(config: ModelConfig) -> int:
    """Weights that multiply one token, the head apart."""
    total = 0
    for path, shape in params_shape(config).items():
        if path.startswith("layers") and len(shape) > 1:
            moe = config.blocks[int(path.split(".")[1])].ffn
            total += math.prod(shape) * (moe.top_k if len(shape) == 3 else shape[0]) // shape[0]
    return total


@partial(jax.jit, static_argnames=("config", "steps"), donate_argnames="state")
def decoded(config: ModelConfig, params: dict, state, token: Array, steps: int):
    """So many greedy steps in one program -> (state, token i32 [B])."""

    def step(carry, _):
        state, token = carry
        x, state, _ = layers.hidden(config, params, token[:, None], state)
        return (state, layers.logits(config, params, x[:, -1]).argmax(-1).astype(jnp.int32)), None

    return jax.lax.scan(step, (state, token), length=steps)[0]


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def prefilled(config: ModelConfig, params: dict, state, tokens: Array):
    """tokens i32 [B, C] appended -> (state, their last hidden vectors [B, D])."""
    x, state, _ = layers.hidden(config, params, tokens, state)
    return state, x[:, -1]


def decode_line(config: ModelConfig, params: dict, batch: int, sizes: Sizes) -> dict:
    """Decoding with `context` tokens in the cache."""
    slots = 1 << (sizes.context + (sizes.rounds + 1) * sizes.steps - 1).bit_length()
    state = init_state(config, batch, slots, chunk=sizes.chunk)
    prompt = jnp.ones((batch, sizes.chunk), jnp.int32)
    for _ in range(sizes.context // sizes.chunk):
        state, _ = prefilled(config, params, state, prompt)
    held = [state, jnp.arange(batch, dtype=jnp.int32)]

    def once():
        held[:] = decoded(config, params, *held, steps=sizes.steps)
        return held[1]

    took = fastest(once, sizes.rounds) / sizes.steps
    mixer = config.blocks[0].mixer
    visible = sizes.context + (sizes.rounds + 1) * sizes.steps // 2
    cache = 2 * len(config.blocks) * batch * mixer.kv_heads * mixer.head_dim * visible * 2
    read = weight_bytes(config, params, batch) + cache
    return dict(
        kind="decode", batch=batch, ms=took * 1e3, tokens_per_s=batch / took, bytes=read, per_s=read / took
    )


def prefill_line(config: ModelConfig, params: dict, tokens: int, sizes: Sizes) -> dict:
    """One prompt of so many tokens, chunk by chunk, the cache full at the end."""
    part = jnp.ones((1, sizes.chunk), jnp.int32)

    def once():
        state = init_state(config, 1, tokens, chunk=sizes.chunk)
        for _ in range(tokens // sizes.chunk):
            state, x = prefilled(config, params, state, part)
        return x

    took = fastest(once, sizes.rounds)
    mixer = config.blocks[0].mixer
    seen = len(config.blocks) * mixer.heads * mixer.head_dim * 4 * tokens * (tokens + 1) // 2
    flop = 2 * active_weights(config) * tokens + seen
    return dict(
        kind="prefill", tokens=tokens, ms=took * 1e3, tokens_per_s=tokens / took, flop=flop, per_s=flop / took
    )


def model_lines(name: str, format: str, sizes: Sizes, rates: dict[str, float]) -> Iterator[dict]:
    """All lines of one model in one format; one with "error" where memory does not suffice."""
    config, which = MODELS[name], dict(model=name, format=format)
    try:
        params = random_params(config, format, jax.random.key(0))
        for batch in sizes.batches:
            line = decode_line(config, params, batch, sizes)
            yield which | line | dict(share_of_copy=line["per_s"] / rates["copy_bytes_per_s"])
        for tokens in sizes.prompts:
            line = prefill_line(config, params, tokens, sizes)
            yield which | line | dict(share_of_matmul=line["per_s"] / rates["matmul_flop_per_s"])
    except jax.errors.JaxRuntimeError as error:
        yield which | dict(kind="error", error=str(error).splitlines()[0][:200])


def lines(models: list[str], formats: list[str], sizes: Sizes, platforms: list[str], interpret: bool):
    """Every line of a run: peaks, kernels, models."""
    device = jax.devices()[0]
    rates = peaks(sizes)
    yield dict(kind="peak", device=device.device_kind, jax=jax.__version__, kernels=kernels.describe(), **rates)
    for platform in platforms:
        for line in checks(sizes, platform, interpret):
            yield line | dict(platform=platform)
    for name in models:
        for format in formats:
            yield from model_lines(name, format, sizes, rates)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama-1b,llama-8b,qwen3-30b")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args(argv)
    if not args.toy and kernels.unavailable():
        print(f"no kernels to measure: {kernels.unavailable()}; --toy runs this on a CPU", file=sys.stderr)
        return 2
    models = ["toy", "toy-moe"] if args.toy else args.models.split(",")
    platforms = ["tpu", "cuda"] if args.toy else list(kernels.bodies())
    wrong = 0
    for line in lines(models, args.formats.split(","), TOY if args.toy else Sizes(), platforms, args.toy):
        print(json.dumps(line), flush=True)
        wrong += line.get("right") is False
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
