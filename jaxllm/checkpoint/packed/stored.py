"""What a reader of packed weights is given: the settings of its method, the tensors of one module at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.checkpoint.canonical import Values
from jaxllm.checkpoint.safetensors import Tensor
from jaxllm.errors import CheckpointError
from jaxllm.families.fields import Fields

Read = Callable[[], Values]
FLOATS = ("float32", "float16", "bfloat16")
LARGEST_NOTE = 2**16  # bytes of a tensor that holds settings, not weights
COMPUTED_IN = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Job:
    """A checkpoint whose weights are packed."""

    settings: Fields  # its quantization_config; problems are collected there
    dtype: str  # that its values stand for: the config's, else bfloat16
    metadata: Callable[[], dict[str, str]]  # the text in its files' headers
    notes: Counter[str]  # what the caller will be told once, and for how many weights


@dataclass(frozen=True)
class Module:
    """The stored tensors that make one weight, by the end of their names ("qweight", "weight_scale")."""

    name: str
    tensors: dict[str, Tensor]

    def has(self, leaf: str) -> bool:
        return leaf in self.tensors

    def shape(self, leaf: str, dtypes: Container[str], ndim: int | None = 2) -> tuple[int, ...]:
        """The shape of a tensor that has to be there, with one of the dtypes and so many axes.

        Raises CheckpointError where it is not, and where it is empty."""
        if leaf not in self.tensors:
            raise CheckpointError(f"{leaf} is missing beside {', '.join(sorted(self.tensors))}")
        tensor = self.tensors[leaf]
        if tensor.dtype.name not in dtypes:
            raise CheckpointError(f"{leaf} should be {' or '.join(dtypes)}, it is {tensor.dtype.name}")
        if ndim is not None and len(tensor.shape) != ndim:
            raise CheckpointError(f"{leaf} should have {ndim} axes, its shape is {list(tensor.shape)}")
        if 0 in tensor.shape:
            raise CheckpointError(f"{leaf} is empty: {list(tensor.shape)}")
        return tensor.shape

    def expect(self, leaf: str, dtypes: Container[str], *shapes: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor that has to be there in one of the shapes.

        Raises CheckpointError where it is not."""
        shape = self.shape(leaf, dtypes, None)
        if shape not in shapes:
            wanted = " or ".join(str(list(s)) for s in shapes)
            raise CheckpointError(f"{leaf} should have shape {wanted}, it has {list(shape)}")
        return shape

    def read(self, leaf: str) -> np.ndarray:
        return self.tensors[leaf]()

    def read_finite(self, leaf: str) -> np.ndarray:
        """The values of a tensor of scales.

        Raises CheckpointError where one is infinite or not a number."""
        return finite(self.read(leaf), leaf)

    def note(self, leaf: str, dtypes: Container[str]) -> np.ndarray:
        """The values of a small tensor that holds settings.

        Raises CheckpointError where it is large or of another dtype."""
        self.shape(leaf, dtypes, None)
        tensor = self.tensors[leaf]
        if int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize > LARGEST_NOTE:
            raise CheckpointError(f"{leaf} should be a few settings, its shape is {list(tensor.shape)}")
        return self.read(leaf)


@dataclass(frozen=True)
class Scheme:
    """How a method's checkpoints are taken apart."""

    split: Callable[[str, Tensor], tuple[str, str] | None]  # a tensor -> (module, leaf), None: not packed
    reader: Callable[[Module], Read]  # checks shapes and gives the reader; raises CheckpointError
    also: tuple[str, ...] = ("weight",)  # leaves that belong to a module known by its other ones
    target: str = "{}.weight"  # the name of what a module stands for
    drop: Callable[[str], bool] = lambda name: False  # tensors nobody needs


Method = Callable[[Job], Scheme]


def by_leaf(leaves: Iterable[str]) -> Callable[[str, Tensor], tuple[str, str] | None]:
    """A split for names that end in "." and one of the leaves; a leaf may have dots in it."""
    known = frozenset(leaves)
    deepest = max(leaf.count(".") for leaf in known) + 1

    def split(name: str, tensor: Tensor) -> tuple[str, str] | None:
        parts = name.split(".")
        for n in range(min(deepest, len(parts) - 1), 0, -1):
            if ".".join(parts[-n:]) in known:
                return ".".join(parts[:-n]), ".".join(parts[-n:])
        return None

    return split


def finite(x: np.ndarray, leaf: str) -> np.ndarray:
    """x as it is.

    Raises CheckpointError where a value is infinite or not a number."""
    if not np.isfinite(x.astype(np.float32)).all():
        raise CheckpointError(f"{leaf} has values that are infinite or not a number; download the file again")
    return x


# ---- settings -------------------------------------------------------------------------------------------


def bits(c: Fields, names: str, allowed: Iterable[int]) -> int:
    """Bits of a code; anything not allowed is a problem."""
    n = c.int(names)
    if n not in (allowed := tuple(allowed)):
        c.problem(f"{names.split('|')[0]} is {n}; read are {', '.join(map(str, allowed))}")
        return allowed[0]
    return n


def group_size(c: Fields, names: str = "group_size") -> int | None:
    """Columns that share a scale, None where -1 says the whole row; anything else is a problem."""
    value: Any = c.raw(names, -1)
    if type(value) is int and (value == -1 or 1 <= value < 2**31):
        return None if value == -1 else value
    c.problem(f"{names.split('|')[0]} should be -1 or a whole number from 1, got {value!r:.60}")
    return None
