"""What memory a model needs in any weight format, from its config alone: nothing is loaded or allocated."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import native
from jaxllm.config import MLA, Attention, Block, ModelConfig, MoE, params_shape
from jaxllm.decode import PREFILL_CHUNK
from jaxllm.errors import ConfigError
from jaxllm.model import DTYPES
from jaxllm.native.packed import refuses_format
from jaxllm.ops import BLOCK_ROWS, FEW_ROWS
from jaxllm.quant.cache import CacheCodes
from jaxllm.quant.encode import encode
from jaxllm.quant.formats import UNQUANTIZED, Format
from jaxllm.quant.products import BLOCK_WEIGHTS, SMALL_WEIGHTS
from jaxllm.quant.recipe import Recipe, recipe
from jaxllm.state import KV, Latent, Recurrent, State, init_state, nbytes


@dataclass(frozen=True)
class Plan:
    """Parameters (counts) and memory (bytes) of a model and one decode state of it."""

    batch: int
    context: int  # tokens each row has room for
    chunk: int  # tokens of each row that one prefill step appends
    dtype: str  # of activations and cache, and of matrices that are not quantized
    format: str | None  # of the weights: its name, "recipe", or None where they stay as `load` gives them
    parameters: int
    active_parameters: int  # used by one token: of the routed experts only those chosen
    parts: dict[str, int]  # parameters by part: embed, attention, mlp, ...; they add up to `parameters`
    parameter_bytes: int  # as `load(dtype=...)` holds them, or `quantize` makes them
    state_bytes: int  # of init_state(config, batch, context, chunk=chunk)
    activation_bytes: int  # an estimate of a prefill step's temporaries, see `plan`
    logits_bytes: int  # f32 [batch, V] twice: logits and log-probabilities of one step

    @property
    def bits_per_weight(self) -> float:
        """Of all parameters, scales included."""
        return 8 * self.parameter_bytes / self.parameters

    @property
    def total_bytes(self) -> int:
        """Parameters, state and the larger of activations and logits, which do not live at the same time."""
        return self.parameter_bytes + self.state_bytes + max(self.activation_bytes, self.logits_bytes)


def plan(
    config: ModelConfig,
    *,
    batch: int = 1,
    context: int | None = None,
    chunk: int | None = None,
    dtype: str | None = None,
    format: str | Format | Recipe | None = None,
    kv_format: str | None = None,
) -> Plan:
    """The Plan of a model, with the numbers of the runtime itself: params_shape and an abstract init_state.

    context: default config.max_len. chunk: default that of `generate`, at most the context. dtype: as `load`
    takes it, default config.dtype; parameters with one axis (norms, biases) stay config.dtype. format: as
    `quantize_model` takes it; its bytes are those that quantizing gives, exactly. kv_format: as
    `init_state` takes it.

    activation_bytes estimates the temporaries of one prefill step: two residual streams [B, C, D]; the largest
    of the layers' needs, which are the mixer's arrays (queries, keys, values, output; scores and probabilities
    f32 [B, H, C, S] where no native kernel is in use; the layer's cache once more, laid out for the products) or
    the feed-forward's (three [B, C, F]); for every layer what its loops hold (routed experts, recurrences,
    products of packed matrices without a kernel), for XLA shares no loop's buffers between layers; and what a
    product with a packed matrix needs. For chunks of 32 tokens and more in float32 on CPU it is 0.9 to 1.7 times
    what XLA allots; bfloat16 takes about twice as much there, because XLA for CPU widens it to float32.

    Raises ConfigError for an unknown dtype or format, a rule that decides about nothing, or a format whose own
    dtype is another than the one given; ContextError where the context is too long for the model.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype should be one of {', '.join(DTYPES)}, got {dtype!r}")
    context = config.max_len if context is None else context
    chunk = min(PREFILL_CHUNK if chunk is None else chunk, context)
    rules = None if format is None else format if isinstance(format, Recipe) else recipe(format, config)
    if rules and dtype and rules.dtype not in (None, dtype):
        raise ConfigError(f"{_named(format)} computes in {rules.dtype}; leave out dtype, which is {dtype}")
    live = replace(config, dtype=(rules and rules.dtype) or dtype or config.dtype)
    state = jax.eval_shape(partial(init_state, live, batch, context, chunk=chunk, kv_format=kv_format))
    shapes = params_shape(config)
    formats = rules.assign(shapes) if rules else {}
    return Plan(
        batch=batch,
        context=context,
        chunk=chunk,
        dtype=live.dtype,
        format=_named(format),
        parameters=sum(map(math.prod, shapes.values())),
        active_parameters=_active(config, shapes),
        parts=_parts(config, shapes),
        parameter_bytes=_parameter_bytes(config, live, shapes, formats),
        state_bytes=nbytes(state),
        activation_bytes=_activations(live, state, batch * chunk) + _expanded(shapes, formats, batch * chunk),
        logits_bytes=2 * 4 * batch * config.vocab,
    )


Shapes = dict[str, tuple[int, ...]]
Formats = dict[str, Format | None]


def _block(path: str, config: ModelConfig) -> tuple[Block | None, list[str]]:
    """(the block a parameter belongs to, its path there)."""
    names = path.split(".")
    return (config.blocks[int(names[1])], names[2:]) if names[0] == "layers" else (None, names)


def _parts(config: ModelConfig, shapes: Shapes) -> dict[str, int]:
    found: Counter[str] = Counter()
    for path, shape in shapes.items():
        block, names = _block(path, config)
        part = names[0] if block is None else type(getattr(block, names[0])).__name__.lower()
        found[part] += math.prod(shape)
    return dict(found)


def _active(config: ModelConfig, shapes: Shapes) -> int:
    total = 0
    for path, shape in shapes.items():
        block, names = _block(path, config)
        routed = (
            block and isinstance(block.ffn, MoE) and names[:1] == ["ffn"] and names[1] in ("gate", "up", "down")
        )
        total += math.prod(shape) * block.ffn.top_k // block.ffn.experts if routed else math.prod(shape)
    return total


def _named(format: str | Format | Recipe | None) -> str | None:
    match format:
        case Format():
            return format.name
        case Recipe():
            return "recipe"
    return format


def _parameter_bytes(stored: ModelConfig, live: ModelConfig, shapes: Shapes, formats: Formats) -> int:
    """`load` and `quantize` cast matrices and leave vectors as they are."""
    vector, matrix = (jnp.dtype(c.dtype).itemsize for c in (stored, live))

    def one(path: str, shape: tuple[int, ...]) -> int:
        if formats.get(path):
            return math.prod(shape[:-1]) * row_bytes(formats[path], shape[-1])
        return math.prod(shape) * (matrix if len(shape) > 1 else vector)

    return sum(one(path, shape) for path, shape in shapes.items())


@lru_cache(maxsize=1024)
def row_bytes(format: Format, columns: int) -> int:
    """Bytes of one row of a weight in a format, scales and zeros included.

    Every part of a packed weight has a line for each row, so the row is simply made and measured."""
    if format.name in UNQUANTIZED:
        return columns * jnp.dtype(format.levels).itemsize
    return encode(np.zeros((1, columns), np.float32), format).nbytes


# ---- activations ----------------------------------------------------------------------------------------


def _activations(config: ModelConfig, state: State, rows: int) -> int:
    """Bytes of a prefill step's temporaries, for rows = batch * chunk new tokens."""
    item = jnp.dtype(config.dtype).itemsize
    shared, looped = 0, 0
    for block, cache in zip(config.blocks, state.layers, strict=True):
        (mixed, a), (fed, b) = _mixer(block, cache, rows, item), _ffn(block, rows, config.width, item)
        shared, looped = max(shared, mixed, fed), looped + a + b
    return 2 * rows * config.width * item + shared + looped


def _mixer(block: Block, cache: KV | Latent | Recurrent, rows: int, item: int) -> tuple[int, int]:
    """(bytes that layers share in turn, bytes of loops, which each layer keeps)."""
    match block.mixer:
        case Attention() as m:
            projected = 2 * (m.heads + m.kv_heads) * m.head_dim
        case MLA() as m:
            projected = m.heads * (2 * m.kv_rank + m.nope_dim + 2 * m.rope.dims + m.v_dim)
        case _:  # projections, the convolution's line, gates and the scan's inputs; the scan's output
            wide = 4 * rows * cache.conv.shape[-1]
            return 7 * wide + _bytes(cache), wide
    seen = 4 * rows * cache.pos.shape[1]  # one f32 for each new token and slot
    apart = (seen if getattr(m, "alibi", None) else 0) if _blockwise(cache) else _scores(m, cache, seen, item)
    return rows * projected * item + apart + _bytes(cache), 0


def _scores(m: Attention | MLA, cache: KV | Latent, seen: int, item: int) -> int:
    """Without the kernel: scores twice, and keys and values kept in few bits expanded."""
    lines = [line for line in vars(cache).values() if isinstance(line, CacheCodes)]
    return 2 * seen * m.heads + sum(math.prod(line.shape) * item for line in lines)


def _blockwise(cache: KV | Latent) -> bool:
    """Whether the kernel that keeps no scores takes attention to this cache, on a CPU."""
    line = cache.k if isinstance(cache, KV) else cache.c
    return native.refuses_attend(line, line, line) is None


def _ffn(block: Block, rows: int, width: int, item: int) -> tuple[int, int]:
    match block.ffn:
        case None:
            return 0, 0
        case MoE() as m:
            return _moe(m, rows, width, item)
    return 3 * rows * block.ffn.hidden * item, 0


def _moe(m: MoE, rows: int, width: int, item: int) -> tuple[int, int]:
    """Few rows gather their experts' matrices; many are padded to blocks of one expert, in loops."""
    routed, shared = rows * m.top_k, 3 * rows * m.shared * item
    if routed <= FEW_ROWS:
        return shared + 3 * routed * m.hidden * width * item, 0
    return shared, 3 * 4 * (routed + m.experts * BLOCK_ROWS) * (m.hidden + width)


def _expanded(shapes: Shapes, formats: Formats, rows: int) -> int:
    """What products with packed matrices need beside x and y.

    The kernel takes x once more, in at most 16 bits and with a scale for each block. XLA expands a block of the
    largest matrix in f32 beside its codes, and makes all layers' products in loops; small matrices it expands
    whole, those of all layers at once."""
    packed = [(shapes[p], f) for p, f in formats.items() if f and f.name not in UNQUANTIZED and p != "embed.w"]
    columns = [shape[-1] for shape, f in packed if refuses_format(f) is None]
    loops = [shape for shape, f in packed if refuses_format(f) is not None]
    sizes = [shape[-2] * shape[-1] for shape in loops]
    small = sum(4 * size for size in sizes if size <= SMALL_WEIGHTS)
    products = sum(4 * rows * shape[-2] for shape, size in zip(loops, sizes, strict=True) if size > SMALL_WEIGHTS)
    kernel = 5 * rows * max(columns, default=0) // 2
    return kernel + small + products + 5 * min(max(sizes, default=0) // 2, BLOCK_WEIGHTS)


def _bytes(cache: KV | Latent | Recurrent) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(cache))
