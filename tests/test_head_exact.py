"""Drafts of heads keep the target's distribution: the sums of `test_spec_exact`, with a head in the draft's place.

P prefixes, R drafts of each, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import draft_grow, layers
from jaxllm.draft_grow import Chooser, Grown
from jaxllm.feature_head import Head, HeadConfig, empty, head_shape
from jaxllm.model import Model
from jaxllm.spec_verify import Draft
from jaxllm.state import init_state
from tests import random_model
from tests.test_spec_exact import (
    PROMPT,
    SAMPLERS,
    SHAPES,
    Blocks,
    behind,
    compiled,
    distance,
    followed,
    judged,
    knobs_of,
    law_of,
    lines_of,
    outcomes,
    pair,
    prefixes_of,
    said,
)

GROWN = {"grown": (3, Grown(2, 3, 4)), "grown wide": (4, Grown(2, 2, 4))}


@functools.cache
def pair_of(vocab: int, scale: float = 0.7) -> tuple[Model, Head]:
    """A target of two layers, and an EAGLE head of random weights that says all tokens but the last."""
    target = pair(vocab)[0]
    block = random_model.block(pre="ffn")
    model = dataclasses.replace(target.config, blocks=(block,), vocab=vocab - 1)
    config = HeadConfig(model, vocab, ("layers.1.in", "norm"), 64, reduced=True)
    rng = np.random.default_rng(7)
    draw = lambda shape: jnp.asarray(rng.standard_normal(shape) * scale * shape[-1] ** -0.5, jnp.float32)
    params = random_model.nest({path: draw(shape) for path, shape in head_shape(config).items()})
    known = jnp.arange(vocab)
    return target, Head(config, params | {"vocabulary": jnp.where(known < vocab - 1, known, -1)})


def drafted(target: Model, head: Head, knobs, shape) -> tuple[Draft, np.ndarray]:
    """Every draft that the head may make behind each prefix, P * R rows, and its probability there."""
    vocab, prefixes, grown = target.config.vocab, prefixes_of(target.config.vocab), isinstance(shape, Grown)
    chosen = np.full((1, 1, 1), -1) if grown else outcomes(vocab, shape)
    noise = np.zeros((*chosen.shape[:2], vocab + 1), np.float32)  # the first chosen gets most
    np.put_along_axis(noise, np.where(chosen < 0, vocab, chosen), 1e4 * (9.0 - np.arange(chosen.shape[2])), 2)
    args = (knobs, *lines_of(prefixes), said(knobs, vocab, prefixes), noise[..., :-1])
    made = _drafted(target.config, head.config, shape, target.params, head.params, *args)
    if grown:
        return made, np.ones(len(prefixes))
    parent = np.asarray(made.tree.parent)
    first = [int(np.argmax(parent == n)) - 1 for n in range(chosen.shape[1])]  # of each node's children
    laws = np.asarray(made.probs, np.float64)[:, first]
    chosen = np.tile(chosen, (len(prefixes), 1, 1))
    return made, np.prod([law_of(laws[:, n], chosen[:, n]) for n in range(chosen.shape[1])], 0)


@functools.partial(compiled, static_argnums=(0, 1, 2))
def _drafted(config, head, shape, params, own, knobs, lines, lengths, context, noise) -> Draft:
    """What the drafter's program does, with noise [R, nodes, V] in place of what keys give."""
    again = functools.partial(jax.tree.map, lambda a: jnp.repeat(a, len(noise), 0))
    B, L = lines.shape
    how = dict(n_new=lengths - 1)
    _, _, features = layers.featured(config, params, lines, init_state(config, B, L), head.features, **how)
    state = empty(head, B, 16)
    x, state = draft_grow.newest(head, own, state, lines[:, 1:], features[:, :-1], lengths - 1)
    x, state, context = again(x), again(state), again(context)
    noise_of = lambda nodes, depth: jnp.tile(noise[:, nodes], (B, 1, 1))
    choose = Chooser(knobs, config.vocab, not isinstance(shape, Grown), lambda depth: None, noise_of)
    if isinstance(shape, Grown):
        return draft_grow.grow_by_confidence(head, own, choose, state, x, context, shape)[0]
    if set(shape) == {1}:
        return draft_grow.grow_chain(head, own, choose, state, x, context, len(shape) + 1, len(shape))[0]
    return draft_grow.grow_tree(head, own, choose, state, x, context, shape)[0]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("shape", ["chain", "width 2", "width 4"])
def test_drawn_drafts(shape, name):
    """Chains and trees, drawn without replacement, verified by rejection."""
    vocab, widths = SHAPES[shape]
    target, head = pair_of(vocab)
    knobs, prefixes = knobs_of(name), prefixes_of(vocab)
    made, weight = drafted(target, head, knobs, widths)
    np.testing.assert_allclose(weight.reshape(len(prefixes), -1).sum(1), 1, atol=1e-5)
    blocks = Blocks(prefixes, vocab, made.tree.deepest)
    judged(blocks, made, behind(target, knobs, prefixes, made.tree), weight)
    assert distance(blocks, target, knobs) < 1e-6


@pytest.mark.parametrize("shape", ["chain", "width 2"])
def test_what_drafts_were_drawn_from(shape):
    """Behind a draft on any branch: what the head says of the whole text, its own feature before the draft."""
    vocab, widths = SHAPES[shape]
    target, head = pair_of(vocab)
    prefixes = prefixes_of(vocab)
    made, _ = drafted(target, head, knobs_of("plain"), widths)
    tokens, probs, parent = (np.asarray(a) for a in (made.tree.tokens, made.probs, made.tree.parent))
    config, state = target.config, init_state(target.config, 1, len(PROMPT) + 1)
    line = np.array([[*PROMPT, *prefixes[0]]])
    features = layers.featured(config, target.params, line, state, head.config.features)[2]
    outcomes_of_one = len(probs) // len(prefixes)
    for row in range(0, outcomes_of_one, outcomes_of_one // 3):
        for node in range(1, 1 + widths[0]):
            want = _said_behind(head, line[:, 1:], features[:, :-1], tokens[row, node])
            np.testing.assert_allclose(probs[row, np.argmax(parent == node) - 1], want, atol=1e-5)


def _said_behind(head: Head, line: np.ndarray, features: jax.Array, draft: int) -> jax.Array:
    """f32 [V]: what follows `draft` behind a text i32 [1, T] with the target's features [1, T, W]."""
    config, T = head.config, line.shape[1]
    before = config.take(head.params, features)
    x, _ = config.read(head.params, line, before, empty(config, 1, T))
    text, before = np.append(line, draft)[None], jnp.concatenate([before, x[:, -1:]], 1)
    y, _ = config.read(head.params, text, before, empty(config, 1, T + 1))
    return jax.nn.softmax(config.said(head.params, y[0, -1]))


def test_what_a_head_is_certain_of():
    """A second child whose probability is 0 in f32, though not its logarithm, is no draft."""
    target, head = pair_of(3, scale=2.0)
    knobs, prefixes = knobs_of("plain"), prefixes_of(3)
    made, weight = drafted(target, head, knobs, (2, 2))
    assert (np.asarray(made.tree.tokens) == -1).any()
    blocks = Blocks(prefixes, 3, 2)
    judged(blocks, made, behind(target, knobs, prefixes, made.tree), weight)
    assert distance(blocks, target, knobs) < 1e-6


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("shape", GROWN)
def test_trees_grown_by_confidence(shape, name):
    """Each prefix has a tree of its own, held against the target's own draws."""
    vocab, grown = GROWN[shape]
    target, head = pair_of(vocab)
    knobs, prefixes = knobs_of(name), prefixes_of(vocab)
    made, _ = drafted(target, head, knobs, grown)
    assert (np.asarray(made.tree.tokens)[:, 1:] < vocab - 1).all()  # the last token it never says
    blocks = Blocks(prefixes, vocab, made.tree.deepest)
    followed(blocks, made.tree, np.asarray(behind(target, knobs, prefixes, made.tree)))
    assert distance(blocks, target, knobs) < 1e-6


def test_trees_differ_by_prefix():
    """What the tests above are about: parents are data, not the same for all rows."""
    vocab, grown = GROWN["grown wide"]
    made, _ = drafted(*pair_of(vocab), knobs_of("plain"), grown)
    assert len({tuple(row) for row in np.asarray(made.tree.parent).tolist()}) > 1
