"""Keys and values in few bits: what it costs, and that a state stays a value."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import decode, layers
from jaxllm.errors import CheckpointError, ContextError
from jaxllm.plan import plan
from jaxllm.quant.cache import KV_FORMATS, CacheCodes, empty, expanded, quantized
from jaxllm.state import evict, init_state, insert, kv_format, load_state, nbytes, rewind, save_state, select_rows
from tests import random_model
from tests.test_state import QUICK, feed, new, same

SOME = ("full", "window", "mla")
forward = jax.jit(layers.forward, static_argnums=0, compiler_options=QUICK)


@pytest.fixture(scope="module")
def model():
    return jaxllm.load(dtype="float32")


@pytest.fixture(scope="module")
def text(model):
    """256 tokens of English."""
    words = "The little girl went to the park with her mother. She saw a big dog and wanted to play with it. " * 20
    return np.asarray(model.tokenizer.encode(words))[None, :256]


# ---- the numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("h", "parts"), [(64, None), (16, None), (72, 8), (20, None)])
@pytest.mark.parametrize("format", KV_FORMATS)
def test_values_lie_within_half_a_step(format, h, parts):
    x = np.random.default_rng(0).standard_normal((2, 3, 5, h)).astype(np.float32)
    x[0, 0, 0], x[1, 1, 1] = 0, 1e4  # nothing, and one magnitude throughout
    cache = quantized(jnp.asarray(x), empty(format, x.shape, np.float32, parts=parts))
    found = np.asarray(expanded(cache))
    assert found.shape == cache.shape == x.shape
    assert (found[0, 0, 0] == 0).all()
    scale = np.repeat(np.asarray(cache.scale, np.float32), h // cache.scale.shape[-1], -1)
    if format == "fp8":  # 3 bits of mantissa, and steps of 2 ** -9 near zero
        assert (np.abs(found - x) <= np.abs(x) / 16 + scale * 2**-10 + 1e-6).all()
    else:
        # bf16 scales round to 8 bits; what then exceeds the largest code is cut to it.
        assert (np.abs(found - x) <= scale * (0.5 if format == "int8" else 0.55) + 1e-6).all()
    assert np.abs(found - x)[x != 0].max() > 0


@pytest.mark.parametrize(("format", "most"), [("int8", 0.01), ("fp8", 0.05), ("int4", 0.1)])
def test_logits_of_the_bundled_model(model, text, format, most):
    """Share of the largest logit, over 256 positions."""
    plain, _ = forward(model.config, model.params, text, init_state(model.config, 1, 256))
    packed, _ = forward(model.config, model.params, text, init_state(model.config, 1, 256, kv_format=format))
    difference = np.abs(np.asarray(packed) - np.asarray(plain))
    assert 0 < difference.max() < most * np.abs(plain).max()
    agreed = (np.argmax(packed, -1) == np.argmax(plain, -1)).mean()
    assert agreed > {"int8": 0.98, "fp8": 0.95, "int4": 0.85}[format]


def test_rounding_is_what_makes_the_difference():
    """A cache of values that int8 holds exactly is attended to as if it were plain."""
    rng = np.random.default_rng(0)
    shape = (2, 3, 7, 16)
    k, v = (rng.integers(-127, 128, shape).astype(np.float32) for _ in range(2))
    k[..., 0] = v[..., 0] = 127
    q = rng.standard_normal((2, 4, 3, 2, 16)).astype(np.float32)
    mask = rng.random((2, 4, 7)) > 0.3
    from jaxllm import ops

    held = [quantized(jnp.asarray(x), empty("int8", shape, np.float32)) for x in (k, v)]
    got = ops.attend(q, *held, mask, scale=0.01)
    want = ops.attend(q, k, v, mask, scale=0.01)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


# ---- the state stays a value ------------------------------------------------------------------------------


@pytest.mark.parametrize("format", KV_FORMATS)
@pytest.mark.parametrize("name", SOME)
def test_rewind_equals_replay(name, format):
    tokens = random_model.tokens(3, 32)
    _, start = feed(name, tokens[:, :20], new(name, kv_format=format), 4)
    _, astray = feed(name, random_model.tokens(3, 5, seed=1), start)
    got, _ = feed(name, tokens[:, 20:32], rewind(astray, 20))
    want, _ = feed(name, tokens[:, 20:32], start)
    np.testing.assert_array_equal(got, want)
    assert not np.array_equal(feed(name, tokens[:, 20:25], astray)[0], want[:, :5])


@pytest.mark.parametrize("format", KV_FORMATS)
@pytest.mark.parametrize("name", SOME)
def test_fork(name, format):
    tokens, left, right = (random_model.tokens(3, 6, seed=s) for s in range(3))
    _, state = feed(name, tokens, new(name, kv_format=format))
    copy = jax.tree.map(lambda a: jnp.array(np.asarray(a)), state)
    outs = [feed(name, side, state)[0] for side in (left, right, left)]
    assert same(state, copy)
    np.testing.assert_array_equal(outs[0], outs[2])
    for side, out in zip((left, right), outs, strict=False):
        want, _ = feed(name, np.concatenate([tokens, side], 1), new(name, kv_format=format))
        np.testing.assert_array_equal(out, want[:, 6:])


@pytest.mark.parametrize("format", KV_FORMATS)
@pytest.mark.parametrize("name", SOME)
def test_rows_move_whole(name, format, tmp_path):
    """insert, select_rows, evict, save and load."""
    options = dict(kv_format=format)
    _, busy = feed(name, random_model.tokens(3, 9), new(name, 3, **options), 5)
    _, one = feed(name, random_model.tokens(1, 11, seed=1), new(name, 1, **options), 6)
    after = random_model.tokens(3, 5, seed=2)
    joined = insert(busy, one, 1)
    assert same(select_rows(joined, jnp.array([1])), one)
    assert same(select_rows(joined, jnp.array([0, 2])), select_rows(busy, jnp.array([0, 2])))
    save_state(joined, tmp_path / "state")
    loaded = load_state(tmp_path / "state", new(name, 3, **options))
    assert same(loaded, joined)
    np.testing.assert_array_equal(feed(name, after, loaded)[0], feed(name, after, joined)[0])
    for other in ({}, *({"kv_format": f} for f in KV_FORMATS if f != format)):
        with pytest.raises(CheckpointError, match="another shape or model"):
            load_state(tmp_path / "state", new(name, 3, **other))
        with pytest.raises(ContextError, match="same config and options"):
            insert(busy, new(name, 1, **other), 0)
    cleared, _ = feed(name, after, evict(joined, "all"))
    np.testing.assert_array_equal(cleared, feed(name, after, new(name, 3, **options))[0])


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("format", KV_FORMATS)
def test_any_chunks_give_the_same(format, chunk):
    """But for sums in another order, which now and then round a value to the next code."""
    tokens = random_model.tokens(2, 30)
    got, _ = feed("window", tokens, new("window", 2, 30, chunk, kv_format=format))
    want, _ = feed("window", tokens, new("window", 2, 30, 30, kv_format=format))
    assert np.median(np.abs(got - want)) < 1e-4
    assert np.abs(got - want).max() < 0.1 * np.abs(want).max()


def test_an_eviction_window():
    tokens = random_model.tokens(1, 60)
    plain, _ = feed("full", tokens, new("full", 1, 24, 3, window=8, sinks=2))
    packed, _ = feed("full", tokens, new("full", 1, 24, 3, window=8, sinks=2, kv_format="int8"))
    assert 0 < np.abs(packed - plain).max() < 0.05 * np.abs(plain).max()


# ---- sizes and the rest -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "bits"), [("int8", 8 + 32 / 64), ("fp8", 8 + 32 / 64), ("int4", 4 + 16 / 32)])
def test_bytes(model, format, bits):
    """Heads of 64: a scale for each, or in int4 for half of one."""
    c = model.config
    heads = [b.mixer.kv_heads * b.mixer.head_dim for b in c.blocks]
    assert all(b.mixer.head_dim == 64 for b in c.blocks)
    state = init_state(c, 2, 128, kv_format=format)
    positions = sum(layer.pos.size * 4 for layer in state.layers) + state.length.size * 4
    assert nbytes(state) == positions + 2 * 2 * 128 * sum(heads) * bits / 8
    assert plan(c, batch=2, context=128, kv_format=format).state_bytes == nbytes(state)
    assert kv_format(state) == format
    assert kv_format(init_state(c, 1, 8)) is None


@pytest.mark.parametrize("format", KV_FORMATS)
def test_generate(model, format):
    prompt = [5, 6, 7, 8, 9]
    found = decode.generate(model, prompt, max_new_tokens=8, kv_format=format, eos=())
    state = found.prefix.state
    assert all(isinstance(c.k, CacheCodes) for c in state.layers)
    again = decode.generate(
        model, [*prompt, *found[0].tokens], max_new_tokens=4, kv_format=format, prefix=found.prefix, eos=()
    )
    alone = decode.generate(model, prompt, max_new_tokens=12, kv_format=format, eos=())
    assert (*found[0].tokens, *again[0].tokens) == alone[0].tokens
    streamed = [t.id for t in decode.stream(model, prompt, max_new_tokens=8, kv_format=format, eos=())]
    assert streamed == list(found[0].tokens)
    other = decode.generate(model, [*prompt, 3], max_new_tokens=2, prefix=found.prefix, eos=())
    assert kv_format(other.prefix.state) is None


def test_what_is_refused(model):
    with pytest.raises(ContextError, match="int8, fp8, int4 or None"):
        init_state(model.config, 1, 8, kv_format="int3")
    with pytest.raises(ContextError, match="int8, fp8, int4 or None"):
        decode.generate(model, [1, 2], max_new_tokens=1, kv_format="q4")
    with pytest.raises(ContextError, match="two values in a byte"):
        empty("int4", (1, 1, 4, 7), np.float32)


def test_recurrent_layers_stay_as_they_are():
    """A state of an attention layer and a recurrent one: only the first is packed."""
    attention, recurrent = new("recurrent", kv_format="int8").layers
    assert isinstance(attention.k, CacheCodes)
    plain = new("recurrent").layers[1]
    assert jax.tree.structure(recurrent) == jax.tree.structure(plain)
    assert recurrent.memory.dtype == plain.memory.dtype
