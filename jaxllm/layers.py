"""The maths, as pure functions over parameter dicts.

B batch, T new tokens, S cache slots, D width, H heads, K kv heads, G = H/K, h head dim, F hidden, E experts,
V vocabulary, r latent rank, N = B*T.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm import ops, softmax
from jaxllm.basics import F32, activate, gated, linear, linears, norm, rotate, turn
from jaxllm.config import (
    MLA,
    MLP,
    Attention,
    Block,
    DeltaNet,
    Mamba,
    Mamba2,
    ModelConfig,
    MoE,
    QKNorm,
    ShortConv,
)
from jaxllm.errors import ContextError
from jaxllm.recurrent import delta_net, mamba, mamba2, short_conv
from jaxllm.state import KV, Latent, State, Step, begin, init_state, visible, write
from jaxllm.taps import Recorder, Taps

Array = jax.Array


# ---- attention ------------------------------------------------------------------------------------------


def attention(m: Attention, p: dict, x: Array, cache: KV, step: Step, tap: Recorder):
    """Multi-head attention with grouped keys; x [B, T, D] -> ([B, T, D], cache)."""
    B, T, _ = x.shape
    H, K, h = m.heads, m.kv_heads, m.head_dim
    q, k, v = linears([p[name] for name in "qkv"], x)
    if m.qk_norm and m.qk_norm.over == "full":
        q, k = _qk_norm(m.qk_norm, p, q, k)
    if m.clip:
        q, k, v = (jnp.clip(a, -m.clip, m.clip) for a in (q, k, v))
    q, k, v = q.reshape(B, T, H, h), k.reshape(B, T, K, h), v.reshape(B, T, K, h)
    q, k = _place(m, p, q, k, step)
    q, k, v = tap("mixer.q", q), tap("mixer.k", k), tap("mixer.v", v)
    cache = write(cache, (k, v), step)
    mask = visible(cache, step, m.window, m.chunk)
    q = q.reshape(B, T, K, H // K, h).astype(cache.k.dtype)
    y = _attend(q, cache.k, cache.v, mask, tap, **_scoring(m, p, cache, step))
    y = tap("mixer.heads", y.reshape(B, T, H, h)).reshape(B, T, H * h).astype(x.dtype)
    if m.gate:
        y = y * jax.nn.sigmoid(linear(p["gate"], x))
    if m.out_norm:
        y = norm(m.out_norm, p["out_norm"], y)
    return linear(p["o"], tap("mixer.joined", y)), cache


def _place(m: Attention, p: dict, q: Array, k: Array, step: Step):
    """Norm and rotate queries and keys, in the order the model wants."""
    per_head = m.qk_norm if m.qk_norm and m.qk_norm.over != "full" else None
    if per_head and not per_head.after_rope:
        q, k = _qk_norm(per_head, p, q, k)
    q, k = rotate(q, step.turn(m.rope)), rotate(k, step.turn(m.rope))
    if per_head and per_head.after_rope:
        q, k = _qk_norm(per_head, p, q, k)
    if m.query_scale:
        steps = jnp.floor((step.pos.astype(F32) + 1) / m.query_scale.every)
        scale = 1 + jnp.log(steps + 1) * m.query_scale.factor
        q = (q * scale[:, :, None, None]).astype(q.dtype)
    return q, k


def _qk_norm(n: QKNorm, p: dict, q: Array, k: Array):
    return norm(n.norm, p["q_norm"], q), norm(n.norm, p["k_norm"], k)


def _scoring(m: Attention, p: dict, cache: KV, step: Step) -> dict:
    G = m.heads // m.kv_heads
    bias = slopes = sinks = None
    if m.alibi:
        bias = (cache.pos[:, None, :] - step.pos[:, :, None]).astype(F32)[:, None, :, None]  # [B, 1, T, 1, S]
        slopes = jnp.asarray(m.alibi, F32).reshape(m.kv_heads, G)
    if m.sinks:
        sinks = p["sinks"].reshape(m.kv_heads, G)
    return dict(scale=m.scale, softcap=m.softcap, bias=bias, slopes=slopes, sinks=sinks)


def _attend(q: Array, k: Array, v: Array, mask: Array, tap: Recorder, **scoring) -> Array:
    if not tap.wants("mixer.scores"):
        return ops.attend(q, k, v, mask, **scoring)
    weights = softmax.attention_weights(q, k, mask, **scoring)  # [B, K, T, G, S]
    B, K, T, G, S = weights.shape
    flat = tap("mixer.scores", weights.transpose(0, 1, 3, 2, 4).reshape(B, K * G, T, S))
    y = softmax.weighted_sum(flat.reshape(B, K, G, T, S).transpose(0, 1, 3, 2, 4), v)
    return y.astype(q.dtype).transpose(0, 2, 1, 3, 4)


def latent_attention(m: MLA, p: dict, x: Array, cache: Latent, step: Step, tap: Recorder):
    """Multi-head latent attention (arXiv 2405.04434), keys and values absorbed into queries and outputs."""
    B, T, _ = x.shape
    n, r = m.nope_dim, m.kv_rank
    q, c = linears([p["q_a" if m.q_rank else "q"], p["kv_a"]], x)
    q = linear(p["q"], norm(m.norm, p["q_norm"], q)) if m.q_rank else q
    q, c = q.reshape(B, T, m.heads, n + m.rope.dims), c[:, :, None]  # [B, T, 1, r + rope dims]
    latent = norm(m.norm, p["kv_norm"], c[..., :r])
    turned = step.turn(m.rope)
    c = jnp.concatenate([latent, rotate(c[..., r:], turned)], -1)
    cache = write(cache, (c,), step)
    q = jnp.concatenate([ops.per_head(q[..., :n], p["k_b"]), rotate(q[..., n:], turned)], -1)
    mask = visible(cache, step)
    q = q[:, :, None].astype(cache.c.dtype)  # one kv head: [B, T, 1, H, r + rope dims]
    # The rotary part is summed too and dropped after: a slice of the cache would be copied at every step.
    y = _attend(q, cache.c, cache.c, mask, tap, scale=m.scale)[:, :, 0, :, :r].astype(x.dtype)
    y = tap("mixer.heads", ops.per_head(y, p["v_b"]))
    return linear(p["o"], y.reshape(B, T, m.heads * m.v_dim)), cache


# ---- feed-forward ---------------------------------------------------------------------------------------


def mlp(m: MLP, p: dict, x: Array, tap: Recorder) -> Array:
    """Two matrices, or three where gated (arXiv 2002.05202); [..., D] -> [..., D]."""
    hidden = gated(m.act, p, x) if m.gated else activate(m.act, linear(p["up"], x, out=F32)).astype(x.dtype)
    if m.norm:
        hidden = norm(m.norm, p["norm"], hidden)
    return linear(p["down"], tap("ffn.hidden", hidden))


def moe(m: MoE, p: dict, x: Array, tap: Recorder) -> Array:
    """Routed experts; only the chosen ones are computed. [B, T, D] -> [B, T, D]."""
    B, T, D = x.shape
    rows = x.reshape(B * T, D)
    expert, weight = route(m, p["router"], rows)
    expert = tap("ffn.experts", expert.reshape(B, T, -1)).reshape(B * T, -1)
    weight = tap("ffn.weights", weight.reshape(B, T, -1)).reshape(B * T, -1)
    y = routed(m, p, rows, expert, weight, tap).reshape(B, T, D)
    if m.shared:
        shared = mlp(MLP(m.shared, m.act), p["shared"], x, tap)
        y = y + (shared * jax.nn.sigmoid(linear(p["shared_gate"], x)) if m.shared_gate else shared)
    return y


def routed(m: MoE, p: dict, x: Array, expert: Array, weight: Array, tap: Recorder | None = None) -> Array:
    """sum_i weight[n, i] * expert[n, i](x[n]) for x [N, D], expert i32 [N, k], weight f32 [N, k] -> [N, D]."""
    if ops.plain():
        return _every_expert(m, p, x, expert, weight)
    order = jnp.argsort(expert.reshape(-1), stable=True)  # rows of one expert lie together
    owner, token = expert.reshape(-1)[order], order // m.top_k
    scale = weight.reshape(-1)[order][:, None]
    rows = x[token]
    if m.weigh == "input":
        rows = (rows * scale).astype(x.dtype)

    def each(name, rows):
        y = ops.grouped_matmul(rows, p[name]["w"], owner)
        return y + p[name]["b"].astype(F32)[owner] if m.bias else y

    hidden = activate(m.act, each("gate", rows), each("up", rows)).astype(x.dtype)
    if tap and tap.wants("ffn.routed"):
        by_token = hidden[jnp.argsort(order)].reshape(*expert.shape, -1)
        hidden = tap("ffn.routed", by_token).reshape(hidden.shape)[order]
    y = each("down", hidden)
    y = y if m.weigh == "input" else y * scale
    return jnp.zeros(x.shape, F32).at[token].add(y).astype(x.dtype)


def _every_expert(m: MoE, p: dict, x: Array, expert: Array, weight: Array) -> Array:
    """`routed` by products alone: every expert reads every row, and what was not asked of it counts nothing."""
    y = jnp.zeros(x.shape, F32)
    for e in range(m.experts):

        def one(name, rows, e=e):
            out = ops.matmul(rows, p[name]["w"][e], out=F32)
            return out + p[name]["b"][e].astype(F32) if m.bias else out

        asked = expert == e
        share = jnp.where(asked, weight, 0).sum(-1, keepdims=True)
        rows = (x * share).astype(x.dtype) if m.weigh == "input" else x
        z = one("down", activate(m.act, one("gate", rows), one("up", rows)).astype(x.dtype))
        y = y + z * (asked.any(-1, keepdims=True).astype(F32) if m.weigh == "input" else share)
    return y.astype(x.dtype)


def route(m: MoE, p: dict, x: Array) -> tuple[Array, Array]:
    """The experts of each row of x [N, D] and their weights: i32 [N, k], f32 [N, k]."""
    scores = linear(p, x.astype(F32))
    if m.score == "sparsemixer":
        return _sparsemixer(m, scores)
    if m.score == "softmax":
        scores = jax.nn.softmax(scores, -1)
    elif m.score == "sigmoid":
        scores = jax.nn.sigmoid(scores)
    expert = lax.top_k(_choosable(m, p, scores), m.top_k)[1]
    weight = jnp.take_along_axis(scores, expert, -1)
    if m.score == "softmax_topk":
        weight = jax.nn.softmax(weight, -1)
    if m.renorm:
        weight = weight / (weight.sum(-1, keepdims=True) + 1e-20)
    return expert, weight * m.scale


def _choosable(m: MoE, p: dict, scores: Array) -> Array:
    """Scores the choice is made by: corrected, and limited to the best groups of experts (arXiv 2412.19437)."""
    pick = scores + p["correction"].astype(F32) if m.correction else scores
    if not m.groups:
        return pick
    groups, kept = m.groups
    by_group = pick.reshape(-1, groups, m.experts // groups)
    # Places and not values: a top_k of values alone is a sort to some compilers.
    two = lambda x: jnp.take_along_axis(x, lax.top_k(x, 2)[1], -1).sum(-1)
    best = two(by_group) if m.correction else by_group.max(-1)
    keep = jax.nn.one_hot(lax.top_k(best, kept)[1], groups).sum(1) > 0
    return jnp.where(keep[..., None], by_group, -jnp.inf).reshape(pick.shape)


def _sparsemixer(m: MoE, scores: Array) -> tuple[Array, Array]:
    """Two experts, each weighed among those close to it (SparseMixer, arXiv 2310.00811, at inference)."""
    experts, weights, left = [], [], scores
    for _ in range(m.top_k):
        best = left.max(-1, keepdims=True)
        index = left.argmax(-1, keepdims=True)
        far = (best - scores) / jnp.maximum(jnp.abs(scores), best) > 2 * m.jitter
        share = jax.nn.softmax(jnp.where(far, -jnp.inf, left), -1)
        experts.append(index)
        weights.append(jnp.take_along_axis(share, index, -1))
        left = jnp.where(jax.nn.one_hot(index[:, 0], m.experts, dtype=bool), -jnp.inf, left)
    return jnp.concatenate(experts, -1).astype(jnp.int32), jnp.concatenate(weights, -1)


# ---- block and model ------------------------------------------------------------------------------------

_MIXER = {
    Attention: attention,
    MLA: latent_attention,
    Mamba: mamba,
    Mamba2: mamba2,
    DeltaNet: delta_net,
    ShortConv: short_conv,
}
_FFN = {MLP: mlp, MoE: moe}


def block(b: Block, p: dict, x: Array, cache, step: Step, tap: Recorder, beside: Array | None = None):
    """One layer: x [B, T, D] -> ([B, T, D], cache). beside [B, T, d]: what the mixer reads in front of x."""

    def before(name, x):
        return norm(b.norm, p[name]["pre"], x) if b.normed(name) else x

    def after(name, y):
        y = norm(b.norm, p[name]["post"], y) if b.post else y
        return tap(f"{name}.out", y if b.residual == 1.0 else y * b.residual)

    x = tap("in", x)
    xn = before("mixer", x)
    xn = tap("mixer.in", xn if beside is None else jnp.concatenate([beside, xn], -1))
    mixed, cache = _MIXER[type(b.mixer)](b.mixer, p["mixer"], xn, cache, step, tap)
    mixed = after("mixer", mixed)
    if b.ffn is None:
        return tap("out", x + mixed), cache
    if b.parallel is None:
        x = tap("mid", x + mixed)
    fed = tap("ffn.in", xn if b.parallel == "shared" else before("ffn", x))
    fed = after("ffn", _FFN[type(b.ffn)](b.ffn, p["ffn"], fed, tap))
    return tap("out", x + fed if b.parallel is None else x + mixed + fed), cache


@partial(jax.jit, static_argnums=0)
def _alike(b: Block, p: dict, x: Array, cache, step: Step, beside: Array | None):
    """`block` without taps. Layers of one description and shapes are traced and lowered once, as one function that
    XLA inlines: what a start costs before it finds its programs in a cache grows no more with the layers."""
    return block(b, p, x, cache, step, Recorder(None), beside)


def hidden(
    config: ModelConfig,
    params: dict,
    tokens: Array,
    state: State,
    *,
    n_new: Array | None = None,
    depth: Array | None = None,
    tree: Array | None = None,
    taps: Taps | None = None,
) -> tuple[Array, State, dict[str, Array]]:
    """Append tokens i32 [B, T] to the state -> (x [B, T, D] after the final norm, state, kept activations).

    n_new i32 [B]: how many of a row's T tokens are real (the rest is padding on the right; default all).
    depth i32 [T] or [B, T] and tree bool [T, T] or [B, T, T]: the tokens are nodes of a tree; node t stands at
    position length + depth[t] and sees, of the new tokens, those u with tree[t, u] (itself included).
    Prefill, decode and verification differ only in T.

    Raises ContextError where T cannot fit. A row that overflows inside jit gives NaN, never a wrong answer.
    """
    B, T = tokens.shape
    check_call(config, tokens, state, n_new)
    _check_tree(config, tokens, depth, tree)
    n_new = jnp.full(B, T, jnp.int32) if n_new is None else jnp.asarray(n_new, jnp.int32)
    step, root = placed(config, state, n_new, depth, tree, T), Recorder(taps)
    x = root("embed", embedded(config, params, tokens, step, state, n_new))
    tapped = root if taps is not None and (taps.keep or taps.edit) else None
    x, state = through(config, params, x, state, step, n_new, root=tapped)
    return root("norm", norm(config.norm, params["norm"], x)), state, root.finish()


def placed(
    config: ModelConfig, state: State, n_new: Array, depth: Array | None, tree: Array | None, T: int
) -> Step:
    """The Step of a forward over T tokens, n_new i32 [B] of them real, with the model's rotary tables."""
    step = begin(state, n_new, depth, tree, T)
    # In the order of the layers: that of a set may be another in each process, and so would be the program.
    ropes = tuple(dict.fromkeys(b.mixer.rope for b in config.blocks if getattr(b.mixer, "rope", None)))
    return dataclasses.replace(step, ropes=ropes, tables=tuple(turn(rope, step.pos) for rope in ropes))


def through(
    config: ModelConfig,
    params: dict,
    x: Array,
    state: State,
    step: Step,
    n_new: Array,
    *,
    root: Recorder | None = None,
    beside: Array | None = None,
) -> tuple[Array, State]:
    """x [B, T, D] through every layer -> (x, the state with n_new i32 [B] tokens more); beside as in `block`."""
    caches = []
    for i, (b, p, cache) in enumerate(zip(config.blocks, params["layers"], state.layers, strict=True)):
        if root is None:
            x, cache = _alike(b, p, x, cache, step, beside)
        else:
            x, cache = block(b, p, x, cache, step, root.at(f"layers.{i}"), beside)
        caches.append(cache)
    return x, dataclasses.replace(state, layers=tuple(caches), length=state.length + n_new)


def featured(
    config: ModelConfig,
    params: dict,
    tokens: Array,
    state: State,
    names: tuple[str, ...],
    *,
    n_new: Array | None = None,
    depth: Array | None = None,
    tree: Array | None = None,
) -> tuple[Array, State, Array | None]:
    """`hidden` -> (x, state, activations of these names side by side [B, T, their widths added]; None for ()).

    Names as in `taps`, without patterns, of activations [B, T, width]; "norm" is x itself."""
    inner = tuple(name for name in names if name != "norm")
    taps = Taps(keep=inner) if inner else None
    x, state, kept = hidden(config, params, tokens, state, n_new=n_new, depth=depth, tree=tree, taps=taps)
    found = [x if name == "norm" else kept[name] for name in names]
    return x, state, jnp.concatenate(found, -1) if found else None


def embedded(config: ModelConfig, params: dict, tokens: Array, step: Step, state: State, n_new: Array) -> Array:
    """What enters the first layer, [B, T, D]: zeros for padding, NaN in rows that overflow."""
    x = ops.embed(params["embed"]["w"], tokens).astype(config.dtype)
    if config.embed_scale != 1.0:
        x = x * jnp.asarray(config.embed_scale, x.dtype)
    if config.positions is not None:
        w = params["positions"]["w"]
        row = jnp.minimum(jnp.maximum(step.pos, 0) + config.positions, len(w) - 1)
        x = x + ops.embed(w, row).astype(x.dtype)
    if config.embed_norm:
        x = norm(config.embed_norm, params["embed_norm"], x)
    # Padding sees nothing, so its zeros mostly stay zeros, which the native products skip.
    x = jnp.where((step.pos >= 0)[..., None], x, jnp.zeros((), x.dtype))
    if state.capacity is None:
        return x
    fits = state.length + n_new <= state.capacity
    return jnp.where(fits[:, None, None], x, jnp.nan)


def check_call(config: ModelConfig, tokens: Array, state: State, n_new: Array | None) -> None:
    """Raise ContextError where tokens [B, T] cannot be appended to the state."""
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ContextError(f"tokens must be integers [B, T], got {tokens.dtype}")
    B, T = tokens.shape
    if state.length.shape[0] != B or len(state.layers) != len(config.blocks):
        raise ContextError(
            f"the state is for {state.length.shape[0]} rows of a model with {len(state.layers)} layers; "
            f"got {B} rows and {len(config.blocks)} layers"
        )
    if state.chunk < T:
        raise ContextError(
            f"{T} tokens in one call, but this state takes {state.chunk} at a time; "
            "make it with init_state(..., chunk=...) or feed it in pieces"
        )
    if n_new is not None and jnp.shape(n_new) != (B,):
        raise ContextError(f"n_new should be [{B}], the real tokens of each row, got {jnp.shape(n_new)}")
    if any(isinstance(a, jax.core.Tracer) for a in (state.length, n_new)):
        return
    new = np.full(B, T) if n_new is None else np.asarray(n_new)
    if np.any(new < 0) or np.any(new > T):
        raise ContextError(f"n_new goes from 0 to the {T} tokens of the call, got {new}")
    longest = int(np.max(np.asarray(state.length) + new))
    if state.capacity is not None and longest > state.capacity:
        raise ContextError(
            f"the row would hold {longest} tokens and the state has room for {state.capacity}; "
            "make a longer state, or one with a window to evict the oldest"
        )


def _check_tree(config: ModelConfig, tokens: Array, depth, tree) -> None:
    B, T = tokens.shape
    if depth is not None and jnp.shape(depth) not in ((T,), (B, T)):
        raise ContextError(f"depth should be [{T}] or [{B}, {T}], one for each token, got {jnp.shape(depth)}")
    if tree is not None and jnp.shape(tree) not in ((T, T), (B, T, T)):
        raise ContextError(f"tree should be [{T}, {T}] or [{B}, {T}, {T}], got {jnp.shape(tree)}")
    recurrent = not all(isinstance(b.mixer, Attention | MLA) for b in config.blocks)
    if recurrent and (depth is not None or tree is not None):
        raise ContextError("a recurrent layer reads tokens one after the other; it cannot verify a tree")


def logits(config: ModelConfig, params: dict, x: Array) -> Array:
    """Logits f32 [..., V] of x [..., D] as `hidden` returns it."""
    w = params["embed"]["w"] if config.tied else params["head"]["w"]
    y = ops.matmul(x, w, out=F32)
    if config.head_bias:
        y = y + params["head"]["b"].astype(F32)
    if config.logit_scale != 1.0:
        y = y * config.logit_scale
    if config.logit_softcap:
        y = jnp.tanh(y / config.logit_softcap) * config.logit_softcap
    return y


def forward(
    config: ModelConfig,
    params: dict,
    tokens: Array,
    state: State | None = None,
    *,
    n_new: Array | None = None,
    depth: Array | None = None,
    tree: Array | None = None,
) -> tuple[Array, State]:
    """Tokens i32 [B, T] -> (logits f32 [B, T, V] of every position, state).

    Without a state the tokens are the whole context. Pure: jit it (config static), differentiate it, vmap it.
    The other arguments are those of `hidden`.
    """
    out, _, state = capture(config, params, tokens, None, state, n_new=n_new, depth=depth, tree=tree)
    return out, state


def capture(
    config: ModelConfig,
    params: dict,
    tokens: Array,
    taps: Taps | None,
    state: State | None = None,
    *,
    n_new: Array | None = None,
    depth: Array | None = None,
    tree: Array | None = None,
) -> tuple[Array, dict[str, Array], State]:
    """`forward` with taps -> (logits, kept activations by name, state)."""
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2:
        raise ContextError(f"tokens must be [B, T], got shape {tokens.shape}")
    if state is None:
        state = init_state(config, *tokens.shape)
    x, state, kept = hidden(config, params, tokens, state, n_new=n_new, depth=depth, tree=tree, taps=taps)
    return logits(config, params, x), kept, state
