"""Programs that XLA's CPU backend would turn into something far slower than they look."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jaxllm
from jaxllm import native, ops
from jaxllm.state import init_state, nbytes
from tests.random_model import CONFIGS, params


def _temporaries(dtype: str, *, portable: bool) -> tuple[int, int]:
    """(bytes of temporaries of one decoding step, bytes of its state): little model, long cache."""
    with ops.portable() if portable else contextlib.nullcontext():
        return _measured(dtype)


def _measured(dtype: str) -> tuple[int, int]:
    config = dataclasses.replace(CONFIGS["full"], max_len=16384, dtype=dtype)
    state = init_state(config, 1, 16384, chunk=1)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    step = jax.jit(jaxllm.forward, static_argnums=0, donate_argnums=3)
    memory = step.lower(config, params(config), tokens, state).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= nbytes(state)
    return memory.temp_size_in_bytes, nbytes(state)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_never_copies_the_cache(dtype, portable):
    temporaries, state = _temporaries(dtype, portable=portable)
    assert temporaries < state / 3  # scores of four heads over all slots are an eighth


def test_the_check_sees_a_scatter_of_bf16(monkeypatch):
    """Written by a scatter, a bf16 cache is converted to f32 and back on CPU."""
    if jax.default_backend() != "cpu":
        pytest.skip("this is about XLA's CPU backend")
    monkeypatch.setattr(ops, "_select", ops._scatter)
    jax.clear_caches()
    temporaries, state = _temporaries("bfloat16", portable=True)
    assert temporaries > state / 2
    jax.clear_caches()


def test_rotary_tables_are_worked_out_once():
    """XLA for CPU drops its barriers before it fuses, and would repeat sines in every layer."""
    if jax.default_backend() != "cpu" or native.unavailable():
        pytest.skip("this is about the native kernels")
    config = CONFIGS["full"]
    assert len(config.blocks) > 1
    step = jax.jit(jaxllm.forward, static_argnums=0)

    def sines() -> int:
        return (
            step.lower(config, params(config), jnp.zeros((1, 16), jnp.int32)).compile().as_text().count(" sine(")
        )

    assert sines() == 1
    with ops.portable():
        assert sines() > 1  # so the count sees what it is for
