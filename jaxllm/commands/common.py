"""What several commands share: arguments, reading text, writing output."""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import secrets
import sys
from typing import TYPE_CHECKING, Any

from jaxllm import load
from jaxllm.errors import JaxllmError
from jaxllm.model import DTYPES, Model

if TYPE_CHECKING:
    from jax import Array

    from jaxllm.sampling import Sampler

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
LARGEST_SEED = 2**32 - 1


def formatter(prog: str) -> argparse.HelpFormatter:
    """One line for each option on a screen of 80 columns."""
    return argparse.HelpFormatter(prog, max_help_position=27, width=79)


# ---- arguments ------------------------------------------------------------------------------------------


def whole(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    return _whole(text, 1, None)


def count(text: str) -> int:
    """argparse type: a whole number of at least 0."""
    return _whole(text, 0, None)


def seed(text: str) -> int:
    """argparse type: a seed that gives a key of its own."""
    return _whole(text, 0, LARGEST_SEED)


def _whole(text: str, low: int, high: int | None) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low or (high is not None and value > high):
        span = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise argparse.ArgumentTypeError(f"expected a whole number {span}, got {text!r}")
    return value


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model and --dtype: what every model can be loaded with."""
    parser.add_argument("--model", metavar="PATH_OR_ID", help="checkpoint folder or hub id (default: bundled)")
    parser.add_argument(
        "--dtype", metavar="TYPE", choices=DTYPES, help=f"{', '.join(DTYPES)} (default: as stored)"
    )


def decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """The context, the sampler's knobs and the seed."""
    parser.add_argument("--max-len", metavar="N", type=whole, help="context in tokens (default: the model's)")
    parser.add_argument(
        "--temperature", metavar="T", type=float, help="0 is greedy (default: 0, or 1 with --top-*)"
    )
    parser.add_argument("--top-k", metavar="K", type=int, help="sample from the K most probable tokens")
    parser.add_argument("--top-p", metavar="P", type=float, help="sample from the top tokens of probability P")
    parser.add_argument("--min-p", metavar="P", type=float, help="drop tokens below P times the best one's")
    parser.add_argument("--repetition-penalty", metavar="R", type=float, help="above 1 repeats less")
    parser.add_argument("--seed", metavar="N", type=seed, help="of sampling (default: drawn and reported)")


def load_model(args: argparse.Namespace) -> Model:
    """The model the arguments name; errors as in `load`."""
    return load(args.model, dtype=args.dtype, max_len=getattr(args, "max_len", None))


def make_sampler(args: argparse.Namespace) -> tuple[Sampler, int | None]:
    """(sampler, seed): greedy and None, unless a temperature or a truncation asks for sampling."""
    from jaxllm import sampling

    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    cuts = [name for name in ("top_k", "top_p", "min_p") if given.get(name)]
    temperature = given.get("temperature", 1.0 if cuts else 0.0)
    if temperature == 0:
        idle = [f"--{name.replace('_', '-')}" for name in cuts] + ["--seed"] * (args.seed is not None)
        if idle:
            args.fail(f"{' and '.join(idle)} would change nothing at temperature 0; give --temperature")
        more = given.keys() - {"temperature"}
        return sampling.sampler(**given | {"temperature": 0.0}) if more else sampling.GREEDY, None
    chosen = secrets.randbits(31) if args.seed is None else args.seed
    return sampling.sampler(**given | {"temperature": temperature}), chosen


def key_of(seed: int | None) -> Array | None:
    """The random key of a seed, or None without one."""
    import jax

    return None if seed is None else jax.random.key(seed)


def report_seed(args: argparse.Namespace, seed: int | None) -> None:
    """Say on stderr which seed was drawn, where the user gave none."""
    if seed is not None and args.seed is None:
        print(f"seed {seed}", file=sys.stderr)


# ---- text in and out ------------------------------------------------------------------------------------


def prompt_text(argument: str) -> str:
    """The argument itself, or for "-" the standard input without its last line end."""
    return stdin_text().removesuffix("\n") if argument == "-" else argument


def stdin_text() -> str:
    """All of the standard input. Raises JaxllmError where it is not UTF-8."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise JaxllmError(f"the standard input is not UTF-8 text ({error}); convert it first") from error


def file_text(path: str) -> str:
    """A UTF-8 file, line ends as they are. Raises JaxllmError where it cannot be read."""
    try:
        return pathlib.Path(path).read_bytes().decode()
    except OSError as error:
        raise JaxllmError(f"{path} cannot be read ({error.strerror}); give the path of a text file") from error
    except UnicodeDecodeError as error:
        raise JaxllmError(f"{path} is not UTF-8 text ({error}); convert it first") from error


def write(text: str) -> None:
    """Text to the standard output at once; what its encoding cannot spell becomes "?"."""
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def write_json(value: Any) -> None:
    """One object on one line; numbers that JSON cannot hold (nan, infinities) become null."""
    write(json.dumps(_finite(value), allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
