"""Kernels for TPU and GPU in Pallas: products with packed weights, experts' products, attention while decoding.

They are taken where a program is compiled for the accelerator of this process, if there is exactly one; within
`compiled_for(...)` also for platforms that are not here, for export and ahead-of-time compilation. On a machine
with nothing but a CPU, no program changes and Pallas is not imported. Derivatives go through the definition in
`jaxllm.ops`.

On Hopper they have bodies in Mosaic GPU ("hopper"); what these refuse, and the other NVIDIA GPUs ("cuda"), get
Triton, which JAX has deprecated (since 0.11). Where a JAX brings it no longer, that is left to XLA.

Environment: JAXLLM_PALLAS=off keeps to XLA.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType

import jax
from jax import lax

from jaxllm.errors import JaxllmError
from jaxllm.kernels import tiles
from jaxllm.quant import QTensor

Array = jax.Array

# The bodies for each kind of machine, the best first, and what `lax.platform_dependent` calls the machine.
BODIES = {"tpu": ("tpu",), "cuda": ("cuda",), "hopper": ("hopper", "cuda")}
LOWERED = {"tpu": "tpu", "cuda": "cuda", "hopper": "cuda"}
_WANTED = jax.make_user_context(())  # part of the key of every jitted program


def compiled_for(*platforms: str) -> AbstractContextManager[None]:
    """Within it, programs are traced with the kernels of these platforms, present or not.

    "tpu"; "cuda", any NVIDIA GPU; "hopper", those of compute capability 9.0 alone. A program exported for several
    platforms at once must have none: wrap it in `ops.portable()` instead. Raises JaxllmError for another name.
    Where there is no GPU, JAX from 0.11 on lowers Triton's only within `jax.sharding.use_abstract_mesh` of a mesh
    with an `AbstractDevice`.
    """
    if unknown := [name for name in platforms if name not in BODIES]:
        raise JaxllmError(f"kernels exist for {', '.join(BODIES)}, not for {unknown[0]!r}")
    return _WANTED(tuple(platforms))


def unavailable() -> str | None:
    """Why no kernel is traced in this process; None where some are."""
    if _setting() == "off":
        return "JAXLLM_PALLAS=off"
    return None if _WANTED.value else _absent()


def describe() -> str:
    """One line: for which platform kernels are in use, or why for none."""
    reason = unavailable()
    return f"not in use: {reason}" if reason else f"in use, {' and '.join(_platforms())}"


@functools.cache
def _setting() -> str:
    value = os.environ.get("JAXLLM_PALLAS", "on").lower()
    if value not in ("on", "off"):
        raise JaxllmError(f"JAXLLM_PALLAS should be on or off; got {value!r}")
    return value


@functools.cache
def _absent() -> str | None:
    """Why the devices of this process get no kernels."""
    if present() not in BODIES:
        return "there is no TPU and no NVIDIA GPU here"
    if len(jax.devices()) > 1:
        return "there are several accelerators here, and XLA cannot split a kernel between them"
    if not bodies():
        return f"JAX {jax.__version__} has no Triton backend"
    if present() == "cuda" and tiles.capability() < 8:
        return f"Triton needs compute capability 8.0 (Ampere), and this GPU has {tiles.capability()}"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


@functools.cache
def _has_mosaic() -> bool:
    """JAX 0.10 imports absl for it, and does not ask for it when it is installed."""
    return jax.__version_info__ >= (0, 11) or importlib.util.find_spec("absl") is not None


def present() -> str:
    """The kind of this process's devices: "tpu", "hopper", "cuda" (another NVIDIA GPU), "cpu", ..."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return device.platform
    if "rocm" in device.client.platform_version.lower():
        return "rocm"
    return "hopper" if tiles.capability() == 9 else "cuda"


def bodies() -> tuple[str, ...]:
    """Whose kernels are taken in this process, the best first: each is a `platform` of the kernels' functions."""
    there = {"tpu": True, "cuda": _has_triton(), "hopper": _has_mosaic()}
    return tuple(dict.fromkeys(name for kind in _platforms() for name in BODIES[kind] if there[name]))


def _platforms() -> tuple[str, ...]:
    return _WANTED.value or (present(),)


def refuses_matmul(x: Array, w: Array | QTensor) -> str | None:
    """Why `matmul` does not take x [M, in] and w [out, in]; None where it does, on some platform."""
    return unavailable() or _refuses_everywhere("dense", x, w)


def matmul(x: Array, w: QTensor, *, otherwise: Callable) -> Array:
    """x [M, in] times packed w [out, in] transposed -> f32 [M, out]. `otherwise(x, w)` serves other platforms."""
    return _either(_module("dense").matmul, _fitting("dense", x, w), otherwise, x, w)


def refuses_grouped_matmul(x: Array, w: Array | QTensor) -> str | None:
    """Why `grouped_matmul` does not take x [R, in] and w [E, out, in]; None where it does, on some platform."""
    return unavailable() or _refuses_everywhere("grouped", x, w)


def grouped_matmul(x: Array, w: Array | QTensor, expert: Array, *, otherwise: Callable) -> Array:
    """Row i of x [R, in] times w[expert[i]] -> f32 [R, out]; `expert` i32 [R] never decreases.

    `otherwise(x, w, expert)` serves other platforms.
    """
    return _either(_module("grouped").grouped_matmul, _fitting("grouped", x, w), otherwise, x, w, expert)


def refuses_attend(q: Array, k: Array, v: Array, bias: Array | None) -> str | None:
    """Why `attend` does not take these; None where it does, on some platform."""
    if reason := unavailable():
        return reason
    return "it takes no bias on the scores" if bias is not None else _refuses_everywhere("attention", q, k, v)


def attend(
    q: Array, k: Array, v: Array, mask: Array, sinks: Array | None, *, scale, softcap, otherwise: Callable
) -> Array:
    """Softmax attention of q [B, T, K, G, h] over k, v [B, K, S, h] where mask bool [B, T, S] -> as q.

    sinks [K, G] as in `jaxllm.ops.attention_weights`; `otherwise(q, k, v, mask, sinks)` serves other platforms.
    """
    kernel = functools.partial(_module("attention").attend, scale=scale, softcap=softcap)
    return _either(kernel, _fitting("attention", q, k, v), otherwise, q, k, v, mask, sinks)


def _module(name: str) -> ModuleType:
    """The file of one operation: imported only now, since it brings Pallas along."""
    return importlib.import_module(f"jaxllm.kernels.{name}")


def _refuses_everywhere(name: str, *args: Array | QTensor) -> str | None:
    reasons = [_module(name).refuses(*args, body) for body in bodies()]
    return reasons[-1] if reasons and all(reasons) else None


def _fitting(name: str, *args: Array | QTensor) -> tuple[str, ...]:
    """The bodies that take these arguments, of each platform the best."""
    taking = [body for body in reversed(bodies()) if not _module(name).refuses(*args, body)]
    return tuple({LOWERED[body]: body for body in taking}.values())


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _either(kernel: Callable, platforms: tuple[str, ...], otherwise: Callable, *args) -> Array:
    kernels = {LOWERED[body]: functools.partial(kernel, platform=body) for body in platforms}
    return lax.platform_dependent(*args, **kernels, default=otherwise)


@_either.defjvp
def _either_jvp(kernel, platforms, otherwise, primals, tangents):
    tangent = jax.jvp(otherwise, primals, tangents)[1]
    return _either(kernel, platforms, otherwise, *primals), tangent
