"""Generation on the bundled model and on random ones: what users rely on."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import decode, layers, sampling
from jaxllm.beam import beam_search
from jaxllm.errors import ContextError, JaxllmError, TokenizerError
from jaxllm.model import Model
from jaxllm.stopping import Text
from tests import plain

PROMPTS = ["def add(a, b):", "import os\nimport sys\n\n\nclass Reader:\n    def __init__(self", "x = 1"]
WARM = sampling.sampler(temperature=0.9, top_p=0.95)


@pytest.fixture(scope="module")
def model() -> Model:
    return jaxllm.load(dtype="float32")


@pytest.fixture(scope="module")
def batch(model):
    return decode.generate(model, PROMPTS, max_new_tokens=12, eos=(), logprobs=3)


def test_greedy_is_the_argmax_of_forward(model, batch):
    """The loop with its cache, chunks and padding says what one plain forward says."""
    for c in batch:
        logits = plain.logits(model, [*c.prompt_tokens, *c.tokens])[len(c.prompt_tokens) - 1 : -1]
        assert np.argmax(logits, -1).tolist() == list(c.tokens)
        own = np.asarray(jax.nn.log_softmax(logits, -1))
        np.testing.assert_allclose(own[np.arange(12), list(c.tokens)], c.logprobs, atol=1e-4)
        assert [a.ids[0] for a in c.top] == list(c.tokens)


def test_rows_do_not_see_each_other(model, batch):
    for prompt, c in zip(PROMPTS, batch, strict=True):
        assert decode.generate(model, prompt, max_new_tokens=12, eos=())[0].tokens == c.tokens


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:4])
def test_a_sampled_row_depends_on_its_key_and_prompt_alone(model, order):
    keys = jax.random.split(jax.random.key(7), 3)
    alone = [
        decode.generate(model, p, max_new_tokens=10, eos=(), sampler=WARM, key=k)[0].tokens
        for p, k in zip(PROMPTS, keys, strict=True)
    ]
    shuffled = decode.generate(
        model, [PROMPTS[i] for i in order], max_new_tokens=10, eos=(), sampler=WARM, key=keys[jnp.array(order)]
    )
    assert [c.tokens for c in shuffled] == [alone[i] for i in order]


def test_samples_of_one_prefill_differ_and_repeat(model):
    one = decode.generate(model, PROMPTS[:2], max_new_tokens=10, eos=(), sampler=WARM, key=jax.random.key(1), n=3)
    two = decode.generate(model, PROMPTS[:2], max_new_tokens=10, eos=(), sampler=WARM, key=jax.random.key(1), n=3)
    assert [c.tokens for c in one] == [c.tokens for c in two]
    assert len({c.tokens for c in one[:3]}) > 1
    assert [c.prompt_tokens for c in one[:3]] == [one[0].prompt_tokens] * 3


def test_a_seed_is_drawn_reported_and_repeats(model):
    first = decode.generate(model, PROMPTS[0], max_new_tokens=8, sampler=WARM)
    again = decode.generate(model, PROMPTS[0], max_new_tokens=8, sampler=WARM, key=jax.random.key(first.seed))
    assert first[0].tokens == again[0].tokens


def test_samplers_may_differ_by_row(model):
    mixed = sampling.merge([sampling.GREEDY, WARM, sampling.sampler(temperature=0.5, top_k=5)])
    key = jax.random.key(3)
    rows = decode.generate(model, PROMPTS, max_new_tokens=8, eos=(), sampler=mixed, key=key)
    assert rows[0].tokens == decode.generate(model, PROMPTS[0], max_new_tokens=8, eos=())[0].tokens
    alone = decode.generate(model, PROMPTS[1], max_new_tokens=8, eos=(), sampler=WARM, key=key)
    assert rows[1].tokens == alone[0].tokens


def test_stream_gives_what_generate_gives(model, batch):
    tokens = list(decode.stream(model, PROMPTS[0], max_new_tokens=12, eos=(), logprobs=3))
    assert tuple(t.id for t in tokens) == batch[0].tokens
    assert "".join(t.text for t in tokens) == batch[0].text == model.tokenizer.decode(batch[0].tokens)
    assert [t.finish_reason for t in tokens] == [None] * 11 + ["length"]


def test_an_interrupted_stream_leaves_the_model_usable(model, batch):
    stream = decode.stream(model, PROMPTS[0], max_new_tokens=12, eos=())
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt())
    assert decode.generate(model, PROMPTS[0], max_new_tokens=12, eos=())[0].tokens == batch[0].tokens


@pytest.mark.parametrize("chunk", [1, 3, 128])
def test_any_prefill_chunk_gives_the_same(model, batch, chunk):
    again = decode.generate(model, PROMPTS, max_new_tokens=12, eos=(), prefill_chunk_size=chunk)
    assert [c.tokens for c in again] == [c.tokens for c in batch]


def test_several_steps_in_one_program_give_the_same(model, batch):
    again = decode.generate(model, PROMPTS, max_new_tokens=12, eos=(), steps=5)
    assert [c.tokens for c in again] == [c.tokens for c in batch]


def test_end_tokens_and_stop_tokens_end_a_row(model, batch):
    third = batch[0].tokens[2]
    first = batch[0].tokens.index(third)
    got = decode.generate(model, PROMPTS[0], max_new_tokens=12, eos=[third])[0]
    assert (got.finish_reason, got.tokens) == ("eos", batch[0].tokens[: first + 1])
    assert got.text == model.tokenizer.decode(batch[0].tokens[:first])
    assert decode.generate(model, PROMPTS[0], max_new_tokens=12, eos=(), stop=int(third))[0].tokens == got.tokens


def test_a_stop_string_across_tokens(model, batch):
    text = batch[1].text
    stop = text[len(text) // 2 : len(text) // 2 + 6]
    got = decode.generate(model, PROMPTS[1], max_new_tokens=12, eos=(), stop=[stop, "\0never"])[0]
    assert (got.text, got.finish_reason) == (text[: text.index(stop)], "stop")
    pieces = list(decode.stream(model, PROMPTS[1], max_new_tokens=12, eos=(), stop=stop))
    assert "".join(t.text for t in pieces) == got.text


class Letters:
    """A tokenizer of one letter a token, for the text machinery."""

    def detokenizer(self):
        return self

    def push(self, id):
        return chr(id)

    def flush(self):
        return ""


@pytest.mark.parametrize(
    ("text", "stops", "want"),
    [
        ("abcabd!", ["abd"], "abc"),
        ("aaab", ["aab"], "a"),
        ("xyz", ["zz"], "xyz"),
        ("one two", ["two", "e t"], "on"),
        ("stop at the very end EN", ["END"], "stop at the very end EN"),
    ],
)
def test_stop_strings_hold_back_only_what_may_be_one(text, stops, want):
    row, out = Text(Letters(), stops, frozenset()), ""
    for i, letter in enumerate(text):
        piece, reason = row.push(ord(letter))
        out += piece
        assert want.startswith(out)
        if reason:
            break
        assert len(out) >= i + 1 - max(map(len, stops)) + 1
    assert out + ("" if reason else row.flush()) == want


def test_a_mask_is_obeyed(model):
    digits = [i for i in range(model.config.vocab) if model.tokenizer.token(i).strip("Ġ ").isdigit()]
    allowed = np.zeros(model.config.vocab, bool)
    allowed[digits] = True
    seen = []
    mask = lambda rows: seen.append([list(r) for r in rows]) or np.stack([allowed] * len(rows))
    got = decode.generate(model, PROMPTS, max_new_tokens=6, eos=(), mask=mask)
    assert all(set(c.tokens) <= set(digits) for c in got)
    assert seen[3] == [list(c.tokens[:3]) for c in got]
    with pytest.raises(JaxllmError, match="no token can follow"):
        decode.generate(model, "x", max_new_tokens=2, mask=lambda rows: np.zeros((1, model.config.vocab), bool))


def test_a_prefix_is_reused_and_stays_valid(model, batch):
    first = decode.generate(model, PROMPTS[1], max_new_tokens=8, eos=())
    ids = [*first[0].prompt_tokens, *first[0].tokens]
    calls = []
    inner = decode.read
    longer = [*ids, 5, 6, 7]
    want = decode.generate(model, longer, max_new_tokens=6, eos=())[0].tokens
    for _ in range(2):
        got = decode.generate(model, longer, max_new_tokens=6, eos=(), prefix=first.prefix)
        assert got[0].tokens == want
    other = [*ids[:9], 11, 12]
    want = decode.generate(model, other, max_new_tokens=6, eos=())[0].tokens
    monkey = pytest.MonkeyPatch()
    with monkey.context() as m:
        m.setattr(decode, "read", lambda model, rows, *to: calls.append(rows) or inner(model, rows, *to))
        assert decode.generate(model, other, max_new_tokens=6, eos=(), prefix=first.prefix)[0].tokens == want
    assert calls == [[[11, 12]]]


def test_the_context_is_never_passed_in_silence(model):
    with pytest.raises(ContextError, match="choose overflow="):
        decode.generate(model, "x", max_new_tokens=model.config.max_len)
    with pytest.raises(ContextError, match="the context is 20"):
        decode.generate(model, "x", max_new_tokens=30, max_len=20)
    for policy in ("evict-oldest", "clear"):
        got = decode.generate(model, "x = 1", max_new_tokens=300, eos=(), max_len=64, overflow=policy)
        assert len(got[0].tokens) == 300
    with pytest.raises(ContextError, match="overflow is"):
        decode.generate(model, "x", max_new_tokens=2, overflow="wrap")


def test_a_prefix_that_evicts_is_not_used_where_nothing_may_be_lost(model):
    first = decode.generate(model, "x = 1", max_new_tokens=90, eos=(), max_len=64, overflow="evict-oldest")
    ids = [*first[0].prompt_tokens, *first[0].tokens]
    want = decode.generate(model, ids, max_new_tokens=6, eos=())[0]
    got = decode.generate(model, ids, max_new_tokens=6, eos=(), prefix=first.prefix)[0]
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)


def test_eviction_is_exact_while_everything_fits(model, batch):
    got = decode.generate(model, PROMPTS, max_new_tokens=12, eos=(), overflow="evict-oldest", sinks=2)
    assert [c.tokens for c in got] == [c.tokens for c in batch]


def test_score_is_the_log_softmax_of_forward(model):
    scored = decode.score(model, [PROMPTS[1] * 12, PROMPTS[0]], logprobs=2)
    for s in scored:
        own = np.asarray(jax.nn.log_softmax(plain.logits(model, s.tokens)[:-1], -1))
        np.testing.assert_allclose(own[np.arange(len(s.tokens) - 1), list(s.tokens[1:])], s.logprobs, atol=2e-4)
        assert [a.ids[0] for a in s.top] == np.argmax(own, -1).tolist()
    bits = -sum(scored[1].logprobs) / np.log(2) / len(PROMPTS[0])
    assert scored[1].bits_per_byte == pytest.approx(bits)
    prompt = decode.generate(model, PROMPTS[0], max_new_tokens=1, prompt_logprobs=True)[0].prompt
    np.testing.assert_allclose(prompt.logprobs, scored[1].logprobs, atol=1e-5)


def test_long_texts_are_scored_in_windows(model):
    ids = np.random.default_rng(0).integers(1, 4000, model.config.max_len + 300).tolist()
    with pytest.raises(ContextError, match="stride"):
        decode.score(model, ids)
    scored = decode.score(model, ids, stride=512)[0]
    assert len(scored.logprobs) == len(ids) - 1
    head = decode.score(model, ids[: model.config.max_len])[0]
    np.testing.assert_allclose(scored.logprobs[: len(head.logprobs)], head.logprobs, atol=1e-4)
    tail = decode.score(model, ids[512:])[0]
    np.testing.assert_allclose(scored.logprobs[-300:], tail.logprobs[-300:], atol=1e-4)


def test_beam_search_equals_the_published_result(shared):
    folder = shared / "ort_tiny_gpt2"
    golden = np.load(folder / "golden.npz")
    model = jaxllm.load(folder / "hf")
    found = beam_search(model, golden["beam_prompt"].tolist(), beams=4, max_new_tokens=8)
    got = [[*c.prompt_tokens, *c.tokens] for c in found]
    assert got == golden["hf_beam"].tolist() == golden["beam_published"].tolist()


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("early_stopping", [True, False])
def test_beam_search_equals_transformers(length_penalty, early_stopping):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = jaxllm.bundled()
    model = jaxllm.load(folder, dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    ids = model.tokenizer.encode("def read(self, n=-1):\n    if self.closed:\n        return")
    end = model.tokenizer.encode("\n", add_special=False)[0]  # ends hypotheses at different lengths
    kwargs = dict(num_beams=3, num_return_sequences=2, do_sample=False, eos_token_id=end, pad_token_id=0)
    want = theirs.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=8,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        **kwargs,
    )
    got = beam_search(
        model,
        ids,
        beams=3,
        n=2,
        max_new_tokens=8,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        eos=[end],
    )
    rows = [row[len(ids) :].tolist() for row in want]
    for c, row in zip(got, rows, strict=True):
        assert list(c.tokens) == row[: len(c.tokens)]
        assert set(row[len(c.tokens) :]) <= {0, end}  # padding


def test_text_needs_a_tokenizer(model):
    bare = Model(model.config, model.params, None, name="bare")
    assert decode.generate(bare, [1, 2, 3], max_new_tokens=2)[0].text is None
    with pytest.raises(TokenizerError, match="bare has no tokenizer"):
        decode.generate(bare, "text", max_new_tokens=2)
    with pytest.raises(TokenizerError, match="stop strings"):
        decode.generate(bare, [1], max_new_tokens=2, stop="x")


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "at least one token"),
        ([1, 99999], {}, "token ids go from 0"),
        ([[1], []], {}, "at least one token"),
        ([1.5, 2.0], {}, "a prompt is text"),
        ("x", {"max_new_tokens": 0}, "max_new_tokens"),
        ("x", {"n": 0}, "whole numbers"),
        ("x", {"logprobs": -1}, "logprobs goes from"),
        ("x", {"stop": [""]}, "none empty"),
        ("x", {"sampler": WARM, "key": jnp.zeros(2, jnp.uint32)}, "typed key"),
        (["x", "y"], {"sampler": WARM, "key": jax.random.split(jax.random.key(0), 3)}, "2 prompts"),
    ],
)
def test_bad_calls_are_refused_in_sentences(model, prompt, options, message):
    with pytest.raises(JaxllmError, match=message):
        decode.generate(model, prompt, **({"max_new_tokens": 2} | options))


def test_results_show_themselves(model, batch):
    page = batch._repr_html_()
    assert page.count("<pre") == 3
    assert "title=" in page
    hostile = decode.score(model, "<script>alert(1)</script>")[0]._repr_html_()
    assert "<script>" not in hostile
    assert "&lt;" in hostile


def test_overflow_inside_a_program_is_nan(model):
    state = jaxllm.init_state(model.config, 1, 4)
    _, state = jaxllm.forward(model.config, model.params, np.array([[1, 2, 3, 4]]), state)
    logits, _ = jax.jit(layers.forward, static_argnums=0)(model.config, model.params, np.array([[5]]), state)
    assert np.isnan(logits).all()
