"""Sampling against llama.cpp's test vectors, transformers' logits processors and the distribution itself."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.errors import SamplerError
from jaxllm.sampling import (
    GREEDY,
    XTC,
    Ban,
    Context,
    Dry,
    DynamicTemperature,
    FrequencyPenalty,
    Greedy,
    LogitBias,
    Mask,
    MinP,
    PresencePenalty,
    RepetitionPenalty,
    Sampler,
    Temperature,
    TopK,
    TopNSigma,
    TopP,
    Typical,
    init_context,
    merge,
    observe,
    sample,
    sampler,
    top_logprobs,
)

TRACES = []


@jax.jit
def draw(chain, logits, keys, context=None):
    """`sample`, compiled once for all tests of one structure; notes each time it is traced."""
    TRACES.append(1)
    return sample(chain, logits, keys, context)


@jax.jit
def dry(step, logits, context):
    return step(logits, context)


V = 50
LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(7, V)).astype(np.float32) * 3)
KEYS = jax.random.split(jax.random.key(5), 7)
PROMPTS = [[i, i + 1, 3, i, i + 1] for i in range(7)]
EVERYTHING = {
    "temperature": 0.8,
    "top_n_sigma": 3.0,
    "top_k": 20,
    "top_p": 0.9,
    "min_p": 0.01,
    "typical_p": 0.95,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.2,
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.2,
    "presence_penalty": 0.1,
    "dry_multiplier": 0.8,
    "dry_breakers": [3, [1, 2]],
    "dry_window": 16,
    "logit_bias": {4: 2.0, 9: -np.inf},
    "banned": [0, 7],
    "vocab": V,
}


# --- llama.cpp's vectors ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vectors(shared) -> list[dict]:
    cases = json.loads((shared / "ref_suites" / "sampling_vectors.json").read_text())["cases"]
    return [case for case in cases if "sampler" in case]


def probabilities(steps, probs, context=None, key=None) -> np.ndarray:
    """What the steps make of the logits log(probs), one row."""
    with np.errstate(divide="ignore"):
        logits = jnp.log(jnp.asarray([probs], jnp.float32))
    chain = Sampler(tuple(steps))
    reads_recent = "recent" in chain.reads
    apply = jax.jit(Sampler.distribution) if reads_recent else Sampler.distribution
    return np.exp(apply(chain, logits, context, key))[0]


def window_context(tokens, vocab) -> Context:
    """llama.cpp's one window of last tokens, as everything our penalties look at."""
    counts = jnp.asarray([np.bincount(tokens, minlength=vocab)], jnp.int32)
    return Context(prompt=counts > 0, counts=counts, recent=jnp.asarray([tokens], jnp.int32))


def step_for(name, args):
    if name == "dry":
        multiplier, base, allowed, last_n, breakers = args
        breakers = jnp.asarray(breakers, jnp.int32) if breakers else None
        return [Dry(multiplier, base, allowed, breakers, last_n)]
    if name == "penalties":
        repeat, frequency, presence = args
        return [RepetitionPenalty(repeat), FrequencyPenalty(frequency), PresencePenalty(presence)]
    kinds = {
        "temp": Temperature,
        "temp_ext": DynamicTemperature,
        "top_k": TopK,
        "top_p": TopP,
        "min_p": MinP,
        "typical": Typical,
        "top_n_sigma": TopNSigma,
        "xtc": XTC,
    }
    return [kinds[name](*args)]


def assert_case(name, args) -> None:
    """Probabilities agree to 1e-5; where the reference drops removed tokens, so do we before comparing."""
    context = key = None
    if name in ("dry", "penalties"):
        probs, tokens, expected, *numbers = args
        context = window_context(tokens, len(probs))
    else:
        probs, expected, *numbers = args
    if name == "xtc":  # a key whose uniform draw is below 0.99
        key = jax.random.split(jax.random.key(0), 1)
    ours = probabilities(step_for(name, numbers), probs, context, key)
    if name in ("top_k", "top_p", "top_n_sigma") and expected != probs:
        ours = ours[np.argsort(probs)[::-1]]  # these sort the tokens
    if len(expected) < len(probs):
        ours = ours[ours > 0]
    expected = np.asarray(expected) / np.sum(expected)  # XTC and typical are given unnormalised
    np.testing.assert_allclose(ours, expected, atol=1e-5, err_msg=f"{name} {args}")


SUITE = {
    "temp": 2,
    "temp_ext": 2,
    "top_k": 4,
    "top_p": 4,
    "min_p": 9,
    "xtc": 4,
    "typical": 2,
    "penalties": 6,
    "dry": 5,
    "top_n_sigma": 3,
    "sampler_queue": 24,
}


@pytest.mark.parametrize("name", [name for name in SUITE if name != "sampler_queue"])
def test_llama_cpp_vectors(vectors, name):
    cases = [case["args"] for case in vectors if case["sampler"] == name]
    assert len(cases) == SUITE[name]
    for args in cases:
        assert_case(name, args)


def smallest_kept(letter: str, size: int, lowest: int, number: float) -> int:
    """The smallest id left, by the suite's own integer arithmetic; all larger ids are left too."""
    if letter == "k":
        return max(lowest, size - number)
    if letter == "m":
        return max(lowest, min(int(np.float32(number) * np.float32(size)), size - 1))
    total = size * (size - 1) // 2 - lowest * (lowest - 1) // 2
    target, mass, token = int(np.ceil(np.float32(number) * np.float32(total))), size - 1, size - 1
    while mass < target:
        token -= 1
        mass += token
    return token


def test_llama_cpp_sampler_queue(vectors):
    """Chains of top-k, top-p and min-p over 10,000 tokens of probability proportional to their id."""
    cases = [case["args"] for case in vectors if case["sampler"] == "sampler_queue"]
    assert len(cases) == SUITE["sampler_queue"]
    for size, letters, top_k, top_p, min_p in cases:
        numbers = {"k": top_k, "p": top_p, "m": min_p}
        lowest = 1  # token 0 has no probability
        for letter in letters:
            lowest = smallest_kept(letter, size, lowest, numbers[letter])
        kinds = {"k": TopK, "p": TopP, "m": MinP}
        ours = np.flatnonzero(probabilities([kinds[x](numbers[x]) for x in letters], np.arange(size)))
        np.testing.assert_array_equal(ours, np.arange(lowest, size), err_msg=f"{letters} {numbers}")


# --- what single steps do -----------------------------------------------------------------------


def test_ties_keep_exactly_k_in_index_order():
    logits = jnp.asarray([[1.0, 2.0, 2.0, -0.0, 2.0, 0.0]])
    assert np.flatnonzero(TopK(2)(logits)[0] > -jnp.inf).tolist() == [1, 2]
    assert np.flatnonzero(TopK(5)(logits)[0] > -jnp.inf).tolist() == [0, 1, 2, 3, 4]  # -0.0 is 0.0
    equal = jnp.zeros((1, 8))
    assert np.flatnonzero(TopP(0.5)(equal)[0] > -jnp.inf).tolist() == [0, 1, 2, 3]
    assert np.flatnonzero(Typical(0.25)(equal)[0] > -jnp.inf).tolist() == [0, 1]
    assert int(sample(GREEDY, logits, None)[0][0]) == 1


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.sampled_from([1.0, 0.25]))
@settings(max_examples=30, deadline=None)
def test_top_k_equals_a_stable_sort(seed, k, grain):
    """Coarse grains make many ties."""
    logits = np.round(np.random.default_rng(seed).normal(size=(3, V)) * 2 / grain) * grain
    kept = np.asarray(TopK(k)(jnp.asarray(logits, jnp.float32))) > -np.inf
    order = np.argsort(-logits, axis=-1, kind="stable")
    expected = np.zeros_like(kept)
    np.put_along_axis(expected, order[:, :k], True, axis=-1)
    np.testing.assert_array_equal(kept, expected)


def test_cold_rows_are_greedy_and_finite():
    logits = jnp.asarray([[1e4, -1e4, 1e4], [0.0, 3.0, 3.0], [-jnp.inf, -5.0, -jnp.inf]])
    for step in (Temperature(jnp.asarray([0.0, 0.0, 0.0])), Temperature(0.0), Greedy()):
        probs = np.exp(Sampler((step,)).distribution(logits))
        np.testing.assert_array_equal(probs, [[1, 0, 0], [0, 1, 0], [0, 1, 0]])
    mixed = np.exp(sampler(temperature=[0.0, 1.0, 2.0]).distribution(logits))
    np.testing.assert_allclose(mixed[1], np.exp([0, 3, 3]) / np.exp([0, 3, 3]).sum(), rtol=1e-6)
    assert np.array_equal(mixed[0], [1, 0, 0])


def test_dynamic_temperature_by_hand():
    probs = np.asarray([0.1, 0.2, 0.3, 0.4])
    entropy = -(probs * np.log(probs)).sum() / np.log(4)
    scaled = probs ** (1 / (0.5 + 2 * entropy**1.5))
    ours = probabilities([DynamicTemperature(1.5, 1.0, 1.5)], probs)
    np.testing.assert_allclose(ours, scaled / scaled.sum(), rtol=1e-5)
    peaked = probabilities([DynamicTemperature(0.5, 2.0, 1.0)], [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(peaked, [1, 0, 0])


def test_xtc_acts_as_often_as_its_probability():
    keys = jax.random.split(jax.random.key(3), 4000)
    logits = jnp.log(jnp.tile(jnp.asarray([0.4, 0.3, 0.2, 0.1]), (4000, 1)))
    for probability in (0.0, 0.3, 1.0):
        left = np.asarray(XTC(probability, 0.15)(logits, None, keys)) > -np.inf
        acted = (left == [False, False, True, True]).all(-1)
        assert (acted | left.all(-1)).all()
        assert abs(acted.mean() - probability) < 4 * np.sqrt(probability * (1 - probability) / 4000) + 1e-9
    tied = XTC(1.0, 0.2)(jnp.log(jnp.asarray([[0.4, 0.3, 0.3]])), None, keys[:1])
    assert np.flatnonzero(tied[0] > -jnp.inf).tolist() == [2]


def test_bias_ban_and_mask():
    logits = jnp.zeros((2, 5))
    sparse = LogitBias(jnp.asarray([1.0, -jnp.inf]), jnp.asarray([3, 0]))(logits)
    np.testing.assert_array_equal(sparse, [[-np.inf, 0, 0, 1, 0]] * 2)
    dense = LogitBias(jnp.arange(10.0).reshape(2, 5))(logits)
    np.testing.assert_array_equal(dense, np.arange(10.0).reshape(2, 5))
    ids = Ban(jnp.asarray([[1, -1], [0, 4]]))(logits)
    np.testing.assert_array_equal(ids == -jnp.inf, [[0, 1, 0, 0, 0], [1, 0, 0, 0, 1]])
    for step in (Ban(jnp.arange(5) > 2), Mask(jnp.arange(5) <= 2)):
        np.testing.assert_array_equal(step(logits)[1] == -jnp.inf, [0, 0, 0, 1, 1])


def test_dry_with_a_breaker_of_several_tokens():
    """0 1 2 5 6 0 1 2: the repeat of 3 tokens would cost token 5, unless a breaker cuts it short."""

    def penalty(breakers, tokens=(0, 1, 2, 5, 6, 0, 1, 2)):
        step = Dry(1.0, 2.0, 2, None if breakers is None else jnp.asarray(breakers), window=8)
        return -np.asarray(dry(step, jnp.zeros((1, 8)), window_context(list(tokens), 8)))[0]

    np.testing.assert_allclose(penalty(None), [0, 0, 0, 0, 0, 2, 0, 0])
    np.testing.assert_allclose(penalty([[6, 0], [-1, -1]]), [0, 0, 0, 0, 0, 1, 0, 0])
    np.testing.assert_allclose(penalty([[0, 1], [-1, -1]]), 0)
    np.testing.assert_allclose(penalty([[6, 1], [5, -1]]), 0)  # the first is absent, the second spares 5
    long = penalty(None, [1] * 8)  # 7 tokens repeat
    np.testing.assert_allclose(long, [0, 2.0**5, 0, 0, 0, 0, 0, 0])


def naive_dry(tokens, vocab, multiplier, base, allowed, singles):
    """The definition, by trying every place and every length."""
    penalty = np.zeros(vocab)
    limit = next((i for i, t in enumerate(reversed(tokens)) if t in singles), len(tokens))
    for place in range(1, len(tokens)):
        longest = 0
        for length in range(1, min(place, limit) + 1):
            if tokens[place - length : place] == tokens[-length:]:
                longest = length
        if longest >= allowed and tokens[place] not in singles:
            penalty[tokens[place]] = max(penalty[tokens[place]], multiplier * base ** (longest - allowed))
    return penalty


@given(st.lists(st.integers(0, 3), min_size=1, max_size=14), st.sets(st.integers(0, 3), max_size=1))
@settings(max_examples=40, deadline=None)
def test_dry_equals_its_definition(tokens, singles):
    breakers = jnp.asarray([[b] for b in singles], jnp.int32) if singles else None
    chain = Sampler((Dry(0.7, 1.5, 2, breakers, window=16),))
    context = init_context(chain, 4, [tokens])
    ours = -np.asarray(dry(chain.steps[0], jnp.zeros((1, 4)), context))[0]
    np.testing.assert_allclose(ours, naive_dry(tokens, 4, 0.7, 1.5, 2, singles), rtol=1e-5)


# --- transformers -------------------------------------------------------------------------------


def warped(processor, logits) -> np.ndarray:
    torch = pytest.importorskip("torch")
    scores = processor(torch.zeros((len(logits), 1), dtype=torch.long), torch.tensor(np.asarray(logits)))
    return torch.log_softmax(scores, -1).numpy()


@pytest.mark.parametrize(
    ("knobs", "name", "args"),
    [
        ({"temperature": 0.7}, "TemperatureLogitsWarper", (0.7,)),
        ({"top_k": 5}, "TopKLogitsWarper", (5,)),
        ({"top_p": 0.3}, "TopPLogitsWarper", (0.3,)),
        ({"top_p": 0.9}, "TopPLogitsWarper", (0.9,)),
        ({"min_p": 0.05}, "MinPLogitsWarper", (0.05,)),
        ({"typical_p": 0.2}, "TypicalLogitsWarper", (0.2,)),
        ({"typical_p": 0.8}, "TypicalLogitsWarper", (0.8,)),
    ],
)
def test_transformers_warpers(knobs, name, args):
    transformers = pytest.importorskip("transformers")
    expected = warped(getattr(transformers, name)(*args), LOGITS)
    np.testing.assert_allclose(sampler(**knobs).distribution(LOGITS), expected, atol=2e-6)


def test_transformers_repetition_penalty_over_prompt_and_output():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    chain = sampler(repetition_penalty=1.7)
    context = init_context(chain, V, PROMPTS)
    emitted = jnp.arange(40, 47)
    context = observe(context, emitted, jnp.ones(7, bool))
    ids = torch.tensor([[*prompt, int(t)] for prompt, t in zip(PROMPTS, emitted, strict=True)])
    scores = transformers.RepetitionPenaltyLogitsProcessor(1.7)(ids, torch.tensor(np.asarray(LOGITS)))
    expected = torch.log_softmax(scores, -1).numpy()
    np.testing.assert_allclose(chain.distribution(LOGITS, context), expected, atol=2e-6)


# --- drawing ------------------------------------------------------------------------------------


def test_draws_follow_the_distribution():
    """Chi-square over 20,000 keys."""
    chain, rows = sampler(temperature=1.3, top_k=12, min_p=0.02), 20_000
    logits = jnp.tile(LOGITS[:1], (rows, 1))
    tokens, logprobs = sample(chain, logits, jax.random.split(jax.random.key(11), rows))
    probs = np.exp(np.asarray(logprobs[0], np.float64))
    assert np.sum(probs > 0) > 5
    assert_frequencies(tokens, probs)


def assert_frequencies(tokens, probs) -> None:
    counts = np.bincount(np.asarray(tokens), minlength=len(probs))
    assert counts[probs == 0].sum() == 0
    expected = probs[probs > 0] * len(tokens)
    chi_square = ((counts[probs > 0] - expected) ** 2 / expected).sum()
    degrees = len(expected) - 1
    assert chi_square < degrees + 3.1 * np.sqrt(2 * degrees) + 6.5  # the 99.9 % point, from above


def test_xtc_is_independent_of_the_draw_that_follows():
    """Otherwise the tokens drawn would not follow the mixture of the two distributions."""
    probs = np.asarray([0.4, 0.3, 0.2, 0.1])
    mixture = 0.5 * probs + 0.5 * np.asarray([0, 0, 2 / 3, 1 / 3])
    logits = jnp.log(jnp.tile(jnp.asarray(probs), (20_000, 1)))
    keys = jax.random.split(jax.random.key(8), 20_000)
    tokens, _ = sample(Sampler((XTC(0.5, 0.15),)), logits, keys)
    assert_frequencies(tokens, mixture)


def test_a_row_depends_on_its_own_key_only():
    chain = sampler(temperature=1.1, top_p=0.95, xtc_probability=0.5)
    tokens, logprobs = draw(chain, LOGITS, KEYS)
    assert len(set(np.asarray(tokens).tolist())) > 1
    for row in range(7):
        alone, alone_logprobs = draw(chain, LOGITS[row : row + 1], KEYS[row : row + 1])
        assert int(alone[0]) == int(tokens[row])
        np.testing.assert_allclose(alone_logprobs[0], logprobs[row], rtol=1e-6)
        for place in range(7):
            order = np.roll(np.arange(7), place)
            moved, _ = draw(chain, LOGITS[order], KEYS[order])
            assert int(moved[list(order).index(row)]) == int(tokens[row])


def test_sample_returns_the_distribution_it_draws_from():
    chain = sampler(**EVERYTHING)
    context = init_context(chain, V, PROMPTS)
    tokens, logprobs = draw(chain, LOGITS, KEYS, context)
    np.testing.assert_allclose(logprobs, chain.distribution(LOGITS, context, KEYS), rtol=1e-5)
    assert np.isfinite(np.asarray(logprobs)[np.arange(7), np.asarray(tokens)]).all()
    np.testing.assert_allclose(np.exp(logprobs).sum(-1), 1, rtol=1e-5)
    assert (np.asarray(logprobs)[:, [0, 7, 9]] == -np.inf).all()


def test_greedy_is_argmax():
    tokens, logprobs = sample(GREEDY, LOGITS, KEYS)
    np.testing.assert_array_equal(tokens, np.argmax(LOGITS, -1))
    np.testing.assert_array_equal(np.exp(logprobs), np.eye(V)[np.asarray(tokens)])
    assert sampler(temperature=0) is GREEDY
    assert sampler(temperature=0, top_p=0.5, top_k=3) is GREEDY
    text = jax.jit(lambda x: sample(GREEDY, x, None)[0]).lower(LOGITS).as_text()
    assert "stablehlo.reduce" in text
    for costly in ("stablehlo.exponential", "stablehlo.sort", "stablehlo.while"):
        assert costly not in text


def test_rows_with_nothing_left_give_minus_one_and_no_nan():
    chain = sampler(**EVERYTHING)
    logits = LOGITS.at[2].set(-jnp.inf)
    tokens, logprobs = draw(chain, logits, KEYS, init_context(chain, V, PROMPTS))
    assert int(tokens[2]) == -1
    assert (np.delete(tokens, 2) >= 0).all()
    assert (np.asarray(logprobs)[2] == -np.inf).all()
    assert not np.isnan(logprobs).any()
    assert sample(Sampler((Mask(jnp.zeros(V, bool)), Greedy())), LOGITS, None)[0].tolist() == [-1] * 7
    assert sample(sampler(), jnp.full((1, V), jnp.nan), KEYS[:1])[0].tolist() == [-1]
    dead = jnp.full((1, V), -jnp.inf)
    assert sample(GREEDY, dead, None)[0].tolist() == [-1]
    steps = (DynamicTemperature(1.0, 0.5, 1.0), Typical(0.5), TopNSigma(1.0), MinP(0.0), Temperature(0.0))
    for step in steps:
        assert (np.asarray(Sampler((step,)).distribution(dead)) == -np.inf).all()


def test_one_trace_for_different_values():
    outputs, traces = set(), set()
    for scale in (0.5, 0.7, 0.9):
        numbers = {n: v * scale for n, v in EVERYTHING.items() if isinstance(v, float)}
        chain = sampler(**EVERYTHING | numbers | {"top_k": int(20 * scale)})
        _, logprobs = draw(chain, LOGITS, KEYS, init_context(chain, V, PROMPTS))
        outputs.add(np.asarray(logprobs).tobytes())
        traces.add(len(TRACES))
    assert len(traces) == 1
    assert len(outputs) == 3


def test_under_jit_vmap_and_scan():
    chain = sampler(**EVERYTHING)
    start = init_context(chain, V, PROMPTS)

    def step(context, keys):
        tokens, _ = draw(chain, LOGITS, keys, context)
        return observe(context, tokens, jnp.ones(7, bool)), tokens

    many = jax.random.split(jax.random.key(0), (4, 7))
    scanned = jax.jit(lambda c: jax.lax.scan(step, c, many))(start)[1]
    context = start
    for keys, expected in zip(many, scanned, strict=True):
        context, tokens = step(context, keys)
        np.testing.assert_array_equal(tokens, expected)
    short = sampler(temperature=0.8, top_k=9, top_p=0.9)
    both = jax.vmap(lambda x, k: draw(short, x, k)[0])(jnp.stack([LOGITS] * 4), many)
    apart = jnp.stack([draw(short, LOGITS, keys)[0] for keys in many])
    np.testing.assert_array_equal(both, apart)


def test_top_logprobs():
    ids, values = top_logprobs(jnp.asarray([[-3.0, -1.0, -jnp.inf]]), 2)
    assert ids.tolist() == [[1, 0]]
    assert values.tolist() == [[-1.0, -3.0]]
    with pytest.raises(SamplerError, match="0 to 3"):
        top_logprobs(jnp.zeros((1, 3)), 4)


# --- context ------------------------------------------------------------------------------------


def test_context_holds_only_what_is_read_and_follows_the_tokens():
    assert init_context(sampler(top_p=0.5), V, PROMPTS) is None
    assert not sampler(top_p=0.5).needs_context
    assert observe(None, jnp.zeros(2, jnp.int32), jnp.ones(2, bool)) is None
    only_counts = init_context(sampler(presence_penalty=0.5), V, [[1], [2]])
    assert only_counts.prompt is None
    assert only_counts.recent is None
    chain = sampler(repetition_penalty=1.1, dry_multiplier=1.0, dry_window=3)
    assert chain.needs_context
    context = init_context(chain, V, [[1, 2, 3, 4], [5]])
    assert context.recent.tolist() == [[2, 3, 4], [-1, -1, 5]]
    assert np.flatnonzero(context.prompt[0]).tolist() == [1, 2, 3, 4]
    for tokens, live in ([[9, 8], [1, 1]], [[9, 7], [1, 0]], [[-1, 8], [1, 1]]):
        context = observe(context, jnp.asarray(tokens), jnp.asarray(live, bool))
    assert context.recent.tolist() == [[4, 9, 9], [5, 8, 8]]
    counts = np.zeros((2, V), int)
    counts[0, 9] = counts[1, 8] = 2
    np.testing.assert_array_equal(context.counts, counts)


def test_penalties_look_at_the_right_tokens():
    context = init_context(sampler(repetition_penalty=2.0), 5, [[0, 0]])
    context = observe(observe(context, jnp.asarray([1]), jnp.ones(1, bool)), jnp.asarray([1]), jnp.ones(1, bool))
    logits = jnp.asarray([[1.0, -1.0, 1.0, 0.0, 4.0]])
    np.testing.assert_allclose(RepetitionPenalty(2.0)(logits, context), [[0.5, -2, 1, 0, 4]])
    np.testing.assert_allclose(PresencePenalty(0.5)(logits, context), [[1, -1.5, 1, 0, 4]])
    np.testing.assert_allclose(FrequencyPenalty(0.5)(logits, context), [[1, -2, 1, 0, 4]])


# --- merging ------------------------------------------------------------------------------------


def different_samplers() -> list[Sampler]:
    return [
        sampler(**EVERYTHING),
        GREEDY,
        sampler(),
        sampler(temperature=0.5, top_k=3, logit_bias={1: 5.0}),
        sampler(min_p=0.1, dry_multiplier=0.5, dry_window=4, banned=[2, 3, 4, 5]),
        sampler(temperature=0, repetition_penalty=1.5),
        sampler(typical_p=0.5, dynatemp_delta=0.5, presence_penalty=1.0, logit_bias=np.linspace(0, 1, V)),
    ]


def test_merge_equals_separate():
    samplers = different_samplers()
    merged = merge(samplers)
    assert merge(samplers[:1] * 7).needs_context
    context = init_context(merged, V, PROMPTS)
    for _ in range(3):
        tokens, logprobs = draw(merged, LOGITS, KEYS, context)
        for row, chain in enumerate(samplers):
            one = jax.tree.map(lambda x, row=row: x[row : row + 1], context)
            alone, apart = sample(chain, LOGITS[row : row + 1], KEYS[row : row + 1], one)
            np.testing.assert_allclose(logprobs[row], apart[0], rtol=1e-5, atol=1e-6)
            assert int(alone[0]) == int(tokens[row])
        context = observe(context, tokens, jnp.ones(7, bool))


def test_merge_structure_does_not_depend_on_values():
    def structure(*temperatures):
        return jax.tree.structure(merge([sampler(temperature=t, top_p=0.5) for t in temperatures]))

    assert structure(0.5, 0.7) == structure(0.9, 2.0)
    mixed = merge([GREEDY, sampler(temperature=0.7)])
    assert jax.tree.structure(mixed) == jax.tree.structure(merge([sampler(), sampler()]))
    assert merge([GREEDY, GREEDY]).greedy
    np.testing.assert_allclose(merge([sampler(min_p=0.1), sampler()]).steps[1].p, [0.1, 0.0])


def test_merge_of_bans_biases_and_masks():
    mask = jnp.arange(5) > 0
    rows = [
        Sampler((Mask(mask), Ban(mask))),
        Sampler((Ban(jnp.asarray([3])),)),
        Sampler((LogitBias(jnp.ones(5)),)),
        Sampler((LogitBias(jnp.ones(1), jnp.asarray([2])),)),
    ]
    merged = merge(rows)
    logits = jnp.zeros((4, 5))
    expected = np.concatenate([r.distribution(logits[:1]) for r in rows])
    np.testing.assert_allclose(merged.distribution(logits), expected, rtol=1e-6)


def test_merge_refuses_what_it_cannot_do():
    with pytest.raises(SamplerError, match="at least one"):
        merge([])
    with pytest.raises(SamplerError, match="one sampler per row"):
        merge([sampler(temperature=[1.0, 2.0]), sampler()])
    with pytest.raises(SamplerError, match="MinP and TopK"):
        merge([Sampler((TopK(1), MinP(0.5))), Sampler((MinP(0.5), TopK(1)))])
    with pytest.raises(SamplerError, match=r"\[5, 6\]"):
        merge([Sampler((LogitBias(jnp.ones(5)),)), Sampler((LogitBias(jnp.ones(6)),))])


# --- errors -------------------------------------------------------------------------------------

GOOD = {
    "temperature": lambda x: x >= 0,
    "dynatemp_delta": lambda x: x >= 0,
    "top_n_sigma": lambda x: x >= 0,
    "top_p": lambda x: 0 < x <= 1,
    "min_p": lambda x: 0 <= x <= 1,
    "typical_p": lambda x: 0 < x <= 1,
    "xtc_probability": lambda x: 0 <= x <= 1,
    "repetition_penalty": lambda x: x > 0,
    "frequency_penalty": lambda x: True,
    "presence_penalty": lambda x: True,
    "dry_multiplier": lambda x: x >= 0,
}


@given(st.sampled_from(sorted(GOOD)), st.floats(width=32, allow_subnormal=False))
@settings(max_examples=150, deadline=None)
def test_values_are_accepted_exactly_in_their_range(name, value):
    if np.isfinite(value) and GOOD[name](value):
        assert isinstance(sampler(**{name: value}), Sampler)
    else:
        with pytest.raises(SamplerError, match=f"{name} must be .*found"):
            sampler(**{name: value})


JUNK = st.one_of(
    st.text(max_size=3), st.booleans(), st.just(object()), st.just([[1.0], 2]), st.just([]), st.just({})
)


@given(st.sampled_from(sorted([*GOOD, "top_k"])), JUNK)
@settings(max_examples=60, deadline=None)
def test_junk_is_refused_in_a_sentence(name, value):
    with pytest.raises(SamplerError, match=f"{name} must be"):
        sampler(**{name: value})


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"top_k": 2.5}, "top_k must be an integer"),
        ({"top_k": -1}, "top_k must be an integer >= 0"),
        ({"temperature": 1e300}, "temperature must be a finite"),
        ({"temperature": -1, "top_p": 2}, "temperature.*top_p"),
        ({"temperature": [0.5, 0.6], "top_p": [0.5] * 3}, "equally many"),
        ({"xtc_threshold": 0.1}, "xtc_threshold change nothing without xtc_probability"),
        ({"dry_breakers": [1]}, "without dry_multiplier"),
        ({"dynatemp_exponent": 2.0}, "without dynatemp_delta"),
        ({"dry_multiplier": 1.0, "dry_window": 1}, "dry_window"),
        ({"dry_multiplier": 1.0, "dry_breakers": [[]]}, "at least one token id"),
        ({"dry_multiplier": 1.0, "dry_breakers": ["\n"]}, "token ids"),
        ({"dry_multiplier": 1.0, "dry_base": 0.5}, "dry_base must be a finite number >= 1"),
        ({"dry_multiplier": 1.0, "dry_allowed_length": 0}, "dry_allowed_length"),
        ({"logit_bias": {1: np.nan}}, "logit_bias values"),
        ({"logit_bias": {1: "x"}}, "logit_bias values"),
        ({"logit_bias": {"x": 1.0}}, "token ids"),
        ({"logit_bias": {9: 1.0}, "vocab": 9}, "run from 0 to 8"),
        ({"logit_bias": np.zeros(4), "vocab": 9}, r"\[9\]"),
        ({"banned": [9], "vocab": 9}, "run from 0 to 8"),
        ({"banned": [-1]}, "token ids run from 0"),
        ({"banned": 5}, "banned must be a list"),
        ({"logit_bias": 5}, "logit_bias must be"),
        ({"dry_multiplier": 1.0, "dry_breakers": 5}, "dry_breakers must be a list"),
        ({"banned": np.zeros(4, bool), "vocab": 9}, r"\[9\]"),
    ],
)
def test_bad_knobs(knobs, words):
    with pytest.raises(SamplerError, match=words):
        sampler(**knobs)


def test_bad_shapes_keys_and_contexts():
    chain = sampler(temperature=[1.0, 2.0])
    with pytest.raises(SamplerError, match="7 rows"):
        chain.distribution(LOGITS)
    with pytest.raises(SamplerError, match="rows, vocabulary"):
        GREEDY.distribution(LOGITS[0])
    for keys in (None, KEYS[:2], jnp.zeros((7, 2), jnp.uint32), KEYS[0]):
        with pytest.raises(SamplerError, match="one typed key per row"):
            sample(sampler(), LOGITS, keys)
    with pytest.raises(SamplerError, match="one typed key per row"):
        sampler(xtc_probability=0.5).distribution(LOGITS)
    with pytest.raises(SamplerError, match=r"context\.counts"):
        sampler(presence_penalty=1.0).distribution(LOGITS)
    with pytest.raises(SamplerError, match="allowed has shape"):
        Mask(jnp.ones(4, bool))(LOGITS)
    with pytest.raises(SamplerError, match="a prompt holds"):
        init_context(sampler(repetition_penalty=1.1), 5, [[5]])
    with pytest.raises(SamplerError, match="list of token ids"):
        init_context(sampler(repetition_penalty=1.1), 5, ["hello"])


def test_per_row_values_equal_single_values():
    rows = [0.3, 0.9, 1.0, 0.5, 0.7, 0.2, 0.8]
    together = sampler(temperature=[2 * r for r in rows], top_p=rows).distribution(LOGITS)
    for i, r in enumerate(rows):
        alone = sampler(temperature=2 * r, top_p=r).distribution(LOGITS[i : i + 1])
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-6)
