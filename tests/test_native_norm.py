"""The native norm against its definition in float64, on every instruction set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import native, ops

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
EPS = 1e-5
norm = jax.jit(native.norm, static_argnames=("eps", "centered", "most", "threads"))


def normal(shape, dtype=F32, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def definition(x, w, b, centered):
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    x = x - x.mean(-1, keepdims=True) if centered else x
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * w
    return y if b is None else y + np.asarray(b, np.float64)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (7, 37), (3, 5), (2, 3072)])
def test_norm(level, shape, centered, dtype):
    x, w = normal(shape, dtype) + 3, normal(shape[1:], BF16, 1)
    for b in (None, normal(shape[1:], F32, 2)):
        got = norm(x, w, b, eps=EPS, centered=centered, most=level)
        wanted = definition(x, w, b, centered)
        assert got.dtype == dtype
        assert (
            np.abs(np.asarray(got, np.float64) - wanted).max()
            <= (1e-5 + jnp.finfo(dtype).eps) * np.abs(wanted).max()
        )


def test_a_row_has_the_same_bits_in_any_company(level):
    x, w = normal((130, 1000), BF16), normal((1000,), BF16, 1)
    whole = np.asarray(norm(x, w, eps=EPS, centered=False, most=level))
    for start, count in [(0, 1), (5, 2), (3, 127)]:
        part = norm(x[start : start + count], w, eps=EPS, centered=False, most=level, threads=1)
        np.testing.assert_array_equal(part, whole[start : start + count])


def test_what_is_no_number_stays_in_its_row(level):
    x = normal((3, 20)).at[1, 4].set(jnp.nan)
    got = np.asarray(norm(x, jnp.ones(20), eps=EPS, centered=True, most=level))
    assert np.isnan(got[1]).all()
    assert np.isfinite(got[[0, 2]]).all()


def test_it_is_differentiated_and_mapped(built):
    x, w, b = normal((2, 4, 24)), normal((24,), F32, 1), normal((24,), F32, 2)
    loss = lambda f: lambda *a: (f(*a) ** 2).sum()
    kernel = lambda *a: ops.norm(*a, eps=EPS, centered=True)
    xla = lambda x, w, b: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + EPS) * w + b
    for got, wanted in zip(
        jax.grad(loss(kernel), (0, 1, 2))(x, w, b), jax.grad(loss(xla), (0, 1, 2))(x, w, b), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(jax.vmap(lambda x: kernel(x, w, b))(x), kernel(x, w, b))


def test_weights_of_several_heads_go_the_other_way(built):
    x, w = normal((2, 3, 8)), normal((3, 8), F32, 1)
    assert "one weight for each column" in native.refuses_norm(x, w, None)
    np.testing.assert_allclose(ops.norm(x, w, eps=EPS), definition(x, w, None, False), rtol=1e-5, atol=1e-6)
