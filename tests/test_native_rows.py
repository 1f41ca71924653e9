"""Rows of an embedding by a kernel: XLA for CPU would widen the whole table of a 16-bit type before a loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import decode, native, ops
from jaxllm.sampling import GREEDY
from jaxllm.state import init_state
from tests.random_model import CONFIGS, params

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


def table(v, d, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((v, d)), dtype)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("kind", [jnp.int32, jnp.uint8, jnp.int16])
def test_rows_are_those_of_the_table(built, dtype, kind):
    w, tokens = table(50, 7, dtype), jnp.asarray([[3, 49, 0], [1, 1, 48]], kind)
    assert native.refuses_rows(w) is None
    for got in (ops.embed(w, tokens), jax.jit(ops.embed)(w, tokens)):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(w)[np.asarray(tokens)])
    assert ops.embed(w, jnp.zeros((2, 0), kind)).shape == (2, 0, 7)


def test_no_row_is_not_a_number(built):
    w, tokens = table(50, 7, BF16), jnp.asarray([50, -1, 2**31 - 1, -(2**31), 49])
    got = np.asarray(ops.embed(w, tokens), np.float32)
    assert np.isnan(got[:4]).all()
    assert np.isfinite(got[4]).all()


def test_it_is_mapped(built):
    w, tokens = jnp.stack([table(50, 7, BF16), table(50, 7, BF16, 1)]), jnp.asarray([[3, 49, 0], [1, 1, 48]])
    a, b = np.asarray(w), np.asarray(tokens)
    shared = jax.vmap(ops.embed, (None, 0))
    np.testing.assert_array_equal(shared(w[0], tokens), a[0][b])
    np.testing.assert_array_equal(jax.vmap(ops.embed, (0, None))(w, tokens), np.stack([a[0][b], a[1][b]]))
    np.testing.assert_array_equal(jax.vmap(ops.embed)(w, tokens), np.stack([a[0][b[0]], a[1][b[1]]]))
    np.testing.assert_array_equal(jax.vmap(shared, (0, None))(w, tokens), np.stack([a[0][b], a[1][b]]))


def test_its_gradient_adds_up_the_tokens(built):
    w, tokens, weights = table(9, 5, BF16), jnp.asarray([3, 3, 7]), jnp.asarray([1.0, 2.0, 4.0])
    loss = lambda w: (ops.embed(w, tokens).astype(F32) * weights[:, None]).sum()
    wanted = np.zeros((9, 5))
    wanted[3], wanted[7] = 3, 4
    np.testing.assert_array_equal(jax.grad(loss)(w), wanted)
    np.testing.assert_array_equal(jax.jvp(loss, (w,), (w,))[1], loss(w))


def test_what_it_leaves_to_xla(built):
    assert "16 bits" in native.refuses_rows(table(3, 3, F32))
    with ops.portable():
        portable = jax.jit(ops.embed).lower(table(3, 3, BF16), jnp.zeros(2, jnp.int32)).as_text()
    assert "jaxllm_rows" not in portable


@pytest.mark.parametrize("learned", [False, True])
def test_no_loop_of_steps_widens_a_table(built, learned):
    """Neither words nor learned positions; the same program of XLA's own operations does."""
    config = dataclasses.replace(CONFIGS["full"], vocab=2**14, dtype="bfloat16")
    if learned:
        config = dataclasses.replace(CONFIGS["full"], positions=0, max_len=2**14, dtype="bfloat16")
    weights, zero = params(config, dtype="bfloat16"), np.zeros(1, np.int32)
    table = weights["positions" if learned else "embed"]["w"]
    carry = decode.Carry(init_state(config, 1, 32, chunk=1), zero, None, None, zero)

    def temporaries() -> int:
        program = decode.advance.lower(config, weights, GREEDY, 0, carry, steps=4).compile()
        return program.memory_analysis().temp_size_in_bytes

    ours = temporaries()
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "refuses_rows", lambda w: "this test says so")
        assert temporaries() > ours + 1.5 * table.nbytes
    jax.clear_caches()
    assert ours < 2 * table.nbytes
