"""Text to calibrate on, as windows of token ids."""

from __future__ import annotations

import hashlib
import pathlib
import random
import sysconfig
from collections.abc import Iterable, Iterator

import numpy as np

from jaxllm.checkpoint.canonical import flatten
from jaxllm.errors import ConfigError, JaxllmError
from jaxllm.model import Model
from jaxllm.prompts import as_prompts
from jaxllm.quant import QTensor

TOKENS = 32768
WINDOW = 512
PIECE = 8000  # characters of one file of the standard library, so that many files have a say
HELD_OUT_ONE_IN = 50  # the bundled models' held-out files, see their README


def check(model: Model, tokens: np.ndarray) -> None:
    """Raise ConfigError for a model that is packed already, JaxllmError for tokens that are no windows of text."""
    if any(isinstance(x, QTensor) for x in flatten(model.params).values()):
        raise ConfigError(f"{model.name} is quantized already; calibrate the model it was made from")
    if np.ndim(tokens) != 2 or not np.size(tokens) or np.shape(tokens)[1] > model.config.max_len:
        raise JaxllmError(
            f"calibration text should be token ids [windows, tokens of each], at most {model.config.max_len} "
            f"tokens each; got shape {list(np.shape(tokens))}"
        )


def windows(model: Model, text: str | None = None, *, tokens: int = TOKENS) -> np.ndarray:
    """Windows i32 [W, T] of about `tokens` tokens of a text; of Python's own library where none is given.

    Raises JaxllmError for a text shorter than one window, TokenizerError without a tokenizer.
    """
    length = min(WINDOW, model.config.max_len)
    wanted = max(1, tokens // length) * length
    ids: list[int] = []
    for piece in standard_library() if text is None else _pieces(text):
        ids += as_prompts(model, piece)[0]
        if len(ids) >= wanted:
            break
    if len(ids) < length:
        raise JaxllmError(
            f"calibration needs a text of at least {length} tokens, got {len(ids)}; give --text a longer one"
        )
    whole = min(wanted, len(ids) // length * length)
    return np.array(ids[:whole], np.int32).reshape(-1, length)


def _pieces(text: str) -> Iterable[str]:
    """A long text in parts, so that no more of it is tokenized than is needed."""
    size = 100_000
    return (text[i : i + size] for i in range(0, len(text), size))


def standard_library() -> Iterator[str]:
    """The beginnings of the running Python's own source files, in a fixed shuffled order.

    Without the files that the bundled models never saw, which are there to measure on."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    paths = [p for p in sorted(root.rglob("*.py")) if "site-packages" not in p.parts]
    random.Random(0).shuffle(paths)
    for path in paths:
        if held_out(path.relative_to(root).as_posix()):
            continue
        try:
            text = path.read_text(encoding="utf-8")[:PIECE]
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            yield text


def held_out(name: str) -> bool:
    """Whether the bundled models were trained without this file of the standard library ("test/test_io.py")."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return digest % HELD_OUT_ONE_IN == 0
