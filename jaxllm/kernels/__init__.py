"""Kernels for TPU and GPU in Pallas: products with packed weights, experts' products, attention while decoding.

They are taken where a program is compiled for the GPUs of this process, or its TPU if it has one; within
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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType

import jax

from jaxllm.errors import JaxllmError
from jaxllm.kernels import tiles
from jaxllm.quant import QTensor
from jaxllm.quant.cache import expanded

Array = jax.Array

# The bodies for each kind of machine, the best first, and what `lax.platform_dependent` calls the machine.
BODIES = {"tpu": ("tpu",), "cuda": ("cuda",), "hopper": ("hopper", "cuda")}
LOWERED = {"tpu": "tpu", "cuda": "cuda", "hopper": "cuda"}
_WANTED = jax.make_user_context(())  # part of the key of every jitted program
_INTERPRETED = jax.make_user_context(False)


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


@contextmanager
def interpreted_for(platform: str) -> Iterator[None]:
    """Within it, programs for CPU are traced with the kernels of "tpu" or "cuda", interpreted: slow, and the same
    arithmetic in the same order."""
    with compiled_for(platform), _INTERPRETED(True):
        yield


def unavailable() -> str | None:
    """Why no kernel is traced in this process; None where some are."""
    if _setting() == "off":
        return "JAXLLM_PALLAS=off"
    return None if _WANTED.value else _absent()


def describe() -> str:
    """One line: for which platform kernels are in use, or why for none."""
    reason = unavailable()
    return f"not in use: {reason}" if reason else f"in use, {' and '.join(platforms())}"


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
    if present() == "tpu" and len(jax.devices()) > 1:
        return "there are several TPUs here, and XLA for TPU takes no rule by which to split a kernel"
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
    return _bodies(_WANTED.value or (present(),))


def _bodies(platforms: tuple[str, ...]) -> tuple[str, ...]:
    there = {"tpu": lambda: True, "cuda": _has_triton, "hopper": _has_mosaic}  # not asked in vain: it imports
    return tuple(dict.fromkeys(name for kind in platforms for name in BODIES[kind] if there[name]()))


def platforms() -> tuple[str, ...]:
    """Those for which kernels are traced, here and now."""
    if unavailable():
        return ()
    return _WANTED.value or (present(),)


def matmul(x: Array, w: QTensor, platforms: tuple[str, ...]) -> dict[str, Callable]:
    """By platform, x [M, in] times packed w [out, in] transposed -> f32 [M, out], where a kernel takes them."""
    return _taking("dense", "matmul", platforms, x, w)


def grouped_matmul(x: Array, w: Array | QTensor, platforms: tuple[str, ...]) -> dict[str, Callable]:
    """By platform, row i of x [R, in] times w[expert[i]] of w [E, out, in] -> f32 [R, out], where a kernel can.

    A function of x, w and expert i32 [R], which never decreases.
    """
    return _taking("grouped", "grouped_matmul", platforms, x, w)


def attend(
    q: Array, k: Array, v: Array, bias: Array | None, platforms: tuple[str, ...], *, scale, softcap
) -> dict[str, Callable]:
    """By platform, softmax attention of q [B, T, K, G, h] over k, v [B, K, S, h], where a kernel takes them.

    A function of q, k and v (packed or not), mask bool [B, T, S], sinks [K, G] as in
    `jaxllm.softmax.attention_weights`, and of a bias and its slopes, which are None: no kernel has them.
    """
    if bias is not None:
        return {}

    def over(kernel):
        kernel = functools.partial(kernel, scale=scale, softcap=softcap)
        return lambda q, k, v, mask, sinks, bias, slopes: kernel(q, expanded(k), expanded(v), mask, sinks)

    return {
        platform: over(kernel) for platform, kernel in _taking("attention", "attend", platforms, q, k, v).items()
    }


def _taking(name: str, call: str, platforms: tuple[str, ...], *args: Array | QTensor) -> dict[str, Callable]:
    """The kernels that take these arguments: for each platform, as XLA calls it, the best body."""
    found = {}
    for body in reversed(_bodies(platforms)):  # without a platform nothing is imported
        if not _module(name).refuses(*args, body):
            how = {"interpret": True} if _INTERPRETED.value else {}
            place = "cpu" if _INTERPRETED.value else LOWERED[body]
            found[place] = functools.partial(getattr(_module(name), call), platform=body, **how)
    return found


def _module(name: str) -> ModuleType:
    """The file of one operation: imported only now, since it brings Pallas along."""
    return importlib.import_module(f"jaxllm.kernels.{name}")
