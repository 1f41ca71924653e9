"""GPTQ (arXiv 2210.17323): round column by column, and let the columns that are left make up for the error."""

from __future__ import annotations

import numpy as np

from jaxllm.calibration.grid import Grid
from jaxllm.errors import JaxllmError

BLOCK = 128  # columns whose corrections are applied to the rest at once
DAMPING = 0.01  # of the mean second moment, added to all


def gptq(
    w: np.ndarray,
    hessian: np.ndarray,
    grid: Grid,
    *,
    damping: float = DAMPING,
    by_size: bool = True,
) -> np.ndarray:
    """Values f32 [N, K] on `grid` (a column for each column of w f32 [N, K]) with little |(w - values) X|^2.

    hessian: X X^T up to a factor, [K, K]. by_size: columns with larger inputs go first ("act-order"); the grid is
    fixed, so that the stored order does not change. Raises JaxllmError where `hessian` is not that of inputs.
    """
    order = np.argsort(-np.diag(hessian), kind="stable") if by_size else np.arange(len(hessian))
    upper = inverse_factor(hessian[order][:, order], damping)
    left, done = w[:, order].astype(np.float32), np.empty(w.shape, np.float32)
    for start in range(0, w.shape[1], BLOCK):
        at = slice(start, start + BLOCK)
        values, errors = _block(left[:, at], upper[at, at], grid.take(order[at]))
        done[:, order[at]] = values
        left[:, start + BLOCK :] -= errors @ upper[at, start + BLOCK :]
    return done


def _block(w: np.ndarray, upper: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Values of a block of columns, and each column's error over its pivot, both [N, C]."""
    w, values, errors = w.copy(), np.empty_like(w), np.empty_like(w)
    for i in range(w.shape[1]):
        values[:, i] = grid.take(slice(i, i + 1)).near(w[:, i : i + 1])[:, 0]
        errors[:, i] = (w[:, i] - values[:, i]) / upper[i, i]
        w[:, i + 1 :] -= errors[:, i : i + 1] * upper[i, i + 1 :]
    return values, errors


def inverse_factor(hessian: np.ndarray, damping: float) -> np.ndarray:
    """The upper Cholesky factor U f32 [K, K] of the damped inverse: U^T U = (hessian + damping * mean)^-1.

    Channels that are always zero count as having the mean."""
    h = np.array(hessian, np.float64)
    diagonal = np.diag(h).copy()
    mean = diagonal.mean() or 1.0
    h[np.diag_indices_from(h)] += np.where(diagonal > 0, damping * mean, mean)
    try:
        # U^T U of the inverse, without inverting twice: with rows and columns turned round, h = L L^T gives it.
        lower = np.linalg.cholesky(h[::-1, ::-1])
        upper = np.triu(np.linalg.inv(lower)[::-1, ::-1]).astype(np.float32)
    except np.linalg.LinAlgError:
        upper = np.full_like(h, np.nan)
    if not np.isfinite(upper).all():
        raise JaxllmError(
            "second moments of inputs should be positive; give more text, or check that the model gives no NaN"
        )
    return upper
