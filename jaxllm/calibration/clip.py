"""Scales by reconstruction error: clipping the largest weights of a group often serves all the others.

The error of a group of a row is d H d^T, with d the rounding error and H the part of the inputs' second moments
that the group meets (the objective of AWQ's clipping, arXiv 2306.00978, section 3.2, without drawing inputs).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from jaxllm.calibration.grid import Grid, group_size, in_groups, of_groups, recoded
from jaxllm.quant import QTensor, encode
from jaxllm.quant.encode import SCALES
from jaxllm.quant.formats import Format

RATIOS = tuple(round(1.05 - 0.05 * i, 2) for i in range(14))  # 1.05 .. 0.40 of the plain scale
POWERS = (1.0, 0.5, 2.0)


def clipped(w: np.ndarray, hessian: np.ndarray, f: Format) -> QTensor:
    """w f32 [N, K] in the format f, each group's scale the one of some multiples of the plain one that loses
    least with inputs of second moments `hessian` [K, K].

    Where rows share a scale it stays the plain one.
    """
    plain = encode(w, f)
    if f.rows != 1:
        return plain
    x, blocks = in_groups(w, plain), _diagonal_blocks(hessian, plain)
    best, least = plain.scale.copy(), None
    for ratio in _ratios(f):
        scale = (plain.scale.astype(np.float32) * np.float32(ratio)).astype(SCALES[f.scale])
        error = _errors(x, blocks, of_groups(replace(plain, scale=scale)))
        if least is None:
            best, least = scale, error
            continue
        better = error < least
        best, least = np.where(better, scale, best), np.where(better, error, least)
    return recoded(w, replace(plain, scale=best))


def _ratios(f: Format) -> tuple[float, ...]:
    """1 comes first: among equals the plain scale stays."""
    ratios = POWERS if f.power else (1.0, *(r for r in RATIOS if r != 1.0))
    lopsided = f.levels == "int" and f.zero is None and f.high - f.center != f.center - f.low
    return (*ratios, *(-r for r in ratios)) if lopsided else ratios


def _diagonal_blocks(hessian: np.ndarray, q: QTensor) -> np.ndarray:
    """f32 [G, group, group]."""
    size, G = group_size(q), q.scale.shape[-1]
    short = size * G - len(hessian)
    whole = np.pad(hessian, ((0, short), (0, short))).reshape(G, size, G, size)
    return whole[np.arange(G), :, np.arange(G)].astype(np.float32)


def _errors(x: np.ndarray, blocks: np.ndarray, grid: Grid) -> np.ndarray:
    """[N, G]."""
    d = (grid.near(x) - x).swapaxes(0, 1)  # [G, N, group]
    return ((d @ blocks) * d).sum(-1).T
