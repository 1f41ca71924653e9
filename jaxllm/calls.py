"""An operation of `ops` kept whole in a traced program: one equation that a converter to another runtime reads."""

from __future__ import annotations

from typing import Any

import jax
from jax.extend.core import Primitive

Array = jax.Array

call_p = Primitive("jaxllm_call")
call_p.def_abstract_eval(lambda *args, name, tree, like, numbers: jax.core.ShapedArray(*like))


def call(name: str, *args: Any, shape: tuple[int, ...], dtype: Any, **numbers: Any) -> Array:
    """One array of this shape and dtype from `args`, pytrees of arrays, packed weights among them.

    numbers: whatever else says what it computes; hashable. It can be traced, and neither lowered nor run."""
    leaves, tree = jax.tree.flatten(args)
    like = (tuple(shape), jax.numpy.dtype(dtype))
    return call_p.bind(*leaves, name=name, tree=tree, like=like, numbers=tuple(sorted(numbers.items())))
