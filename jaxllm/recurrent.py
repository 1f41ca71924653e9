"""Recurrent mixers: state spaces and linear attention. Letters as in layers.py; C convolution channels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm import ops
from jaxllm.basics import F32, linear, linears, norm
from jaxllm.config import DeltaNet, Mamba, Mamba2, ShortConv
from jaxllm.state import Recurrent, Step
from jaxllm.taps import Recorder

Array = jax.Array


def causal_conv(p: dict, x: Array, past: Array, live: Array) -> tuple[Array, Array]:
    """Depthwise convolution of x [B, T, C] after `past` [B, kernel-1, C] -> ([B, T, C] f32, the new past).

    live bool [B, T] marks real tokens; a row's past ends at its last real one.
    """
    T, kernel = x.shape[1], p["w"].shape[-1]
    line = jnp.concatenate([past, x.astype(past.dtype)], 1)
    keep = jax.vmap(lambda row, n: lax.dynamic_slice_in_dim(row, n, kernel - 1))
    past = keep(line, live.sum(1))
    w = p["w"].astype(F32)
    y = sum(line[:, i : i + T].astype(F32) * w[:, i] for i in range(kernel))
    return (y + p["b"].astype(F32) if "b" in p else y), past


def _recur(step, memory: Array, *inputs: Array):
    """Run `step(memory, inputs at one time) -> (memory, y)` along axis 1 of the inputs."""
    if ops.plain():
        return _unrolled(step, memory, *inputs)
    memory, y = lax.scan(step, memory, tuple(a.swapaxes(0, 1) for a in inputs))
    return y.swapaxes(0, 1), memory


def _unrolled(step, memory: Array, *inputs: Array):
    found = []
    for t in range(inputs[0].shape[1]):
        memory, y = step(memory, tuple(a[:, t] for a in inputs))
        found.append(y)
    return jnp.stack(found, 1), memory


def mamba(m: Mamba, p: dict, x: Array, cache: Recurrent, step: Step, tap: Recorder):
    """Selective state space layer (arXiv 2312.00752)."""
    live = step.pos >= 0
    u, z = jnp.split(linear(p["in"], x), 2, -1)
    u, conv = causal_conv(p["conv"], u, cache.conv, live)
    u = jax.nn.silu(u)
    dt, b, c = jnp.split(linear(p["x"], u.astype(x.dtype)), [m.dt_rank, m.dt_rank + m.states], -1)
    if m.inner_eps is not None:
        dt, b, c = (_even(part, m.inner_eps) for part in (dt, b, c))
    # A time step of 0 leaves the memory alone: padding costs nothing.
    dt = jax.nn.softplus(linear(p["dt"], dt).astype(F32)) * live[..., None]
    a = -jnp.exp(p["a_log"].astype(F32))

    def one(memory, now):
        dt, u, b, c = now
        memory = jnp.exp(dt[..., None] * a) * memory + (dt * u)[..., None] * b[:, None]
        return memory, jnp.einsum("bin,bn->bi", memory, c)

    y, memory = _recur(one, cache.memory, dt, u, b.astype(F32), c.astype(F32))
    y = (y + u * p["d"].astype(F32)) * jax.nn.silu(z.astype(F32))
    return linear(p["out"], y.astype(x.dtype)), Recurrent(conv, memory)


def _even(x: Array, eps: float) -> Array:
    """RMSNorm without weights."""
    y = x.astype(F32)
    return (y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)).astype(x.dtype)


def mamba2(m: Mamba2, p: dict, x: Array, cache: Recurrent, step: Step, tap: Recorder):
    """State space duality layer (arXiv 2405.21060), in its recurrent form."""
    B, T, _ = x.shape
    live = step.pos >= 0
    z, u, dt = jnp.split(linear(p["in"], x), [m.inner, m.inner + m.conv_width], -1)
    u, conv = causal_conv(p["conv"], u, cache.conv, live)
    u, b, c = jnp.split(jax.nn.silu(u), [m.inner, m.inner + m.groups * m.states], -1)
    u = u.reshape(B, T, m.heads, m.head_dim)
    b, c = (jnp.repeat(a.reshape(B, T, m.groups, m.states), m.heads // m.groups, 2) for a in (b, c))
    dt = jax.nn.softplus(dt.astype(F32) + p["dt_bias"].astype(F32))
    dt = jnp.clip(dt, *m.dt_limit) * live[..., None]
    decay = jnp.exp(-dt * jnp.exp(p["a_log"].astype(F32)))

    def one(memory, now):
        decay, dt, u, b, c = now
        memory = decay[..., None, None] * memory + (dt[..., None] * u)[..., None] * b[:, :, None]
        return memory, jnp.einsum("bhdn,bhn->bhd", memory, c)

    y, memory = _recur(one, cache.memory, decay, dt, u, b, c)
    y = (y + u * p["d"].astype(F32)[:, None]).reshape(B, T, m.inner) * jax.nn.silu(z.astype(F32))
    by_group = {"w": p["norm"]["w"].reshape(m.groups, -1)}
    y = norm(m.norm, by_group, y.reshape(B, T, m.groups, -1)).reshape(B, T, m.inner)
    return linear(p["out"], y.astype(x.dtype)), Recurrent(conv, memory)


def delta_net(m: DeltaNet, p: dict, x: Array, cache: Recurrent, step: Step, tap: Recorder):
    """Gated delta rule (arXiv 2412.06464): forget by exp(g), then write what the memory gets wrong."""
    B, T, _ = x.shape
    live = (step.pos >= 0)[..., None]
    u, z, beta, rate = linears([p[name] for name in ("qkv", "z", "b", "a")], x)
    u, conv = causal_conv(p["conv"], u, cache.conv, live[..., 0])
    keys = m.k_heads * m.k_dim
    q, k, v = jnp.split(jax.nn.silu(u), [keys, 2 * keys], -1)
    repeat = m.v_heads // m.k_heads
    q, k = (jnp.repeat(_unit(a.reshape(B, T, m.k_heads, m.k_dim)), repeat, 2) for a in (q, k))
    v = v.reshape(B, T, m.v_heads, m.v_dim)
    beta = jax.nn.sigmoid(beta.astype(F32)) * live
    rate = jax.nn.softplus(rate.astype(F32) + p["dt_bias"].astype(F32))
    decay = jnp.exp(-rate * jnp.exp(p["a_log"].astype(F32)) * live)

    def one(memory, now):
        q, k, v, beta, decay = now
        memory = memory * decay[..., None, None]
        error = (v - jnp.einsum("bhkv,bhk->bhv", memory, k)) * beta[..., None]
        memory = memory + k[..., None] * error[..., None, :]
        return memory, jnp.einsum("bhkv,bhk->bhv", memory, q)

    y, memory = _recur(one, cache.memory, q * m.k_dim**-0.5, k, v, beta, decay)
    z = z.reshape(B, T, m.v_heads, m.v_dim).astype(F32)
    y = tap("mixer.heads", norm(m.norm, p["norm"], y) * jax.nn.silu(z))
    return linear(p["out"], y.reshape(B, T, -1).astype(x.dtype)), Recurrent(conv, memory)


def _unit(x: Array) -> Array:
    return x * lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)


def short_conv(m: ShortConv, p: dict, x: Array, cache: Recurrent, step: Step, tap: Recorder):
    """Gated short convolution (arXiv 2511.23404): x is gated, convolved and gated again."""
    b, c, u = jnp.split(linear(p["in"], x), 3, -1)
    y, conv = causal_conv(p["conv"], b * u, cache.conv, step.pos >= 0)
    return linear(p["out"], (c * y).astype(x.dtype)), Recurrent(conv, cache.memory)
