"""A format's grid with given scales: what values round to, and the packed weight of values that lie on it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from jaxllm.quant.encode import rounded
from jaxllm.quant.formats import FLOAT8, LEVELS, Format
from jaxllm.quant.qtensor import QTensor, pack


@dataclass(frozen=True)
class Grid:
    """Scales and zeros or offsets of a weight, f32 [N, C] with one column for each column (or group) of it."""

    format: Format
    scale: np.ndarray
    zero: np.ndarray | None = None
    offset: np.ndarray | None = None

    def near(self, x: np.ndarray) -> np.ndarray:
        """What x f32 [N, C] or [N, C, group] rounds to."""
        one = x if x.ndim == 3 else x[..., None]
        with np.errstate(all="ignore"):
            codes = rounded(one, self.format, self.scale, zero=self.zero, offset=self.offset)
        y = _level(codes, self.format)
        y = y - self.zero[..., None] if self.zero is not None else y
        y = y * self.scale[..., None]
        y = y + self.offset[..., None] if self.offset is not None else y
        return y.reshape(x.shape)

    def take(self, columns: np.ndarray | slice) -> Grid:
        """The grid of some columns."""
        parts = (self.scale, self.zero, self.offset)
        return Grid(self.format, *(None if part is None else part[:, columns] for part in parts))


def _level(codes: np.ndarray, f: Format) -> np.ndarray:
    if f.levels in FLOAT8:
        return codes.astype(np.float32)
    if f.levels != "int":
        return np.asarray(LEVELS[f.levels], np.float32)[codes]
    return codes.astype(np.float32) - np.float32(f.center)


def of_groups(q: QTensor) -> Grid:
    """The grid of q [N, in], one column for each group."""
    scale = q.scale.astype(np.float32)
    if q.super_scale is not None:
        above = np.repeat(q.super_scale.astype(np.float32), scale.shape[-1] // q.super_scale.shape[-1], -1)
        scale = scale * above
    zero, offset = (None if part is None else part.astype(np.float32) for part in (q.zero, q.offset))
    return Grid(q.format, scale, zero, offset)


def of_columns(q: QTensor) -> Grid:
    """The grid of q [N, in], one column for each of its columns."""
    owner = np.arange(q.columns) // group_size(q)
    return of_groups(q).take(owner)


def group_size(q: QTensor) -> int:
    """Columns that share a scale in q; the last group may be padded."""
    return q.format.group or -(-q.columns // q.scale.shape[-1])


def in_groups(w: np.ndarray, q: QTensor) -> np.ndarray:
    """w f32 [N, in] as [N, G, group], padded with zeros."""
    size, G = group_size(q), q.scale.shape[-1]
    return np.pad(w, ((0, 0), (0, size * G - w.shape[1]))).reshape(len(w), G, size)


def recoded(w: np.ndarray, q: QTensor) -> QTensor:
    """w f32 [N, in] rounded on q's own grid: q with other codes."""
    grid, f = of_groups(q), q.format
    with np.errstate(all="ignore"):
        codes = rounded(in_groups(w, q), f, grid.scale, zero=grid.zero, offset=grid.offset)
    codes = codes.reshape(len(w), -1)
    codes[:, q.columns :] = 0
    if f.bits == 8:
        return replace(q, codes=codes)
    whole = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 8)))
    low, high = pack(whole, f.bits)
    return replace(q, codes=low, high=high)
