"""Packed weights as leaves: the table of formats, rounding into each, and products under jit, vmap and grad."""

import importlib
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm import ops
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.quant import FORMATS, Format, QTensor, dequantize, encode, named, products
from jaxllm.quant.encode import top
from jaxllm.quant.formats import FLOAT8, LEVELS, UNQUANTIZED, as_json, from_json
from jaxllm.quant.qtensor import PLANES, pack, select, unpack

PACKED = [name for name in FORMATS if name not in UNQUANTIZED]
FLOATS = [name for name in PACKED if FORMATS[name].levels != "int"]
# One of each way that codes and scales lie in memory.
KINDS = ["q3f16_1", "q4f16_1", "int5_g32", "int8", "uint4_g64", "w8a8", "fp8_e4m3_block", "nf4", "mxfp4", "nvfp4"]


def weight(*shape, seed=0, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def device(q: QTensor) -> QTensor:
    return jax.tree.map(jnp.asarray, q)


def float32(x) -> np.ndarray:
    return np.asarray(x).astype(np.float32)


# ---- the table ----------------------------------------------------------------------------------------------


def test_the_named_levels_are_those_of_their_papers():
    """NF4 and NF3 by QLoRA's construction: quantiles of the normal distribution, zero, both ends."""
    norm = pytest.importorskip("scipy.stats").norm
    for name, bits in (("nf4", 4), ("nf3", 3)):
        half = 2 ** (bits - 1)
        end = 1 - (1 / (2**bits - 1) + 1 / 2**bits) / 4  # halfway between the outermost quantiles
        positive = norm.ppf(np.linspace(end, 0.5, half + 1)[:-1])
        negative = -norm.ppf(np.linspace(end, 0.5, half)[:-1])
        wanted = np.sort(np.concatenate([positive, [0.0], negative])) / positive.max()
        np.testing.assert_allclose(LEVELS[name], wanted, atol=2e-7, err_msg=name)


@pytest.mark.parametrize("name", ["e2m1", "e2m3", "e3m2"])
def test_small_floats_are_those_of_ml_dtypes(name):
    kind = {"e2m1": "float4_e2m1fn", "e2m3": "float6_e2m3fn", "e3m2": "float6_e3m2fn"}[name]
    codes = np.arange(len(LEVELS[name]), dtype=np.uint8).view(getattr(ml_dtypes, kind))
    np.testing.assert_array_equal(np.array(LEVELS[name], np.float32), codes.astype(np.float32))


@pytest.mark.parametrize("name", PACKED)
def test_bits_per_weight_is_what_is_stored(name):
    f = FORMATS[name]
    q = encode(weight(256, 1920), f)  # 1920 is a multiple of every group
    per_row = sum(part[:1].nbytes for part in q.parts().values()) if f.group else q.codes[:1].nbytes
    per_row += q.high[:1].nbytes if not f.group and q.high is not None else 0
    per_row -= 4 if q.super_scale is not None else 0  # one f32 for the whole matrix
    assert f.bits_per_weight == per_row * 8 / 1920


@pytest.mark.parametrize("name", FORMATS)
def test_formats_survive_json(name):
    assert from_json(as_json(FORMATS[name])) == FORMATS[name]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"base": "q4f16_1", "grup": 64}, "no field 'grup'"),
        ({"base": "q4"}, "there is no weight format 'q4'"),
        ({"name": "x"}, "needs base, or name and bits"),
        ({"name": "x", "bits": True}, "bits of a weight format should be int from 1 to 64, got True"),
        ({"base": "int4_g32", "group": 0}, "group of a weight format"),
        ({"base": ["int4_g32"]}, "there is no weight format"),
        ([], "an object of fields"),
    ],
)
def test_what_is_no_format_is_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        from_json(values)


@given(st.sampled_from(sorted(PLANES)), st.integers(0, 2**32 - 1), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_unpack_is_the_inverse_of_pack(bits, seed, eights):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (3, 8 * eights)).astype(np.uint8)
    low, high = pack(codes, bits)
    assert (low.nbytes + (0 if high is None else high.nbytes)) * 8 == codes.size * bits
    np.testing.assert_array_equal(unpack(low, high, bits), codes)
    np.testing.assert_array_equal(
        unpack(jnp.asarray(low), None if high is None else jnp.asarray(high), bits), codes
    )


def test_codes_lie_lowest_column_first():
    low, _ = pack(np.array([[1, 2, 3, 4, 5, 6, 7, 8]], np.uint8), 4)
    assert low.tolist() == [[0x21, 0x43, 0x65, 0x87]]
    low, high = pack(np.array([[0, 1, 2, 3, 4, 5, 6, 7]], np.uint8), 3)
    assert low.tolist() == [[0b11100100, 0b11100100]]
    assert high.tolist() == [[0b11110000]]


# ---- rounding -----------------------------------------------------------------------------------------------


def gaps(f: Format) -> float:
    """The widest distance between neighbouring levels, where 1 is the scale."""
    if f.levels == "int":
        return 1.0
    if f.levels in FLOAT8:
        mantissa = {"float8_e4m3fn": 3, "float8_e5m2": 2}[f.levels]
        return 2.0 ** (np.floor(np.log2(top(f))) - mantissa)
    return float(np.diff(np.unique(LEVELS[f.levels])).max())


def bound(q: QTensor) -> np.ndarray:
    """The most that a value may be off, [.., N, columns]: half a gap, or what is beyond the last level."""
    f = q.format
    scale = np.abs(float32(q.scale))
    if q.super_scale is not None:
        scale = scale * np.repeat(q.super_scale, scale.shape[-1] // q.super_scale.shape[-1], -1)
    most = gaps(f) / 2
    if f.power:  # the largest magnitude may be nearly twice the power of two of the largest level
        most = max(most, 2.0 ** (np.floor(np.log2(top(f))) + 1) - top(f))
    if f.levels == "int" and f.zero is None and 0 < f.high < 2 * f.center:
        most = 1.0  # a group whose other end is as far out as the extreme
    if f.zero == "code":
        most = 1.0  # the zero is rounded, too
    reach = max(abs(f.low - f.center), f.high - f.center) if f.levels == "int" else top(f)
    reach *= {"float16": 2**-10, "bfloat16": 2**-8, "float8_e4m3fn": 2**-3}.get(f.scale, 2**-20)
    reach += f.high * 2**-10 if f.dtype == "float16" else 0  # MLC's codes are worked out in f16
    spread = np.repeat(scale, q.codes.shape[-1] * 8 // PLANES.get(f.bits, (8,))[0] // scale.shape[-1], -1)
    return (most + reach) * spread[..., : q.columns] + 1e-6


@pytest.mark.parametrize("name", [n for n in PACKED if n != "ternary"])
@pytest.mark.parametrize("columns", [384, 77])
def test_a_value_is_off_by_half_a_step_at_most(name, columns):
    f = FORMATS[name]
    w = weight(131, columns, seed=3)
    if f.dtype:
        w = w.astype(ml_dtypes.bfloat16 if f.dtype == "bfloat16" else f.dtype)
    q = encode(w, f)
    assert q.shape == w.shape
    assert q.dtype_name == (f.dtype or "float32")
    error = np.abs(dequantize(q, np.float32) - float32(w))
    assert (error <= bound(q)).all()


@pytest.mark.parametrize("name", PACKED)
def test_values_a_format_can_say_come_back_exactly(name):
    """Codes made by hand, with every level in each group, are decoded, encoded and decoded again."""
    f = FORMATS[name]
    rng = np.random.default_rng(5)
    group = f.group or 64
    if f.levels == "int":
        table = np.arange(f.low, f.high + 1, dtype=np.float32) - f.center
        if f.zero:
            table = table - 2**f.bits // 3
    elif f.levels in FLOAT8:
        table = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, f.levels)).astype(np.float32)
        table = table[np.isfinite(table)]
    else:
        table = np.array(LEVELS[f.levels], np.float32)
    if name == "ternary":
        table = table[table != 0]  # the mean magnitude is that of the values only where none is 0
    values = rng.choice(table, (128, 2, group))
    end = np.abs(table).argmax()
    values[..., 0], values[..., 1] = table[end], table[0]
    values[..., -1] = table[-1]
    whole = f.rows is None or f.global_scale
    rows, groups = 1 if whole or f.rows == 128 else 128, 1 if f.group is None or whole else 2
    scale = np.float32(2.0) ** rng.integers(-6, -2, (rows, groups, 1))
    w = (values * scale).reshape(128, -1)
    np.testing.assert_array_equal(dequantize(encode(w, f), np.float32), w)


@pytest.mark.parametrize("name", PACKED)
def test_zeros_stay_zeros(name):
    q = encode(np.zeros((3, 72), np.float32), FORMATS[name])
    assert not dequantize(q, np.float32).any()
    y = ops.matmul(jnp.ones((2, 72)), device(q))
    assert not np.asarray(y).any()


@pytest.mark.parametrize("name", KINDS)
def test_stacks_of_matrices_are_encoded_one_by_one(name):
    w = weight(3, 5, 96)
    q = encode(w, FORMATS[name])
    for i in range(3):
        alone = encode(w[i], FORMATS[name])
        jax.tree.map(np.testing.assert_array_equal, select(q, i), alone)


@pytest.mark.parametrize("name", ["q4f16_1", "fp8_e4m3_block", "fp8_e4m3_tensor", "ternary", "nvfp4"])
def test_blocks_of_rows_change_nothing(name, monkeypatch):
    w = weight(300, 128)
    whole = encode(w, FORMATS[name])
    monkeypatch.setattr(importlib.import_module("jaxllm.quant.encode"), "CHUNK", 1000)
    jax.tree.map(np.testing.assert_array_equal, encode(w, FORMATS[name]), whole)


def test_block_scales_are_shared_by_128_rows():
    q = encode(weight(200, 256), FORMATS["fp8_e4m3_block"])
    assert q.scale.shape == (200, 2)
    assert (q.scale[:128] == q.scale[0]).all()
    assert (q.scale[128:] == q.scale[199]).all()
    assert (q.scale[0] != q.scale[199]).all()


def test_halves_round_as_the_format_says():
    w = np.array([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0, 0]], np.float32)
    even, away = (encode(w, named("int8", low=-7, high=7, rounding=r)).codes for r in ("even", "away"))
    assert even.tolist() == [[7, 0, 2, 2, 0, -2, 0, 0]]
    assert away.tolist() == [[7, 1, 2, 3, -1, -2, 0, 0]]


def test_all_codes_of_a_signed_group_serve():
    """The extreme is at code 0 whatever its sign, so that the other side has one step more than half of them."""
    for sign in (1, -1):
        w = sign * np.linspace(-1, 0.86, 32, dtype=np.float32)[None]
        codes = unpack(encode(w, FORMATS["int4_g32"]).codes, None, 4)
        assert (codes.min(), codes.max()) == (0, 15)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_refused(bad):
    w = weight(4, 64)
    w[1, 2] = bad
    with pytest.raises(CheckpointError, match="infinite values or NaN"):
        encode(w, FORMATS["int4_g32"])


@pytest.mark.parametrize("w", [np.ones(4), np.ones((2, 3), np.int32), np.ones((0, 3))])
def test_what_is_no_matrix_is_refused(w):
    with pytest.raises(CheckpointError, match="a weight"):
        encode(w, FORMATS["int8"])


def test_formats_that_are_only_read_are_not_made():
    with pytest.raises(ConfigError, match="stores plain values"):
        encode(weight(2, 8), FORMATS["q0f16"])
    with pytest.raises(ConfigError, match="only read"):
        encode(weight(2, 8), named("int4_g32", scale="uint8"))


def mx(w: np.ndarray, kind, group=32) -> np.ndarray:
    """OCP Microscaling, section 6.3, one group after the other in float64, rounded by ml_dtypes."""
    out = np.zeros_like(w, dtype=np.float64)
    info = ml_dtypes.finfo(kind)
    emax = int(np.floor(np.log2(float(info.max))))
    for row in range(w.shape[0]):
        for at in range(0, w.shape[1], group):
            v = w[row, at : at + group].astype(np.float64)
            scale = 2.0 ** (np.floor(np.log2(np.abs(v).max())) - emax)
            near = np.clip(v / scale, -float(info.max), float(info.max)).astype(np.float32).astype(kind)
            out[row, at : at + group] = near.astype(np.float64) * scale
    return out


@pytest.mark.parametrize(
    ("name", "kind"),
    [("mxfp4", "float4_e2m1fn"), ("mxfp6", "float6_e2m3fn"), ("mxfp8", "float8_e4m3fn")],
)
def test_microscaling_is_that_of_the_specification(name, kind):
    w = weight(16, 96, seed=2) * 2.0 ** np.random.default_rng(0).integers(-9, 9, (16, 1)).astype(np.float32)
    w[:, ::7] = np.round(w[:, ::7] * 4) / 4  # ties, too
    q = encode(w.astype(np.float32), FORMATS[name])
    np.testing.assert_array_equal(dequantize(q, np.float64), mx(w, getattr(ml_dtypes, kind)))


def test_nvfp4_puts_scales_of_groups_over_one_of_the_matrix():
    w = weight(8, 64)
    q = encode(w, FORMATS["nvfp4"])
    above = np.float32(np.abs(w).max() / (6 * 448))
    assert q.super_scale.shape == (8, 1)
    assert (q.super_scale == above).all()
    amax = np.abs(w.reshape(8, 4, 16)).max(-1)
    np.testing.assert_array_equal(q.scale, (amax / 6 / above).astype(ml_dtypes.float8_e4m3fn))
    scaled = w.reshape(8, 4, 16) / (float32(q.scale) * above)[..., None]
    near = np.clip(scaled, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    got = dequantize(q, np.float32).reshape(8, 4, 16)
    np.testing.assert_allclose(got, near * (float32(q.scale) * above)[..., None], rtol=1e-6)


def test_ternary_is_the_mean_magnitude():
    w = weight(5, 40)
    scale = np.abs(w).mean()
    q = encode(w, FORMATS["ternary"])
    wanted = np.clip(np.rint(w / scale), -1, 1) * scale  # BitNet b1.58, equations 1 to 3
    np.testing.assert_allclose(dequantize(q, np.float32), wanted, rtol=1e-6)


def test_nf4_chooses_the_nearest_of_the_published_values():
    w = weight(4, 128)
    book = np.array(LEVELS["nf4"])
    amax = np.abs(w.reshape(4, 2, 64)).max(-1, keepdims=True)
    nearest = np.abs((w.reshape(4, 2, 64) / amax)[..., None] - book).argmin(-1)
    codes = unpack(encode(w, FORMATS["nf4"]).codes, None, 4)
    np.testing.assert_array_equal(codes, nearest.reshape(4, 128))


# ---- products -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKED)
def test_a_product_is_that_of_the_values(name):
    w, x = weight(48, 96), weight(3, 96, seed=1)
    q = encode(w, FORMATS[name])
    y = jax.jit(ops.matmul)(jnp.asarray(x), device(q))
    wanted = x @ dequantize(q, np.float32).T
    atol = 2e-5 * np.abs(wanted).max()
    if FORMATS[name].activations == "int8":
        atol = np.abs(x).max() / 254 * np.abs(dequantize(q, np.float32)).sum(1).max()
    elif FORMATS[name].activations:
        atol = np.abs(x).max() / 16 * np.abs(dequantize(q, np.float32)).sum(1).max()
    np.testing.assert_allclose(y, wanted, atol=atol)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("blocks", [1, 3, 7])
def test_blocks_of_rows_give_the_same_product(name, blocks, monkeypatch):
    """Also where the last block overlaps the one before it."""
    q = device(encode(weight(50, 64), FORMATS[name]))
    x = jnp.asarray(weight(4, 64, seed=1))
    monkeypatch.setattr(products, "SMALL_WEIGHTS", 2**30)
    whole = products.matmul(x, q)
    monkeypatch.setattr(products, "SMALL_WEIGHTS", 0)
    monkeypatch.setattr(products, "BLOCK_WEIGHTS", 50 * 64 // blocks)
    np.testing.assert_allclose(products.matmul(x, q), whole, rtol=1e-5, atol=1e-5)


def test_no_more_than_a_block_is_expanded():
    """Of 8 layers with 4 million weights each, expanded 134 MB, no more than 8 MB are in memory at a time."""
    f = FORMATS["q4f16_1"]
    q = jax.eval_shape(
        lambda: QTensor(
            jnp.zeros((2048, 1024), jnp.uint8), jnp.zeros((2048, 64), jnp.float16), format=f, columns=2048
        )
    )

    def chain(x, weights):
        for w in weights:
            x = ops.matmul(x, w)
        return x

    compiled = jax.jit(chain).lower(jax.ShapeDtypeStruct((1, 2048), jnp.float16), [q] * 8).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8e6


@pytest.mark.parametrize("name", KINDS)
def test_products_map_over_rows_and_over_weights(name):
    q = device(encode(weight(3, 40, 64), FORMATS[name]))
    x = jnp.asarray(weight(3, 2, 64, seed=1))
    by_row = jax.vmap(lambda row: products.matmul(row, select(q, 0)))(x)
    np.testing.assert_allclose(by_row[1], products.matmul(x[1], select(q, 0)), rtol=1e-5, atol=1e-4)
    by_weight = jax.vmap(products.matmul)(x, q)
    for i in range(3):
        np.testing.assert_allclose(by_weight[i], products.matmul(x[i], select(q, i)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["q4f16_1", "int8", "uint4_g64", "nf4", "fp8_e4m3"])
@pytest.mark.parametrize("small", [0, 2**30])
def test_gradients_are_those_of_the_values(name, small, monkeypatch):
    monkeypatch.setattr(products, "SMALL_WEIGHTS", small)
    q = encode(weight(20, 64), FORMATS[name])
    q = device(replace(q, scale=q.scale.astype(np.float32)))
    x, target = jnp.asarray(weight(3, 64, seed=1)), jnp.asarray(weight(3, 20, seed=2))

    def packed(x, scale):
        return (products.matmul(x, replace(q, scale=scale)) * target).sum()

    def plain(x, scale):
        return ((x @ dequantize(replace(q, scale=scale), jnp.float32).T) * target).sum()

    got, wanted = (jax.grad(f, (0, 1))(x, q.scale) for f in (packed, plain))
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
        assert np.abs(np.asarray(b)).max() > 0


def test_the_gradient_passes_through_rounded_activations():
    q = device(encode(weight(20, 64), FORMATS["w8a8"]))
    g = jax.grad(lambda x: products.matmul(x, q).sum())(jnp.asarray(weight(2, 64)))
    np.testing.assert_allclose(g[0], dequantize(q, jnp.float32).sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_shapes_are_known_without_values(name):
    q = encode(weight(6, 64), FORMATS[name])
    y = jax.eval_shape(ops.matmul, jax.ShapeDtypeStruct((2, 5, 64), jnp.bfloat16), q)
    assert (y.shape, y.dtype) == ((2, 5, 6), jnp.bfloat16)
    assert jax.eval_shape(ops.embed, q, jax.ShapeDtypeStruct((3,), jnp.int32)).shape == (3, 64)
    assert (q.shape, q.ndim, q.size) == ((6, 64), 2, 384)


@pytest.mark.parametrize("name", PACKED)
def test_rows_are_looked_up(name):
    q = encode(weight(9, 40), FORMATS[name])
    ids = np.array([[0, 8], [3, 3]])
    np.testing.assert_array_equal(ops.embed(device(q), jnp.asarray(ids)), dequantize(q)[ids])
    assert np.isnan(float32(ops.embed(device(q), jnp.asarray([9, -1])))).all()


@pytest.mark.parametrize("rows", [5, 80])
@pytest.mark.parametrize("name", KINDS)
def test_each_row_meets_its_expert(name, rows):
    q = encode(weight(4, 12, 64), FORMATS[name])
    expert = np.sort(np.random.default_rng(0).integers(0, 4, rows)).astype(np.int32)
    x = weight(rows, 64, seed=1)
    y = jax.jit(ops.grouped_matmul)(jnp.asarray(x), device(q), jnp.asarray(expert))
    wanted = np.einsum("ri,roi->ro", x, dequantize(q, np.float32)[expert])
    atol = np.abs(wanted).max() * (0.02 if FORMATS[name].activations else 1e-5)
    np.testing.assert_allclose(y, wanted, atol=atol)


@pytest.mark.parametrize("rows", [5, 80])
def test_experts_pass_gradients(rows):
    q = device(encode(weight(3, 12, 64), FORMATS["int8"]))
    expert = jnp.asarray(np.sort(np.arange(rows) % 3).astype(np.int32))
    x = jnp.asarray(weight(rows, 64))
    got = jax.grad(lambda x: ops.grouped_matmul(x, q, expert).sum())(x)
    np.testing.assert_allclose(got, dequantize(q, np.float32).sum(1)[expert], rtol=1e-4, atol=1e-4)


def test_columns_in_another_order():
    """GPTQ's act-order: column c of the codes is column order[c] of the weight."""
    order = np.random.default_rng(0).permutation(64).astype(np.int32)
    w = weight(7, 64)
    plain = encode(w[:, order], FORMATS["int8"])
    q = replace(plain, order=order)
    np.testing.assert_array_equal(dequantize(q)[:, order], dequantize(plain))
    np.testing.assert_array_equal(dequantize(device(q)), dequantize(q))
    x = weight(3, 64, seed=1)
    y = products.matmul(jnp.asarray(x), device(q))
    np.testing.assert_allclose(y, x @ dequantize(q, np.float32).T, atol=1e-4)


def test_a_scale_of_the_activations_is_taken_where_it_is_given():
    q = replace(device(encode(weight(7, 64), FORMATS["w8a8"])), input_scale=jnp.float32(0.5))
    x = jnp.asarray(weight(3, 64, seed=1))
    rounded = np.clip(np.rint(np.asarray(x) / 0.5), -127, 127) * 0.5
    y = products.matmul(x, q)
    np.testing.assert_allclose(y, rounded @ np.asarray(dequantize(q, np.float32)).T, atol=1e-4)


@pytest.mark.parametrize("name", ["q4f16_1", "fp8_e4m3_block", "nvfp4", "uint5_g32"])
def test_numpy_and_jax_decode_alike(name):
    q = encode(weight(30, 100), FORMATS[name])
    a, b = dequantize(q), jax.jit(dequantize)(device(q))
    assert isinstance(a, np.ndarray)
    np.testing.assert_array_equal(a, b)
    assert a.dtype == q.dtype
    half = partial(dequantize, dtype=jnp.bfloat16)
    assert half(device(q)).dtype == jnp.bfloat16
