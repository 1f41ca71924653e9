"""Kernels for the CPU, compiled from the C++ beside this file and called through XLA's FFI.

They are optional: where the library is not built, `unavailable()` says why and `jaxllm.ops` keeps to XLA's own
operations. Nothing is loaded before the first kernel is traced.

Environment: JAXLLM_NATIVE=off keeps to XLA; JAXLLM_NATIVE=portable, avx2, avx512 or amx goes no higher than that
instruction set (default: the best of the machine). JAXLLM_NATIVE_THREADS=N limits the threads (default: all that
XLA has). JAXLLM_NATIVE_LIBRARY=FILE: a library of `python -m jaxllm.native.build --to FILE`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import JaxllmError

Array = jax.Array

LEVELS = ("portable", "avx2", "avx512", "amx")  # as in cpu.h
LIBRARY = pathlib.Path(os.environ.get("JAXLLM_NATIVE_LIBRARY") or pathlib.Path(__file__).with_name("_kernels.so"))
INTERFACE = 8  # as in ffi.cc: what Python and the library agree on
CALLS = ("matmul", "gated", "packed", "packed_gated", "packed_several", "float8", "float8_gated")
CALLS += ("attend", "put", "norm", "rows", "keep", "read")
CALLS = tuple(f"jaxllm_{name}" for name in CALLS)  # what the library gives to XLA
FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
ACTIVATIONS = ("silu", "gelu_tanh")  # as in matmul.h
HELD = (None, "int8", "fp8", "int4")  # as in attention.h


def unavailable() -> str | None:
    """Why the native kernels cannot be used in this process; None where they can."""
    if _setting() == "off":
        return "JAXLLM_NATIVE=off"
    found = _load()
    return found if isinstance(found, str) else None


def level() -> str:
    """The instruction set in use, one of LEVELS: the best of the machine, or what JAXLLM_NATIVE allows.

    Raises JaxllmError where the kernels are unavailable.
    """
    best = _library().jaxllm_best_level()
    return LEVELS[min(best, LEVELS.index(_setting()))] if _setting() in LEVELS else LEVELS[best]


def describe() -> str:
    """One line: which kernels are in use, or why none are."""
    reason = unavailable()
    return f"not in use: {reason}" if reason else f"in use, {level()}"


@functools.cache
def _setting() -> str:
    value = os.environ.get("JAXLLM_NATIVE", "on").lower()
    if value not in ("on", "off", *LEVELS):
        raise JaxllmError(f"JAXLLM_NATIVE should be on, off, {', '.join(LEVELS)}; got {value!r}")
    return value


@functools.cache
def _threads() -> int:
    value = os.environ.get("JAXLLM_NATIVE_THREADS", "0")
    if not value.isdecimal():
        raise JaxllmError(f"JAXLLM_NATIVE_THREADS should be a number of threads, 0 for all; got {value!r}")
    return int(value)


def _library() -> ctypes.CDLL:
    if reason := unavailable():
        raise JaxllmError(f"the native kernels are not in use: {reason}")
    return _load()


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library with its functions known to XLA, or why there is none."""
    if not LIBRARY.is_file():
        return "not built; with a C++ compiler at hand, run python -m jaxllm.native.build"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        made = library.jaxllm_interface()
    except (OSError, AttributeError) as error:
        return f"{LIBRARY.name} does not load ({error}); run python -m jaxllm.native.build"
    if made != INTERFACE:
        return f"{LIBRARY.name} was built from other sources; run python -m jaxllm.native.build"
    for name in CALLS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return library


def refuses_matmul(x: Array, w: Array) -> str | None:
    """Why `matmul` does not take x [m, k] and w [n, k]; None where it does."""
    if other := [str(a.dtype) for a in (x, w) if a.dtype not in FLOATS]:
        return f"it multiplies float32, bfloat16 and float16, not {' and '.join(other)}"
    return unavailable()


def matmul(x: Array, w: Array, out: jnp.dtype, *, most: str | None = None, threads: int | None = None) -> Array:
    """x [m, k] times w [n, k] transposed -> [m, n] in `out`, summed in f32.

    A row's bits do not depend on the other rows, nor on the threads. most: the highest of LEVELS to use.
    """
    made = out if out in FLOATS else jnp.float32
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), made)
    call = jax.ffi.ffi_call("jaxllm_matmul", shape, vmap_method="expand_dims")
    return call(x, w, **how(most, threads)).astype(out)


def refuses_gated(x: Array, gate: Array, up: Array, act: str) -> str | None:
    """Why `gated` does not take these; None where it does."""
    if act not in ACTIVATIONS:
        return f"it knows {' and '.join(ACTIVATIONS)}, not {act}"
    if any(a.dtype != jnp.bfloat16 for a in (x, gate, up)):
        return f"it is for bfloat16 throughout, not {x.dtype}, {gate.dtype} and {up.dtype}"
    if reason := unavailable():
        return reason
    return None if level() in ("avx512", "amx") else f"it needs avx512, and {level()} is in use"


def gated(
    x: Array, gate: Array, up: Array, *, act: str, most: str | None = None, threads: int | None = None
) -> Array:
    """act(x gate) * (x up) of bf16 x [m, k] and gate, up [n, k] -> bf16 [m, n], rounded once, at the end.

    most: the highest of LEVELS to use, avx512 or amx.
    """
    shape = jax.ShapeDtypeStruct((x.shape[0], gate.shape[0]), x.dtype)
    call = jax.ffi.ffi_call("jaxllm_gated", shape, vmap_method="sequential")
    return call(x, gate, up, activation=np.int64(ACTIVATIONS.index(act)), **how(most, threads))


def refuses_attend(q: Array, k: Array, v: Array) -> str | None:
    """Why `attend` does not take arrays or packed caches (their dtype is the values'); None where it does."""
    if q.dtype not in FLOATS or not q.dtype == k.dtype == v.dtype:
        names = f"{q.dtype}, {k.dtype} and {v.dtype}"
        return f"it is for float32, bfloat16 or float16 throughout, not {names}"
    return unavailable()


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Array,
    sinks: Array | None = None,
    bias: Array | None = None,
    slopes: Array | None = None,
    scales: tuple[Array, Array] | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    held: str | None = None,
    most: str | None = None,
    threads: int | None = None,
) -> Array:
    """Softmax attention of q [B, T, K, G, h] over k [B, K, S, h], v [B, K, S, j] where mask bool [B, T, S] sees.

    Gives [B, T, K, G, j] in q's dtype, zeros for a query that sees nothing. sinks f32 [K, G], bias f32
    [B, K, T, G, S] (any axis may be 1) and slopes f32 [K, G] as in `jaxllm.softmax.attention_weights`.

    held: one of HELD; where it is not None, k and v are the codes and `scales` their scales as in
    `jaxllm.quant.cache.CacheCodes`. They give the bits of values expanded to q's dtype first.

    The cache is taken in blocks of 64 slots: a query's bits depend neither on other queries nor on the threads.
    """
    none = jnp.zeros(0, jnp.float32)
    extras = [none if a is None else a.astype(jnp.float32) for a in (sinks, bias, slopes)]
    shape = (*q.shape[:-1], v.shape[-1] * (2 if held == "int4" else 1))
    call = jax.ffi.ffi_call("jaxllm_attend", jax.ShapeDtypeStruct(shape, q.dtype), vmap_method="sequential")
    numbers = dict(scale=np.float32(scale), softcap=np.float32(softcap or 0), held=np.int64(HELD.index(held)))
    return call(q, k, v, mask, *extras, *(scales or (none, none)), **numbers, **how(most, threads))


def refuses_put(cache: Array) -> str | None:
    """Why `put` does not take a cache; None where it does."""
    if cache.ndim != 4:
        return f"it is for caches [B, K, S, h], not of {cache.ndim} axes"
    if cache.dtype not in (*FLOATS, jnp.int8, jnp.uint8):
        return f"it copies whole bytes of floats and 8-bit integers, not {cache.dtype}"
    return unavailable()


def put(cache: Array, x: Array, slot: Array) -> Array:
    """`cache` [B, K, S, h] with x [B, T, K, h] of its dtype at slots i32 [B, T], in place where XLA allows it."""
    _library()
    shape = jax.ShapeDtypeStruct(cache.shape, cache.dtype)
    call = jax.ffi.ffi_call("jaxllm_put", shape, vmap_method="sequential", input_output_aliases={0: 0})
    return call(cache, x, slot)


def refuses_rows(w: Array) -> str | None:
    """Why `rows` does not take a matrix w; None where it does."""
    if w.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it is for floats of 16 bits, which XLA would widen first, not {w.dtype}"
    return unavailable()


def rows(w: Array, number: Array) -> Array:
    """Rows `number` i32 [n, 1] of w [v, d] -> [n, d] as they are; NaNs for a row that w does not have."""
    _library()
    shape = jax.ShapeDtypeStruct((len(number), w.shape[1]), w.dtype)
    return jax.ffi.ffi_call("jaxllm_rows", shape, vmap_method="expand_dims")(w, number)


def keep(x: Array) -> Array:
    """x as it is, but worked out once, in memory: XLA does not work it out again where it is used."""
    _library()
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ffi.ffi_call("jaxllm_keep", shape, vmap_method="broadcast_all", input_output_aliases={0: 0})(x)


def refuses_norm(x: Array, w: Array, b: Array | None) -> str | None:
    """Why `norm` does not take these; None where it does."""
    if w.ndim != 1:
        return f"it takes one weight for each column, not {list(w.shape)}"
    if other := [a.dtype for a in (x, w, b) if a is not None and a.dtype not in FLOATS]:
        return f"it is for floats of 16 and 32 bits, not {other[0]}"
    return unavailable()


def norm(
    x: Array,
    w: Array,
    b: Array | None = None,
    *,
    eps: float,
    centered: bool,
    most: str | None = None,
    threads: int | None = None,
) -> Array:
    """RMSNorm, or LayerNorm where centered, of the rows of x [m, D] with w, b [D]: in f32, back in x's dtype."""
    b = jnp.zeros(0, jnp.float32) if b is None else b
    call = jax.ffi.ffi_call("jaxllm_norm", jax.ShapeDtypeStruct(x.shape, x.dtype), vmap_method="sequential")
    return call(x, w, b, eps=np.float32(eps), centered=bool(centered), **how(most, threads))


def read(x: Array, *, threads: int | None = None) -> Array:
    """The bits of x (any shape and dtype, its bytes a multiple of 8) xored together, u64 as u32 [2]: every byte is
    read once and nothing else is done, which is how fast memory can be read."""
    call = jax.ffi.ffi_call("jaxllm_read", jax.ShapeDtypeStruct((2,), jnp.uint32))
    return call(x, threads=how(None, threads)["threads"])


def how(most: str | None, threads: int | None) -> dict[str, np.int64]:
    """The level and the number of threads, as every kernel takes them."""
    _library()
    if most is None:
        most = _setting() if _setting() in LEVELS else LEVELS[-1]
    return dict(level=np.int64(LEVELS.index(most)), threads=np.int64(_threads() if threads is None else threads))
