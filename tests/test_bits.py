"""With the native kernels a token's logits have the same bits however it came: alone, in a chunk, in a batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import layers, quant
from jaxllm.state import init_state

pytestmark = pytest.mark.usefixtures("built")
T, SLOTS = 65, 80
FORMATS = (None, "q4bf16_1", "int8_g32")


@pytest.fixture(scope="module")
def bundled():
    return jaxllm.load()


@pytest.fixture(scope="module", params=FORMATS)
def run(bundled, request):
    """(tokens [B, T], chunk) -> logits [B, T, V], the cache filled chunk by chunk."""
    model = bundled if request.param is None else quant.quantize_model(bundled, request.param)
    forward = jax.jit(partial(layers.forward, model.config))

    def go(tokens, chunk):
        state, logits = init_state(model.config, len(tokens), SLOTS), []
        for i in range(0, tokens.shape[1], chunk):
            new, state = forward(model.params, tokens[:, i : i + chunk], state)
            logits.append(np.asarray(new))
        return np.concatenate(logits, 1)

    return go


@pytest.fixture(scope="module")
def tokens(bundled):
    return jnp.asarray(np.random.default_rng(0).integers(5, bundled.config.vocab, (7, T)))


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_in_any_chunks(run, tokens, chunk):
    np.testing.assert_array_equal(run(tokens[:1], chunk), run(tokens[:1], T))


@pytest.mark.parametrize("batch", [2, 7])
def test_in_any_batch(run, tokens, batch):
    whole = run(tokens[:batch], T)
    np.testing.assert_array_equal(run(tokens[:1], T), whole[:1])
    np.testing.assert_array_equal(run(tokens[:batch, :9], 1), whole[:, :9])


def test_drafts_in_a_tree(bundled, tokens):
    """Verification: the tokens of a path in a tree get the bits that they get one after another."""
    forward = jax.jit(partial(layers.forward, bundled.config))
    _, state = forward(bundled.params, tokens[:1, :20], init_state(bundled.config, 1, SLOTS))
    path, other = tokens[:1, 20:23], tokens[1:2, 20:22]
    drafts = jnp.concatenate([path, other], 1)  # two branches from one root: 0-1-2 and 0-3-4
    tree = np.tril(np.ones((5, 5), bool))
    tree[3:, 1:3] = False
    depth = jnp.asarray([[0, 1, 2, 1, 2]])
    logits, _ = forward(bundled.params, drafts, state, depth=depth, tree=jnp.asarray(tree[None]))
    alone = []
    for i in range(3):
        step, state = forward(bundled.params, path[:, i : i + 1], state)
        alone.append(step)
    np.testing.assert_array_equal(logits[:, :3], jnp.concatenate(alone, 1))
