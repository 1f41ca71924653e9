"""A drafter that reads the target's activations gets those of every token, whatever became of its drafts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import decode, layers, sampling
from jaxllm.draft_model import DraftModel
from jaxllm.draft_ngram import NGram
from jaxllm.errors import JaxllmError
from jaxllm.model import Model
from jaxllm.spec_decode import Speculative
from jaxllm.spec_length import Pace
from jaxllm.taps import Taps
from tests import random_model
from tests.random_model import CONFIGS

WARM = sampling.sampler(temperature=0.9, top_p=0.95, repetition_penalty=1.2)
ROWS = [random_model.tokens(n, seed=n).tolist() * 2 for n in (5, 3, 9)]


def model_of(name: str, seed: int = 0) -> Model:
    return Model(CONFIGS[name], random_model.params(CONFIGS[name], seed))


@dataclasses.dataclass
class Watching:
    """Drafts like another drafter, and keeps all the features it is shown: [tokens, width] of each row."""

    inner: NGram | DraftModel
    features: tuple[str, ...] = ("layers.0.out", "norm")
    whole_prompt: bool = True
    seen: list[np.ndarray] = dataclasses.field(default_factory=list)

    @property
    def nodes(self):
        return self.inner.nodes

    @property
    def lengths(self):
        return self.inner.lengths

    def init(self, target, plan, found):
        self.chunks = [np.asarray(c) for c in found.features]
        self.last = np.asarray(found.last)
        if self.whole_prompt:
            each = len(plan.rows) // len(self.chunks[0])
            every = np.concatenate(self.chunks, 1)
            self.seen = [every[i // each, : len(row)] for i, row in enumerate(plan.rows)]
        return self.inner.init(target, plan, found)

    def propose(self, memory, asked):
        return self.inner.propose(memory, asked)

    def accept(self, memory, seen):
        features = np.asarray(seen.features)
        assert features.shape[:2] == np.asarray(seen.path).shape
        for i, kept in enumerate(np.asarray(seen.kept)):
            self.seen[i] = np.concatenate([self.seen[i], features[i, : kept + 1]])
        return self.inner.accept(memory, seen) if features.shape[1] > 1 else memory


@functools.cache
def whole(config):
    keep = Taps(keep=("layers.0.out", "norm"))
    return jax.jit(lambda params, tokens: layers.capture(config, params, tokens, keep)[1])


def expected(model: Model, row: list[int]) -> np.ndarray:
    """The same activations [tokens, width], of one forward over all tokens and padding behind them."""
    tokens = np.array([row + [0] * (48 - len(row))])
    kept = whole(model.config)(model.params, tokens)
    return np.concatenate([kept["layers.0.out"][0], kept["norm"][0]], -1)[: len(row)]


def complete(model: Model, made, watching: Watching) -> None:
    for completion, features in zip(made, watching.seen, strict=True):
        row = [*completion.prompt_tokens, *completion.tokens][:-1]  # the last token is never fed
        assert len(features) >= len(row)
        want = expected(model, row)
        np.testing.assert_allclose(features[: len(row)], want, atol=2e-5)


@pytest.mark.parametrize("length", [2, "auto"])
@pytest.mark.parametrize("shape", ["chain", "tree", "recurrent"])
def test_every_token_has_its_features(shape, length, monkeypatch):
    """Drafts kept of chains and trees, plain steps between, rows that end early, prompts of several chunks."""
    lengths = iter([2, 0, 0, 2, 2, 0, 2])
    monkeypatch.setattr(Pace, "choose", lambda self: self.fixed or next(lengths, 2))
    target = model_of("recurrent" if shape == "recurrent" else "full")
    noise = random_model.params(target.config, seed=1)
    near = dataclasses.replace(target, params=jax.tree.map(lambda a, b: a + 0.03 * b, target.params, noise))
    inner = {"chain": DraftModel(near, (1, 1)), "tree": DraftModel(near, (2, 2)), "recurrent": NGram(2, 2, 1)}
    watching = Watching(inner[shape])
    options = dict(max_new_tokens=14, eos=(), prefill_chunk_size=8)
    made = decode.generate(target, ROWS, **options, speculative=Speculative(watching, length))
    assert [c.tokens for c in made] == [c.tokens for c in decode.generate(target, ROWS, **options)]
    assert made.speculation.verifications > 0
    assert (made.speculation.plain_steps > 0) == (length == "auto" or shape == "recurrent")
    complete(target, made, watching)


def test_samples_of_a_prompt_share_its_features():
    target = model_of("full")
    watching = Watching(NGram(3, 2, 1))
    options = dict(max_new_tokens=12, sampler=WARM, key=jax.random.key(3), n=3, eos=(), prefill_chunk_size=8)
    made = decode.generate(target, ROWS[:2], **options, speculative=Speculative(watching, 3))
    assert [c.tokens for c in made] == [c.tokens for c in decode.generate(target, ROWS[:2], **options)]
    assert [c.shape[:2] for c in watching.chunks] == [(2, 8), (2, 8)]
    complete(target, made, watching)


def test_the_newest_alone():
    """Without `whole_prompt` a prompt is read as without a drafter, and its newest hidden vector is there."""
    target = model_of("full")
    watching = Watching(NGram(3, 2, 1), whole_prompt=False, seen=[np.zeros((0, 64), np.float32)] * 3)
    made = decode.generate(target, ROWS, max_new_tokens=9, eos=(), speculative=Speculative(watching, 3))
    assert watching.chunks == []
    for completion, last, features in zip(made, watching.last, watching.seen, strict=True):
        row = [*completion.prompt_tokens, *completion.tokens][:-1]
        want = expected(target, row)
        at = len(completion.prompt_tokens)
        np.testing.assert_allclose(last, want[at - 1, 32:], atol=2e-5)
        np.testing.assert_allclose(features[: len(row) - at], want[at:], atol=2e-5)


def test_a_prefix_is_read_again():
    """A state holds no features, so what a prefix would save is done once more."""
    target = model_of("full")
    before = decode.generate(target, ROWS[0], max_new_tokens=4, eos=())
    row = [*before.prefix.tokens, 7, 8]
    watching = Watching(NGram(3, 2, 1))
    options = dict(max_new_tokens=6, eos=())
    made = decode.generate(target, row, **options, prefix=before.prefix, speculative=Speculative(watching, 3))
    complete(target, made, watching)
    assert made[0].tokens == decode.generate(target, row, **options)[0].tokens


def test_an_activation_that_is_not_there():
    watching = Watching(NGram(3), features=("layers.2.out",))
    with pytest.raises(JaxllmError, match="no activation matches"):
        decode.generate(model_of("full"), ROWS[0], max_new_tokens=3, speculative=Speculative(watching))


def test_without_features_nothing_is_tapped(monkeypatch):
    """Their programs are those of `hidden` without taps."""
    asked = []
    original = layers.hidden

    def noted(*args, taps=None, **more):
        asked.append(taps)
        return original(*args, taps=taps, **more)

    monkeypatch.setattr(layers, "hidden", noted)
    jax.clear_caches()
    decode.generate(
        model_of("full"), ROWS[0], max_new_tokens=8, eos=(), speculative=Speculative(NGram(3, 2, 1), 3)
    )
    config, tokens = CONFIGS["full"], jnp.zeros((1, 3), jnp.int32)
    state = jax.eval_shape(lambda: layers.init_state(config, 1, 8, chunk=3))
    jax.eval_shape(lambda p, s: layers.featured(config, p, tokens, s, ("norm",)), model_of("full").params, state)
    assert len(asked) >= 4
    assert asked == [None] * len(asked)
    jax.clear_caches()
