"""Speculative decoding keeps the target's distribution: every random outcome is summed, none is drawn.

Two tiny transformers over three to five tokens are target and draft. For each prefix, each draft that the drafter
may make and each way its verification may go, the probability of what comes out is added up, over a horizon of two
or three tokens; what is known to be wrong goes through the same sums and is seen.
P prefixes, R drafts of each, N nodes, D depth, V vocabulary.
"""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import draft_grow, layers, sampling, spec_verify
from jaxllm.decode import Carry
from jaxllm.draft_lookahead import Lookahead
from jaxllm.draft_ngram import Seen
from jaxllm.model import Model
from jaxllm.sampling import sampler
from jaxllm.spec_decode import Asked, examine, masked
from jaxllm.spec_mask import allowed_behind
from jaxllm.spec_verify import Draft, Tree, chain_of, follow, path_to, processed, reject, typical
from jaxllm.state import init_state
from tests import random_model

PROMPT = (0, 2, 1, 0, 2, 1)
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
NEUTRAL = dict(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)
NEUTRAL |= dict(frequency_penalty=0.0, presence_penalty=0.0)
SAMPLERS = {  # one structure, so one program for all
    "plain": {},
    "top-p 0.9": dict(top_p=0.9),
    "top-p 0.5": dict(top_p=0.5),
    "top-k": dict(top_k=2),
    "cool": dict(temperature=0.7, min_p=0.3),
    "hot": dict(temperature=1.5, top_p=0.9),
    "penalties": dict(repetition_penalty=1.4, frequency_penalty=0.8, presence_penalty=0.5),
    "everything": dict(temperature=1.5, top_p=0.9, top_k=3, repetition_penalty=0.8, presence_penalty=-0.7),
}
SHAPES = {"chain": (3, (1, 1)), "width 2": (3, (2, 2)), "narrowing": (4, (2, 1)), "width 4": (5, (4,))}


def knobs_of(name: str):
    return sampler(**NEUTRAL | SAMPLERS[name])


@functools.cache
def pair(vocab: int) -> tuple[Model, Model]:
    """A target of two layers, and a draft of one that knows nothing of it."""
    config = random_model.config(random_model.block(), random_model.block(), vocab=vocab)
    small = random_model.config(random_model.block(), vocab=vocab)
    return Model(config, random_model.params(config)), Model(small, random_model.params(small, seed=1))


def horizon_of(vocab: int) -> int:
    return 3 if vocab < 5 else 2


def prefixes_of(vocab: int) -> list[tuple[int, ...]]:
    """Everything that may have been said when a speculative step begins."""
    return [c for n in range(1, horizon_of(vocab)) for c in itertools.product(range(vocab), repeat=n)]


def lines_of(prefixes) -> tuple[np.ndarray, np.ndarray]:
    """(prompt and prefix i32 [P, L], their lengths i32 [P])"""
    lengths = np.array([len(PROMPT) + len(c) for c in prefixes], np.int32)
    lines = np.zeros((len(prefixes), lengths.max()), np.int32)
    for line, prefix in zip(lines, prefixes, strict=True):
        line[: len(PROMPT) + len(prefix)] = (*PROMPT, *prefix)
    return lines, lengths


def said(knobs, vocab: int, prefixes):
    """The context after the prompt and each prefix."""
    context = sampling.init_context(knobs, vocab, [PROMPT] * len(prefixes))
    for n in range(max(map(len, prefixes), default=0)):
        token = jnp.array([c[n] if n < len(c) else -1 for c in prefixes])
        context = sampling.observe(context, token, token >= 0)
    return context


# ---- the target, token by token -------------------------------------------------------------------------


@functools.partial(compiled, static_argnums=0)
def _next(config, params, knobs, tokens, context):
    logits, _ = layers.forward(config, params, tokens)
    return knobs.distribution(logits[:, -1], context)


def plain_law(target: Model, knobs, horizon: int, mask=None) -> dict[tuple[int, ...], float]:
    """Probability of each sequence of `horizon` tokens after the prompt."""
    law, vocab = {(): 1.0}, target.config.vocab
    for _ in range(horizon):
        prefixes = list(law)
        step = sampling.Sampler((*([sampling.Mask(mask(prefixes))] if mask else []), *knobs.steps))
        args = (step, lines_of(prefixes)[0], said(knobs, vocab, prefixes))
        probs = np.exp(np.asarray(_next(target.config, target.params, *args), np.float64))
        law = {(*c, v): law[c] * probs[i, v] for i, c in enumerate(prefixes) for v in range(vocab)}
    return law


# ---- one speculative step, all outcomes -----------------------------------------------------------------


@functools.partial(compiled, static_argnums=0)
def _behind(config, params, knobs, lines, lengths, context, tree, allowed):
    """The distribution of a model behind each node of P x R trees: f32 [P * R, N, V]."""
    times = len(tree.tokens) // len(lines)
    _, state, _ = layers.hidden(config, params, lines, init_state(config, len(lines), 16), n_new=lengths - 1)
    last = jnp.take_along_axis(lines, lengths[:, None] - 1, 1)[:, 0]
    carry = jax.tree.map(lambda a: jnp.repeat(a, times, 0), Carry(state, last, context, None, lengths))
    nodes = examine(config, params, carry, tree, jnp.ones(len(carry.token), bool))
    nodes = nodes if allowed is None else masked(nodes, allowed)
    return jnp.exp(processed(knobs, nodes.logits, nodes.contexts, None))


def behind(model: Model, knobs, prefixes, tree: Tree, mask=None) -> jax.Array:
    """The model's distribution behind each node, R trees for each prefix: f32 [P * R, N, V]."""
    context = said(knobs, model.config.vocab, prefixes)
    texts = [c for c in prefixes for _ in range(len(tree.tokens) // len(prefixes))]
    allowed = allowed_behind(mask, texts, tree) if mask else None
    return _behind(model.config, model.params, knobs, *lines_of(prefixes), context, tree, allowed)


class Blocks:
    """What one step may emit after each prefix, and how probable it is."""

    def __init__(self, prefixes, vocab: int, deepest: int):
        self.prefixes, self.vocab = prefixes, vocab
        self.sums = np.zeros(
            (len(prefixes), *[vocab + 1] * deepest, vocab)
        )  # tokens kept (V: none), then the last

    def add(self, tree: Tree, at, rest, weight) -> None:
        """Rows [P * R] emit the path to node `at` and a token of `rest` [P * R, V]."""
        path = np.asarray(_path_to(tree, jnp.asarray(at)))[:, 1:]
        tokens = np.take_along_axis(np.asarray(tree.tokens), np.maximum(path, 0), 1)
        kept = np.where(path >= 0, tokens, self.vocab)
        prefix = np.arange(len(path)) // (len(path) // len(self.prefixes))
        np.add.at(self.sums, (prefix, *kept.T), weight[:, None] * np.asarray(rest, np.float64))

    def after(self, prefix) -> dict[tuple[int, ...], float]:
        """{tokens: probability}"""
        sums = self.sums[self.prefixes.index(prefix)]
        return {tuple(t for t in (*kept, v) if t < self.vocab): sums[(*kept, v)] for *kept, v in np.argwhere(sums)}


_path_to, _follow, _reject = compiled(path_to), compiled(follow), compiled(reject)


def judged(blocks: Blocks, draft: Draft, p, weight: np.ndarray, rule=None) -> None:
    """All ways in which rejection may go for drafts that came with probability `weight` [P * R]."""
    drafts = draft.tree.tokens.shape[1] - 1
    rule = rule or _reject
    for pattern in itertools.product([0.0, 1.0], repeat=drafts):
        uniform = jnp.broadcast_to(jnp.asarray(pattern, jnp.float32), (len(weight), drafts))
        at, rest, chance = rule(draft.tree, p, draft.probs, uniform)
        chance = np.asarray(chance, np.float64)
        way = np.where(chance < 0, 0.5, np.where(np.array(pattern) == 0, chance, 1 - chance)).prod(1)
        blocks.add(draft.tree, at, rest, weight * way)


def followed(blocks: Blocks, tree: Tree, p: np.ndarray) -> None:
    """All draws of the target at the nodes of one tree for each prefix."""
    P, N, V = p.shape
    drawn = np.array(list(itertools.product(range(V), repeat=N)))
    each = np.prod([p[:, n, drawn[:, n]] for n in range(N)], 0, dtype=np.float64)  # [P, R]
    many = Tree(*(jnp.repeat(a, len(drawn), 0) for a in (tree.tokens, tree.parents)), tree.deepest)
    drawn = np.tile(drawn, (P, 1))
    at = np.asarray(_follow(many, jnp.asarray(drawn)))
    blocks.add(many, at, np.eye(V)[drawn[np.arange(len(at)), at]], each.reshape(-1))


def spoken(blocks: Blocks, first: dict, horizon: int) -> dict[tuple[int, ...], float]:
    """The law of `horizon` tokens: the first drawn as after every prompt, the rest in steps."""
    law, unfinished = {}, dict(first)
    while unfinished:
        prefix = min(unfinished, key=len)
        weight = unfinished.pop(prefix)
        for block, p in blocks.after(prefix).items():
            line = (*prefix, *block)[:horizon]
            where = law if len(line) == horizon else unfinished
            where[line] = where.get(line, 0.0) + weight * p
    return law


def distance(blocks: Blocks, target: Model, knobs, mask=None) -> float:
    """Total variation between what the steps say and what the target says."""
    horizon = horizon_of(target.config.vocab)
    first = {c: p for c, p in plain_law(target, knobs, 1, mask).items() if p}
    got = spoken(blocks, first, horizon)
    want = plain_law(target, knobs, horizon, mask)
    assert sum(got.values()) == pytest.approx(1, abs=1e-5)
    return sum(abs(got.get(s, 0.0) - want.get(s, 0.0)) for s in {*got, *want}) / 2


# ---- what a draft model may draw ------------------------------------------------------------------------


def outcomes(vocab: int, widths) -> np.ndarray:
    """Everything that sampling without replacement may choose: i32 [R, nodes with children, width], -1 beyond."""
    inner = [1, *np.cumprod(widths)[:-1]]
    each = [
        list(itertools.permutations(range(vocab), w)) for w, n in zip(widths, inner, strict=True) for _ in range(n)
    ]
    most = max(widths)
    return np.array([[[*c, *[-1] * (most - len(c))] for c in choice] for choice in itertools.product(*each)])


def law_of(probs: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """How probable `chosen` i32 [R, w] is, in that order, drawn one after the other from probs f64 [R, V].

    Where nothing is left to draw, whatever comes is as good as another: it is no draft.
    """
    weight, left, row = np.ones(len(probs)), probs.copy(), np.arange(len(probs))
    gone = np.zeros(probs.shape, bool)
    for token in chosen.T:
        mass, real = left.sum(1), token >= 0
        share = np.where(
            mass > 0, left[row, token] / np.where(mass > 0, mass, 1), 1 / np.maximum((~gone).sum(1), 1)
        )
        weight *= np.where(real, share, 1)
        left[row[real], token[real]], gone[row[real], token[real]] = 0, True
    return weight


def drafted(target: Model, draft: Model, knobs, widths, choice="draw", prefixes=None) -> tuple[Draft, np.ndarray]:
    """Every draft that the draft model may make behind each prefix, P * R rows, and its probability there."""
    vocab, prefixes = target.config.vocab, prefixes or prefixes_of(target.config.vocab)
    chosen = outcomes(vocab, widths) if choice == "draw" else np.full((1, 1, 1), -1)
    noise = np.zeros((*chosen.shape[:2], vocab + 1), np.float32)  # the first chosen gets most, however improbable
    np.put_along_axis(noise, np.where(chosen < 0, vocab, chosen), 1e4 * (9.0 - np.arange(chosen.shape[2])), 2)
    shape = (draft.config, choice, vocab, tuple(widths))
    args = (knobs, *lines_of(prefixes), said(knobs, vocab, prefixes), noise[..., :-1])
    made = _drafted(*shape, draft.params, *args)
    if choice == "top":
        return made, np.ones(len(prefixes))
    laws = np.asarray(behind(draft, knobs, prefixes, made.tree), np.float64)
    chosen = np.tile(chosen, (len(prefixes), 1, 1))
    return made, np.prod([law_of(laws[:, n], chosen[:, n]) for n in range(chosen.shape[1])], 0)


@functools.partial(compiled, static_argnums=(0, 1, 2, 3))
def _drafted(config, choice, vocab, widths, params, knobs, lines, lengths, context, noise) -> Draft:
    """What the draft model's programs do, with noise [R, nodes, V] in place of what keys give."""
    again = lambda a: jnp.repeat(a, len(noise), 0)
    _, state, _ = layers.hidden(config, params, lines, init_state(config, len(lines), 16), n_new=lengths - 2)
    two = jnp.take_along_axis(lines, lengths[:, None] - jnp.array([2, 1]), 1)
    speaker = draft_grow.Alone(config)
    x, state = draft_grow.newest(speaker, params, state, two, None, jnp.full(len(lines), 2))
    x, state, context = again(x), jax.tree.map(again, state), jax.tree.map(again, context)
    noise_of = lambda nodes, depth: jnp.tile(noise[:, nodes], (len(lines), 1, 1)) if choice == "draw" else None
    choose = draft_grow.Chooser(knobs, vocab, choice == "draw", lambda depth: None, noise_of)
    if set(widths) == {1}:
        nodes, length = len(widths) + 1, len(widths)
        return draft_grow.grow_chain(speaker, params, choose, state, x, context, nodes, length)[0]
    return draft_grow.grow_tree(speaker, params, choose, state, x, context, widths)[0]


def by_rejection(target, draft, knobs, widths, tamper=lambda made: made, rule=None) -> Blocks:
    """Steps with drafts that were drawn; `tamper` and `rule` may put a mistake in."""
    prefixes = prefixes_of(target.config.vocab)
    made, weight = drafted(target, draft, knobs, widths)
    np.testing.assert_allclose(weight.reshape(len(prefixes), -1).sum(1), 1, atol=1e-5)
    made = tamper(made)
    blocks = Blocks(prefixes, target.config.vocab, made.tree.deepest)
    judged(blocks, made, behind(target, knobs, prefixes, made.tree), weight, rule)
    return blocks


# ---- what is exact --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_drawn_drafts(shape, name):
    """Chains and trees of a draft model, sampled without replacement, verified by rejection."""
    vocab, widths = SHAPES[shape]
    target, draft = pair(vocab)
    blocks = by_rejection(target, draft, knobs_of(name), widths)
    assert distance(blocks, target, knobs_of(name)) < 1e-6


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("widths", [(1, 1), (2, 1), (4,)], ids=str)
def test_most_probable_drafts(widths, name):
    """A tree of the draft model's most probable tokens, held against the target's own draws."""
    target, draft = pair(vocab := 4 if 4 in widths else 3)
    knobs, prefixes = knobs_of(name), prefixes_of(vocab)
    made, _ = drafted(target, draft, knobs, widths, "top")
    blocks = Blocks(prefixes, vocab, made.tree.deepest)
    followed(blocks, made.tree, np.asarray(behind(target, knobs, prefixes, made.tree)))
    assert distance(blocks, target, knobs) < 1e-6


@pytest.mark.parametrize("name", SAMPLERS)
def test_ngrams(name):
    """Chains of what was said before; where nothing was, the newest token alone."""
    target, _ = pair(3)
    knobs, prefixes = knobs_of(name), prefixes_of(3)
    tokens = np.full((len(prefixes), 3), -1, np.int32)
    for line, prefix in zip(tokens, prefixes, strict=True):
        guess = Seen(1, 3).following([*PROMPT, *prefix], 2)
        line[1 : 1 + len(guess)] = guess
    assert (tokens[:, 1:] >= 0).any()
    tree = chain_of(jnp.asarray(tokens))
    blocks = Blocks(prefixes, 3, 2)
    followed(blocks, tree, np.asarray(behind(target, knobs, prefixes, tree)))
    assert distance(blocks, target, knobs) < 1e-6


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("drafter", [Lookahead(2, 2, 0), Lookahead(2, 3, 2)], ids=["chain", "tree"])
def test_lookahead(drafter, name):
    """Later drafts are made of what was drawn behind drafts that were not kept, and no token gives that away.

    A row for every way in which the second token and, behind each second token, the third may be drawn: the steps
    look their draws up. What lies beyond is the most probable token.
    """
    target, knobs = pair(3)[0], knobs_of(name)
    one, two, three = (plain_law(target, knobs, n) for n in (1, 2, 3))
    ways = [(a, b, c) for a, b in TWO for c in itertools.product(range(3), repeat=3)]
    rows, kept, end = [[*PROMPT, a] for a, _, _ in ways], 0, len(PROMPT) + 3
    share = lambda text: three[text] / two[text[:2]] if two[text[:2]] else 1 / 3
    weight = np.array([one[a,] * np.prod([share((a, x, c[x])) for x in range(3) if x != b]) for a, b, c in ways])
    memory = drafter.init(target, types.SimpleNamespace(rows=rows), None)
    while (live := np.array([len(row) < end for row in rows])).any():
        draft, memory = drafter.propose(memory, Asked(rows, None, drafter.lengths[0], live))
        texts = [tuple(row[len(PROMPT) : end]) for row in rows]
        p = np.asarray(behind(target, knobs, texts, draft.tree), np.float64)
        drawn = looked_up(draft.tree, p, texts, ways)
        at = _follow(draft.tree, jnp.asarray(drawn))
        path = np.asarray(_path_to(draft.tree, at))
        for r in np.flatnonzero(live):
            for node in path[r][path[r] >= 0]:
                weight[r] *= p[r, node, drawn[r, node]] if len(rows[r]) < end else 1
                rows[r].append(int(drawn[r, node]))
        count = np.where(live, (path >= 0).sum(1) - 1, -1)
        memory = drafter.accept(memory, types.SimpleNamespace(said=drawn, kept=count))
        kept += np.maximum(count, 0).sum()
    assert kept > 50
    got = dict.fromkeys(three, 0.0)
    for row, w in zip(rows, weight, strict=True):
        got[tuple(row[len(PROMPT) : end])] += w
    assert sum(abs(got[text] - p) for text, p in three.items()) / 2 < 1e-6


TWO = list(itertools.product(range(3), repeat=2))


def looked_up(tree: Tree, p: np.ndarray, texts, ways) -> np.ndarray:
    """What is drawn behind each node i32 [R, N], by the `ways` (first, second, thirds) of the rows."""
    drawn, tokens, parents = p.argmax(-1), np.asarray(tree.tokens), np.asarray(tree.parents)
    for r, (text, (_, second, thirds)) in enumerate(zip(texts, ways, strict=True)):
        lines = [text]
        for n in range(1, tokens.shape[1]):
            lines.append((*lines[parents[r, n]], int(tokens[r, n])))
        for n, line in enumerate(lines):
            if len(line) < 3 and line[-1] >= 0:
                drawn[r, n] = second if len(line) == 1 else thirds[line[1]]
    return drawn.astype(np.int32)


def no_repeats(rows) -> np.ndarray:
    """A mask: no token twice in a row, and 1 2 is followed by 0."""
    allowed = np.ones((len(rows), 3), bool)
    for line, row in zip(allowed, rows, strict=True):
        line[list(row[-1:])] = False
        line[1:] &= tuple(row[-2:]) != (1, 2)
    return allowed


@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("shape", ["chain", "width 2"])
def test_masks(shape, name):
    """A constraint holds along every path of a tree whose drafts know nothing of it; not if asked once only."""
    target, draft = pair(3)
    knobs, prefixes = knobs_of(name), [c for c in prefixes_of(3) if len(c) < 2 or no_repeats([c[:-1]])[0, c[-1]]]
    made, weight = drafted(target, draft, knobs, SHAPES[shape][1], prefixes=prefixes)
    for allowed, exact in ((no_repeats, True), (lambda rows: no_repeats([row[:1] for row in rows]), False)):
        blocks = Blocks(prefixes, 3, made.tree.deepest)
        judged(blocks, made, behind(target, knobs, prefixes, made.tree, allowed), weight)
        assert (distance(blocks, target, knobs, no_repeats) < 1e-6) == exact


def test_a_mixed_tree():
    """Siblings of which one was certain and the next drawn: each is weighed by what it came from."""
    target, draft = pair(3)
    knobs = knobs_of("plain")

    def certain_first(made: Draft) -> Draft:  # the first child becomes token 0, the second what was drawn first
        tokens = jnp.stack([made.tree.tokens[:, 0], 0 * made.tree.tokens[:, 1], made.tree.tokens[:, 1]], 1)
        sure = jnp.broadcast_to(jax.nn.one_hot(0, 3), made.probs[:, 0].shape)
        parent = np.array([-1, 0, 0])
        return Draft(Tree(tokens, parent, 1), jnp.stack([sure, made.probs[:, 0]], 1))

    blocks = by_rejection(target, draft, knobs, (1, 1), certain_first)
    assert distance(blocks, target, knobs) < 1e-6


# ---- what is not, and is seen ---------------------------------------------------------------------------


def test_probabilities_from_before_top_p_are_seen():
    """Drafts drawn from the truncated distribution, weighed by the whole one."""
    target, draft = pair(3)
    knobs = knobs_of("top-p 0.9")

    def whole(made: Draft) -> Draft:
        raw = behind(draft, knobs_of("plain"), prefixes_of(3), made.tree)
        return Draft(made.tree, raw[:, :-1])

    assert distance(by_rejection(target, draft, knobs, (1, 1)), target, knobs) < 1e-6
    assert distance(by_rejection(target, draft, knobs, (1, 1), whole), target, knobs) > 1e-3


@pytest.mark.parametrize("shape", ["narrowing", "width 4"])
def test_one_row_of_probabilities_for_all_siblings_is_seen(shape):
    """Drawn without replacement, weighed as if with it."""
    vocab, widths = SHAPES[shape]
    target, draft = pair(vocab)
    knobs = knobs_of("plain")

    def shared(made: Draft) -> Draft:
        parent = np.asarray(made.tree.parent)[1:]
        return Draft(made.tree, made.probs[:, np.searchsorted(parent, parent)])

    assert distance(by_rejection(target, draft, knobs, widths, shared), target, knobs) > 1e-3


@pytest.mark.parametrize("shape", ["width 2", "width 4"])
def test_most_probable_drafts_weighed_as_if_drawn_are_seen(shape):
    vocab, widths = SHAPES[shape]
    target, draft = pair(vocab)
    knobs, prefixes = knobs_of("plain"), prefixes_of(vocab)
    made, weight = drafted(target, draft, knobs, widths, "top")
    probs = behind(draft, knobs, prefixes, made.tree)[:, np.asarray(made.tree.parent)[1:]]
    blocks = Blocks(prefixes, vocab, made.tree.deepest)
    judged(blocks, Draft(made.tree, probs), behind(target, knobs, prefixes, made.tree), weight)
    assert distance(blocks, target, knobs) > 0.05


def test_an_epsilon_in_the_ratio_is_seen(monkeypatch):
    target, draft = pair(3)
    knobs = knobs_of("plain")

    def careful(p, q, token):
        px, qx = (jnp.take_along_axis(a, token[:, None], 1)[:, 0] for a in (p, q))
        return jnp.where(px >= qx, 1.0, px / (qx + 1e-5))

    monkeypatch.setattr(spec_verify, "acceptance", careful)
    blocks = by_rejection(target, draft, knobs, (1, 1), rule=compiled(lambda *args: reject(*args)))
    assert distance(blocks, target, knobs) > 1e-6


def test_penalties_of_the_root_for_all_nodes_are_seen(monkeypatch):
    """Penalties must know the drafts before."""
    target, draft = pair(3)
    everywhere = lambda context, tree: jax.tree.map(
        lambda a: jnp.repeat(a[:, None], tree.tokens.shape[1], 1), context
    )
    monkeypatch.setattr("jaxllm.spec_decode.along", everywhere)
    jax.clear_caches()
    blocks = by_rejection(target, draft, knobs_of("penalties"), (1, 1))
    jax.clear_caches()
    assert distance(blocks, target, knobs_of("penalties")) > 1e-3


def test_typical_acceptance_is_another_distribution():
    target, draft = pair(3)
    knobs = knobs_of("plain")

    def lossy(tree, p, probs, uniform):
        at = typical(tree, p)
        return at, p[jnp.arange(len(at)), at], jnp.full(uniform.shape, -1.0)

    blocks = by_rejection(target, draft, knobs, (1, 1), rule=compiled(lossy))
    assert distance(blocks, target, knobs) > 1e-3
