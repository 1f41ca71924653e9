"""One tiny checkpoint of the parity table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """What transformers builds, and how its saved folder is turned into what is to be loaded.

    model_type: in transformers; values: its config's arguments; attn: the implementation that is right there;
    convert: rewrites the saved folder in place (for families that only exist with remote code);
    modes: which of full, incremental, ragged, rewind, tree apply; max_len: what `load` is asked for;
    prepare: changes the transformers model before it is compared and saved.
    """

    model_type: str
    values: dict[str, Any] = field(default_factory=dict)
    attn: str = "eager"
    convert: Callable[[Any], None] | None = None
    modes: tuple[str, ...] = ("full", "incremental", "ragged", "rewind", "tree")
    max_len: int | None = None
    prepare: Callable[[Any], None] | None = None


RECURRENT = ("full", "incremental", "ragged")  # a recurrent state has no rewind and no tree
