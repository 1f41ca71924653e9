"""The native CPU kernels against the definition in `ops`, on every instruction set of this machine."""

import functools
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import native, ops
from jaxllm.basics import activate
from jaxllm.errors import JaxllmError
from jaxllm.native import build

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16


def normal(shape, dtype=F32, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


matmul = jax.jit(native.matmul, static_argnames=("out", "most", "threads"))
attend = jax.jit(native.attend, static_argnames=("scale", "softcap", "most", "threads"))


# ---- matmul -----------------------------------------------------------------------------------------------


def bound(k):
    """What f32 may lose in a sum of k products of normal numbers: 6e-8 of the sum so far at each."""
    return 2e-6 + 2e-7 * k


def products(x, w):
    return np.asarray(x, np.float64) @ np.asarray(w, np.float64).T


@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(1, 576, 576), (2, 40, 33), (7, 1600, 130), (33, 37, 65), (5, 33, 19), (16, 32, 16), (513, 64, 70)],
)
def test_matmul_is_the_product(level, m, k, n):
    for x_type, w_type in [
        (BF16, BF16),
        (F32, F32),
        (F16, F16),
        (F16, BF16),
        (F32, F16),
        (F32, BF16),
        (BF16, F32),
    ]:
        x, w = normal((m, k), x_type), normal((n, k), w_type, 1)
        got = matmul(x, w, out=F32, most=level)
        assert np.abs(np.asarray(got, np.float64) - products(x, w)).max() < bound(k)
    for out in (BF16, F16):
        np.testing.assert_array_equal(matmul(x, w, out=out, most=level), got.astype(out))


def test_matmul_sums_long_rows(level):
    """28,672 is the longest row of a 70B model's matrices."""
    x, w = normal((3, 28672), BF16), normal((48, 28672), BF16, 1)
    got = matmul(x, w, out=F32, most=level)
    assert np.abs(np.asarray(got, np.float64) - products(x, w)).max() < bound(28672)


@pytest.mark.parametrize("size", [2.0**-64, 2.0**-130])
def test_numbers_too_small_for_bf16_are_zeros_at_most(level, size):
    """Products, or x itself, are below what f32 has in full: pairs of bf16 take them and leave them as zeros."""
    x, w = (normal((3, 1056)) * size).astype(BF16), (normal((9, 1056), seed=1) * max(size, 2.0**-64)).astype(BF16)
    got = np.asarray(matmul(x, w, out=F32, most=level), np.float64)
    flushed = 2.0**-126 * (2 * 1056 + np.abs(np.asarray(w, np.float64)).sum(1))
    assert (np.abs(got - products(x, w)) <= flushed).all()
    one = jnp.zeros((1, 1056), BF16).at[0, 1030].set(2.0**-126)  # the smallest that counts
    assert matmul(one, jnp.ones((1, 1056), BF16), out=F32, most=level)[0, 0] == 2.0**-126


@pytest.mark.parametrize("k", [64, 1056, 2079])
def test_every_column_of_bf16_meets_its_own(level, k):
    """One number in a row of x: what comes out is the weight, whatever block, lane or panel it is in."""
    w = normal((9, k), BF16)
    for x, start in [(jnp.eye(k, dtype=BF16), 0), (jnp.eye(k, dtype=BF16)[k // 2 : k // 2 + 3], k // 2)]:
        got = matmul(x, w, out=F32, most=level)
        np.testing.assert_array_equal(got, w.T[start : start + len(x)].astype(F32))


@pytest.mark.parametrize("dtype", [BF16, F32, F16])
@pytest.mark.parametrize("k", [100, 3072])
def test_a_row_has_the_same_bits_in_any_company(level, dtype, k):
    x, w = normal((513, k), dtype), normal((70, k), dtype, 1)
    whole = np.asarray(matmul(x, w, out=F32, most=level))
    for start, count in [(0, 1), (5, 2), (3, 7), (17, 32), (1, 511)]:
        part = matmul(x[start : start + count], w, out=F32, most=level)
        np.testing.assert_array_equal(part, whole[start : start + count])
    np.testing.assert_array_equal(matmul(x, w, out=F32, most=level, threads=1), whole)


def test_matmul_keeps_what_is_no_number(level):
    x = normal((5, 64), BF16).at[2, 3].set(jnp.nan).at[3, 1].set(jnp.inf)
    got = matmul(x, normal((20, 64), BF16, 1), out=F32, most=level)
    assert np.isnan(got[2]).all()
    assert not np.isfinite(got[3]).any()
    assert np.isfinite(got[jnp.array([0, 1, 4])]).all()


def test_bf16_is_rounded_to_nearest_even(level):
    """Every normal bf16 with the f32 around its ties; what is no number stays none."""
    upper = np.arange(2**16, dtype=np.uint32)
    bits = upper[:, None] << 16 | np.array([0, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = bits[upper & 0x7F80 > 0].reshape(-1, 1).view(np.float32)
    got = matmul(jnp.asarray(x), jnp.ones((1, 1)), out=BF16, most=level)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(got.astype(F32), x.astype(BF16).astype(F32))


@pytest.mark.parametrize("dtype", [BF16, F32, F16])
def test_rows_of_zeros_behind_the_others(level, dtype):
    """Padding: zeros of either sign give zeros; one number anywhere in the last row counts."""
    x, w = normal((20, 37), dtype), normal((65, 37), dtype, 1)
    whole = np.asarray(matmul(x, w, out=F32, most=level))
    got = matmul(x.at[12:].set(0).at[15].set(-0.0), w, out=F32, most=level)
    np.testing.assert_array_equal(got[:12], whole[:12])
    np.testing.assert_array_equal(np.abs(got[12:]), 0)
    for column in (0, 3, 5, 7, 36):
        last = jnp.zeros((20, 37), dtype).at[19, column].set(0.5)
        assert np.asarray(matmul(last, w, out=F32, most=level))[19].any()


def test_matmul_of_nothing(built):
    assert matmul(normal((0, 32)), normal((8, 32)), out=F32).shape == (0, 8)
    np.testing.assert_array_equal(matmul(jnp.zeros((3, 0)), jnp.zeros((8, 0)), out=F32), np.zeros((3, 8)))


# ---- attention --------------------------------------------------------------------------------------------

CASES = [  # B, T, K, G, h, S
    (1, 1, 3, 3, 64, 640),
    (2, 5, 2, 1, 32, 33),
    (1, 33, 1, 7, 40, 100),
    (2, 130, 3, 3, 64, 200),
    (1, 3, 1, 16, 576, 129),
    (1, 300, 1, 2, 20, 320),
    (1, 1, 1, 1, 5, 1),
]
MASKS = ("causal", "window", "random")


def case(B, T, K, G, h, S, kind, dtype):
    last = S - T + np.arange(T)[:, None]
    mask = np.arange(S) <= last
    if kind == "window":
        mask &= np.arange(S) > last - 17
    mask = np.broadcast_to(mask, (B, T, S))
    if kind == "random":
        mask = np.random.default_rng(S).random((B, T, S)) < 0.5
        mask[..., 0] = True  # every query sees something
    q, k, v = normal((B, T, K, G, h), dtype), normal((B, K, S, h), dtype, 1), normal((B, K, S, h), dtype, 2)
    return q, k, v, jnp.asarray(mask)


def definition(q, k, v, mask, sinks, scale, softcap):
    """Attention in f64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.einsum("btkgh,bksh->bktgs", q, k) * scale
    scores = np.tanh(scores / softcap) * softcap if softcap else scores
    scores = np.where(np.asarray(mask)[:, None, :, None], scores, -np.inf)
    highest = scores.max(-1, keepdims=True)
    sink = 0 if sinks is None else np.exp(np.asarray(sinks, np.float64)[:, None, :, None] - highest)
    weights = np.exp(scores - highest)
    return np.einsum("bktgs,bksh->btkgh", weights / (weights.sum(-1, keepdims=True) + sink), v)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(("shape", "kind"), list(zip(CASES, MASKS * 3, strict=False)), ids=str)
def test_attention_is_softmax_attention(level, shape, kind, dtype):
    q, k, v, mask = case(*shape, kind, dtype)
    for softcap, sinks in [(None, None), (3.0, normal(q.shape[2:4]))]:
        scale = 2 * shape[4] ** -0.5
        want = definition(q, k, v, mask, sinks, scale, softcap)
        got = attend(q, k, v, mask, sinks, scale=scale, softcap=softcap, most=level)
        assert got.dtype == dtype
        # bf16: the weights of the sum and the result are rounded to 8 bits, values reach 4
        assert np.abs(np.asarray(got, np.float64) - want).max() < (2e-2 if dtype == BF16 else 2e-5)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("kind", ["causal", "window"])
def test_a_query_has_the_same_bits_in_any_company(level, kind, dtype):
    q, k, v, mask = case(2, 130, 3, 3, 64, 200, kind, dtype)
    go = functools.partial(attend, scale=0.2, most=level)
    whole = np.asarray(go(q, k, v, mask).astype(F32))
    for start, count in [(0, 1), (7, 5), (1, 129)]:
        rows = slice(start, start + count)
        np.testing.assert_array_equal(go(q[:, rows], k, v, mask[:, rows]).astype(F32), whole[:, rows])
    for b in range(2):
        one = go(*(a[b : b + 1] for a in (q, k, v, mask)))
        np.testing.assert_array_equal(one[0].astype(F32), whole[b])
    np.testing.assert_array_equal(go(q, k, v, mask, threads=1).astype(F32), whole)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_slots_nobody_sees_do_not_matter(level, dtype):
    """A longer cache with more empty slots behind gives the same bits."""
    q, k, v, mask = case(1, 9, 2, 2, 64, 100, "causal", dtype)
    more = [jnp.pad(a, ((0, 0), (0, 0), (0, 93), (0, 0)), constant_values=7) for a in (k, v)]
    got = attend(q, *more, jnp.pad(mask, ((0, 0), (0, 0), (0, 93))), scale=0.2, most=level)
    np.testing.assert_array_equal(got.astype(F32), attend(q, k, v, mask, scale=0.2, most=level).astype(F32))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_query_that_sees_nothing_gets_zeros(level, dtype):
    q, k, v, mask = case(1, 40, 2, 3, 64, 100, "causal", dtype)
    mask = mask.at[0, 4].set(False)
    got = np.asarray(attend(q, k, v, mask, scale=0.2, most=level).astype(F32))
    assert (got[0, 4] == 0).all()
    assert (np.abs(got).max(axis=(0, 2, 3, 4)) > 0).sum() == 39


def test_a_query_that_is_no_number_stays_none(level):
    q, k, v, mask = case(1, 5, 1, 2, 32, 70, "causal", F32)
    got = attend(q.at[0, 2, 0, 1, 0].set(jnp.nan), k, v, mask, scale=0.2, most=level)
    assert np.isnan(got[0, 2, 0, 1]).all()
    assert np.isnan(got).sum() == 32


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_query_that_sees_one_slot_gets_its_value(level, dtype):
    """Each slot in turn: the first and last of blocks and halves of blocks too."""
    q, k, v, _ = case(130, 1, 1, 1, 8, 130, "causal", dtype)
    got = attend(q, k, v, jnp.eye(130, dtype=bool)[:, None], scale=0.2, most=level)
    np.testing.assert_array_equal(got[:, 0, 0, 0].astype(F32), v[jnp.arange(130), 0, jnp.arange(130)].astype(F32))


@pytest.mark.parametrize(("softcap", "most"), [(None, 8), (2.0, 40)])
def test_weights_are_exact(level, softcap, most):
    """A score against one of zero, the other value zero: the result is the weight itself."""
    scores = np.linspace(-most, most, 997, dtype=np.float32)
    k, v, mask = jnp.asarray([1.0, 0.0]), jnp.asarray([1.0, 0.0]), jnp.ones((1, 997, 2), bool)
    arrays = jnp.asarray(scores).reshape(1, 997, 1, 1, 1), k.reshape(1, 1, 2, 1), v.reshape(1, 1, 2, 1), mask
    got = attend(*arrays, scale=1.0, softcap=softcap, most=level)
    np.testing.assert_allclose(got, definition(*arrays, None, 1.0, softcap), rtol=2e-6)


# ---- gated products and the cache -------------------------------------------------------------------------


@pytest.mark.parametrize("act", native.ACTIVATIONS)
def test_gated_is_the_activation_of_one_product_times_the_other(level, act):
    if level not in ("avx512", "amx"):
        pytest.skip(f"{level} multiplies no bf16 as it is")
    for m, k, n in [(1, 576, 100), (7, 40, 33), (33, 1600, 17), (200, 2048, 50), (3, 1056, 300)]:
        x, gate, up = (normal(s, F32, i) for i, s in enumerate([(m, k), (n, k), (n, k)]))
        x, gate, up = x.astype(BF16), (gate * k**-0.5).astype(BF16), (up * k**-0.5).astype(BF16)
        want = activate(act, *(jnp.asarray(products(x, w), F32) for w in (gate, up)))
        got = np.asarray(native.gated(x, gate, up, act=act, most=level).astype(F32))
        np.testing.assert_allclose(got, want, rtol=2**-8, atol=1e-5)
        for rows in (slice(0, 1), slice(m // 2, m)):
            one = native.gated(x[rows], gate, up, act=act, most=level, threads=1)
            np.testing.assert_array_equal(one.astype(F32), got[rows])


def test_gated_needs_products_of_bf16(built):
    if native.level() in ("portable", "avx2"):
        assert "it needs avx512" in native.refuses_gated(*[normal((8, 32), BF16)] * 3, "silu")
    with pytest.raises(Exception, match="needs AVX-512 with BF16"):
        native.gated(*[normal((8, 32), BF16)] * 3, act="silu", most="avx2").block_until_ready()


def test_gated_is_differentiated(built):
    args = [normal(s, BF16, i) for i, s in enumerate([(2, 3, 32), (20, 32), (20, 32)])]
    f = lambda *a: ops.gated(*a, "silu", activate).astype(F32).sum()
    got, want = both(jax.grad(f, (0, 1, 2)), *args)
    close([a.astype(F32) for a in got], [a.astype(F32) for a in want])


@pytest.mark.parametrize("dtype", [BF16, F32, jnp.int8])
def test_put_writes_in_place_what_the_definition_writes(built, dtype):
    cache, x = (normal(s, F32).astype(dtype) for s in [(2, 3, 20, 8), (2, 5, 3, 8)])
    slot = jnp.asarray([[3, 4, 5, 20, 20], [19, 0, 1, 2, 20]], jnp.int32)
    got, want = both(ops.put, cache, x, slot)
    np.testing.assert_array_equal(got.astype(F32), want.astype(F32))
    compiled = jax.jit(ops.put, donate_argnums=0).lower(cache, x, slot).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == cache.nbytes
    assert compiled.memory_analysis().temp_size_in_bytes == 0


def test_put_is_differentiated_and_mapped(built):
    cache, x, slot = normal((2, 3, 20, 8)), normal((2, 5, 3, 8)), jnp.tile(jnp.arange(5), (2, 1))
    close(*both(jax.grad(lambda c, x: (ops.put(c, x, slot) ** 2).sum(), (0, 1)), cache, x))
    close(*both(jax.vmap(lambda x: ops.put(cache, x, slot)), jnp.stack([x, x + 1])))


# ---- transformations, through ops -------------------------------------------------------------------------


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), a, b)


def both(f, *args):
    """f with native kernels and without."""
    assert ops.explain(normal((2, 3)), normal((4, 3))).startswith("native")
    got = f(*args)
    with ops.portable():
        return got, f(*args)


def test_matmul_is_differentiated_to_any_order(built):
    f = lambda x, w: jnp.sin(ops.matmul(x, w)).sum()
    x, w = normal((3, 20)), normal((5, 20), seed=1)
    close(*both(jax.jit(jax.grad(f, (0, 1))), x, w))
    close(*both(jax.jacfwd(f), x, w))
    close(*both(jax.hessian(f), x, w))
    close(*both(jax.grad(lambda x: jax.grad(f)(x, w).sum()), x))


def test_attention_is_differentiated_to_any_order(built):
    q, k, v, mask = case(2, 3, 2, 2, 8, 11, "causal", F32)
    f = lambda q, k, v, s: jnp.sin(ops.attend(q, k, v, mask, sinks=s, scale=0.3, softcap=4.0)).sum()
    args = q, k, v, normal((2, 2))
    close(*both(jax.jit(jax.grad(f, (0, 1, 2, 3))), *args))
    close(*both(jax.hessian(f, 3), *args))
    plain = lambda q: ops.attend(q, k, v, mask, scale=0.3).sum()
    close(*both(jax.grad(plain), q))


def test_vmap_of_matmul(built):
    x, w = normal((4, 3, 33)), normal((4, 6, 33), seed=1)
    close(*both(jax.vmap(ops.matmul), x, w))
    close(*both(jax.vmap(ops.matmul, (None, 0)), x, w))
    many = jax.jit(jax.vmap(jax.vmap(ops.matmul, (None, 0)), (0, None)))
    close(*both(many, x, w))
    rows = jax.vmap(ops.matmul, (0, None))(x, w[0])
    np.testing.assert_array_equal(rows.reshape(12, 6), ops.matmul(x.reshape(12, 33), w[0]))


def test_vmap_of_attention(built):
    q, k, v, mask = case(2, 3, 2, 2, 8, 70, "causal", F32)
    f = jax.vmap(lambda q, k: ops.attend(q, k, v, mask, scale=0.3), (0, None))
    close(*both(f, jnp.stack([q, q + 1]), k))


def test_loops(built):
    w = normal((33, 33)) * 0.2
    scan = lambda x: jax.lax.scan(lambda y, _: (ops.matmul(y, w), y[0, 0]), x, length=4)
    loop = lambda x: jax.lax.while_loop(lambda c: c[0] < 4, lambda c: (c[0] + 1, ops.matmul(c[1], w)), (0, x))[1]
    close(*both(jax.jit(scan), normal((3, 33))))
    close(*both(jax.jit(loop), normal((3, 33))))
    close(*both(jax.jit(jax.grad(lambda x: scan(x)[0].sum())), normal((3, 33))))


# ---- which code is taken ----------------------------------------------------------------------------------


def test_a_portable_program_has_no_kernel(built):
    f = jax.jit(lambda x, w, q, k, m: (ops.matmul(x, w), ops.attend(q, k, k, m, scale=1.0)))
    args = (
        normal((2, 32)),
        normal((8, 32)),
        normal((1, 2, 1, 1, 8)),
        normal((1, 1, 4, 8)),
        jnp.ones((1, 2, 4), bool),
    )
    assert set(kernels(f.lower(*args).as_text())) == {"jaxllm_matmul", "jaxllm_attend"}
    with ops.portable():
        assert kernels(f.lower(*args).as_text()) == []
    assert len(kernels(f.lower(*args).as_text())) == 2


def kernels(text):
    return [name for name in ("jaxllm_matmul", "jaxllm_attend") if name in text]


def test_another_platform_keeps_its_own_form(built):
    exported = jax.export.export(jax.jit(ops.matmul), platforms=["tpu"])(
        normal((2, 32), BF16), normal((8, 32), BF16)
    )
    assert kernels(exported.mlir_module()) == []


def test_explain_says_why(built):
    x, w = normal((2, 32)), normal((8, 32))
    assert ops.explain(x, w) == f"native kernel, {native.level()}"
    assert ops.explain(x.astype(F16), w.astype(F16)) == f"native kernel, {native.level()}"
    assert "not int32" in ops.explain(x, w.astype(jnp.int32))
    with ops.portable():
        assert "ops.portable() is on" in ops.explain(x, w)


def test_what_is_not_taken_goes_the_other_way(built):
    q, k, v, mask = case(1, 2, 1, 2, 8, 5, "causal", F32)
    assert "not float16, float32 and float32" in native.refuses_attend(q.astype(F16), k, v)
    mixed = ops.attend(q, k.astype(BF16), v, mask, scale=0.3)
    close(mixed, ops.attend(q, k.astype(BF16).astype(F32), v, mask, scale=0.3))
    whole = ops.matmul(normal((2, 32)), jnp.ones((8, 32), jnp.int32))
    assert whole.dtype == F32


ALONE = "from jaxllm import native; print(native.describe())"


def alone(setting):
    command = [sys.executable, "-c", ALONE]
    env = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "JAXLLM_NATIVE": setting}
    folder = pathlib.Path(native.__file__).parents[2]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)


def test_it_can_be_turned_off():
    assert alone("off").stdout.strip() == "not in use: JAXLLM_NATIVE=off"


def test_a_lower_instruction_set_can_be_asked_for(built):
    assert alone("portable").stdout.strip() == "in use, portable"


def test_a_wrong_setting_is_an_error():
    run = alone("fastest")
    assert run.returncode == 1
    assert "JAXLLM_NATIVE should be on, off, portable, avx2, avx512, amx; got 'fastest'" in run.stderr


@pytest.fixture
def another(monkeypatch):
    """A library at another place, and the memory of the real one kept."""

    def put(path):
        monkeypatch.setattr(native, "LIBRARY", path)
        native._load.cache_clear()

    yield put
    monkeypatch.undo()
    native._load.cache_clear()


def test_without_a_library_everything_works(another, tmp_path):
    another(tmp_path / "_kernels.so")
    if native.unavailable() == "JAXLLM_NATIVE=off":
        pytest.skip("JAXLLM_NATIVE=off comes first")
    assert native.unavailable().startswith("not built; with a C++ compiler")
    close(ops.matmul(jnp.ones((2, 3)), jnp.ones((4, 3))), np.full((2, 4), 3.0))
    with pytest.raises(JaxllmError, match="the native kernels are not in use: not built"):
        native.matmul(jnp.ones((2, 3)), jnp.ones((4, 3)), F32)


def test_a_library_of_something_else_is_refused(another, tmp_path):
    (tmp_path / "_kernels.so").write_bytes(b"nothing")
    another(tmp_path / "_kernels.so")
    if native.unavailable() == "JAXLLM_NATIVE=off":
        pytest.skip("JAXLLM_NATIVE=off comes first")
    assert "does not load" in native.unavailable()


# ---- building ---------------------------------------------------------------------------------------------


def test_a_failing_compiler_is_reported(monkeypatch, tmp_path):
    if not shutil.which("false"):
        pytest.skip("no `false` here")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match="the compiler failed"):
        build.build(tmp_path / "_kernels.so")
    assert list(tmp_path.iterdir()) == []


def test_no_compiler_is_reported(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler was found"):
        build.compiler()


def test_another_processor_gets_the_portable_sources():
    levels = {level for _, level, _ in build.units("aarch64")}
    assert levels == {"", "portable"}
    assert {level for _, level, _ in build.units("x86_64")} == {"", *native.LEVELS}


def test_every_access_under_a_mask_is_checked():
    """What compilers do not check is named in checked.h."""
    access = re.compile(r"_mm\d*_\w*(?:mask\w*(?:load|store)|gather|scatter)\w*")
    files = [p for p in build.HERE.iterdir() if p.suffix in (".cc", ".h") and p.name != "checked.h"]
    used = {name for path in files for name in access.findall(path.read_text(encoding="utf-8"))}
    known = (build.HERE / "checked.h").read_text(encoding="utf-8")
    assert used
    assert {name for name in used if f"#define {name}(" not in known} == set()
