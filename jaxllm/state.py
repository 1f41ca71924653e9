"""The decode state: an immutable value. Fork it by keeping two, rewind it by a smaller length.

Every cache slot stores the position it holds (-1: empty, -2: evicted) and masks are computed from positions, so
full caches, rings for sliding windows, ragged rows, rewinding, trees and eviction are the same code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import ops
from jaxllm.config import MLA, Attention, DeltaNet, Mamba, Mamba2, Mixer, ModelConfig, Rope, ShortConv
from jaxllm.errors import CheckpointError, ContextError
from jaxllm.quant import cache as packed
from jaxllm.quant.cache import CacheCodes

Array = jax.Array
EMPTY, EVICTED = -1, -2


def _static():
    return field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KV:
    """Keys and values of one attention layer."""

    k: Array | CacheCodes  # [B, K, S, h]: heads first, which halves the time of decoding attention on CPU
    v: Array | CacheCodes  # [B, K, S, h]
    pos: Array  # i32 [B, S]  position held by each slot; EMPTY or EVICTED where none


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Latent:
    """The shared latent and rotary key of one MLA layer."""

    c: Array | CacheCodes  # [B, 1, S, r + rope dims]
    pos: Array  # i32 [B, S]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recurrent:
    """State of one recurrent layer. It cannot be rewound: keep the old State to go back."""

    conv: Array  # [B, kernel - 1, C]  last inputs of the convolution
    memory: Array  # f32 [B, ...]  shape as the mixer says


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a model remembers of B rows: one cache a layer, and each row's length. A pytree of arrays."""

    layers: tuple[KV | Latent | Recurrent, ...]
    length: Array  # i32 [B]  tokens seen by each row, evicted ones included
    capacity: int | None = _static()  # tokens a row may hold; None: the oldest make room
    chunk: int = _static()  # most tokens one call may append
    window: int | None = _static()  # an eviction window over every layer, or None
    sinks: int = _static()  # first positions that are never evicted


def init_state(
    config: ModelConfig,
    batch: int,
    max_len: int,
    *,
    chunk: int | None = None,
    window: int | None = None,
    sinks: int = 0,
    dtype: str | None = None,
    kv_format: str | None = None,
) -> State:
    """An empty state for `batch` rows of up to `max_len` tokens.

    chunk: the most tokens one forward will append (default max_len); sliding-window layers keep a ring of
    window + chunk slots. window: keep only the last `window` tokens in every attention layer, and the first
    `sinks` of all (StreamingLLM, arXiv 2309.17453); length is then unlimited and positions go on counting.
    dtype: of the cache, config.dtype if not given. kv_format: "int8", "fp8" or "int4" keeps keys, values and
    latents in so many bits, with scales for each head and position; attention sees them in dtype.

    Raises ContextError where max_len exceeds what the model was made for, or an option cannot hold.
    """
    chunk = max_len if chunk is None else min(chunk, max_len)
    _check_room(config, batch, max_len, chunk)
    _check_window(config, window, sinks)
    dtype = jnp.dtype(dtype or config.dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ContextError(f"a cache holds floating-point numbers, got dtype {dtype}")
    made, length = _empty(config, batch, max_len, chunk, window, sinks, dtype, kv_format)
    return State(made, length, None if window else max_len, chunk, window, sinks)


@partial(jax.jit, static_argnums=range(8))
def _empty(config: ModelConfig, batch, *options) -> tuple[tuple, Array]:
    """(every layer's cache, length). One program: array by array it would be one for each shape."""
    return tuple(_layer(b.mixer, batch, *options) for b in config.blocks), jnp.zeros(batch, jnp.int32)


def _check_room(config, batch, max_len, chunk) -> None:
    if batch < 1 or max_len < 1 or chunk < 1:
        raise ContextError(
            f"a state needs batch, max_len and chunk of at least 1, got {batch}, {max_len} and {chunk}"
        )
    if max_len > config.max_len:
        raise ContextError(
            f"a state of {max_len} tokens was asked for, but this model was made for {config.max_len}; "
            f"ask for fewer, load with max_len={max_len} if its rotary scaling allows it, or give a window"
        )


def _check_window(config, window, sinks) -> None:
    if window is None:
        if sinks:
            raise ContextError("sinks keep tokens from being evicted; they need window=")
        return
    if not 1 <= window <= config.max_len:
        raise ContextError(
            f"a window goes from 1 to the {config.max_len} tokens this model was made for, got {window}"
        )
    if config.positions is not None:
        raise ContextError("a window needs relative positions; this model has a table of learned ones")
    if not 0 <= sinks < window:
        raise ContextError(f"sinks must be fewer than the window ({window}) and not negative, got {sinks}")


def _layer(m: Mixer, batch, max_len, chunk, window, sinks, dtype, kv_format) -> KV | Latent | Recurrent:
    if not isinstance(m, Attention | MLA):
        channels, kernel, memory = recurrent_shape(m)
        conv = jnp.zeros((batch, kernel - 1, channels), dtype)
        return Recurrent(conv, jnp.zeros((batch, *memory), jnp.float32))
    spans = [w for w in (getattr(m, "window", None), getattr(m, "chunk", None), window) if w]
    # With an eviction window the length has no bound, so every layer is a ring.
    slots = sinks + min([w + chunk for w in spans] + ([] if window else [max_len]))
    pos = jnp.full((batch, slots), EMPTY, jnp.int32)
    if isinstance(m, MLA):  # the latent and the rotary key, of other magnitudes, share no scale
        line = (batch, 1, slots, m.kv_rank + m.rope.dims)
        return Latent(_line(line, dtype, kv_format, parts=math.gcd(m.kv_rank, m.rope.dims)), pos)
    shape = (batch, m.kv_heads, slots, m.head_dim)
    return KV(_line(shape, dtype, kv_format), _line(shape, dtype, kv_format), pos)


def _line(shape: tuple[int, ...], dtype, kv_format: str | None, **groups) -> Array | CacheCodes:
    return jnp.zeros(shape, dtype) if kv_format is None else packed.empty(kv_format, shape, dtype, **groups)


def kv_format(state: State) -> str | None:
    """The kv_format that a state was made with; None for plain arrays, or where no layer has keys or latents."""
    lines = [c.k if isinstance(c, KV) else c.c for c in state.layers if not isinstance(c, Recurrent)]
    return lines[0].format if lines and isinstance(lines[0], CacheCodes) else None


def recurrent_shape(m: Mixer) -> tuple[int, int, tuple[int, ...]]:
    """(channels of the convolution, its kernel, shape of the memory of one row)."""
    match m:
        case Mamba():
            return m.inner, m.kernel, (m.inner, m.states)
        case Mamba2():
            return m.conv_width, m.kernel, (m.heads, m.head_dim, m.states)
        case DeltaNet():
            return m.conv_width, m.kernel, (m.v_heads, m.k_dim, m.v_dim)
        case ShortConv():
            return m.width, m.kernel, ()


# ---- what a layer does with its cache ------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Step:
    """Where T new tokens of each row go: shared by all layers of one forward."""

    index: Array  # i32 [B, T]  how many tokens of the row came before
    pos: Array  # i32 [B, T]  position (a tree's nodes share them), -1 for padding
    tree: Array | None  # bool [B, T, T]  [t, u]: token t sees token u; None: all before it
    window: int | None = _static()
    sinks: int = _static()
    ropes: tuple[Rope, ...] = field(default=(), metadata=dict(static=True))
    tables: tuple[tuple[Array, Array], ...] = ()  # of each of the ropes: cos and sin at `pos`, [B, T, 1, n]

    def turn(self, rope: Rope | None) -> tuple[Array, Array] | None:
        """Cos and sin of a rotary table at `pos`."""
        return None if rope is None else self.tables[self.ropes.index(rope)]


def begin(state: State, n_new: Array, depth: Array | None, tree: Array | None, T: int) -> Step:
    """The Step that appends T tokens at state.length, of which n_new i32 [B] are real."""
    t = jnp.arange(T)[None]
    start = state.length[:, None]
    real = t < n_new[:, None]
    if state.capacity is not None:  # a row that overflows writes nothing, so that rewinding it still works
        real &= start + n_new[:, None] <= state.capacity
    pos = jnp.where(real, start + (t if depth is None else depth), -1)
    if tree is not None:
        tree = jnp.broadcast_to(tree, (pos.shape[0], T, T))
    return Step(start + t, pos, tree, state.window, state.sinks)


def slots(step: Step, size: int) -> Array:
    """i32 [B, T]: the slot of each new token in a cache of `size` slots; `size` itself for padding."""
    ring = size - step.sinks
    wrapped = step.sinks + (step.index - step.sinks) % ring
    slot = jnp.where(step.index < step.sinks, step.index, wrapped)
    return jnp.where(step.pos < 0, size, slot)


def appended(size: int, length: Array, sinks: int) -> Array:
    """i32 [B, size]: the positions in a cache of `size` slots to which `length` i32 [B] tokens were only ever
    appended; the inverse of `slots`."""
    slot, n = jnp.arange(size)[None], length[:, None]
    newest = n - 1 - (n - 1 - slot) % (size - sinks)  # the last token before n whose turn the slot is
    pos = jnp.where(slot < sinks, slot, newest)
    return jnp.where(slot < n, pos, EMPTY)


def write(cache: KV | Latent, new: tuple[Array, ...], step: Step) -> KV | Latent:
    """The cache with new values ([B, T, K, ...] each, in field order) and their positions in place."""
    slot = slots(step, cache.pos.shape[1])
    names = ("k", "v") if isinstance(cache, KV) else ("c",)
    old = [getattr(cache, n) for n in names]
    put = [ops.put(a, x, slot) for a, x in zip(old, new, strict=True)]
    pos = ops.put_each(cache.pos, step.pos, slot)
    return replace(cache, pos=pos, **dict(zip(names, put, strict=True)))


def visible(cache: KV | Latent, step: Step, window: int | None = None, chunk: int | None = None) -> Array:
    """bool [B, T, S]: which slots each new token sees, from positions alone."""
    q, s = step.pos[:, :, None], cache.pos[:, None, :]
    mask = (s >= 0) & (s <= q)
    if window:
        mask &= s > q - window
    if step.window:
        mask &= (s > q - step.window) | (s < step.sinks)
    if chunk:
        mask &= s // chunk == q // chunk
    if step.tree is None:
        return mask
    size = cache.pos.shape[1]
    row = jnp.arange(q.shape[0])[:, None, None]
    t = jnp.arange(q.shape[1])[None, :, None]
    within = step.tree & mask.at[row, t, slots(step, size)[:, None, :]].get(mode="fill", fill_value=False)
    return mask.at[row, t, slots(step, size)[:, None, :]].set(within, mode="drop")


# ---- what a user does with a state ----------------------------------------------------------------------


def room(state: State) -> float:
    """Tokens the fullest row can still take (inf with a window). Reads the device."""
    return math.inf if state.capacity is None else state.capacity - int(np.max(state.length))


def rewind(state: State, length: Array | int) -> State:
    """The state as it was when each row had `length` tokens (int or i32 [B]); equal to replaying them.

    Raises ContextError for a recurrent layer, for a longer length than the state has, and where a ring has
    already overwritten what would be needed (more than `chunk` tokens back). The last two are checked when
    values are known, that is outside jit.
    """
    if any(isinstance(c, Recurrent) for c in state.layers):
        raise ContextError("a recurrent layer cannot be rewound: keep the State from before, it is still valid")
    if not isinstance(length, jax.core.Tracer) and not isinstance(state.length, jax.core.Tracer):
        length = np.broadcast_to(np.asarray(length, np.int32), state.length.shape)
        _check_rewind(state, length)
    positions, length = _cut(tuple(c.pos for c in state.layers), length)
    keep = [replace(c, pos=pos) for c, pos in zip(state.layers, positions, strict=True)]
    return replace(state, layers=tuple(keep), length=length)


@jax.jit
def _cut(positions: tuple[Array, ...], length: Array) -> tuple[tuple[Array, ...], Array]:
    """Positions i32 [B, S] of each layer, EMPTY from `length` (or i32 [B]) on, and the length as i32 [B]."""
    length = jnp.broadcast_to(jnp.asarray(length, jnp.int32), positions[0].shape[:1])
    return tuple(jnp.where(pos >= length[:, None], EMPTY, pos) for pos in positions), length


def _check_rewind(state: State, length: Array) -> None:
    back = np.asarray(state.length) - np.asarray(length)
    if back.min() < 0 or np.min(length) < 0:
        raise ContextError(
            f"rewind goes back to between 0 and {np.asarray(state.length)} tokens, got {np.asarray(length)}"
        )
    rings = [c for c in state.layers if state.capacity is None or c.pos.shape[1] < state.capacity]
    if any(_lost(c, state, np.asarray(length)) for c in rings):
        raise ContextError(
            f"going back {back.max()} tokens needs some that a ring has overwritten; "
            f"{state.chunk} from the newest are certain: keep the State from before, or make it with more chunk"
        )


def _lost(ring: KV | Latent, state: State, length: np.ndarray) -> bool:
    """Whether a ring no longer holds what the token after `length` [B] may see."""
    size, n = ring.pos.shape[1], length[:, None]
    turn = size - state.sinks
    slot = np.arange(state.sinks, size)[None]
    due = n - 1 - (n - 1 - slot) % turn  # the newest position before n that belongs in the slot
    needed = (due >= state.sinks) & (due > n - (turn - state.chunk))
    held = np.asarray(ring.pos)[:, state.sinks :]
    return bool(np.any(needed & (held != due) & (held != EVICTED)))


def keep_path(state: State, start: Array, path: Array | None, count: Array) -> State:
    """The state in which, of the nodes appended from length `start` i32 [B] on, path[:count] remain, one after the
    other: equal to having appended those tokens alone.

    path i32 [B, P]: numbers of appended nodes, each before its descendants; None: 0, 1, 2 ... count i32 [B]: at
    most P. Only the slots of the path are moved. A recurrent layer stays as it is: it has read all of them.
    """
    layers = [c if isinstance(c, Recurrent) else _keep_path(c, state, start, path, count) for c in state.layers]
    return replace(state, layers=tuple(layers), length=start + count)


def _keep_path(cache: KV | Latent, state: State, start: Array, path: Array | None, count: Array) -> KV | Latent:
    start = start[:, None]
    if path is None:
        return replace(cache, pos=jnp.where(cache.pos >= start + count[:, None], EMPTY, cache.pos))
    size, to = cache.pos.shape[1], jnp.arange(path.shape[1])[None]
    kept = jnp.where(to < count[:, None], start + to, -1)
    source = slots(Step(start + path, jnp.maximum(path, 0), None, state.window, state.sinks), size)
    target = slots(Step(start + to, kept, None, state.window, state.sinks), size)
    pos = ops.put_each(jnp.where(cache.pos >= start, EMPTY, cache.pos), kept, target)
    lines = {
        n: _moved(getattr(cache, n), source, target) for n in (("k", "v") if isinstance(cache, KV) else ("c",))
    }
    return replace(cache, pos=pos, **lines)


def _moved(line: Array | CacheCodes, source: Array, target: Array) -> Array | CacheCodes:
    """Slots `source` i32 [B, P] of [B, K, S, h] copied to slots `target`; those of S are dropped."""
    if isinstance(line, CacheCodes):
        return replace(line, codes=_moved(line.codes, source, target), scale=_moved(line.scale, source, target))
    taken = jnp.take_along_axis(line, source[:, None, :, None], 2, mode="clip")
    return ops.put(line, taken.swapaxes(1, 2), target)


def insert(state: State, one: State, slot: Array | int) -> State:
    """`state` with row `slot` replaced by the only row of `one` (made with the same options).

    Raises ContextError where the two were not made alike, or there is no such row.
    """
    if jax.tree.structure(state) != jax.tree.structure(one):
        raise ContextError("insert needs two states made with the same config and options")
    if one.length.shape[0] != 1:
        raise ContextError(f"insert takes a state of one row, got {one.length.shape[0]}")
    different = [
        (a.shape, b.shape)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(one), strict=True)
        if a.shape[1:] != b.shape[1:]
    ]
    if different:
        raise ContextError(f"insert needs rows of equal shape, got {different[0]}")
    _check_rows(state, slot)
    return jax.tree.map(lambda a, b: a.at[slot].set(b[0].astype(a.dtype)), state, one)


def _check_rows(state: State, rows: Array | int) -> None:
    """Raise ContextError for rows the state does not have, where they are known (that is outside jit)."""
    if isinstance(rows, jax.core.Tracer):
        return
    last = state.length.shape[0] - 1
    if np.any(np.asarray(rows) < 0) or np.any(np.asarray(rows) > last):
        raise ContextError(f"the rows of this state go from 0 to {last}, got {rows}")


def select_rows(state: State, rows: Array) -> State:
    """The state whose row i is row rows[i] of `state`: forking a prompt, reordering beams.

    Raises ContextError for a row that is not there (outside jit).
    """
    _check_rows(state, rows)
    return jax.tree.map(lambda a: a[jnp.asarray(rows)], state)


def evict(
    state: State,
    policy: Literal["oldest", "all"],
    *,
    count: int = 0,
    sinks: int = 0,
    rows: Array | None = None,
) -> State:
    """Forget tokens, in all rows or where rows bool [B].

    "oldest": the `count` oldest that any layer remembers, after the first `sinks`; "all": everything, the length
    becomes 0. Evicted tokens become invisible. Positions are kept, so "oldest" frees room only in a state made
    with window= (there it also happens by itself); "all" frees the whole row.

    Raises ContextError for another policy, for "oldest" without a count, and for "oldest" of a recurrent layer.
    """
    if policy == "all":
        if count or sinks:
            raise ContextError("evict 'all' takes no count and no sinks; choose 'oldest' to keep some tokens")
        empty = replace(state, layers=tuple(map(_cleared, state.layers)), length=jnp.zeros_like(state.length))
        return empty if rows is None else _where(rows, empty, state)
    if policy != "oldest":
        raise ContextError(f"eviction policies are 'oldest' and 'all', got {policy!r}")
    if any(isinstance(c, Recurrent) for c in state.layers):
        raise ContextError("a recurrent layer cannot forget its oldest tokens; evict 'all' instead")
    if count < 1 or sinks < 0:
        raise ContextError(f"evict 'oldest' needs count >= 1 and sinks >= 0, got {count} and {sinks}")
    first = _oldest(state, sinks)
    less = replace(state, layers=tuple(_without(c, sinks, first + count) for c in state.layers))
    return less if rows is None else _where(rows, less, state)


def _where(rows: Array, a: State, b: State) -> State:
    return jax.tree.map(lambda x, y: jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y), a, b)


def _cleared(cache):
    if isinstance(cache, Recurrent):
        return jax.tree.map(jnp.zeros_like, cache)
    return replace(cache, pos=jnp.full_like(cache.pos, EMPTY))


def _oldest(state: State, sinks: int) -> Array:
    """i32 [B, 1]: the oldest position, from `sinks` on, that the next token of a row could see in any layer."""
    held = jnp.concatenate([c.pos for c in state.layers], 1)
    seen = held >= sinks
    if state.window:
        seen &= held > state.length[:, None] - state.window
    return jnp.min(jnp.where(seen, held, jnp.iinfo(jnp.int32).max // 2), 1, keepdims=True)


def _without(cache: KV | Latent, sinks: int, end: Array) -> KV | Latent:
    """The cache with positions from `sinks` up to `end` i32 [B, 1] evicted."""
    return replace(cache, pos=jnp.where((cache.pos >= sinks) & (cache.pos < end), EVICTED, cache.pos))


def nbytes(state: State) -> int:
    """Bytes of all arrays of the state; works on abstract ones too."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(state))


def save_state(state: State, path: str) -> None:
    """Write a state to one safetensors file; `load_state` gives it back bit for bit."""
    from safetensors.numpy import save

    from jaxllm.files import write_whole

    arrays = {str(i): np.asarray(a) for i, a in enumerate(jax.tree.leaves(state))}
    write_whole(path, save(arrays, metadata={"format": "jaxllm-state", "layout": _layout(state)}))


def load_state(path: str, like: State) -> State:
    """Read a state saved by `save_state` into the shape of `like` (an init_state with the same options).

    Raises CheckpointError where the file is damaged or was made with other options.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="flax") as file:
            found = (file.metadata() or {}).get("layout")
            arrays = [file.get_tensor(str(i)) for i in range(len(list(file.keys())))]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a saved state ({error}); save it again with save_state") from error
    if found != _layout(like):
        raise CheckpointError(f"{path} holds a state of another shape or model; make `like` with the same options")
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def _layout(state: State) -> str:
    leaves = [f"{a.dtype}{list(a.shape)}" for a in jax.tree.leaves(state)]
    return f"{state.capacity} {state.chunk} {state.window} {state.sinks} {' '.join(leaves)}"
