"""Programs of `ops.portable(plain=True)` are the model, and made of nothing that small runtimes lack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import layers, ops
from jaxllm.export.options import Options
from tests import random_model
from tests.test_export import CONFIGS


@pytest.mark.parametrize("name", ["full", "window", "mla", "moe", "recurrent"])
def test_plain_programs_are_the_model(name):
    """Rows of different length, a chunk and a step, with nothing but what `portable(plain=True)` promises."""
    config, options = CONFIGS[name], Options(context=64, chunk=8, batch=2)
    params = random_model.params(config)
    tokens, n_new = random_model.tokens(2, 8), jnp.array([8, 5])

    def run(params, state):
        x, state, _ = layers.hidden(config, params, tokens, state, n_new=n_new)
        y, state, _ = layers.hidden(config, params, tokens[:, :1], state, n_new=jnp.array([0, 1]))
        return layers.logits(config, params, x), layers.logits(config, params, y)[1], state

    expected = jax.jit(run)(params, options.state(config))
    with ops.portable(plain=True):
        traced = jax.make_jaxpr(run)(params, options.state(config))
        found = jax.jit(run)(params, options.state(config))
    assert not {"scatter", "scatter-add", "sort", "while", "scan", "cond"} & primitives(traced.jaxpr)
    real = np.arange(8) < np.asarray(n_new)[:, None]
    np.testing.assert_allclose(found[0][real], expected[0][real], atol=2e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=2e-5)
    for ours, theirs in zip(jax.tree.leaves(found[2]), jax.tree.leaves(expected[2]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_an_id_beyond_the_vocabulary_gives_no_row():
    table = jnp.arange(12.0).reshape(4, 3)
    with ops.portable(plain=True):
        found = np.asarray(ops.embed(table, jnp.array([[3, 4, -1]])))
    np.testing.assert_array_equal(found[0, 0], table[3])
    assert np.isnan(found[0, 1:]).all()


def primitives(jaxpr) -> set[str]:
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found |= primitives(inner)
    return found
