"""Checkpoint tensors, one at a time, into the canonical parameter tree; every difference in one error."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np

from jaxllm.config import Block, ModelConfig, params_shape
from jaxllm.errors import CheckpointError
from jaxllm.families.base import Family, Rule
from jaxllm.families.layouts import BY_ROWS, deinterleave, rotary_rows, unit_rows
from jaxllm.quant import QTensor, dequantize

# Tables that older files carry and nobody needs.
IGNORED = re.compile(
    r".*(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attention\.(masked_)?bias|\.attn\.(masked_)?bias|attn\.causal_mask)"
)
Values = np.ndarray | QTensor  # a packed weight is [.., out, in] whatever way the family's own files lie
REAL = ("float32", "bfloat16", "float16", "float64")  # dtypes that are values and not codes
SUFFIX = {"weight": "w", "bias": "b", None: ""}


class Piece(NamedTuple):
    """A canonical parameter, or row `index` of one that stacks experts."""

    path: str
    index: int | None
    value: Values


def destination(name: str, family: Family) -> tuple[Rule, str, str] | None:
    """(rule, canonical path, leaf) of a checkpoint tensor; None where no rule knows it."""
    name = name.replace(family.inside, "", 1) if family.inside else name
    stem, leaf = re.fullmatch(r"(.*?)(?:\.(weight|bias))?", name, re.DOTALL).groups()
    for rule in family.rules:
        if match := re.fullmatch(rule.pattern, stem):
            return rule, match.expand(rule.path), SUFFIX[leaf]
    return None


def skipped(name: str, config: ModelConfig, family: Family) -> bool:
    """Whether a tensor is known to carry nothing the decoder needs."""
    if IGNORED.fullmatch(name) or any(re.fullmatch(p, name) for p in family.skip):
        return True
    layer = family.past_last and re.fullmatch(family.past_last, name)
    if layer and int(layer[1]) >= len(config.blocks):
        return True
    found = destination(name, family)
    return bool(found and found[1:] == ("head", "w") and config.tied)


def pieces(name: str, x: Values, config: ModelConfig, family: Family) -> Iterator[Piece]:
    """The canonical parameters inside one checkpoint tensor, in jaxllm's one layout."""
    rule, path, leaf = destination(name, family)
    if isinstance(x, QTensor):
        yield from _packed_pieces(name, x, config, family, rule)
        return
    path, _, index = path.partition("@")
    if family.conv1d and leaf == "w" and x.ndim == 2 and path not in ("embed", "positions", "head"):
        x = x.T
    yield from _pieces(path, int(index) if index else None, leaf, x, rule.split, config, family)


def row_pieces(name: str, x: np.ndarray, config: ModelConfig, family: Family) -> Iterator[Piece]:
    """What `pieces` does to the rows of the matrix [out, in] of this name, done to x [out, anything].

    Raises CheckpointError for a name without a place, and a matrix whose parts mix columns."""
    if skipped(name, config, family) or (found := destination(name, family)) is None:
        raise CheckpointError("not a tensor of this architecture")
    rule, path, leaf = found
    path, _, index = path.partition("@")
    split = BY_ROWS.get(rule.split)
    if (rule.split and not split) or (config.unit_head and path == "head"):
        raise CheckpointError("its rows are not rows of jaxllm's own matrices")
    yield from _pieces(path, int(index) if index else None, leaf or "w", x, split, config, family)


def _packed_pieces(name: str, q: QTensor, config: ModelConfig, family: Family, rule: Rule) -> Iterator[Piece]:
    """The same for a packed weight, without unpacking it: what moves its rows moves the rows of its parts."""
    _, path, leaf = destination(name, family)
    path, _, index = path.partition("@")
    index, split = int(index) if index else None, BY_ROWS.get(rule.split)
    if (rule.split and not split) or (config.unit_head and path == "head"):
        yield from _pieces(path, index, leaf or "w", dequantize(q), rule.split, config, family)
        return
    leaf = leaf or ("w" if split else "")
    moved = [_pieces(path, index, leaf, part, split, config, family) for part in q.row_parts().values()]
    for same in zip(*moved, strict=True):
        parts = dict(zip(q.row_parts(), (piece.value for piece in same), strict=True))
        yield same[0]._replace(value=replace(q, **parts))


def _pieces(path, index, leaf, x, split, config: ModelConfig, family: Family) -> Iterator[Piece]:
    block = _block(path, config)
    parts = split(x, leaf, block) if split else {leaf: x}
    for below, part in parts.items():
        where = f"{path}.{below}" if below else path
        part = unit_rows(part) if config.unit_head and where == "head.w" else part
        yield Piece(where, index, _one_layout(where, part, block, family))


def _block(path: str, config: ModelConfig) -> Block | None:
    number = re.match(r"layers\.(\d+)\.", path)
    if not number:
        return None
    i = int(number[1])
    if i >= len(config.blocks):
        raise CheckpointError(f"layer {i}, but the config has {len(config.blocks)}")
    return config.blocks[i]


def _one_layout(path: str, x: np.ndarray, block: Block | None, family: Family) -> np.ndarray:
    if family.interleaved and block:
        for heads, dims, at in rotary_rows(path, x.shape, block):
            rows = x.reshape(-1) if path.endswith("_norm.w") else x  # a norm's weights are rows without an in axis
            x = deinterleave(rows, heads, dims, at=at).reshape(x.shape)
    if family.one_plus and re.fullmatch(family.one_plus, path):
        x = x.astype(np.float32) + 1  # in bf16 the sum would lose what w says
    return x


def assemble(
    tensors: dict[str, Callable[[], Values]],
    config: ModelConfig,
    family: Family,
    *,
    place: Callable[[str, Values], object],
    source: str,
    on_tensor: Callable[[str], None] = lambda name: None,
    shapes: dict[str, tuple[int, ...]] | None = None,
) -> dict:
    """Read tensors one by one into the nested parameter tree that `config` describes.

    tensors: name -> reader of its values; place(path, array) makes the final leaf, so that at most one tensor
    is held beside the result; shapes: of the tree, where it has more or less than the config says.
    Raises CheckpointError that lists everything missing, unknown, doubled, of the wrong shape or not of real
    numbers.
    """
    tree = _Tree(params_shape(config) if shapes is None else shapes, place, len(tensors))
    for name, read in tensors.items():
        try:
            _put(tree, name, read, config, family)
        except (CheckpointError, ValueError, TypeError, LookupError, AttributeError) as error:
            tree.problems.append(f"{name}: {error}")
        on_tensor(name)
    if family.unit_norm:
        tree.fill_norms(family.unit_norm)
    problems = [*tree.problems, *tree.missing()]
    if problems:
        raise CheckpointError(_listed(source, problems))
    return nest(tree.leaves)


def _put(tree: _Tree, name: str, read: Callable[[], Values], config: ModelConfig, family: Family) -> None:
    if skipped(name, config, family):
        return
    if destination(name, family) is None:
        raise CheckpointError("not a tensor of this architecture")
    x = read()
    if not isinstance(x, QTensor) and x.dtype.name not in REAL:
        raise CheckpointError(f"values of dtype {x.dtype.name} are not read; they should be {', '.join(REAL)}")
    for piece in pieces(name, x, config, family):
        tree.put(name, piece)


class _Tree:
    """The parameter tree being filled, and what went wrong."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], place: Callable[[str, Values], object], most: int):
        self.shapes, self.place = shapes, place
        self.most = most  # tensors there are: no stack can have more rows
        self.leaves: dict[str, object] = {}
        self.stacks: dict[str, tuple[Values, set[int]]] = {}
        self.problems: list[str] = []
        self.faulty: set[str] = set()

    def put(self, name: str, piece: Piece) -> None:
        path, index, value = piece
        want = self.shapes.get(path)
        if want is None:
            self.problems.append(f"{name}: the config has no place {path} for it")
        elif path in self.leaves:
            self.problems.append(f"{name}: {path} was already given")
        elif value.shape != (want if index is None else want[1:]):
            self.faulty.add(path)
            self.problems.append(f"{name}: {path} should have shape {list(want)}, got {list(value.shape)}")
        elif index is None:
            self.leaves[path] = self.place(path, value)
        else:
            self._stack(name, path, index, value)

    def _stack(self, name: str, path: str, index: int, value: Values) -> None:
        want = self.shapes[path]
        if want[0] > self.most:
            self.faulty.add(path)
            self.problems.append(f"{path} has {want[0]} rows, and there are {self.most} tensors in all")
            return
        if path not in self.stacks:
            self.stacks[path] = jax.tree.map(lambda a: np.empty((want[0], *a.shape), a.dtype), value), set()
        stack, rows = self.stacks[path]
        if index >= want[0] or index in rows:
            self.problems.append(f"{name}: {path} has rows 0 to {want[0] - 1}, each once; got {index}")
            return
        if jax.tree.structure(stack) != jax.tree.structure(value):
            raise CheckpointError(f"{path} stacks rows in one format, {stack!r}; this one is {value!r}")
        jax.tree.map(lambda to, a: to.__setitem__(index, a), stack, value)
        rows.add(index)
        if len(rows) == want[0]:
            self.leaves[path] = self.place(path, stack)
            del self.stacks[path]

    def fill_norms(self, pattern: str) -> None:
        for path, shape in self.shapes.items():
            if path not in self.leaves and re.fullmatch(pattern, path):
                self.leaves[path] = self.place(path, np.ones(shape, np.float32))

    def missing(self) -> list[str]:
        absent = [p for p in self.shapes if p not in self.leaves and p not in self.faulty]
        return [self._lack(p) for p in absent]

    def _lack(self, path: str) -> str:
        want = self.shapes[path]
        if path not in self.stacks:
            return f"{path} {list(want)} is missing"
        rows = sorted(set(range(want[0])) - self.stacks[path][1])
        return f"{path} {list(want)} lacks {len(rows)} of its {want[0]} rows, the first is {rows[0]}"


def _listed(source: str, problems: list[str], most: int = 40) -> str:
    more = [f"... and {len(problems) - most} more"] if len(problems) > most else []
    head = f"{source} does not hold the weights its config describes; get the files again, or the right config:"
    return "\n  ".join([head, *problems[:most], *more])


def nest(flat: dict[str, object]) -> dict:
    """{"layers.0.mixer.q.w": x, ...} -> {"layers": [{"mixer": {"q": {"w": x}}}, ...], ...}."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    layers = tree.get("layers", {})
    tree["layers"] = [layers[str(i)] for i in range(len(layers))]
    return tree


def flatten(params: dict) -> dict[str, object]:
    """The inverse of `nest`."""
    out = {}

    def walk(prefix, node):
        if isinstance(node, dict | list):
            for key, child in node.items() if isinstance(node, dict) else enumerate(node):
                walk(f"{prefix}{key}.", child)
        else:
            out[prefix[:-1]] = node

    walk("", params)
    return out
