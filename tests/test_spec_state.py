"""After any drafts, kept or not, a state equals that of the kept tokens alone, slot for slot."""

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxllm import layers
from jaxllm.decode import Carry
from jaxllm.quant.cache import expanded
from jaxllm.spec_decode import replay
from jaxllm.spec_verify import Tree, path_to, relations
from jaxllm.state import KV, Recurrent, State, begin, init_state, keep_path, nbytes, visible
from tests import random_model
from tests.random_model import CONFIGS

B, N, ROUNDS = 2, 5, 4
KINDS = {
    "full": ("full", {}),
    "ring": ("window", {}),
    "latent": ("mla", {}),
    "eviction": ("full", dict(window=8, sinks=2)),
    "ring and eviction": ("window", dict(window=7, sinks=1)),
    "int8": ("full", dict(kv_format="int8")),
    "fp8 ring": ("window", dict(kv_format="fp8")),
    "int4 latent": ("mla", dict(kv_format="int4")),
}
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def params(name: str):
    return random_model.params(CONFIGS[name])


@functools.partial(quick, static_argnums=0)
def fed(config, params, tokens, state, n_new):
    return layers.hidden(config, params, tokens, state, n_new=n_new)[1]


@functools.partial(quick, static_argnums=0)
def kept(config, params, tree, state, at, n_new):
    """The state with the path to node `at` of a tree, and that path."""
    depth, sees = relations(tree)
    _, grown, _ = layers.hidden(config, params, tree.tokens, state, n_new=n_new, depth=depth, tree=sees)
    path = path_to(tree, at)
    return keep_path(grown, state.length, path, (path >= 0).sum(-1)), path


@functools.partial(quick, static_argnums=0)
def remembered(config, state: State) -> list:
    """What the next token of each row sees in every layer: positions, then values, -9 and 0 in all other slots."""
    step, found = begin(dataclasses.replace(state, capacity=None), jnp.ones(B, jnp.int32), None, None, 1), []
    for b, cache in zip(config.blocks, state.layers, strict=True):
        if isinstance(cache, Recurrent):
            found += [cache.conv, cache.memory]
            continue
        seen = visible(cache, step, getattr(b.mixer, "window", None), getattr(b.mixer, "chunk", None))[:, 0]
        found.append(jnp.where(seen, cache.pos, -9))
        lines = (cache.k, cache.v) if isinstance(cache, KV) else (cache.c,)
        found += [jnp.where(seen[:, None, :, None], expanded(line), 0) for line in lines]
    return found


def same(config, a: State, b: State) -> None:
    np.testing.assert_array_equal(a.length, b.length)
    for x, y in zip(remembered(config, a), remembered(config, b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        # A sum of another order may round to another code now and then; another token differs everywhere.
        assert np.mean(np.abs(x - y) > 2e-5) < 0.005


trees = st.tuples(*[st.integers(0, n - 1) for n in range(1, N)])
rounds = st.lists(
    st.tuples(trees, st.lists(st.integers(0, N - 1), min_size=B, max_size=B)), min_size=ROUNDS, max_size=ROUNDS
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(rounds=rounds, seed=st.integers(0, 99))
def test_what_is_kept_of_trees(kind, rounds, seed):
    """Four trees of five nodes, of which each row keeps some path; all shapes of trees, full acceptance too."""
    name, options = KINDS[kind]
    chain = jnp.arange(-1, N - 1)
    config, tokens = CONFIGS[name], random_model.tokens(ROUNDS + 1, B, N, seed=seed)
    state = fed(config, params(name), tokens[0], init_state(config, B, 40, chunk=N, **options), jnp.array([N, 2]))
    alone = state
    for (parents, at), line in zip(rounds, tokens[1:], strict=True):
        tree = Tree(jnp.asarray(line), jnp.array([-1, *parents]), N - 1)
        state, path = kept(config, params(name), tree, state, jnp.asarray(at), jnp.full(B, N))
        along = np.take_along_axis(line, np.maximum(path, 0), 1)
        count = (np.asarray(path) >= 0).sum(1).astype(np.int32)
        alone, _ = kept(config, params(name), Tree(along, chain, N - 1), alone, count - 1, count)
        same(config, state, alone)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(counts=st.lists(st.tuples(*[st.integers(1, N)] * B), min_size=ROUNDS, max_size=ROUNDS))
def test_what_recurrent_layers_keep_of_chains(counts):
    """They read again, from what they were before, the tokens that were kept."""
    config, p = CONFIGS["recurrent"], params("recurrent")
    tokens = random_model.tokens(ROUNDS + 1, B, N)
    state = fed(config, p, tokens[0], init_state(config, B, 40, chunk=N), jnp.array([N, 2]))
    alone = state
    for count, line in zip(counts, tokens[1:], strict=True):
        before = tuple(c for c in state.layers if isinstance(c, Recurrent))
        count = np.array(count, np.int32)
        grown = fed(config, p, line, state, np.full(B, N, np.int32))
        grown = keep_path(grown, state.length, None, jnp.asarray(count))
        carry = Carry(grown, jnp.zeros(B, jnp.int32), None, None, jnp.zeros(B, jnp.int32))
        state = replay(config, p, carry, before, line, count - 1).state
        alone = fed(config, p, line, alone, count)
        same(config, state, alone)


@pytest.mark.parametrize("name", ["full", "window", "mla"])
def test_keeping_a_path_moves_a_few_slots(name):
    """The state's memory is reused: no copy of it, no temporary of its size."""
    config = dataclasses.replace(CONFIGS[name], max_len=8192)
    state = init_state(config, 4, 8192, chunk=8, window=4096)
    path = jax.ShapeDtypeStruct((4, 5), jnp.int32)
    count = jax.ShapeDtypeStruct((4,), jnp.int32)
    memory = jax.jit(keep_path, donate_argnums=0).lower(state, count, path, count).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= nbytes(state) - state.length.nbytes
    largest = max(nbytes(dataclasses.replace(state, layers=(c,))) for c in state.layers)
    assert memory.temp_size_in_bytes < largest / 4
