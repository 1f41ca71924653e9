"""`jaxllm logits`: logits and activations of every position of a prompt, into one file."""

from __future__ import annotations

import argparse
import io
import pathlib
from typing import TYPE_CHECKING

import numpy as np

from jaxllm.commands import common
from jaxllm.errors import JaxllmError
from jaxllm.model import Model

if TYPE_CHECKING:
    from jax import Array

USAGE = "PROMPT --out FILE.npz [options]"
SUMMARY = "logits and activations of a prompt, as .npz"
DESCRIPTION = (
    'Write "tokens" i32 [T], "logits" f32 [T, V] and activations such as "layers.0.out" [T, D] to one .npz '
    "file, whole or not at all; bfloat16 is stored as float32."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="a text; - reads the standard input")
    parser.add_argument("--out", metavar="FILE.npz", required=True, help="where to write")
    parser.add_argument("--layers", metavar="0,3", help="layers to keep (default: all, with --taps)")
    parser.add_argument("--taps", metavar="POINTS", help="such as out,mixer.out (default: out, with --layers)")
    common.model_arguments(parser)


def run(args: argparse.Namespace) -> None:
    out = pathlib.Path(args.out)
    if out.is_dir() or not out.parent.is_dir():
        raise JaxllmError(f"{out} cannot be written: it should be a file in a folder that exists")
    numbers = None if args.layers is None else _numbers(args)
    points = None if args.taps is None else [p.strip() for p in args.taps.split(",") if p.strip()]
    if points == []:
        args.fail("--taps takes names with commas between, such as out,mixer.out; got none")
    model = common.load_model(args)
    patterns = _patterns(numbers, points, len(model.config.blocks))
    arrays = capture(model, common.prompt_text(args.prompt), patterns)
    _save(out, arrays)
    for name, array in arrays.items():
        common.write(f"{name}  {array.dtype} {list(array.shape)}\n")


def _numbers(args: argparse.Namespace) -> list[int]:
    try:
        return [int(part) for part in args.layers.split(",")]
    except ValueError:
        args.fail(f"--layers takes numbers with commas between, such as 0,3; got {args.layers!r}")


def _patterns(layers: list[int] | None, points: list[str] | None, count: int) -> list[str]:
    """The names `Taps` keeps. Raises JaxllmError for layers the model does not have."""
    if layers is None and points is None:
        return []
    if wrong := [i for i in layers or () if not 0 <= i < count]:
        raise JaxllmError(f"this model has the layers 0 to {count - 1}; --layers asked for {wrong}")
    outside = [p for p in points or () if p in ("embed", "norm")]
    inside = [p for p in points or ("out",) if p not in outside]
    return outside + [f"layers.{i}.{p}" for i in (range(count) if layers is None else layers) for p in inside]


def capture(model: Model, prompt: str, patterns: list[str]) -> dict[str, np.ndarray]:
    """Tokens, logits and the activations that match the patterns, without the batch axis.

    Raises JaxllmError for a pattern that matches nothing, ContextError for a prompt beyond the context."""
    import jax

    import jaxllm
    from jaxllm import decode

    row = decode.as_prompts(model, prompt)[0]
    taps = jaxllm.Taps(keep=tuple(patterns))
    pure = jax.jit(lambda params, tokens: jaxllm.capture(model.config, params, tokens, taps)[:2])
    values, kept = pure(model.params, np.array([row], np.int32))
    arrays = {"tokens": np.array(row, np.int32), "logits": values, **kept}
    return {name: a if name == "tokens" else _plain(a) for name, a in arrays.items()}


def _plain(x: Array) -> np.ndarray:
    """The only row of x; types that .npz does not know (bfloat16) as float32, which holds them exactly."""
    array = np.asarray(x[0])
    return array if array.dtype.kind in "iufb" and array.dtype.isbuiltin else array.astype(np.float32)


def _save(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    from jaxllm.files import write_whole

    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    try:
        write_whole(path, buffer.getvalue())
    except OSError as error:
        raise JaxllmError(f"{path} cannot be written ({error.strerror}); give another --out") from error
