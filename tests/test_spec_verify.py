"""Trees and the rules by which drafts are kept, against MLC-LLM's own reference and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import sampling
from jaxllm.sampling import sampler
from jaxllm.spec_verify import Tree, along, chain_of, follow, offered, path_to, reject, relations, typical

#        0
#      1   2
#     3 4   5
#     6
PARENT = np.array([-1, 0, 0, 1, 1, 2, 3])


def tree(*rows, parent=PARENT, deepest=3) -> Tree:
    return Tree(jnp.array(rows), jnp.asarray(parent), deepest)


def test_relations():
    depth, sees = relations(tree(range(7), range(7)))
    assert depth.tolist() == [[0, 1, 1, 2, 2, 2, 3]] * 2
    seen = [{0}, {0, 1}, {0, 2}, {0, 1, 3}, {0, 1, 4}, {0, 2, 5}, {0, 1, 3, 6}]
    assert [set(np.flatnonzero(row).tolist()) for row in np.asarray(sees[0])] == seen


def test_rows_may_have_trees_of_their_own():
    parent = np.array([[-1, 0, 1], [-1, 0, 0]])
    depth, _ = relations(tree([1, 2, 3], [1, 2, 3], parent=parent, deepest=2))
    assert depth.tolist() == [[0, 1, 2], [0, 1, 1]]


def test_a_chain_is_a_tree():
    chain = chain_of(jnp.array([[5, 6, 7]]))
    depth, sees = relations(chain)
    assert chain.chain
    assert depth.tolist() == [[0, 1, 2]]
    assert np.array_equal(sees[0], np.tril(np.ones((3, 3), bool)))
    assert not tree(range(7)).chain


def test_paths():
    rows = [range(7)] * 3
    assert path_to(tree(*rows), jnp.array([6, 5, 0])).tolist() == [[0, 1, 3, 6], [0, 2, 5, -1], [0, -1, -1, -1]]


def test_context_along_the_paths():
    """Each node's context is that of having said its path."""
    knobs = sampler(frequency_penalty=1.0, dry_multiplier=1.0, dry_window=4)
    context = sampling.init_context(knobs, 10, [[1, 2, 3], [4]])
    drafts = tree([9, 1, 2, 3, 4, 5, 6], [9, 7, 7, 7, -1, 8, 0])
    got = along(context, drafts)
    sees = np.asarray(relations(drafts)[1])
    for row in range(2):
        for node in range(7):
            want = jax.tree.map(lambda a, row=row: a[row : row + 1], context)
            path = np.flatnonzero(sees[row, node])[1:]
            for token in np.asarray(drafts.tokens)[row, path]:
                want = sampling.observe(want, jnp.array([token]), jnp.array([token >= 0]))
            assert np.array_equal(got.counts[row, node], want.counts[0])
            assert np.array_equal(got.recent[row, node], want.recent[0])


@pytest.mark.parametrize(
    ("drawn", "at"),
    [
        ([8, 0, 0, 0, 0, 0, 0], 0),  # no child of the root
        ([2, 9, 5, 0, 0, 0, 0], 5),
        ([2, 9, 4, 0, 0, 0, 0], 2),
        ([1, 3, 0, 6, 0, 0, 0], 6),
        ([1, 4, 0, 6, 0, 0, 0], 4),
        ([-1, 3, 0, 6, 0, 0, 0], 0),
    ],
)
def test_follow(drawn, at):
    assert follow(tree(range(7)), jnp.array([drawn])).tolist() == [at]
    assert offered(tree(range(7)), jnp.array([at])).tolist() == [at in PARENT]


def test_what_was_not_proposed_is_not_kept():
    missing = tree([0, -1, -1, 3, 4, 5, 6])
    assert follow(missing, jnp.full((1, 7), -1)).tolist() == [0]
    assert offered(missing, jnp.array([0])).tolist() == [False]
    p = jnp.full((1, 7, 8), 1 / 8)
    at, rest, chance = reject(missing, p, p[:, 1:], jnp.zeros((1, 6)))
    assert at.tolist() == [0]
    assert np.array_equal(rest, p[:, 0])
    assert chance.tolist() == [[-1] * 6]


def test_equal_distributions_keep_everything():
    p = jax.nn.softmax(jax.random.normal(jax.random.key(0), (50, 4, 6)), -1)
    tokens = jnp.concatenate(
        [jnp.zeros((50, 1), int), jax.random.categorical(jax.random.key(1), jnp.log(p[:, :3]))], 1
    )
    at, _, _ = reject(chain_of(tokens), p, p[:, :3], jnp.full((50, 3), 0.999999))
    assert at.tolist() == [3] * 50


def test_typical_takes_the_deepest_likely_path():
    """At certainty the floor is epsilon; where all is open, delta by the entropy."""
    p = np.full((1, 7, 8), 0.05)
    p[0, 0, 1], p[0, 0, 2] = 0.1, 0.6
    p[0, 2, 5], p[0, 2, 0] = 0.05, 0.9
    p /= p.sum(-1, keepdims=True)
    assert typical(tree(range(7)), jnp.asarray(p)).tolist() == [6]  # from 1 on everything is open
    sure = np.eye(8)[[[2, 0, 0, 0, 0, 0, 0]]]
    assert typical(tree(range(7)), jnp.asarray(sure)).tolist() == [2]


@pytest.mark.parametrize("case", range(4))
def test_trees_of_mlc(shared, case):
    """The reference of its verification kernel: where each tree stops, and what is left there to draw from.

    Its siblings were drawn independently, each from a distribution of its own, for which its rule is right.
    """
    file = np.load(shared / "mlc_ref" / "mlc_spec_tree_verify.npz")
    if f"c{case}_in_uniform" not in file:
        pytest.skip("no such case")
    names = ("draft_probs", "draft_tokens", "model_probs", "first_child", "next_sibling", "uniform", "parent_ptr")
    q, tokens, p, child, sibling, uniform, roots = (file[f"c{case}_in_{n}"] for n in names)
    stops, rests = file[f"c{case}_out_parent_ptr"], file[f"c{case}_out_model_probs"]
    for root, stop in zip(roots, stops, strict=True):
        nodes, parent = [int(root)], [-1]
        for node in nodes:  # grows as it is read
            below = child[node]
            while below >= 0:
                parent.append(nodes.index(node))
                nodes.append(int(below))
                below = sibling[below]
        drafts = nodes[1:]
        if not drafts:
            assert stop == root
            continue
        one = Tree(jnp.asarray(tokens[nodes])[None], jnp.array(parent), len(drafts))
        at, rest, _ = _reject(one, p[None, nodes], q[None, drafts], uniform[None, drafts])
        assert nodes[int(at[0])] == stop
        np.testing.assert_allclose(rest[0], rests[stop], atol=1e-6)


_reject = jax.jit(reject, compiler_options={"xla_backend_optimization_level": 0})
