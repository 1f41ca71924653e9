"""Programs that XLA's CPU backend would turn into something far slower than they look."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jaxllm
from jaxllm import ops
from jaxllm.state import init_state, nbytes
from tests.random_model import CONFIGS, params


def _temporaries(dtype: str) -> tuple[int, int]:
    """(bytes of temporaries of one decoding step, bytes of its state): little model, long cache."""
    config = dataclasses.replace(CONFIGS["full"], max_len=16384, dtype=dtype)
    state = init_state(config, 1, 16384, chunk=1)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    step = jax.jit(jaxllm.forward, static_argnums=0, donate_argnums=3)
    memory = step.lower(config, params(config), tokens, state).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= nbytes(state)
    return memory.temp_size_in_bytes, nbytes(state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_never_copies_the_cache(dtype):
    temporaries, state = _temporaries(dtype)
    assert temporaries < state / 3  # scores of four heads over all slots are an eighth


def test_the_check_sees_a_scatter_of_bf16(monkeypatch):
    """Written by a scatter, a bf16 cache is converted to f32 and back on CPU."""
    if jax.default_backend() != "cpu":
        pytest.skip("this is about XLA's CPU backend")
    monkeypatch.setattr(ops, "_select", ops._scatter)
    jax.clear_caches()
    temporaries, state = _temporaries("bfloat16")
    assert temporaries > state / 2
    jax.clear_caches()
