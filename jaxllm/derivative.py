"""Derivatives of kernels, through their definition."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def tangent(definition: Callable, primals: tuple, tangents: tuple) -> Array:
    """That of definition(*primals). What does not move is closed over, so that a frozen weight costs nothing."""
    moves = [not all(map(_is_zero, jax.tree.leaves(t, is_leaf=_is_zero))) for t in tangents]

    def of_moving(*some):
        some = iter(some)
        return definition(*(next(some) if m else p for m, p in zip(moves, primals, strict=True)))

    some = [p for m, p in zip(moves, primals, strict=True) if m]
    filled = [jax.tree.map(_filled, t, is_leaf=_is_zero) for m, t in zip(moves, tangents, strict=True) if m]
    return jax.jvp(of_moving, some, filled)[1]


def _filled(tangent) -> Array | np.ndarray:
    if not _is_zero(tangent):
        return tangent
    zeros = np.zeros if tangent.dtype == jax.dtypes.float0 else jnp.zeros  # float0: of codes, which are integers
    return zeros(tangent.shape, tangent.dtype)


def _is_zero(tangent) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)
