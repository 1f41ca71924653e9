"""Reading an architecture's metadata: typed, and with what nobody asked for told to the caller."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from jaxllm.checkpoint.gguf import GGUF, Tensor
from jaxllm.errors import CheckpointError, ConfigError

REQUIRED: Any = object()


class Keys:
    """The metadata of one file whose keys begin with the name of its architecture; names are without it."""

    def __init__(self, file: GGUF, architecture: str):
        self.path: pathlib.Path = file.path
        self.metadata, self.tensors = file.metadata, file.tensors
        self.architecture = architecture
        self.asked: set[str] = set()

    def raw(self, name: str) -> Any:
        """The value as it is, or None; from now on it counts as read."""
        self.asked.add(name)
        return self.metadata.get(f"{self.architecture}.{name}")

    def skip(self, names: str) -> None:
        """Keys "a|b" that something else already decides."""
        self.asked.update(names.split("|"))

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """A number; where there is one for each layer, they must be the same. ConfigError where it is none."""
        value = self.raw(name)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if value is None and default is not REQUIRED:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            shown = f"{value.size} different values" if isinstance(value, np.ndarray) else repr(value)[:60]
            raise ConfigError(f"{self.path}: {self.architecture}.{name} should be a number, got {shown}")
        return value

    def int(self, name: str, default: Any = REQUIRED) -> int:
        """A whole number of at least 0, and of at least 1 where it is required."""
        value = self.number(name, default)
        if value is default:
            return value
        if value != int(value) or value < (default is REQUIRED):
            raise ConfigError(f"{self.path}: {self.architecture}.{name} should be a whole number, got {value!r}")
        return int(value)

    def tensor(self, name: str) -> Tensor:
        """A tensor every file of this kind has, of at least one axis. CheckpointError where it is missing."""
        if name not in self.tensors or not self.tensors[name].shape:
            raise CheckpointError(
                f"{self.path} has no tensor {name}, so it is no model; it may be a vocabulary only"
            )
        return self.tensors[name]

    def has(self, name: str) -> bool:
        """Whether the first layer has the tensor."""
        return f"blk.0.{name}" in self.tensors

    def unread(self) -> dict[str, Any]:
        """Keys of the architecture that nobody asked for, under their full names."""
        prefix = self.architecture + "."
        found = {k: v for k, v in self.metadata.items() if k.startswith(prefix)}
        plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in found.items()}
        return {k: v for k, v in plain.items() if k.removeprefix(prefix) not in self.asked}
