"""Native products with weights of float8 against the values that they stand for, on every instruction set."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm import native, ops
from jaxllm.basics import activate
from jaxllm.native import float8, packed
from jaxllm.quant import FORMATS, dequantize, encode, products

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
# Groups that begin in one block of 1024 columns and end in another.
STRADDLING = {f"g{n}": replace(FORMATS["fp8_e4m3_block"], name=f"g{n}", group=n, rows=1) for n in (96, 1536)}
NAMES = [f"fp8_{kind}{end}" for kind in ("e4m3", "e5m2") for end in ("", "_tensor", "_block")] + ["mxfp8"]

product = jax.jit(packed.matmul, static_argnames=("out", "most", "threads"))
gated = jax.jit(packed.gated, static_argnames=("act", "most", "threads"))


def normal(shape, dtype=F32, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def weight(name, n, k, seed=0):
    """Rows of many sizes, so that scales differ."""
    values = np.asarray(normal((n, k), seed=seed)) * np.float32(2) ** (np.arange(n)[:, None] % 5)
    return jax.tree.map(
        jnp.asarray, encode(values * np.linspace(0.1, 3, k, dtype=np.float32), (FORMATS | STRADDLING)[name])
    )


def values(q):
    """[n, k] in f64, without a rounding."""
    scale = np.repeat(np.asarray(q.scale, np.float64), q.codes.shape[-1] // q.scale.shape[-1], -1)
    return (np.asarray(q.codes, np.float64) * scale)[..., : q.columns]


def allowed(x, w, group):
    """What panels.h says that sums lose [m, n]."""
    x, w = np.abs(np.asarray(x, np.float64)), np.abs(w)
    return 2.0**-24 * (300 + 1024 // (group or 1024) + x.shape[1] / 1024) * (x @ w.T) + 1e-30


def within(got, x, q):
    w = values(q)
    return (
        np.abs(np.asarray(got, np.float64) - np.asarray(x, np.float64) @ w.T) <= allowed(x, w, q.format.group)
    ).all()


# ---- the values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_it_is_the_product_of_the_values(level, name, dtype):
    for m, k, n in [(1, 512, 40), (2, 1155, 33), (5, 200, 7), (64, 1376, 18)]:
        x, q = normal((m, k), dtype), weight(name, n, k)
        assert packed.refuses(x, q) is None
        got = [product(x, q, out=F32, most=level, threads=threads) for threads in (1, 2)]
        np.testing.assert_array_equal(*got)
        assert within(got[0], x, q)


@pytest.mark.parametrize("name", ["fp8_e4m3_block", "fp8_e5m2", "mxfp8"])
def test_it_is_the_definition(level, name):
    x, q = normal((5, 384)), weight(name, 20, 384)
    close(product(x, q, out=F32, most=level), products.matmul(x, q), 1e-5)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2_block", "mxfp8"])
def test_long_rows(level, name):
    """28,672 is the longest row of a 70B model's matrices."""
    x, q = normal((3, 28672), BF16), weight(name, 10, 28672)
    assert within(product(x, q, out=F32, most=level), x, q)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("kind", ["e4m3fn", "e5m2"])
def test_every_code_is_taken_as_it_is(level, kind, dtype):
    """Normal and subnormal ones, infinities, and what is no number, one column of 256 rows."""
    codes = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, f"float8_{kind}"))[:, None]
    q = replace(weight(f"fp8_{kind[:4]}", 256, 64), scale=jnp.full((256, 1), 0.75, F32))
    q = replace(q, codes=jnp.asarray(np.pad(codes, ((0, 0), (0, 63)))))
    wanted = codes[:, 0].astype(np.float32) * np.float32(0.75)
    for rows in (1, 9):
        x = jnp.zeros((rows, 64), dtype).at[:, 0].set(1)
        got = product(x, q, out=F32, most=level)
        np.testing.assert_array_equal(got, np.broadcast_to(wanted, (rows, 256)))


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e4m3_block", "fp8_e5m2_block", "mxfp8", *STRADDLING])
@pytest.mark.parametrize("k", [96, 1120, 2079])
def test_every_column_meets_its_own_weight_and_scale(level, name, k):
    """One number in a row of x: what comes out is the weight, rounded once, wherever it lies."""
    q = weight(name, 9, k)
    q = replace(q, scale=(q.scale.astype(F32) * (1 + jnp.arange(q.scale.shape[1]) % 7)).astype(q.scale.dtype))
    whole = np.asarray(dequantize(q, np.float32)).T
    for dtype in (BF16, F32):
        np.testing.assert_array_equal(product(jnp.eye(k, dtype=dtype), q, out=F32, most=level), whole)
        few = jnp.eye(k, dtype=dtype)[k - 3 :]
        np.testing.assert_array_equal(product(few, q, out=F32, most=level), whole[k - 3 :])


@pytest.mark.parametrize("dtype", [F32, BF16, F16, jnp.float8_e8m0fnu])
@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e4m3_block"])
def test_scales_of_every_type(level, name, dtype):
    q = weight(name, 20, 384)
    q = replace(q, scale=q.scale.astype(dtype))
    x = normal((5, 384), BF16)
    assert packed.refuses(x, q) is None
    assert within(product(x, q, out=F32, most=level), x, q)


def test_every_power_of_two_is_a_scale(level):
    """2^-126 to 2^127 (XLA's threads take smaller numbers as zeros), and no number; one a row, and of groups."""
    powers = np.r_[np.arange(1, 256, dtype=np.uint8), np.uint8(127)].view(ml_dtypes.float8_e8m0fnu)
    for groups in (1, 3):
        scale = np.stack([np.roll(powers, g) for g in range(groups)], 1)
        q = replace(weight("mxfp8", 256, 32 * groups), scale=jnp.asarray(scale))
        q = replace(q, codes=jnp.ones((256, 32 * groups), jnp.float8_e4m3fn))
        x = jnp.zeros((5, 32 * groups), BF16).at[:, -1].set(1)
        wanted = np.where(np.isnan(scale.astype(np.float32)).any(1), np.nan, scale[:, -1].astype(np.float32))
        np.testing.assert_array_equal(product(x, q, out=F32, most=level), np.broadcast_to(wanted, (5, 256)))


@pytest.mark.parametrize("out", [BF16, F16])
def test_results_are_rounded_once(level, out):
    x, q = normal((9, 256), BF16), weight("fp8_e4m3_block", 50, 256)
    whole = product(x, q, out=F32, most=level)
    np.testing.assert_array_equal(product(x, q, out=out, most=level), whole.astype(out))


def test_what_is_no_number_stays_in_its_row(level):
    for dtype in (BF16, F32):
        x = normal((6, 80), dtype).at[2, 3].set(jnp.nan).at[3, 40].set(jnp.inf).at[4, 79].set(-jnp.inf)
        got = np.asarray(product(x, weight("fp8_e4m3", 20, 80), out=F32, most=level))
        assert not np.isfinite(got[2:5]).any()
        assert np.isfinite(got[[0, 1, 5]]).all()


def test_rows_of_zeros_behind_the_others(level):
    x, q = normal((20, 64), BF16), weight("mxfp8", 33, 64)
    whole = np.asarray(product(x, q, out=F32, most=level))
    got = product(x.at[12:].set(0).at[15].set(-0.0), q, out=F32, most=level)
    np.testing.assert_array_equal(got[:12], whole[:12])
    np.testing.assert_array_equal(np.abs(got[12:]), 0)


def test_nothing(built):
    assert product(jnp.zeros((0, 32), BF16), weight("fp8_e4m3", 8, 32), out=F32).shape == (0, 8)


# ---- one order of summation --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F32, F16])
@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2_block", "mxfp8"])
@pytest.mark.parametrize("k", [320, 1100, 2304])
def test_a_row_has_the_same_bits_in_any_company(level, name, dtype, k):
    x, q = normal((300, k), dtype), weight(name, 70, k)
    whole = np.asarray(product(x, q, out=F32, most=level))
    for start, count in [(0, 1), (5, 2), (3, 3), (3, 7), (17, 32), (1, 299)]:
        part = product(x[start : start + count], q, out=F32, most=level)
        np.testing.assert_array_equal(part, whole[start : start + count])
    np.testing.assert_array_equal(product(x, q, out=F32, most=level, threads=1), whole)


def test_many_rows_of_weights_give_the_bits_of_few(level):
    x, q = normal((3, 64), BF16), weight("fp8_e4m3_block", 1031, 64)
    whole = product(x, q, out=F32, most=level)
    for start, end in [(0, 1), (254, 259), (1024, 1031)]:
        some = replace(q, codes=q.codes[start:end], scale=q.scale[start:end])
        np.testing.assert_array_equal(product(x, some, out=F32, most=level), whole[:, start:end])


# ---- gated products and experts ----------------------------------------------------------------------------


@pytest.mark.parametrize("act", native.ACTIVATIONS)
@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2_tensor", "fp8_e4m3_block", "mxfp8"])
def test_gated_is_the_activation_of_one_product_times_the_other(level, name, act):
    for (m, k, n), dtype in [((1, 512, 40), BF16), ((7, 200, 33), F16), ((21, 96, 300), F32)]:
        gate, up = weight(name, n, k), weight(name, n, k, seed=1)
        x = normal((m, k), dtype) / (64 * max(1, float(np.abs(values(gate)).max())))
        assert packed.refuses_gated(x, gate, up, act) is None
        wanted = activate(act, *(product(x, q, out=F32, most=level) for q in (gate, up)))
        got = gated(x, gate, up, act=act, most=level)
        assert got.dtype == dtype
        assert (jnp.abs(got.astype(F32) - wanted) <= (jnp.finfo(dtype).eps + 1e-6) * jnp.abs(wanted) + 1e-6).all()
        alone = [gated(x[i : i + 1], gate, up, act=act, most=level, threads=1) for i in range(m)]
        np.testing.assert_array_equal(jnp.concatenate(alone), got)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e4m3_block", "mxfp8"])
@pytest.mark.parametrize("rows", [1, 9, 70])
def test_each_row_meets_its_expert(level, name, rows):
    q = jax.tree.map(lambda *parts: jnp.stack(parts), *(weight(name, 24, 192, seed=i) for i in range(5)))
    expert = np.sort(np.random.default_rng(rows).integers(0, 5, rows)).astype(np.int32)
    x = normal((rows, 192), BF16)
    got = packed.grouped(x, q, jnp.asarray(expert), most=level)
    for i, e in enumerate(expert):
        alone = product(x[i : i + 1], weight(name, 24, 192, seed=e), out=F32, most=level)
        np.testing.assert_array_equal(got[i : i + 1], alone)


def test_an_expert_that_is_not_there_is_an_error(built):
    q = jax.tree.map(lambda part: part[None], weight("fp8_e4m3", 8, 32))
    for expert in (-1, 1):
        with pytest.raises(Exception, match="expert that is not there"):
            packed.grouped(jnp.ones((1, 32), BF16), q, jnp.asarray([expert])).block_until_ready()


# ---- behind ops --------------------------------------------------------------------------------------------


def close(got, wanted, tolerance=2e-4):
    assert np.abs(np.asarray(got - wanted)).max() <= tolerance * np.abs(np.asarray(wanted)).max()


def test_it_is_differentiated(built):
    x, q = normal((5, 96)), weight("fp8_e4m3", 20, 96)
    assert "native" in ops.explain(x, q)
    loss = lambda f: lambda x, scale: (f(x, replace(q, scale=scale)) ** 2).sum()
    for got, wanted in zip(
        jax.grad(loss(ops.matmul), (0, 1))(x, q.scale),
        jax.grad(loss(products.matmul), (0, 1))(x, q.scale),
        strict=True,
    ):
        close(got, wanted)


def test_the_program_has_the_kernels(built):
    x, q = normal((2, 64), BF16), weight("fp8_e4m3", 8, 64)
    three = jax.tree.map(lambda *parts: jnp.stack(parts), q, q, q)
    f = lambda x: (
        ops.matmul(x, q),
        ops.gated(x, q, q, "silu", activate),
        ops.grouped_matmul(x, three, jnp.zeros(2, jnp.int32)),
    )
    text = jax.jit(f).lower(x).as_text()
    assert text.count("@jaxllm_float8(") == 2
    assert text.count("@jaxllm_float8_gated(") == 1
    with ops.portable():
        assert "jaxllm_float8" not in jax.jit(f).lower(x).as_text()


def test_refusals_have_reasons(built):
    x, q = normal((2, 128)), weight("fp8_e4m3_block", 8, 128)
    assert "rounds activations" in packed.refuses(x, weight("fp8_e4m3_w8a8", 8, 128))
    assert "multiple of 32" in packed.refuses(x, replace(q, scale=jnp.ones((8, 8), F32)))
    assert "multiple of 32" in packed.refuses_format(replace(q.format, group=48))
    assert "scales of uint8" in packed.refuses(x, replace(q, scale=jnp.ones((8, 1), jnp.uint8)))
    assert "not zero" in packed.refuses(x, replace(q, zero=jnp.ones((8, 1), F32)))
    assert "float8_e5m2" in packed.refuses(x.astype("float8_e5m2"), q)
    assert "differ" in packed.refuses_gated(x, q, weight("fp8_e4m3", 8, 128), "silu")
    assert float8.refuses(x, q) is None


@pytest.mark.parametrize("part", [("codes", np.s_[:, :64]), ("codes", np.s_[:4]), ("scale", np.s_[:4])])
def test_parts_that_do_not_fit_are_an_error(built, part):
    """The call itself checks: nothing is read beyond an array."""
    (name, kept), q = part, weight("mxfp8", 8, 128)
    q = replace(q, **{name: getattr(q, name)[kept]})
    with pytest.raises(Exception, match="do not fit"):
        packed.matmul(normal((2, 128), BF16), q, F32).block_until_ready()
    with pytest.raises(Exception, match="do not fit"):
        packed.gated(normal((2, 128), BF16), weight("mxfp8", 8, 128), q, act="silu").block_until_ready()
