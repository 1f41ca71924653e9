"""Scales of an activation, moved into what makes it and what reads it: the model computes the same."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxllm.calibration.reads import Read

Block = dict[str, Any]  # a block's nested parameters


def get(p: Block, path: str) -> Any:
    """The parameter or part of a block at a path such as "mixer.q.w"; None where there is none."""
    for key in path.split("."):
        p = p.get(key) if isinstance(p, dict) else None
    return p


def put(p: Block, path: str, value: Any) -> Block:
    """The block with another parameter at that path."""
    first, _, rest = path.partition(".")
    return {**p, first: put(p[first], rest, value) if rest else value}


def fold(p: Block, read: Read, s: np.ndarray) -> Block:
    """The block with the activation of `read` divided by s f32 [K] and its readers multiplied by it."""
    s = made = np.asarray(s, np.float32)
    if read.repeat > 1:
        made = s.reshape(-1, read.repeat, read.head)[:, 0].reshape(-1)
    for leaf in ("w", "b"):
        if (x := get(p, f"{read.maker}.{leaf}")) is not None:
            by = made[:, None] if x.ndim == 2 else made
            p = put(p, f"{read.maker}.{leaf}", np.asarray(x, np.float32) / by)
    for name in read.linears:
        p = put(p, f"{name}.w", np.asarray(get(p, f"{name}.w"), np.float32) * s)
    return p
