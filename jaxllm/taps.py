"""Keep or edit named activations while a forward is traced. Off costs nothing: the program stays the same.

Names are "embed", "norm", or "layers.{i}.{point}" with the points below.

| point          | shape            | what                                                            |
|----------------|------------------|-----------------------------------------------------------------|
| in             | [B, T, D]        | residual stream entering the layer                              |
| mixer.in       | [B, T, D]        | what the mixer reads (after its norm)                           |
| mixer.q        | [B, T, H, h]     | queries, normed and rotated (attention)                         |
| mixer.k        | [B, T, K, h]     | new keys, as they are cached (attention)                        |
| mixer.v        | [B, T, K, h]     | new values (attention)                                          |
| mixer.scores   | [B, H, T, S]     | attention probabilities over cache slots, f32 (attention, MLA)  |
| mixer.heads    | [B, T, H, h]     | each head's output, before the output projection                |
| mixer.joined   | [B, T, J]        | what the output projection reads: gated, normed (attention)     |
| mixer.out      | [B, T, D]        | what the mixer adds to the residual stream                      |
| mid            | [B, T, D]        | residual stream between mixer and feed-forward (sequential)     |
| ffn.in         | [B, T, D]        | what the feed-forward reads (after its norm)                    |
| ffn.hidden     | [B, T, F]        | activations of the neurons (MLP)                                |
| ffn.experts    | i32 [B, T, k]    | chosen experts (MoE)                                            |
| ffn.weights    | [B, T, k]        | weights of the experts that were chosen by score, f32 (MoE)     |
| ffn.routed     | [N, k, f]        | activations of the chosen experts' neurons (MoE)                |
| ffn.out        | [B, T, D]        | what the feed-forward adds                                      |
| out            | [B, T, D]        | residual stream leaving the layer                               |

N = B * T, J = H * h, f is the hidden size of one expert.
"embed" is [B, T, D] entering the first layer; "norm" is [B, T, D] after the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import jax

from jaxllm.errors import JaxllmError

Edit = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Taps:
    """What to keep (patterns such as "layers.*.out") and what to change ({pattern: function of the activation}).

    An edit gets the activation and returns one of the same shape; kept values are those after the edit.
    In a pattern `*`, `?` and `[..]` match within one part of a dotted name, and a part `**` any number of parts.
    Every pattern must match at least one activation of the model, else JaxllmError lists those it has.
    """

    keep: Sequence[str] = ()
    edit: Mapping[str, Edit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.keep, str):
            raise JaxllmError(f"keep is a sequence of patterns; write keep=({self.keep!r},)")


def fits(name: str, pattern: str) -> bool:
    """Whether a dotted name matches a pattern, part by part."""
    return _fits(name.split("."), pattern.split("."))


def _fits(name: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(_fits(name[i:], pattern[1:]) for i in range(len(name) + 1))
    return bool(name) and fnmatchcase(name[0], pattern[0]) and _fits(name[1:], pattern[1:])


class Recorder:
    """The trace-time side of Taps: lives for one call of `hidden` and collects into `kept`."""

    def __init__(self, taps: Taps | None, prefix: str = "", root: Recorder | None = None):
        self.taps, self.prefix, self.root = taps, prefix, root or self
        if root is None:
            self.kept: dict[str, jax.Array] = {}
            self.seen: list[str] = []

    def at(self, prefix: str) -> Recorder:
        """The same recorder, naming what it meets `prefix.name`."""
        if self.taps is None:
            return self
        return Recorder(self.taps, f"{self.prefix}{prefix}.", self.root)

    def wants(self, name: str) -> bool:
        """Whether any pattern asks for this activation (some are not computed otherwise)."""
        if self.taps is None:
            return False
        self.root.seen.append(self.prefix + name)
        return any(fits(self.prefix + name, p) for p in (*self.taps.keep, *self.taps.edit))

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        """Pass activation `x` through: edited where asked, recorded where asked."""
        if not self.wants(name):
            return x
        full = self.prefix + name
        for pattern, edit in self.taps.edit.items():
            if fits(full, pattern):
                x = _same_shape(full, x, edit(x))
        if any(fits(full, p) for p in self.taps.keep):
            self.root.kept[full] = x
        return x

    def finish(self) -> dict[str, jax.Array]:
        """What was kept, by full name.

        Raises JaxllmError for a pattern that met no activation."""
        if self.taps is None:
            return {}
        patterns = (*self.taps.keep, *self.taps.edit)
        unmet = [p for p in patterns if not any(fits(n, p) for n in self.root.seen)]
        if unmet:
            names = ", ".join(sorted({n.split(".", 2)[-1] for n in self.root.seen}))
            raise JaxllmError(
                f"no activation matches {unmet}; names are 'layers.0.<point>' with the points {names}"
            )
        return self.root.kept


def _same_shape(name: str, before: jax.Array, after: jax.Array) -> jax.Array:
    if after.shape != before.shape:
        raise JaxllmError(f"the edit of {name!r} returned shape {after.shape}; it must keep {before.shape}")
    return after.astype(before.dtype)
