"""`jaxllm tune`: the tile sizes of the accelerator's kernels, timed for a model or a shape."""

from __future__ import annotations

import argparse
import sys

import jax

from jaxllm import load_config
from jaxllm.commands import common
from jaxllm.config import Attention, ModelConfig, params_shape
from jaxllm.errors import ConfigError
from jaxllm.model import CONFIG_FILES, find
from jaxllm.quant import named

USAGE = "[MODEL] [options]"
SUMMARY = "time the accelerator's kernels and keep the fastest tiles"
DESCRIPTION = (
    "Time the tile sizes of the kernels on the TPU or GPU at hand, for the matrices and heads of a model, and "
    "keep the fastest in the user's cache folder, where later programs find them. Takes minutes."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="checkpoint folder or hub id (default: bundled)")
    parser.add_argument("--shape", metavar="NxK", type=shape, help="one matrix [out, in], or ExNxK, instead")
    parser.add_argument("--format", metavar="F", help="of the weights (default: plain bfloat16)")
    parser.add_argument(
        "--rows", metavar="N,...", type=rows, default=(1, 64, 512), help="rows at a time (default: 1,64,512)"
    )
    parser.add_argument("--context", metavar="N", type=common.whole, help="slots of the cache (default: 4096)")


def run(args: argparse.Namespace) -> None:
    from jaxllm.kernels import tiles, tune

    tune.bodies()  # refuses here, before anything is read
    if args.format:
        named(args.format)
    matrices, heads = ([args.shape], []) if args.shape else of_model(args)
    say = lambda line: print(line, file=sys.stderr)
    found = {}
    for matrix in matrices:
        for n in args.rows:
            if args.format or len(matrix) == 3:  # one plain matrix is XLA's own
                found |= tune.tune_product(args.format, matrix, n, report=say)
    for head in heads:
        found |= tune.tune_attend(head, report=say)
    if not found:
        raise ConfigError("there was nothing to tune: the kernels take packed weights, experts and attention")
    where = tiles.store(jax.devices()[0].device_kind, found)
    common.write(f"{len(found)} choices of {jax.devices()[0].device_kind} kept in {where}\n")


def of_model(args: argparse.Namespace) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The matrices [out, in] and [E, out, in] of the arguments' model, and its heads (B, T, K, G, h, S)."""
    config = load_config(find(args.model, files=CONFIG_FILES))
    slots = args.context or min(config.max_len, 4096)
    return matrices(config), heads(config, args.rows, slots)


def matrices(config: ModelConfig) -> list[tuple[int, ...]]:
    """The shapes of a model's matrices that kernels multiply by, each once."""
    shapes = {
        path: shape for path, shape in params_shape(config).items() if path.endswith(".w") and len(shape) in (2, 3)
    }
    left_out = ("embed.w", "positions.w") if not config.tied else ("positions.w",)
    return sorted({shape for path, shape in shapes.items() if path not in left_out})


def heads(config: ModelConfig, rows: tuple[int, ...], slots: int) -> list[tuple[int, ...]]:
    """(B, T, K, G, h, S) of a model's attention for as many sequences as `rows`, each once."""
    mixers = {block.mixer for block in config.blocks if isinstance(block.mixer, Attention)}
    return sorted({(B, 1, m.kv_heads, m.heads // m.kv_heads, m.head_dim, slots) for m in mixers for B in rows})


def shape(text: str) -> tuple[int, ...]:
    """argparse type: NxK or ExNxK."""
    parts = text.split("x")
    if len(parts) not in (2, 3) or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected NxK or ExNxK, such as 4096x14336, got {text!r}")
    return tuple(int(part) for part in parts)


def rows(text: str) -> tuple[int, ...]:
    """argparse type: whole numbers with commas between them."""
    return tuple(common.whole(part) for part in text.split(","))
