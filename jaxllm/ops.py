"""The front door to everything a kernel may replace. The code here is the definition.

A weight is an array [out, in] or a packed leaf (`QTensor`). What differs between platforms is chosen when
the program is lowered (`lax.platform_dependent`), so that exporting for another platform keeps its form. On CPU
the kernels of `jaxllm.native` are taken where they are built, on a TPU or GPU those of `jaxllm.kernels`; within
`portable()` none is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm import kernels, native, slots, softmax
from jaxllm.calls import call
from jaxllm.derivative import tangent
from jaxllm.native import packed
from jaxllm.partition import on_mesh, split
from jaxllm.quant import QTensor, adapted, dequantize, products
from jaxllm.quant.cache import CacheCodes, quantized

Array = jax.Array

_PORTABLE = jax.make_user_context(False)  # part of the key of every jitted program
_NAMED = jax.make_user_context(False)

_LAST = (((1,), (1,)), ((), ()))  # contract the last axis of both operands
FEW_ROWS = 32  # below this a gather of each row's expert beats sorting rows into blocks (CPU)
BLOCK_ROWS = 32  # rows of one expert multiplied at a time (CPU)
# What a mesh may cut: queries, keys, values, mask, sinks, bias and slopes
ATTENTION = "b t k g _, b k _ _, b k _ _, b t _, k g, b k t g _, k g -> b t k g _"


def portable(*, plain: bool = False, pallas: bool = False) -> AbstractContextManager[None]:
    """Within it, programs are traced without kernels of any platform: for export to machines without them.

    plain: and without scatters, sorts and loops, which small runtimes lack or take slowly. pallas: but with those
    that `kernels.compiled_for` or `kernels.interpreted_for` asks for, whose code is part of the program."""
    return _PORTABLE("plain" if plain else "pallas" if pallas else True)


def plain() -> bool:
    """Whether `portable(plain=True)` holds."""
    return _PORTABLE.value == "plain"


def _without_kernels() -> bool:
    return _PORTABLE.value not in (False, "pallas")


def named() -> AbstractContextManager[None]:
    """Within it, programs are traced with every operation here as one equation of `calls.call`, under the
    function's name: for converters to runtimes with operators of their own. They can be lowered no more."""
    return _NAMED(True)


def explain(x: Array, w: Array | QTensor) -> str:
    """Which code `matmul` of x [..., in] by w [out, in] becomes on CPU, and why no other. Shapes and dtypes do."""
    reason = _refused(packed.refuses(x, w) if isinstance(w, QTensor) else native.refuses_matmul(x, w))
    return f"XLA's dot; the native kernel is not taken: {reason}" if reason else f"native kernel, {native.level()}"


def _refused(reason: str | None) -> str | None:
    return "ops.portable() is on" if _PORTABLE.value else reason


def matmul(x: Array, w: Array | QTensor, *, out: jnp.dtype | None = None) -> Array:
    """x [..., in] times w [out, in] transposed -> [..., out], accumulated in f32, in `out` or x's dtype."""
    out = jnp.dtype(out or x.dtype)
    if isinstance(w, adapted.LoRA):
        return (matmul(x, w.w, out=jnp.float32) + adapted.added(x, w)).astype(out)
    if _NAMED.value:
        return call("matmul", x, w, shape=(*x.shape[:-1], w.shape[0]), dtype=out)
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(w, QTensor):
        y = _packed_product(rows, w, out)
    elif _refused(native.refuses_matmul(rows, w)):
        y = _xla_product(rows, w, out)
    else:
        y = _product(rows, w, out)
    return y.reshape(*x.shape[:-1], w.shape[0])


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _product(x: Array, w: Array, out: jnp.dtype) -> Array:
    kernel, summed = (functools.partial(native.matmul, out=dtype) for dtype in (out, jnp.float32))
    xla = functools.partial(_xla_product, out=out)
    return lax.platform_dependent(x, w, cpu=split(kernel, "m k, n k -> m n", summed), default=xla)


@functools.partial(_product.defjvp, symbolic_zeros=True)
def _product_jvp(out, primals, tangents):
    return _product(*primals, out), tangent(functools.partial(_xla_product, out=out), primals, tangents)


def _xla_product(x: Array, w: Array, out: jnp.dtype) -> Array:
    dtype = jnp.promote_types(x.dtype, w.dtype)
    x, w = x.astype(dtype), w.astype(dtype)
    exact = dtype == jnp.float32
    y = _dot(x, w) if exact else lax.platform_dependent(x, w, cpu=_dot_padded, default=_dot)
    return y.astype(out)


def _packed_product(x: Array, q: QTensor, out: jnp.dtype) -> Array:
    if q.order is not None:
        x, q = x[:, q.order], replace(q, order=None)
    return products.matmul(x, q).astype(out) if _without_kernels() else _packed(x, q, out)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _packed(x: Array, q: QTensor, out: jnp.dtype) -> Array:
    # The definition is split like the kernels: it takes blocks of rows in a loop, which XLA would gather.
    piece = functools.partial(_packed_piece, platforms=kernels.platforms())
    f, summed = (functools.partial(piece, out=dtype) for dtype in (out, jnp.float32))
    return split(f, "m k, n k -> m n" if q.divisible else "m _, n _ -> m n", summed)(x, q)


@functools.partial(_packed.defjvp, symbolic_zeros=True)
def _packed_jvp(out, primals, tangents):
    return _packed(*primals, out), tangent(products.matmul, primals, tangents).astype(out)


def _packed_piece(x: Array, q: QTensor, *, out: jnp.dtype, platforms: tuple[str, ...]) -> Array:
    q = replace(q, columns=x.shape[1])
    by_platform = {p: lambda x, q, f=f: f(x, q).astype(out) for p, f in kernels.matmul(x, q, platforms).items()}
    if _refused(packed.refuses(x, q)) is None:
        by_platform["cpu"] = functools.partial(packed.matmul, out=out)
    return _by_platform(by_platform, lambda x, q: products.matmul(x, q).astype(out), x, q)


def _by_platform(found: dict[str, Callable], default: Callable, *args) -> Array:
    return lax.platform_dependent(*args, **found, default=default) if found else default(*args)


def matmuls(x: Array, weights: Sequence[Array | QTensor]) -> list[Array]:
    """`matmul` of x [..., in] by each of the weights [out, in], in x's dtype: at once where a kernel can."""
    if _NAMED.value or not _at_once(x, weights):
        return [matmul(x, w) for w in weights]
    ys = _several(x.reshape(-1, x.shape[-1]), tuple(weights))
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys]


def _at_once(x: Array, weights: Sequence[Array | QTensor]) -> bool:
    # On a mesh each weight is cut in its own way.
    packs = all(isinstance(w, QTensor) for w in weights) and not on_mesh()
    return packs and not _refused(packed.refuses_several(x, weights))


@jax.custom_jvp
def _several(x: Array, weights: tuple[QTensor, ...]) -> list[Array]:
    each = lambda x, weights: [_packed(x, q, x.dtype) for q in weights]
    kernel = functools.partial(packed.several, out=x.dtype)
    return lax.platform_dependent(x, weights, cpu=kernel, default=each)


@functools.partial(_several.defjvp, symbolic_zeros=True)
def _several_jvp(primals, tangents):
    each = lambda x, weights: [products.matmul(x, q).astype(x.dtype) for q in weights]
    return _several(*primals), tangent(each, primals, tangents)


def gated(x: Array, gate: Array, up: Array, act: str, activate: Callable) -> Array:
    """activate(act, x gate, x up) in x's dtype: x [..., in], gate and up [out, in] -> [..., out].

    `activate(act, a, b)` of two f32 arrays is the definition; `act` names it to a kernel that does all at once.
    """
    kernel = _gating(x, gate, up, act)
    if kernel is None:
        return _gated_apart(x, gate, up, act, activate)
    y = _gated(x.reshape(-1, x.shape[-1]), gate, up, act, activate, kernel)
    return y.reshape(*x.shape[:-1], gate.shape[0])


def _gating(x: Array, gate: Array | QTensor, up: Array | QTensor, act: str) -> Callable | None:
    """The kernel that takes these, if there is one."""
    if _NAMED.value:
        return None
    both = [kind for kind in (QTensor, jax.Array) if isinstance(gate, kind) and isinstance(up, kind)]
    if not both:
        return None
    module = packed if both[0] is QTensor else native
    return None if _refused(module.refuses_gated(x, gate, up, act)) else module.gated


def _gated_apart(x: Array, gate: Array, up: Array, act: str, activate: Callable) -> Array:
    return activate(act, matmul(x, gate, out=jnp.float32), matmul(x, up, out=jnp.float32)).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _gated(x: Array, gate: Array | QTensor, up: Array | QTensor, act: str, activate: Callable, kernel) -> Array:
    apart = functools.partial(_gated_apart, act=act, activate=activate)
    one = split(functools.partial(kernel, act=act), "m _, n _, n _ -> m n")
    return lax.platform_dependent(x, gate, up, cpu=one, default=apart)


@functools.partial(_gated.defjvp, symbolic_zeros=True)
def _gated_jvp(act, activate, kernel, primals, tangents):
    apart = functools.partial(_gated_apart, act=act, activate=activate)
    return _gated(*primals, act, activate, kernel), tangent(apart, primals, tangents)


def _dot(x: Array, w: Array) -> Array:
    return lax.dot_general(x, w, _LAST, preferred_element_type=jnp.float32)


def _dot_padded(x: Array, w: Array) -> Array:
    # One row of bf16 falls to a path that first expands w to f32 (4 times slower); four rows do not.
    short = max(0, 4 - x.shape[0])
    return _dot(jnp.pad(x, ((0, short), (0, 0))), w)[: x.shape[0]]


def per_head(x: Array, w: Array | QTensor) -> Array:
    """x [B, T, H, in] times each head's w [H, out, in] -> [B, T, H, out] in x's dtype."""
    if _NAMED.value:
        return call("per_head", x, w, shape=(*x.shape[:-1], w.shape[1]), dtype=x.dtype)
    w = dequantize(w, x.dtype) if isinstance(w, QTensor) else w
    y = jnp.einsum("bthi,hoi->btho", x, w.astype(x.dtype), preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def embed(w: Array | QTensor, tokens: Array) -> Array:
    """Rows of w [V, D] for tokens i32 [...] -> [..., D]; an id beyond the vocabulary gives NaN, no wrong row."""
    if isinstance(w, adapted.LoRA):
        x = embed(w.w, tokens)
        return (x + adapted.added_rows(tokens, w)).astype(x.dtype)
    if _NAMED.value:
        return call("embed", w, tokens, shape=(*tokens.shape, w.shape[1]), dtype=w.dtype)
    if isinstance(w, QTensor):
        return products.embed(w, tokens)
    number = tokens.reshape(-1, 1).astype(jnp.int32)
    if plain():
        return _plain_embed(w, number).reshape(*tokens.shape, w.shape[1])
    x = (_xla_embed if _refused(native.refuses_rows(w)) else _embed)(w, number)
    return x.reshape(*tokens.shape, w.shape[1])


@jax.custom_jvp
def _embed(w: Array, number: Array) -> Array:
    piece = lambda w, number, ids: native.rows(w, number)
    kernel = split(piece, "v d, n _, v -> n d", functools.partial(_own_rows, vocab=len(w)))
    cpu = lambda w, number: kernel(w, number, lax.iota(jnp.int32, len(w)))
    return lax.platform_dependent(w, number, cpu=cpu, default=_xla_embed)


@functools.partial(_embed.defjvp, symbolic_zeros=True)
def _embed_jvp(primals, tangents):
    return _embed(*primals), tangent(_xla_embed, primals, tangents)


def _xla_embed(w: Array, number: Array) -> Array:
    return w.at[number[:, 0]].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _plain_embed(w: Array, number: Array) -> Array:
    there = (number >= 0) & (number < w.shape[0])
    return jnp.where(there, jnp.take(w, jnp.clip(number[:, 0], 0, w.shape[0] - 1), axis=0, mode="clip"), jnp.nan)


def _own_rows(w: Array, number: Array, ids: Array, *, vocab: int) -> Array:
    """What a device that has the rows `ids` of all adds to the result: zeros for those of others."""
    own = (number >= ids[0]) & (number <= ids[-1])
    nowhere = (number < 0) | (number >= vocab)
    return jnp.where(own | nowhere, native.rows(w, jnp.where(own, number - ids[0], -1)), 0)


def grouped_matmul(x: Array, w: Array | QTensor, expert: Array) -> Array:
    """Row i of x [R, in] times w[expert[i]] (w [E, out, in]) -> f32 [R, out]. `expert` i32 [R] never decreases.

    The work grows with R, not with E. Differentiable in x and w to any order.
    """
    if _NAMED.value:
        return call("grouped_matmul", x, w, expert, shape=(x.shape[0], w.shape[1]), dtype=jnp.float32)
    return _grouped(x, w if isinstance(w, QTensor) else w.astype(x.dtype), expert)


@jax.custom_jvp
def _grouped(x: Array, w: Array | QTensor, expert: Array) -> Array:
    if _without_kernels():  # `ragged_dot` is no operation of StableHLO, and XLA for CPU has none
        return (_xla_packed_grouped if isinstance(w, QTensor) else _grouped_cpu)(x, w, expert)
    piece = functools.partial(_grouped_piece, platforms=kernels.platforms())
    whole = lambda x, w, expert, ids: piece(x, w, expert)
    k = "k" if not isinstance(w, QTensor) or w.divisible else "_"
    rule = f"m {k}, e n {k}, m, e -> m n"
    return split(whole, rule, functools.partial(_of_own_experts, piece))(x, w, expert, np.arange(w.shape[0]))


@functools.partial(_grouped.defjvp, symbolic_zeros=True)
def _grouped_jvp(primals, tangents):
    # The CPU form loops to a bound known only at run time, which reverse mode cannot follow; `ragged_dot` can.
    definition = _xla_packed_grouped if isinstance(primals[1], QTensor) else _ragged
    definition = functools.partial(definition, expert=primals[2])
    return _grouped(*primals), tangent(definition, primals[:2], tangents[:2])


def _grouped_piece(x: Array, w: Array | QTensor, expert: Array, platforms: tuple[str, ...]) -> Array:
    if not isinstance(w, QTensor):
        by_platform, definition = {"cpu": _grouped_cpu}, _grouped_cpu if _PORTABLE.value else _ragged
    else:
        w, by_platform, definition = replace(w, columns=x.shape[1]), {}, _xla_packed_grouped
        if w.order is None and _refused(packed.refuses(x, w)) is None:
            by_platform["cpu"] = packed.grouped
    return _by_platform(by_platform | kernels.grouped_matmul(x, w, platforms), definition, x, w, expert)


def _of_own_experts(piece: Callable, x: Array, w: Array | QTensor, expert: Array, ids: Array) -> Array:
    """What a device that has the experts `ids` of all adds to the result: zeros for the rows of others."""
    own = expert - ids[0]
    y = piece(x, w, jnp.clip(own, 0, len(ids) - 1))
    return jnp.where(((own >= 0) & (own < len(ids)))[:, None], y, 0.0)


def _xla_packed_grouped(x: Array, q: QTensor, expert: Array) -> Array:
    return products.grouped_matmul(x, q, expert, few=FEW_ROWS, size=BLOCK_ROWS)


def _ragged(x: Array, w: Array, expert: Array) -> Array:
    sizes = jnp.bincount(expert, length=w.shape[0]).astype(jnp.int32)
    return lax.ragged_dot(x, w.swapaxes(1, 2), sizes, preferred_element_type=jnp.float32)


def _grouped_cpu(x: Array, w: Array, expert: Array) -> Array:
    if isinstance(x.shape[0], int) and x.shape[0] <= FEW_ROWS:  # a symbolic number may be large
        return jnp.einsum("ri,roi->ro", x, w[expert], preferred_element_type=jnp.float32)
    return _grouped_blocks(x, w, expert)


def _grouped_blocks(x: Array, w: Array, expert: Array) -> Array:
    """Rows padded so that every block of BLOCK_ROWS has one expert, then one product a used block.

    Measured (32 experts of 512x1024, f32, 2048 rows): 29 ms, `lax.ragged_dot` 340 ms, all experts 107 ms.
    """
    M = BLOCK_ROWS
    blocks, owner, used, place = products.expert_blocks(x, expert, experts=w.shape[0], size=M)

    def one(i, y):
        block = lax.dynamic_index_in_dim(blocks, i, keepdims=False)
        weight = lax.dynamic_index_in_dim(w, owner[i], keepdims=False)
        return lax.dynamic_update_slice_in_dim(y, _dot(block, weight), i * M, 0)

    y = jnp.zeros((blocks.shape[0] * M, w.shape[1]), jnp.float32)
    return lax.fori_loop(0, used, one, y)[place]


def norm(x: Array, w: Array, b: Array | None = None, *, eps: float, centered: bool = False) -> Array:
    """RMSNorm (arXiv 1910.07467), or LayerNorm (1607.06450) where centered, of x [..., D] in f32, as x's dtype.

    w, b: [D], or what broadcasts to x.
    """
    if _NAMED.value:
        return call("norm", x, w, b, shape=x.shape, dtype=x.dtype, eps=eps, centered=centered)
    rows = x.reshape(-1, x.shape[-1])
    if _refused(native.refuses_norm(x, w, b)):
        return _xla_norm(x, w, b, eps, centered)
    return _norm(rows, w, b, eps, centered).reshape(x.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _norm(x: Array, w: Array, b: Array | None, eps: float, centered: bool) -> Array:
    kernel = split(functools.partial(native.norm, eps=eps, centered=centered), "m _, _, _ -> m _")
    xla = functools.partial(_xla_norm, eps=eps, centered=centered)
    return lax.platform_dependent(x, w, b, cpu=kernel, default=xla)


@functools.partial(_norm.defjvp, symbolic_zeros=True)
def _norm_jvp(eps, centered, primals, tangents):
    xla = functools.partial(_xla_norm, eps=eps, centered=centered)
    return _norm(*primals, eps, centered), tangent(xla, primals, tangents)


def _xla_norm(x: Array, w: Array, b: Array | None, eps: float, centered: bool) -> Array:
    y = x.astype(jnp.float32)
    if centered:
        y = y - y.mean(-1, keepdims=True)
    y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps) * w.astype(jnp.float32)
    return (y if b is None else y + b.astype(jnp.float32)).astype(x.dtype)


def once(x: Array) -> Array:
    """x, which has no gradient, worked out once however many layers use it.

    XLA for CPU removes its barriers before it joins operations, and then repeats costly ones in every user.
    """
    if _NAMED.value:
        return x
    x = lax.optimization_barrier(x)
    axes = " ".join("abcdefgh"[: x.ndim])
    kept = split(native.keep, f"{axes} -> {axes}")
    return x if _refused(native.unavailable()) else lax.platform_dependent(x, cpu=kept, default=lambda x: x)


def put(cache: Array | CacheCodes, x: Array, slot: Array) -> Array | CacheCodes:
    """`cache` [B, K, S, h] with x [B, T, K, h] written at slots i32 [B, T]; slots of S or more are dropped."""
    if isinstance(cache, CacheCodes):
        x = quantized(x, cache)
        return replace(cache, codes=put(cache.codes, x.codes, slot), scale=put(cache.scale, x.scale, slot))
    x = x.astype(cache.dtype)
    if _NAMED.value:
        return call("put", cache, x, slot, shape=cache.shape, dtype=cache.dtype)
    if plain():
        return slots.chosen(cache, x.swapaxes(1, 2), slot)
    return (_xla_put if _refused(native.refuses_put(cache)) else _put)(cache, x, slot)


@jax.custom_jvp
def _put(cache: Array, x: Array, slot: Array) -> Array:
    kernel = split(native.put, "b k _ h, b _ k h, b _ -> b k _ h")
    return lax.platform_dependent(cache, x, slot, cpu=kernel, default=_scatter)


@_put.defjvp
def _put_jvp(primals, tangents):
    # Linear in both; a scatter would be, too, but reverse mode has no transpose of one whose slots may repeat.
    return _put(*primals), _select(*tangents[:2], primals[2])


def _xla_put(cache: Array, x: Array, slot: Array) -> Array:
    if cache.dtype == jnp.float32:
        return _scatter(cache, x, slot)
    return lax.platform_dependent(cache, x, slot, cpu=_select, default=_scatter)


def _scatter(cache: Array, x: Array, slot: Array) -> Array:
    return slots.scattered(cache, x, slot, inside=bool(_PORTABLE.value))


def _select(cache: Array, x: Array, slot: Array) -> Array:
    return slots.selected(cache, x, slot, inside=bool(_PORTABLE.value))


def put_each(a: Array, x: Array, slot: Array) -> Array:
    """`a` [B, S] with x [B, T] written at slots i32 [B, T]; slots of S or more are dropped."""
    if plain():
        return slots.chosen(a[:, None, :, None], x[:, None, :, None], slot)[:, 0, :, 0]
    return slots.each(a, x, slot, inside=bool(_PORTABLE.value))


def attend(
    q: Array, k: Array | CacheCodes, v: Array | CacheCodes, mask: Array, *, sinks: Array | None = None, **scoring
) -> Array:
    """Softmax attention of q [B, T, K, G, h] over k [B, K, S, h], v [B, K, S, j] -> [B, T, K, G, j] in q's dtype.

    The other arguments as in `softmax.attention_weights`.
    """
    numbers = dict(scale=scoring["scale"], softcap=scoring.get("softcap"))
    if _NAMED.value:
        extras = (sinks, scoring.get("bias"), scoring.get("slopes"))
        return call("attend", q, k, v, mask, *extras, shape=(*q.shape[:-1], v.shape[-1]), dtype=q.dtype, **numbers)
    if not _attention_kernels(q, k, v, scoring.get("bias"), numbers):
        return softmax.attend(q, k, v, mask, sinks=sinks, **scoring)
    return _attend(q, k, v, mask, sinks, scoring.get("bias"), scoring.get("slopes"), *numbers.values())


def _attention_kernels(q, k, v, bias: Array | None, numbers: dict) -> dict[str, Callable]:
    """By platform, with the arguments of `_attend` that are arrays."""
    found = {} if _without_kernels() else kernels.attend(q, k, v, bias, kernels.platforms(), **numbers)
    if _held(k) == _held(v) and not _refused(native.refuses_attend(q, k, v)):
        found["cpu"] = functools.partial(_native_attend, **numbers)
    return {platform: split(f, ATTENTION) for platform, f in found.items()}


def _held(cache: Array | CacheCodes) -> str | None:
    return cache.format if isinstance(cache, CacheCodes) else None


@functools.partial(jax.custom_jvp, nondiff_argnums=(7, 8))
def _attend(q, k, v, mask, sinks, bias, slopes, scale: float, softcap: float | None) -> Array:
    numbers = dict(scale=scale, softcap=softcap)
    xla = lambda q, k, v, mask, sinks, bias, slopes: softmax.attend(
        q, k, v, mask, sinks=sinks, bias=bias, slopes=slopes, **numbers
    )
    by_platform = _attention_kernels(q, k, v, bias, numbers)
    return lax.platform_dependent(q, k, v, mask, sinks, bias, slopes, **by_platform, default=xla)


def _native_attend(q, k, v, mask, *extras: Array | None, **scoring) -> Array:
    if _held(k) is None:
        return native.attend(q, k, v, mask, *extras, **scoring)
    return native.attend(q, k.codes, v.codes, mask, *extras, (k.scale, v.scale), held=k.format, **scoring)


@_attend.defjvp
def _attend_jvp(scale, softcap, primals, tangents):
    mask = primals[3]

    def xla(q, k, v, sinks, bias, slopes):
        extras = dict(sinks=sinks, bias=bias, slopes=slopes)
        return softmax.attend(q, k, v, mask, **extras, scale=scale, softcap=softcap)

    linear = [(*side[:3], *side[4:]) for side in (primals, tangents)]
    return _attend(*primals, scale, softcap), jax.jvp(xla, *linear)[1]
