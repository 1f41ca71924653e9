"""`generate` with a drafter says what it says without: token for token, or in law where drafts are drawn."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import decode, layers, quant, sampling
from jaxllm.draft_medusa import load_medusa
from jaxllm.draft_model import DraftModel, early_exit
from jaxllm.draft_ngram import NGram
from jaxllm.errors import ContextError, JaxllmError, TokenizerError
from jaxllm.model import Model, bundled
from jaxllm.spec_decode import Speculative
from jaxllm.spec_length import Pace
from tests import random_model
from tests.random_model import CONFIGS

WARM = sampling.sampler(temperature=0.9, top_p=0.95, repetition_penalty=1.2)


def model_of(name: str, seed: int = 0) -> Model:
    return Model(CONFIGS[name], random_model.params(CONFIGS[name], seed))


@pytest.fixture(scope="module")
def target() -> Model:
    return model_of("full")


@pytest.fixture(scope="module")
def near(target) -> Model:
    """A draft that often agrees with the target: its weights and some noise."""
    noise = random_model.params(target.config, seed=1)
    params = jax.tree.map(lambda a, b: a + 0.05 * b, target.params, noise)
    return dataclasses.replace(target, params=params)


ROWS = [random_model.tokens(n, seed=n).tolist() for n in (5, 3, 9)]
WIDTHS = {"chain": (1, 1, 1), "tree": (2, 2)}


def tokens(made) -> list[tuple[int, ...]]:
    return [c.tokens for c in made]


# ---- token for token ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [3, "auto"])
@pytest.mark.parametrize("sampler", [sampling.GREEDY, WARM], ids=["greedy", "warm"])
def test_ngrams(target, sampler, length):
    options = dict(max_new_tokens=14, sampler=sampler, key=jax.random.key(1), eos=())
    rows = [r * 2 for r in ROWS]
    want = decode.generate(target, rows, **options)
    got = decode.generate(target, rows, **options, speculative=Speculative(NGram(3, 3, 1), length))
    assert tokens(got) == tokens(want)
    np.testing.assert_allclose(got[0].logprobs, want[0].logprobs, atol=1e-4)
    if length == 3:
        assert got.speculation.verifications > 0


@pytest.mark.parametrize("choice", ["draw", "couple", "top"])
@pytest.mark.parametrize("shape", WIDTHS)
def test_a_draft_model(target, near, shape, choice):
    """Greedy rows are those of plain decoding, and so are warm ones unless drafts are drawn on their own."""
    mixed = sampling.merge([sampling.GREEDY, WARM, sampling.sampler(temperature=0.6, top_k=5)])
    options = dict(max_new_tokens=14, sampler=mixed, key=jax.random.key(2), eos=())
    drafter = DraftModel(near, WIDTHS[shape], choice)
    got = decode.generate(target, ROWS, **options, speculative=Speculative(drafter, drafter.lengths[-1]))
    want = decode.generate(target, ROWS, **options)
    same = 1 if choice == "draw" else 3
    assert tokens(got)[:same] == tokens(want)[:same]
    assert [len(c.tokens) for c in got] == [14] * 3
    assert got.speculation.tokens_per_step > 3.5  # of three rows


@pytest.mark.parametrize("name", ["window", "mla", "parallel", "learned", "recurrent"])
def test_other_caches(name):
    """Rings, latents, learned positions; a recurrent target reads its chains again."""
    model = model_of(name)
    options = dict(max_new_tokens=20, eos=(), prefill_chunk_size=4)
    want = tokens(decode.generate(model, ROWS, **options))
    draft = model_of("full", 1)
    drafters = [NGram(3, 2, 1), DraftModel(draft, (1, 1))]
    if name != "recurrent":
        drafters.append(DraftModel(draft if name == "learned" else model, (2, 1)))
    for drafter in drafters:
        speculative = Speculative(drafter, drafter.lengths[-1])
        got = decode.generate(model, ROWS, **options, speculative=speculative)
        assert tokens(got) == want
        assert got.speculation.verifications > 0


@pytest.mark.parametrize(
    "more", [dict(overflow="evict-oldest", max_len=16, sinks=2), dict(kv_format="int8")], ids=str
)
def test_windows_and_packed_caches(target, near, more):
    options = dict(max_new_tokens=24, eos=(), prefill_chunk_size=8, **more)
    want = tokens(decode.generate(target, ROWS, **options))
    speculative = Speculative(DraftModel(near, (2, 1)), 2)
    assert tokens(decode.generate(target, ROWS, **options, speculative=speculative)) == want


def test_up_to_the_end_of_the_context(target):
    """The last tokens leave no room for a tree."""
    row = random_model.tokens(80).tolist()
    want = decode.generate(target, row, max_new_tokens=17, eos=())
    for drafter in (NGram(4, 2, 1), DraftModel(model_of("full", 1), (1,) * 4)):
        got = decode.generate(target, row, max_new_tokens=17, eos=(), speculative=Speculative(drafter, 4))
        assert tokens(got) == tokens(want)
    assert got.speculation.plain_steps > 0


def test_samples_of_one_prompt(target, near):
    options = dict(max_new_tokens=9, sampler=WARM, key=jax.random.key(3), n=3, eos=())
    speculative = Speculative(DraftModel(near, (2, 1), "couple"), 2)
    assert tokens(decode.generate(target, ROWS[:2], **options, speculative=speculative)) == tokens(
        decode.generate(target, ROWS[:2], **options)
    )


def test_ends_and_streams(target, near):
    """An end token in the middle of a step ends the row there; a stream gives the same; a prefix goes on."""
    speculative = Speculative(DraftModel(near, (1,) * 4), 4)
    whole = decode.generate(target, ROWS[0], max_new_tokens=12, eos=())[0].tokens
    end = whole[6]
    want = decode.generate(target, ROWS[0], max_new_tokens=12, eos=[end], logprobs=2)
    got = decode.generate(target, ROWS[0], max_new_tokens=12, eos=[end], logprobs=2, speculative=speculative)
    assert tokens(got) == tokens(want)
    assert got[0].finish_reason == "eos"
    assert [a.ids for a in got[0].top] == [a.ids for a in want[0].top]
    streamed = decode.stream(target, ROWS[0], max_new_tokens=12, eos=[end], speculative=speculative)
    assert tuple(t.id for t in streamed) == want[0].tokens
    assert got.prefix.tokens == want.prefix.tokens
    further = [*got.prefix.tokens, 7]
    again = decode.generate(target, further, max_new_tokens=6, eos=(), prefix=got.prefix)
    assert tokens(again) == tokens(decode.generate(target, further, max_new_tokens=6, eos=()))
    fewer = decode.generate(target, ROWS[0], max_new_tokens=1, eos=(), speculative=speculative)
    assert fewer[0].tokens == whole[:1]


def test_a_draft_that_is_the_target(target):
    """Everything is kept: five tokens a step."""
    drafter = DraftModel(target, (1,) * 4)
    report = decode.generate(
        target, ROWS[0], max_new_tokens=21, eos=(), speculative=Speculative(drafter, 4)
    ).speculation
    assert (report.verifications, report.plain_steps, report.new_tokens) == (4, 0, 20)
    assert report.acceptance == (1, 1, 1, 1)
    assert report.tokens_per_step == 5
    assert report.looked_at == report.kept == (4, 4, 4, 4)


def test_a_draft_that_rests_catches_up(target, near, monkeypatch):
    """Lengths come and go; what was said meanwhile is read by the draft model before it goes on."""
    lengths = iter([2, 0, 0, 4, 0, 0, 0, 0, 0, 0, 1, 4, 4, 0, 3])
    monkeypatch.setattr(Pace, "choose", lambda self: next(lengths, 2))
    want = decode.generate(target, ROWS, max_new_tokens=40, eos=())
    got = decode.generate(
        target, ROWS, max_new_tokens=40, eos=(), speculative=Speculative(DraftModel(near, (1,) * 4))
    )
    assert tokens(got) == tokens(want)
    assert got.speculation.plain_steps == 9
    assert got.speculation.acceptance[0] > 0.6


def test_one_trace_for_every_length(target, near, monkeypatch):
    """One program of the draft model and one of verification, whatever the lengths, values and keys."""
    traced = []
    original = layers.hidden

    def counted(config, params, tokens, state, **more):
        traced.append((config is target.config, tokens.shape))
        return original(config, params, tokens, state, **more)

    monkeypatch.setattr(layers, "hidden", counted)
    jax.clear_caches()
    draft = dataclasses.replace(near, config=dataclasses.replace(near.config, max_len=95))
    for length in (1, 3, 2):
        sampler = sampling.sampler(temperature=0.5 + length, top_p=0.9)
        options = dict(max_new_tokens=9, sampler=sampler, key=jax.random.key(length), eos=(), prefill_chunk_size=8)
        speculative = Speculative(DraftModel(draft, (1,) * 3), length)
        decode.generate(target, ROWS[0], **options, speculative=speculative)
    assert sorted(traced) == sorted(
        [(True, (1, 8)), (True, (1, 4)), (False, (1, 64)), (False, (1, 2)), (False, (1, 1))]
    )
    jax.clear_caches()


# ---- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda m: Speculative(NGram(3), 4), "drafts 1 to 3 tokens ahead"),
        (lambda m: Speculative(DraftModel(m, (2, 2)), 1), "drafts 2 tokens ahead"),
        (lambda m: Speculative(NGram(3), rule="quick"), "'exact' or 'typical'"),
        (lambda m: NGram(0), "length >= 1"),
        (lambda m: NGram(longest=1), "shortest <= longest"),
        (lambda m: DraftModel(m, ()), "widths"),
        (lambda m: DraftModel(m, (0,)), "widths"),
        (lambda m: DraftModel(m, choice="best"), "'draw', 'couple' or 'top'"),
        (lambda m: early_exit(m, 2), "layer 1 to 1"),
    ],
)
def test_what_cannot_be(target, make, says):
    with pytest.raises(JaxllmError, match=says):
        make(target)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(mask=lambda rows: np.ones((1, 48), bool)), "mask"),
        (dict(overflow="clear"), "overflow='clear'"),
        (dict(steps=2), "steps: leave one out"),
    ],
)
def test_what_does_not_go_together(target, options, says):
    with pytest.raises(JaxllmError, match=says):
        decode.generate(target, ROWS[0], max_new_tokens=3, speculative=Speculative(NGram()), **options)


def test_drafts_of_another_kind(target):
    other = Model(random_model.config(random_model.block(), vocab=50), {})
    with pytest.raises(TokenizerError, match="vocabulary of 50 tokens and the target 48"):
        decode.generate(target, ROWS[0], max_new_tokens=3, speculative=Speculative(DraftModel(other)))
    with pytest.raises(JaxllmError, match="cannot take drafts back"):
        decode.generate(
            target, ROWS[0], max_new_tokens=3, speculative=Speculative(DraftModel(model_of("recurrent")))
        )
    tree = Speculative(DraftModel(target, (2, 1)), 2)
    with pytest.raises(JaxllmError, match="cannot verify a tree"):
        decode.generate(model_of("recurrent"), ROWS[0], max_new_tokens=3, speculative=tree)
    short = dataclasses.replace(target, config=dataclasses.replace(target.config, max_len=6))
    with pytest.raises(ContextError, match=r"draft model .* context of 6 tokens, and 7 are"):
        decode.generate(target, ROWS[0], max_new_tokens=3, speculative=Speculative(DraftModel(short)))


def test_another_tokenizer_is_refused(tmp_path):
    """The same number of tokens, two of which have changed places."""
    model = jaxllm.load(bundled("draft"))
    folder = tmp_path / "other"
    folder.mkdir()
    for file in bundled("draft").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    words = json.loads((folder / "tokenizer.json").read_text())
    vocab = words["model"]["vocab"]
    a, b = [t for t in vocab if t.isalpha()][:2]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (folder / "tokenizer.json").write_text(json.dumps(words))
    other = jaxllm.load(folder)
    with pytest.raises(TokenizerError, match="others than the target's \\(4 differ"):
        decode.generate(model, "x", max_new_tokens=3, speculative=Speculative(DraftModel(other)))


# ---- the bundled pair -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> tuple[Model, Model]:
    return jaxllm.load(), jaxllm.load(bundled("draft"))


def drafters(target: Model, draft: Model) -> dict:
    return {
        "ngram": NGram(6),
        "draft": DraftModel(draft, (1,) * 4),
        "tree": DraftModel(draft, (2, 2, 1)),
        "copy": DraftModel(quant.quantize_model(target, "q4bf16_1"), (1,) * 3),
        "exit": DraftModel(early_exit(target, 4), (1, 1)),
        "medusa": load_medusa(bundled("medusa"), target),
    }


def prompts(target: Model, count: int) -> list[list[int]]:
    """Pieces of Python of 8 to 40 tokens."""
    ids = target.tokenizer.encode(pathlib.Path(json.decoder.__file__).read_text())
    rng = np.random.default_rng(5)
    return [ids[at : at + rng.integers(8, 40)] for at in rng.integers(0, len(ids) - 40, count)]


def agrees(pair, kind: str, count: int, batch: int) -> None:
    target, draft = pair
    drafter, rows = drafters(target, draft)[kind], prompts(target, count)
    speculative = Speculative(drafter, drafter.lengths[-1])
    for i in range(0, count, batch):
        options = dict(max_new_tokens=32, eos=(), max_len=96)
        want = decode.generate(target, rows[i : i + batch], **options)
        got = decode.generate(target, rows[i : i + batch], **options, speculative=speculative)
        assert tokens(got) == tokens(want)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("kind", ["ngram", "draft", "tree", "copy", "exit", "medusa"])
def test_greedy(built, pair, kind, batch):
    agrees(pair, kind, 8 if batch == 1 else 16, batch)


@pytest.mark.long
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("kind", ["ngram", "draft", "tree", "copy", "exit", "medusa"])
def test_greedy_of_a_thousand(built, pair, kind, batch):
    agrees(pair, kind, 1000, batch)


HOT = sampling.sampler(temperature=1.2, top_k=3, frequency_penalty=0.3)


def law(target: Model, prompt: list[int], horizon: int) -> dict[tuple[int, ...], float]:
    """The probability of every continuation, from plain forwards."""
    found = {(): 1.0}
    for n in range(horizon):
        before = list(found)
        logits = jax.jit(layers.forward, static_argnums=0)(
            target.config, target.params, jnp.array([[*prompt, *c] for c in before])
        )[0][:, -1]
        context = sampling.init_context(HOT, target.config.vocab, [prompt] * len(before))
        for i in range(n):
            context = sampling.observe(context, jnp.array([c[i] for c in before]), jnp.ones(len(before), bool))
        probs = np.exp(np.asarray(HOT.distribution(logits, context), np.float64))
        found = {
            (*c, int(v)): found[c] * p[v] for c, p in zip(before, probs, strict=True) for v in np.flatnonzero(p)
        }
    return found


def surprise(pair, widths, times: int, rows: int) -> float:
    """Standard deviations by which chi-square of times * rows sampled continuations exceeds its expectation."""
    target, draft = pair
    prompt = target.tokenizer.encode("def add(")
    want = law(target, prompt, 3)
    speculative = Speculative(DraftModel(draft, widths), len(widths))
    counts = dict.fromkeys(want, 0)
    for time in range(times):
        made = decode.generate(
            target,
            prompt,
            max_new_tokens=3,
            eos=(),
            n=rows,
            sampler=HOT,
            key=jax.random.key(time),
            speculative=speculative,
        )
        for c in made:
            counts[c.tokens] += 1  # a KeyError is a token that cannot be
    expected = times * rows * np.array(list(want.values()))
    seen, common = np.array(list(counts.values())), expected >= 5
    cells = [(seen[common], expected[common]), ([seen[~common].sum()], [expected[~common].sum()])]
    seen, expected = (np.concatenate(part) for part in zip(*cells, strict=True))
    square, free = np.sum((seen - expected) ** 2 / np.maximum(expected, 1e-9)), len(seen) - 1
    return ((square / free) ** (1 / 3) - (1 - 2 / (9 * free))) / math.sqrt(2 / (9 * free))  # Wilson and Hilferty


@pytest.mark.parametrize("widths", [(1, 1, 1), (3, 1)], ids=str)
def test_sampled_continuations(pair, widths):
    """Chi-square of 600 against the exact law of three tokens."""
    assert abs(surprise(pair, widths, 2, 300)) < 3.5


@pytest.mark.long
@pytest.mark.parametrize("widths", [(1, 1, 1), (3, 1), (2, 2)], ids=str)
def test_sampled_continuations_in_number(pair, widths):
    assert abs(surprise(pair, widths, 200, 500)) < 3.5
