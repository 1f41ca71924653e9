"""Native attention: to codes and float16, with a bias, to values of another size than keys, of few queries."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import native, ops
from jaxllm.quant.cache import KV_FORMATS, CacheCodes, empty, expanded, quantized
from jaxllm.state import init_state, nbytes
from tests.random_model import CONFIGS, params
from tests.test_native import both, case, close, definition, normal

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
DTYPES = [BF16, F32, F16]
PRECISION = {BF16: 2e-2, F32: 2e-5, F16: 2e-3}  # of results up to 4
SHAPES = [  # B, T, K, G, h, S
    (1, 1, 2, 4, 64, 200),
    (2, 1, 3, 1, 40, 65),
    (1, 2, 1, 3, 20, 64),
    (1, 33, 2, 3, 72, 130),
]


_attend = jax.jit(native.attend, static_argnames=("scale", "softcap", "held", "most"))


def attended(q, k, v, mask, sinks=None, bias=None, slopes=None, *, level, **how):
    """`native.attend` of arrays or packed caches."""
    if not isinstance(k, CacheCodes):
        return _attend(q, k, v, mask, sinks, bias, slopes, most=level, **how)
    scales = k.scale, v.scale
    return _attend(q, k.codes, v.codes, mask, sinks, bias, slopes, scales, held=k.format, most=level, **how)


def bits(x):
    """To compare: equal where every bit is, but for the sign of zero."""
    return np.asarray(x.astype(F32))


def packed(x, format, parts=None):
    return quantized(x, empty(format, x.shape, x.dtype, parts=parts))


# ---- codes ------------------------------------------------------------------------------------------------


def values(cache):
    """What a cache stands for, from its bytes; f64."""
    codes, scale = np.asarray(cache.codes), np.asarray(cache.scale, np.float64)
    if cache.format == "int4":
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1) - 8.0
    elif cache.format == "fp8":
        sign, exponent, mantissa = codes >> 7, codes >> 3 & 15, codes & 7
        powers = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10.0), mantissa * 2.0**-9)
        codes = np.where(sign == 1, -powers, powers)
    return codes * np.repeat(scale, codes.shape[-1] // scale.shape[-1], -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", KV_FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_attended_to_as_what_they_stand_for(level, shape, format, dtype):
    q, k, v, mask = case(*shape, "causal", dtype)
    k, v = packed(k, format), packed(v, format)
    got = attended(q, k, v, mask, level=level, scale=0.2)
    want = definition(q, values(k), values(v), mask, None, 0.2, None)
    assert np.abs(np.asarray(got, np.float64) - want).max() < PRECISION[dtype]
    plain = attended(q, expanded(k), expanded(v), mask, level=level, scale=0.2)
    np.testing.assert_array_equal(bits(got), bits(plain))


@pytest.mark.parametrize("format", KV_FORMATS)
@pytest.mark.parametrize("parts", [8, 24])
def test_groups_of_codes(level, format, parts):
    """Scales that change within a vector, as those of a latent do."""
    q, k, v, mask = case(1, 3, 2, 2, 72, 70, "random", BF16)
    k, v = packed(k, format, parts), packed(v, format, parts)
    assert k.scale.shape[-1] == (9 if format == "int4" else 72 // parts)
    got = attended(q, k, v, mask, level=level, scale=0.2)
    plain = attended(q, expanded(k), expanded(v), mask, level=level, scale=0.2)
    np.testing.assert_array_equal(bits(got), bits(plain))


def test_every_code_of_float8(level):
    """Each of the 256 as a value that one query sees alone; the two that are no number stay none."""
    codes = jnp.arange(256, dtype=jnp.uint8).reshape(1, 1, 16, 16)
    v = CacheCodes(codes, jnp.ones((1, 1, 16, 1)), "fp8", "float32")
    eye = jnp.eye(16, dtype=bool)[None]
    got = attended(
        jnp.zeros((1, 16, 1, 1, 16)), packed(jnp.zeros((1, 1, 16, 16)), "fp8"), v, eye, level=level, scale=1
    )
    want = np.asarray(values(v), np.float32).reshape(16, 16)
    none = np.asarray(codes).reshape(16, 16) & 127 == 127
    seen = np.asarray(got).reshape(16, 16)
    rows = ~none.any(1)  # what is no number spreads over its column alone
    columns = ~none.any(0)
    np.testing.assert_array_equal(seen[:, columns], want[:, columns])
    assert rows.sum() == 14
    assert np.isnan(seen[none]).all()


def test_a_step_over_codes_never_expands_the_cache(built):
    config = dataclasses.replace(CONFIGS["full"], max_len=4096)
    step = jax.jit(jaxllm.forward, static_argnums=0, donate_argnums=3)
    for format in KV_FORMATS:
        state = init_state(config, 1, 4096, chunk=1, kv_format=format)
        lowered = step.lower(config, params(config), jax.ShapeDtypeStruct((1, 1), jnp.int32), state)
        memory = lowered.compile().memory_analysis()
        assert memory.alias_size_in_bytes >= nbytes(state)
        assert memory.temp_size_in_bytes < nbytes(state) / 4


def test_codes_of_two_formats_go_the_other_way(built):
    q, k, v, mask = case(1, 2, 1, 2, 8, 5, "causal", F32)
    got = ops.attend(q, packed(k, "int8"), v, mask, scale=0.3)
    close(got, ops.attend(q, expanded(packed(k, "int8")), v, mask, scale=0.3))


def test_attention_to_codes_is_differentiated_and_mapped(built):
    q, k, v, mask = case(1, 3, 2, 2, 8, 11, "causal", F32)
    k, v = packed(k, "int8"), packed(v, "int8")
    close(*both(jax.grad(lambda q: jnp.sin(ops.attend(q, k, v, mask, scale=0.3)).sum()), q))
    close(*both(jax.vmap(lambda q: ops.attend(q, k, v, mask, scale=0.3)), jnp.stack([q, q + 1])))


# ---- a bias on the scores, and values of another size -----------------------------------------------------

AXES = ["bktgs", "1ktgs", "11t1s", "bkt1s", "1ktg1"]


def biased(q, k, v, mask, bias, scale, softcap):
    """Attention in f64, the bias added to the scaled scores."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.einsum("btkgh,bksh->bktgs", q, k) * scale + np.asarray(bias, np.float64)
    scores = np.tanh(scores / softcap) * softcap if softcap else scores
    scores = np.where(np.asarray(mask)[:, None, :, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bktgs,bksh->btkgh", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_bias_is_added_to_the_scores(level, shape, softcap, axes):
    q, k, v, mask = case(*shape, "causal", F32)
    B, T, K, G, _, S = shape
    sizes = dict(zip("bktgs", (B, K, T, G, S), strict=True)) | {"1": 1}
    bias = 3 * normal([sizes[a] for a in axes], seed=5)
    slopes = normal((K, G), seed=6)
    for by, whole in [(None, bias), (slopes, bias * slopes[:, None, :, None])]:
        got = attended(q, k, v, mask, None, bias, by, level=level, scale=0.3, softcap=softcap)
        want = biased(q, k, v, mask, whole, 0.3, softcap)
        assert np.abs(np.asarray(got, np.float64) - want).max() < PRECISION[F32]


def test_attention_with_a_bias_is_differentiated_and_mapped(built):
    q, k, v, mask = case(2, 3, 2, 2, 8, 11, "causal", F32)
    bias, slopes = normal((2, 1, 3, 1, 11)), normal((2, 2))
    f = lambda q, bias, slopes: jnp.sin(ops.attend(q, k, v, mask, scale=0.3, bias=bias, slopes=slopes)).sum()
    close(*both(jax.grad(f, (0, 1, 2)), q, bias, slopes))
    close(*both(jax.vmap(f, (None, 0, None)), q, jnp.stack([bias, -bias]), slopes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("h", "j"), [(64, 48), (24, 40), (17, 64)])
def test_values_of_another_size_than_keys(level, dtype, h, j):
    for T in (1, 30):
        q, k, _, mask = case(2, T, 2, 3, h, 90, "causal", dtype)
        v = normal((2, 2, 90, j), dtype, 7)
        got = attended(q, k, v, mask, level=level, scale=0.2)
        assert got.shape == (2, T, 2, 3, j)
        want = definition(q, k, v, mask, None, 0.2, None)
        assert np.abs(np.asarray(got, np.float64) - want).max() < PRECISION[dtype]
    got, want = both(lambda q: ops.attend(q, k, v, mask, scale=0.2).astype(F32), q)
    assert np.abs(np.asarray(got - want)).max() < PRECISION[dtype]


def test_keys_that_are_values(level):
    """As in latent attention: the same array for both."""
    q, k, _, mask = case(1, 2, 1, 3, 40, 70, "causal", BF16)
    share = jax.jit(lambda q, c: native.attend(q, c, c, mask, scale=0.2, most=level))
    np.testing.assert_array_equal(bits(share(q, k)), bits(attended(q, k, k + 0, mask, level=level, scale=0.2)))


# ---- few queries ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("h", [64, 40])
@pytest.mark.parametrize("held", [*DTYPES, *KV_FORMATS], ids=str)
def test_one_query_has_the_bits_it_has_among_many(level, held, h):
    """Alone it takes another path: its scores are made along the slots."""
    for G in (1, 2, 3, 5, 8, 9):
        dtype = held if held in DTYPES else F16
        q, k, v, mask = case(1, 24, 1, G, h, 150, "window", dtype)
        k, v = (k, v) if held in DTYPES else (packed(k, held), packed(v, held))
        extra = dict(sinks=normal((1, G)), slopes=normal((1, G), seed=4), bias=normal((1, 1, 24, G, 150), seed=3))
        how = dict(level=level, scale=0.2, softcap=20.0 if G % 2 else None)
        whole = bits(attended(q, k, v, mask, **extra, **how))
        for t in (0, 23):
            row = slice(t, t + 1)
            some = extra | {"bias": extra["bias"][:, :, row]}
            np.testing.assert_array_equal(
                bits(attended(q[:, row], k, v, mask[:, row], **some, **how)), whole[:, row]
            )


def test_a_query_alone_that_sees_nothing_or_is_no_number(level):
    q, k, v, mask = case(2, 1, 1, 2, 32, 70, "causal", F32)
    got = attended(q.at[0, 0, 0, 1, 0].set(jnp.nan), k, v, mask.at[1].set(False), level=level, scale=0.2)
    assert (np.asarray(got[1]) == 0).all()
    assert np.isnan(got[0, 0, 0, 1]).all()
    assert np.isnan(got).sum() == 32


# ---- float16 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float16_attention(level, shape):
    q, k, v, mask = case(*shape, "causal", F16)
    sinks = normal(q.shape[2:4])
    got = attended(q, k, v, mask, sinks, level=level, scale=0.2, softcap=3.0)
    assert got.dtype == F16
    want = definition(q, k, v, mask, sinks, 0.2, 3.0)
    assert np.abs(np.asarray(got, np.float64) - want).max() < PRECISION[F16]


def test_every_number_of_float16_is_read_and_written(level):
    """All 65536, through a product with one: denormals, infinities and what is no number too."""
    x = jax.lax.bitcast_convert_type(jnp.arange(65536, dtype=jnp.uint16).reshape(65536, 1), F16)
    got = native.matmul(x, jnp.ones((1, 1), F32), F32, most=level)
    np.testing.assert_array_equal(got, np.asarray(x, np.float32))
    back = native.matmul(x, jnp.ones((1, 1), F32), F16, most=level)
    np.testing.assert_array_equal(back, np.asarray(x))


def test_float16_is_rounded_to_the_nearest(level):
    """What lies between two numbers, halfway and next to it; numpy's rounding is the judge."""
    numbers = np.arange(0, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = np.append((numbers[:-1] + numbers[1:]) / 2, np.float32(65520))
    x = np.concatenate([middle, np.nextafter(middle, 0), np.nextafter(middle, np.inf), [1e30, 1e-30]])[:, None]
    x = np.concatenate([x, -x]).astype(np.float32)
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
    np.testing.assert_array_equal(native.matmul(jnp.asarray(x), jnp.ones((1, 1)), F16, most=level), want)


def test_a_float16_model_runs_on_the_kernels(built):
    config = dataclasses.replace(CONFIGS["full"], dtype="float16")
    weights = jax.tree.map(lambda x: jnp.asarray(x, F16), params(config))
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    assert ops.explain(jnp.ones((1, 32), F16), weights["layers"][0]["mixer"]["q"]["w"]).startswith("native")
    step = jax.jit(jaxllm.forward, static_argnums=0)
    text = step.lower(config, weights, tokens).compile().as_text()
    assert all(name in text for name in ("jaxllm_matmul", "jaxllm_attend", "jaxllm_put"))
    assert " dot(" not in text
    (got, _), (want, _) = both(lambda: step(config, weights, tokens))
    np.testing.assert_allclose(got, want, atol=0.01 * np.abs(want).max())
