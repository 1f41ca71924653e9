"""Native products with packed weights against the values that the weights stand for, on every instruction set."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import native, ops
from jaxllm.basics import activate
from jaxllm.native import packed
from jaxllm.quant import FORMATS, QTensor, dequantize, encode, products
from jaxllm.quant.formats import Format
from jaxllm.quant.qtensor import PLANES

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
ROUNDING = {32: 2.0**-30, 16: 2.0**-15, 8: 1.0001 / 254}  # of the largest activation in a block

# Beside the table's own formats, what checkpoints bring: scales of scales, offsets, groups of 16.
MADE = {
    "q4_k": Format("q4_k", 4, 32, scale="uint8", zero="value"),
    "q6_k": Format("q6_k", 6, 16, center=32, scale="int8"),
    "nvfp4": FORMATS["nvfp4"],
}
NAMES = ("q4f16_1", "q8f16_1", "q4bf16_1", "int2_g64", "int3_g32", "int4_g128", "int5_g32", "int6_g64")
NAMES += ("int8_g32", "int4", "int8", "uint3_g32", "uint4_g32", "uint4_g128", "uint5_g64", "uint8_g64")
ODD = {"uint4_g160": replace(FORMATS["uint4_g32"], group=160)}  # five blocks: they end where nothing else does
NAMES += ("nf4", "fp4", "mxfp4", *MADE, *ODD)


def normal(shape, dtype=F32, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def codes_at_random(rng, shape, bits):
    """Planes u8 of random codes [.., columns]."""
    widths = PLANES[bits]
    return [jnp.asarray(rng.integers(0, 256, (*shape[:-1], shape[-1] * w // 8), dtype=np.uint8)) for w in widths]


def made(name, n, k, seed=0):
    """A weight [n, k] of random codes and parts."""
    rng = np.random.default_rng([seed, n, k])
    f = MADE[name]
    columns = -(-k // 256) * 256
    low, high = [*codes_at_random(rng, (n, columns), f.bits), None][:2]
    number = lambda *shape: jnp.asarray(rng.uniform(0.5, 1.5, shape), F16)
    whole = lambda dtype: jnp.asarray(rng.integers(1, 64, (n, columns // f.group)), dtype)
    parts = dict(super_scale=number(n, columns // 256), scale=whole(f.scale))
    if name == "q4_k":
        parts |= dict(offset=whole("uint8"), super_offset=-number(n, columns // 256))
    if name == "nvfp4":
        parts |= dict(scale=whole("int8").astype(f.scale), super_scale=jnp.full((n, 1), 0.25, F32))
    return QTensor(low, high=high, format=f, columns=k, dtype_name="float32", **parts)


def weight(name, n, k, seed=0):
    if name in MADE:
        return made(name, n, k, seed)
    return jax.tree.map(jnp.asarray, encode(np.asarray(normal((n, k), seed=seed)), (FORMATS | ODD)[name]))


def values(q):
    return np.asarray(dequantize(jax.tree.map(np.asarray, q), np.float32), np.float64)


def kept(q, dtype):
    """Bits of an activation that count."""
    if dtype == F32:
        return 32
    return 8 if q.format.levels in ("int", "e2m1") else 16


def allowed(x, q, dtype):
    """What may be lost: of each activation, and 2^-23 of the sum so far at each of the blocks' sums [m, n]."""
    w = np.abs(values(q))
    x = np.abs(np.asarray(x, np.float64))
    blocks = np.pad(x, ((0, 0), (0, -x.shape[1] % 32))).reshape(x.shape[0], -1, 32)
    largest = np.repeat(blocks.max(-1), 32, 1)[:, : x.shape[1]]
    return ROUNDING[kept(q, dtype)] * largest @ w.T + 2.0**-23 * (blocks.shape[1] + 4) * (x @ w.T) + 1e-30


product = jax.jit(packed.matmul, static_argnames=("out", "most", "threads"))


# ---- the values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_product_of_the_values(level, name):
    for (m, k, n), dtype in [((1, 512, 40), BF16), ((7, 200, 33), F16), ((21, 96, 16), F32)]:
        x, q = normal((m, k), dtype), weight(name, n, k)
        assert packed.refuses(x, q) is None
        w = values(q)
        got = np.asarray(product(x, q, out=F32, most=level), np.float64)
        assert (np.abs(got - np.asarray(x, np.float64) @ w.T) <= allowed(x, q, dtype)).all()


def test_fifteen_bits_of_an_activation_count(level):
    """What is a multiple of 2^-15 of the largest, or of the next power of two, is taken as it is beside nf4."""
    x = jnp.asarray([[2047, 0.0625, -3.1875] + [0] * 29], F16)
    q = replace(weight("nf4", 4, 32), scale=jnp.ones((4, 1), F32))
    exact = np.asarray(x, np.float64) @ values(q).T
    np.testing.assert_allclose(product(x, q, out=F32, most=level), exact, rtol=0, atol=2047 * 2.0**-22)


@pytest.mark.parametrize("name", ["q4f16_1", "int8_g128", "q6_k"])
def test_long_rows(level, name):
    """28,672 is the longest row of a 70B model's matrices."""
    x, q = normal((3, 28672), BF16), weight(name, 20, 28672)
    w = values(q)
    got = np.asarray(product(x, q, out=F32, most=level), np.float64)
    assert (np.abs(got - np.asarray(x, np.float64) @ w.T) <= allowed(x, q, BF16)).all()


@pytest.mark.parametrize("out", [BF16, F16])
def test_results_are_rounded_once(level, out):
    x, q = normal((9, 256), BF16), weight("q4f16_1", 50, 256)
    whole = product(x, q, out=F32, most=level)
    np.testing.assert_array_equal(product(x, q, out=out, most=level), whole.astype(out))


def test_half_floats_of_every_size(level):
    """Scales and results of float16: normal, subnormal, zero, too large."""
    scale = jnp.asarray([[6e-8], [1e-5], [0.0], [1.0], [60000.0], [-2.5]], F16)
    q = replace(weight("int8", 6, 32), scale=scale)
    x = jnp.ones((1, 32), BF16)
    w = values(q)
    got = product(x, q, out=F32, most=level)
    assert (np.abs(np.asarray(got, np.float64) - np.asarray(x, np.float64) @ w.T) <= allowed(x, q, BF16)).all()
    np.testing.assert_array_equal(product(x, q, out=F16, most=level), got.astype(F16))


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e20, 3e38])
def test_activations_of_any_size(level, size):
    x, q = normal((3, 64)).clip(-1, 1) * size, weight("int8_g32", 8, 64)
    q = replace(q, scale=q.scale * F16(1e-3))  # or the sum overflows
    w = values(q)
    got = np.asarray(product(x, q, out=F32, most=level), np.float64)
    assert np.abs(got - np.asarray(x, np.float64) @ w.T).max() <= max(1e-6 * size, 1e-30)


def test_what_is_no_number_stays_in_its_row(level):
    for dtype in (BF16, F32):
        x = normal((6, 64), dtype).at[2, 3].set(jnp.nan).at[3, 40].set(jnp.inf).at[4, 0].set(-jnp.inf)
        got = np.asarray(product(x, weight("q4f16_1", 20, 64), out=F32, most=level))
        assert np.isnan(got[2:5]).all()
        assert np.isfinite(got[[0, 1, 5]]).all()


def test_rows_of_zeros_behind_the_others(level):
    x, q = normal((20, 64), BF16), weight("q4f16_1", 33, 64)
    whole = np.asarray(product(x, q, out=F32, most=level))
    got = product(x.at[12:].set(0).at[15].set(-0.0), q, out=F32, most=level)
    np.testing.assert_array_equal(got[:12], whole[:12])
    np.testing.assert_array_equal(np.abs(got[12:]), 0)


def test_nothing(built):
    q = weight("q4f16_1", 8, 32)
    assert product(jnp.zeros((0, 32), BF16), q, out=F32).shape == (0, 8)


# ---- one order of summation --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("name", ["q4f16_1", "uint4_g64", "int8", "q4_k", "int6_g32", "nf4"])
def test_a_row_has_the_same_bits_in_any_company(level, name, dtype):
    x, q = normal((150, 320), dtype), weight(name, 70, 320)
    whole = np.asarray(product(x, q, out=F32, most=level))
    for start, count in [(0, 1), (5, 2), (3, 7), (17, 32), (1, 149)]:
        part = product(x[start : start + count], q, out=F32, most=level)
        np.testing.assert_array_equal(part, whole[start : start + count])
    np.testing.assert_array_equal(product(x, q, out=F32, most=level, threads=1), whole)


# ---- tiles have the bits of vectors --------------------------------------------------------------------------


@pytest.fixture
def amx(built):
    if native.level() != "amx":
        pytest.skip("this machine has no amx")


def same_bits(got, wanted):
    np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(wanted).view(np.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_amx_has_the_bits_of_avx512(amx, name):
    """Rows that fill tiles of 8, 12 and 16, and not; more columns than one tile of x takes at once."""
    q, wanted = weight(name, 40, 1000), {}
    for m, dtype in [(1, F16), (3, F32), (9, F32), (16, F16), (17, F32), (33, BF16), (130, BF16)]:
        if dtype not in wanted:
            wanted[dtype] = product(normal((130, 1000), dtype), q, out=F32, most="avx512")
        got = product(normal((130, 1000), dtype)[:m], q, out=F32, most="amx", threads=1 + m % 2)
        same_bits(got, wanted[dtype][:m])


@pytest.mark.parametrize(
    "name", ["q4f16_1", "int4_g32", "uint4_g32", "nvfp4", "mxfp4", "uint8_g32", "int8", "nf4"]
)
def test_amx_takes_the_largest_numbers(amx, name):
    """Activations whose upper byte is -128 or 127 everywhere, codes that are all the lowest or the highest."""
    x = jnp.asarray([[-1.9921875], [1.9921875], [-1], [1], [2**-9], [-(2**-9)]], BF16) * jnp.ones(64, BF16)
    x = x.at[4:, 0].set(1)  # the others are small beside it
    for byte in (0x00, 0xFF, 0x80, 0x7F, 0x08):
        q = weight(name, 20, 64)
        codes = np.full(q.codes.shape, byte, np.uint8).view(np.dtype(q.codes.dtype))
        q = replace(q, codes=jnp.asarray(codes))
        same_bits(*(product(x, q, out=F32, most=most) for most in ("amx", "avx512")))


@pytest.mark.parametrize(("m", "k", "n"), [(33, 200, 70), (5, 8192, 192)])
def test_amx_gates_with_the_bits_of_avx512(amx, m, k, n):
    """The longer rows are more than the tiles take at once of two weights."""
    gated = jax.jit(packed.gated, static_argnames=("act", "most", "threads"))
    gate, up, x = weight("q4f16_1", n, k), weight("q4f16_1", n, k, seed=1), normal((m, k)) / 64
    wanted = gated(x, gate, up, act="gelu_tanh", most="avx512")
    for threads in (1, 2):
        same_bits(gated(x, gate, up, act="gelu_tanh", most="amx", threads=threads), wanted)


# ---- gated products ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", native.ACTIVATIONS)
@pytest.mark.parametrize("name", ["q4f16_1", "uint4_g32", "mxfp4", "int6_g32", "q4_k"])
def test_gated_is_the_activation_of_one_product_times_the_other(level, name, act):
    gated = jax.jit(packed.gated, static_argnames=("act", "most", "threads"))
    for (m, k, n), dtype in [((1, 512, 40), BF16), ((7, 200, 33), F16), ((21, 96, 16), F32)]:
        gate, up = weight(name, n, k), weight(name, n, k, seed=1)
        x = normal((m, k), dtype) / (64 * max(1, float(np.abs(values(gate)).max())))
        assert packed.refuses_gated(x, gate, up, act) is None
        wanted = activate(act, *(product(x, q, out=F32, most=level) for q in (gate, up)))
        got = gated(x, gate, up, act=act, most=level)
        assert got.dtype == dtype
        assert (jnp.abs(got.astype(F32) - wanted) <= (jnp.finfo(dtype).eps + 1e-6) * jnp.abs(wanted) + 1e-6).all()
        alone = [gated(x[i : i + 1], gate, up, act=act, most=level, threads=1) for i in range(m)]
        np.testing.assert_array_equal(jnp.concatenate(alone), got)


@pytest.mark.parametrize("name", ["q4f16_1", "uint4_g32"])
def test_gated_is_differentiated(built, name):
    x, gate, up = normal((5, 96)) / 8, weight(name, 20, 96), weight(name, 20, 96, seed=1)
    loss = lambda f: lambda x, scale: (f(x, replace(gate, scale=scale), up) ** 2).sum()
    apart = lambda x, gate, up: activate("silu", products.matmul(x, gate), products.matmul(x, up))
    for number in (0, 1):
        got = jax.grad(loss(lambda *a: ops.gated(*a, "silu", activate)), number)(x, gate.scale.astype(F32))
        close(got, jax.grad(loss(apart), number)(x, gate.scale.astype(F32)))


# ---- several products of one x ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q4f16_1", "uint4_g32", "int8_g32", "mxfp4", "int6_g32", "q4_k"])
def test_several_products_have_the_bits_of_each_alone(level, name):
    several = jax.jit(packed.several, static_argnames=("out", "most", "threads"))
    for m, k, rows in [(1, 512, (40, 8, 8)), (2, 576, (700, 300, 5)), (21, 200, (33, 1))]:
        weights = [weight(name, n, k, seed=i) for i, n in enumerate(rows)]
        x = normal((m, k), BF16)
        wanted = [product(x, q, out=BF16, most=level) for q in weights]
        for threads in (1, 2):
            got = several(x, weights, out=BF16, most=level, threads=threads)
            for one, other in zip(got, wanted, strict=True):
                same_bits(one, other)


def test_several_products_go_together_where_they_can(built):
    x, q, k = normal((2, 3, 96), BF16), weight("q4f16_1", 20, 96), weight("q4f16_1", 8, 96, seed=1)
    program = lambda *weights: jax.jit(ops.matmuls).lower(x, weights).as_text()
    assert program(q, k).count("jaxllm_packed_several") == 1
    for other in (weight("int8_g32", 8, 96), weight("nf4", 8, 96), dequantize(k, BF16)):
        assert "jaxllm_packed_several" not in program(q, other)
        for got, w in zip(ops.matmuls(x, (q, other)), (q, other), strict=True):
            same_bits(got, ops.matmul(x, w))
    with ops.portable():
        assert "jaxllm" not in program(q, k)


def test_several_products_are_differentiated_and_batched(built):
    x, q, k = normal((3, 5, 96)) / 8, weight("q4f16_1", 20, 96), weight("q4f16_1", 8, 96, seed=1)
    loss = lambda f: lambda x, scale: sum((y**2).sum() for y in f(x, [replace(q, scale=scale), k]))
    apart = lambda x, weights: [products.matmul(x.reshape(-1, 96), w) for w in weights]
    for number in (0, 1):
        got = jax.grad(loss(ops.matmuls), number)(x, q.scale.astype(F32))
        close(got, jax.grad(loss(apart), number)(x, q.scale.astype(F32)))
    for got, wanted in zip(jax.vmap(ops.matmuls, (0, None))(x, [q, k]), ops.matmuls(x, [q, k]), strict=True):
        same_bits(got, wanted)


def test_gated_refuses_what_differs(built):
    x, q = normal((2, 64)), weight("q4f16_1", 8, 64)
    assert "differ" in packed.refuses_gated(x, q, weight("int4_g32", 8, 64), "silu")
    assert "relu" in packed.refuses_gated(x, q, q, "relu")
    assert "two tables" in packed.refuses_gated(x, weight("nf4", 8, 64), weight("nf4", 8, 64), "silu")


# ---- experts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q4f16_1", "uint4_g32", "int6_g32", "mxfp4"])
@pytest.mark.parametrize("rows", [1, 9, 70])
def test_each_row_meets_its_expert(level, name, rows):
    q = jax.tree.map(lambda *parts: jnp.stack(parts), *(weight(name, 24, 96, seed=i) for i in range(5)))
    expert = np.sort(np.random.default_rng(rows).integers(0, 5, rows)).astype(np.int32)
    x = normal((rows, 96), BF16)
    got = packed.grouped(x, q, jnp.asarray(expert), most=level)
    for i, e in enumerate(expert):
        alone = product(x[i : i + 1], weight(name, 24, 96, seed=e), out=F32, most=level)
        np.testing.assert_array_equal(got[i : i + 1], alone)


def test_an_expert_that_is_not_there_is_an_error(built):
    q = jax.tree.map(lambda part: part[None], weight("q4f16_1", 8, 32))
    with pytest.raises(Exception, match="expert that is not there"):
        packed.grouped(jnp.ones((1, 32), BF16), q, jnp.asarray([1])).block_until_ready()


# ---- behind ops --------------------------------------------------------------------------------------------


def close(got, wanted, tolerance=2e-4):
    assert np.abs(np.asarray(got - wanted)).max() <= tolerance * np.abs(np.asarray(wanted)).max()


@pytest.mark.parametrize("name", ["q4f16_1", "uint4_g32"])
def test_it_is_differentiated(built, name):
    x, q = normal((5, 96)), weight(name, 20, 96)
    assert "native" in ops.explain(x, q)
    loss = lambda f: lambda x, scale: (f(x, replace(q, scale=scale)) ** 2).sum()
    scale = q.scale.astype(F32)
    for got, wanted in zip(
        jax.grad(loss(ops.matmul), (0, 1))(x, scale),
        jax.grad(loss(products.matmul), (0, 1))(x, scale),
        strict=True,
    ):
        close(got, wanted)
    second = lambda f: jax.jit(jax.grad(lambda x: (jax.grad(loss(f))(x, scale) ** 2).sum()))(x)
    close(second(ops.matmul), second(products.matmul))


def test_experts_are_differentiated(built):
    q = jax.tree.map(lambda *parts: jnp.stack(parts), *(weight("q4f16_1", 24, 96, seed=i) for i in range(3)))
    expert = jnp.asarray([0] * 20 + [2] * 20)
    x = normal((40, 96))
    loss = lambda f: lambda x: (f(x, q, expert) ** 2).sum()
    xla = lambda x, q, expert: products.grouped_matmul(x, q, expert, few=32, size=32)
    close(jax.grad(loss(ops.grouped_matmul))(x), jax.grad(loss(xla))(x))


def test_it_is_mapped_and_looped(built):
    x, q = normal((4, 3, 96), BF16), weight("q4f16_1", 20, 96)
    got = jax.jit(jax.vmap(lambda x: ops.matmul(x, q)))(x)
    np.testing.assert_array_equal(got.reshape(12, 20), ops.matmul(x.reshape(12, 96), q))
    looped = jax.jit(lambda x: jax.lax.map(lambda x: ops.matmul(x, q), x))(x)
    np.testing.assert_array_equal(looped, got)


def test_columns_in_another_order(built):
    order = jnp.asarray(np.random.default_rng(0).permutation(96).astype(np.int32))
    q = replace(weight("int4_g32", 20, 96), order=order)
    x = normal((3, 96))
    close(ops.matmul(x, q), x @ values(q).T.astype(np.float32), 1e-5)


def test_refusals_have_reasons(built):
    x = normal((2, 64))
    assert "rounds activations" in packed.refuses(x, weight("w8a8", 8, 64))
    assert "e2m3" in packed.refuses(x, weight("mxfp6", 8, 64))
    assert "multiple of 16" in packed.refuses(x, weight("q3f16_1", 8, 80))
    far = weight("int4_g32", 8, 64)
    assert "center" in packed.refuses(x, replace(far, format=replace(far.format, center=1000)))
    assert "float8_e5m2" in packed.refuses(x.astype("float8_e5m2"), weight("int8", 8, 64))
    with ops.portable():
        assert "portable" in ops.explain(x, weight("q4f16_1", 8, 64))


def test_a_portable_program_has_no_kernel(built):
    x, q = normal((2, 64)), weight("q4f16_1", 8, 64)
    f = lambda x, q: ops.matmul(x, q)
    assert "jaxllm_packed" in jax.jit(f).lower(x, q).as_text()
    with ops.portable():
        assert "jaxllm_packed" not in jax.jit(f).lower(x, q).as_text()


@pytest.mark.parametrize("part", [("codes", np.s_[:, :16]), ("scale", np.s_[:4]), ("zero", np.s_[:, :1])])
def test_parts_that_do_not_fit_are_an_error(built, part):
    """The call itself checks: nothing is read beyond an array."""
    (name, kept), q = part, weight("uint4_g32", 8, 64)
    q = replace(q, **{name: getattr(q, name)[kept]})
    with pytest.raises(Exception, match="do not fit"):
        packed.matmul(normal((2, 64), BF16), q, F32).block_until_ready()
