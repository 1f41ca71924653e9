"""How checkpoints pack several matrices into one tensor, and how to take them apart. numpy only.

A split takes (tensor, leaf "w" or "b", block) and returns {path below the rule's: tensor}. Matrices are
[out, in] and biases [out]; views where possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from jaxllm.config import MLA, Block, DeltaNet

Split = Callable[[np.ndarray, str, Block], dict[str, np.ndarray]]


def _named(names: Iterable[str], leaf: str, parts: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{name}.{leaf}": part for name, part in zip(names, parts, strict=True)}


def _axis(leaf: str) -> int:
    return -2 if leaf == "w" else -1  # the out axis


def fused_qkv(x: np.ndarray, leaf: str, block: Block) -> dict[str, np.ndarray]:
    """[q; k; v], all heads of each together."""
    m = block.mixer
    at = [m.heads * m.head_dim, (m.heads + m.kv_heads) * m.head_dim]
    return _named("qkv", leaf, np.split(x, at, 0))


def grouped_qkv(x: np.ndarray, leaf: str, block: Block) -> dict[str, np.ndarray]:
    """For each kv head: its queries, its key, its value."""
    m = block.mixer
    G = m.heads // m.kv_heads
    x = x.reshape(m.kv_heads, G + 2, m.head_dim, *x.shape[1:])
    parts = (part.reshape(-1, *x.shape[3:]) for part in (x[:, :G], x[:, G], x[:, G + 1]))
    return _named("qkv", leaf, parts)


def codegen_qkv(x: np.ndarray, leaf: str, block: Block) -> dict[str, np.ndarray]:
    """Four parts, each with the queries, values and keys of a quarter of the heads."""
    parts = x.reshape(4, 3, -1, *x.shape[1:])
    return _named("qvk", leaf, (parts[:, i].reshape(-1, *x.shape[1:]) for i in range(3)))


def gated_query(x: np.ndarray, leaf: str, block: Block) -> dict[str, np.ndarray]:
    """For each head: its query, then the gate of its output."""
    m = block.mixer
    x = x.reshape(m.heads, 2, m.head_dim, *x.shape[1:])
    return _named(("q", "gate"), leaf, (x[:, i].reshape(-1, *x.shape[3:]) for i in range(2)))


def gate_up(x: np.ndarray, leaf: str, block: Block) -> dict[str, np.ndarray]:
    """[gate; up], of one feed-forward or of a stack of experts."""
    return _named(("gate", "up"), leaf, np.split(x, 2, _axis(leaf)))


def turned_gate_up(x: np.ndarray, leaf: str, block: Block) -> dict[str, np.ndarray]:
    """[.., in, gate then up]."""
    return gate_up(x.swapaxes(-1, -2), leaf or "w", block)


def up_gate(x: np.ndarray, leaf: str, block: Block) -> dict[str, np.ndarray]:
    """[up; gate]."""
    return _named(("up", "gate"), leaf, np.split(x, 2, _axis(leaf)))


def stacked_gate_up(x: np.ndarray, leaf: str, block: Block) -> dict[str, np.ndarray]:
    """Experts' gates and ups taking turns: matrices [E, in, 2 F] or biases [E, 2 F]."""
    return _stacked(("gate", "up"), (x[..., 0::2], x[..., 1::2]))


def stacked_down(x: np.ndarray, leaf: str, block: Block) -> dict[str, np.ndarray]:
    """Experts' matrices [E, F, out] or biases [E, out]."""
    return _stacked(("down",), (x,))


def _stacked(names: Iterable[str], parts: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    turned = [x.swapaxes(1, 2) if x.ndim == 3 else x for x in parts]
    return _named(names, "w" if turned[0].ndim == 3 else "b", turned)


def latent_kv(x: np.ndarray, leaf: str, block: Block) -> dict[str, np.ndarray]:
    """MLA's up-projection [(n + v) of each head, r] as the two absorbed factors."""
    m: MLA = block.mixer
    x = x.reshape(m.heads, m.nope_dim + m.v_dim, m.kv_rank)
    return {"k_b": x[:, : m.nope_dim].swapaxes(1, 2), "v_b": x[:, m.nope_dim :]}


def depthwise(x: np.ndarray, leaf: str, block: Block) -> dict[str, np.ndarray]:
    """Convolution weights [C, 1, kernel] -> [C, kernel]."""
    return {f"conv.{leaf}": x[:, 0] if leaf == "w" else x}


def halves_swapped(x: np.ndarray, leaf: str, block: Block) -> dict[str, np.ndarray]:
    """A matrix that reads two inputs side by side, for the same two the other way round."""
    return {leaf: np.concatenate(np.split(x, 2, -1)[::-1], -1) if leaf == "w" else x}


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Every row [.., in] at length 1, computed in f32, in x's dtype."""
    y = x.astype(np.float32)
    return (y / np.maximum(np.linalg.norm(y, axis=-1, keepdims=True), 1e-12)).astype(x.dtype)


def delta_qkvz(x: np.ndarray, leaf: str, block: Block) -> dict[str, np.ndarray]:
    """For each key head: its query, its key, then its values and their gates."""
    m: DeltaNet = block.mixer
    values = m.v_heads // m.k_heads * m.v_dim
    x = x.reshape(m.k_heads, -1, *x.shape[1:])
    parts = np.split(x, [m.k_dim, 2 * m.k_dim, 2 * m.k_dim + values], 1)
    *qkv, z = (part.reshape(-1, *x.shape[2:]) for part in parts)
    return {f"qkv.{leaf}": np.concatenate(qkv), f"z.{leaf}": z}


def delta_ba(x: np.ndarray, leaf: str, block: Block) -> dict[str, np.ndarray]:
    """For each key head: the write strengths of its values, then their decays."""
    m: DeltaNet = block.mixer
    x = x.reshape(m.k_heads, 2, -1, *x.shape[1:])
    return _named("ba", leaf, (x[:, i].reshape(-1, *x.shape[3:]) for i in range(2)))


def deinterleave(x: np.ndarray, heads: int, dims: int, *, at: int = 0) -> np.ndarray:
    """Rows of `heads` heads whose rotary pairs are (0, 1), (2, 3).. -> halves, for `dims` rows from row `at`."""
    x = x.reshape(heads, -1, *x.shape[1:])
    order = np.arange(x.shape[1])
    order[at : at + dims] = at + np.concatenate([np.arange(0, dims, 2), np.arange(1, dims, 2)])
    return x[:, order].reshape(-1, *x.shape[2:])


def rotary_rows(path: str, shape: tuple[int, ...], block: Block) -> Iterator[tuple[int, int, int]]:
    """(heads, dims, at) where the tensor at `path` holds rows that a rotary embedding turns."""
    m, name = block.mixer, path.split(".")[-2]
    if not getattr(m, "rope", None) or ".mixer." not in path:
        return
    if isinstance(m, MLA):
        if name == "q":
            yield m.heads, m.rope.dims, m.nope_dim
        elif name == "kv_a":
            yield 1, m.rope.dims, m.kv_rank
    elif name in ("q", "k", "q_norm", "k_norm"):
        heads = shape[0] // m.head_dim if len(shape) == 1 or name in "qk" else shape[0]
        yield max(heads, 1), m.rope.dims, 0


def _alternating_rows(x: np.ndarray, leaf: str, block: Block) -> dict[str, np.ndarray]:
    """Experts' gates and ups taking turns as rows: [E, 2 F, ..]."""
    return _named(("gate", "up"), "w", (x[:, 0::2], x[:, 1::2]))


def _expert_rows(x: np.ndarray, leaf: str, block: Block) -> dict[str, np.ndarray]:
    return {"down.w": x}


def _halved_rows(x: np.ndarray, leaf: str, block: Block) -> dict[str, np.ndarray]:
    return _named(("gate", "up"), "w", np.split(x, 2, -2))


# What a split does to the parts of a packed weight, which are [.., out, something] whatever way the values lay.
# A split that is not here mixes columns: the weight is expanded first.
BY_ROWS: dict[Split, Split] = {
    split: split for split in (fused_qkv, grouped_qkv, codegen_qkv, gated_query, gate_up, up_gate)
} | {
    stacked_gate_up: _alternating_rows,
    stacked_down: _expert_rows,
    turned_gate_up: _halved_rows,
    delta_qkvz: delta_qkvz,
    delta_ba: delta_ba,
}
