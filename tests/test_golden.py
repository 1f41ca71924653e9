"""Published models and the numbers their authors published for them."""

import itertools
import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxllm
from jaxllm import Taps, decode

F32_SUM = 1e-5  # f32 against f32 in another order of summation


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    monkeypatch.setenv("JAXLLM_CACHE", "off")


def forward(model, tokens, state=None):
    """Logits of every position, and the state after them."""
    return jax.jit(jaxllm.forward, static_argnums=0)(model.config, model.params, np.asarray(tokens), state)


# ---- stories260K: a Llama trained on TinyStories ----------------------------------------------------------


@pytest.fixture(scope="module")
def stories(shared):
    return jaxllm.load(shared / "stories260K" / "hf")


def test_stories_greedy_text_is_the_authors(stories, shared):
    """llama2.c's own test: 200 greedy steps from BOS."""
    sentencepiece = pytest.importorskip("sentencepiece")
    tokenizer = sentencepiece.SentencePieceProcessor(str(shared / "stories260K" / "tok512.model"))
    out = decode.generate(stories, [1], max_new_tokens=200, eos=())
    want = (shared / "stories260K" / "expected_greedy_200.txt").read_text().rstrip("\n")
    assert tokenizer.decode(list(out[0].tokens)) == want


@pytest.mark.parametrize("name", ["bos", "dog", "lily", "once"])
def test_stories_logits(stories, shared, name):
    """Prompt, every one of 64 greedy steps, and the C program's own numbers over the whole sequence."""
    golden = np.load(shared / "stories260K" / f"golden_{name}.npz")
    prompt, new = golden["prompt_ids"], golden["greedy_ids"]
    logits, _ = forward(stories, np.concatenate([prompt, new])[None])
    logits, n = np.asarray(logits[0]), len(prompt)
    np.testing.assert_allclose(logits[:n], golden["prompt_logits"], atol=1e-4)
    np.testing.assert_allclose(logits[n - 1 : -1], golden["step_logits"], atol=1e-4)
    np.testing.assert_allclose(logits[n - 1], golden["last_logits"], atol=1e-4)
    np.testing.assert_allclose(logits[: len(golden["c_logits"])], golden["c_logits"], atol=1e-4)
    np.testing.assert_array_equal(logits[n - 1 : -1].argmax(-1), new)


@pytest.mark.parametrize("name", ["bos", "dog", "lily", "once"])
def test_stories_greedy_tokens(stories, shared, name):
    golden = np.load(shared / "stories260K" / f"golden_{name}.npz")
    out = decode.generate(stories, golden["prompt_ids"].tolist(), max_new_tokens=64, eos=())
    assert list(out[0].tokens) == golden["greedy_ids"].tolist()
    assert out[0].prompt_tokens == tuple(golden["prompt_ids"].tolist())


def test_stories_perplexity(stories, shared):
    windows = np.load(shared / "stories260K" / "ppl_windows.npz")["windows"]
    want = json.loads((shared / "stories260K" / "golden_ppl.json").read_text())
    scored = decode.score(stories, windows.tolist())
    assert [len(s.logprobs) for s in scored] == [255] * 20
    nll = np.mean([s.nll for s in scored])
    assert nll == pytest.approx(want["nll"]["fp32"], abs=1e-5)
    assert math.exp(nll) == pytest.approx(7.4517, abs=1e-3)


# ---- gpt-nano: a minGPT that sorts ------------------------------------------------------------------------

NANO = dict(
    model_type="gpt2",
    n_layer=3,
    n_head=3,
    n_embd=48,
    vocab_size=3,
    n_positions=11,
    activation_function="gelu_new",
    tie_word_embeddings=False,
)
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # [out, in] at minGPT, [in, out] in the hub's form


@pytest.fixture(scope="module")
def nano(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt-nano")
    weights = np.load(shared / "gpt_nano_sort" / "weights.npz")
    turned = {k: np.ascontiguousarray(v.T if k.endswith(CONV1D) else v) for k, v in weights.items()}
    save_file(turned, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(NANO))
    return jaxllm.load(folder)


@pytest.fixture(scope="module")
def partials(shared):
    """The author's published activations: of the first layer, except block0 to block2, ln_f and lm_head."""
    golden = np.load(shared / "gpt_nano_sort" / "golden.npz")
    return {k.removeprefix("partials_"): golden[k] for k in golden.files}


def test_nano_sorts_all_inputs(nano):
    prompts = [list(p) for p in itertools.product(range(3), repeat=6)]
    out = decode.generate(nano, prompts, max_new_tokens=6, eos=())
    wrong = [c.prompt_tokens for c in out if list(c.tokens) != sorted(c.prompt_tokens)]
    assert len(out) == 729
    assert wrong == []


def test_nano_activations(nano, partials):
    tokens = partials["idx"].astype(np.int32)
    taps = Taps(keep=("embed", "norm", "layers.**"))
    logits, kept, _ = jaxllm.capture(nano.config, nano.params, tokens, taps)
    heads = {n: partials[n].transpose(0, 2, 1, 3) for n in "qkv"}  # [B, H, T, h] there
    first = dict(partials, **heads)
    points = {
        "in": "x",
        "mixer.in": "ln1",
        "mixer.q": "q",
        "mixer.k": "k",
        "mixer.v": "v",
        "mixer.scores": "attSm",
        "mixer.out": "yProj",
        "mid": "attnResid",
        "ffn.in": "ln2",
        "ffn.hidden": "gelu",
        "ffn.out": "mlp",
        "out": "mlpResid",
    }
    pairs = [(f"layers.0.{ours}", first[theirs]) for ours, theirs in points.items()]
    pairs += [(f"layers.{i}.out", partials[f"block{i}"]) for i in range(3)]
    pairs += [("embed", partials["tok_emb"] + partials["pos_emb"]), ("norm", partials["ln_f"])]
    for name, want in pairs:
        np.testing.assert_allclose(kept[name], want, atol=F32_SUM, err_msg=name)
    together = np.asarray(kept["layers.0.mixer.heads"]).reshape(partials["y"].shape)
    np.testing.assert_allclose(together, partials["y"], atol=F32_SUM)
    np.testing.assert_allclose(logits, partials["lm_head"], atol=F32_SUM)


def test_nano_steps(nano, partials):
    """Token by token through the cache: the logits of each of the six sorted digits."""
    prompt, new = partials["prompt_ids"], partials["greedy_ids"]
    logits, state = forward(nano, prompt[None], jaxllm.init_state(nano.config, 1, 11))
    steps = [logits[0, -1]]
    for token in new[:-1]:
        logits, state = forward(nano, [[token]], state)
        steps.append(logits[0, 0])
    np.testing.assert_allclose(steps, partials["step_logits"], atol=F32_SUM)
    assert np.argmax(steps, -1).tolist() == new.tolist()


# ---- a random GPT-2 with published logits -----------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_gpt2(shared):
    return jaxllm.load(shared / "ort_tiny_gpt2" / "hf")


@pytest.fixture(scope="module")
def published(shared):
    return np.load(shared / "ort_tiny_gpt2" / "golden.npz")


def test_tiny_gpt2_logits(tiny_gpt2, published):
    logits, _ = forward(tiny_gpt2, published["prompt_ids"])
    np.testing.assert_allclose(logits, published["prompt_logits"], atol=1e-6)
    np.testing.assert_allclose(logits[..., ::200], published["published_sampled_logits"], atol=1e-6)
    np.testing.assert_allclose(logits[:, -1], published["last_logits"], atol=1e-6)


def test_tiny_gpt2_greedy(tiny_gpt2, published):
    """64 new tokens of each row, of which 6 are published."""
    prompt, new = published["prompt_ids"], published["greedy_ids"]
    out = decode.generate(tiny_gpt2, prompt.tolist(), max_new_tokens=64, eos=())
    np.testing.assert_array_equal([c.tokens for c in out], new)
    np.testing.assert_array_equal(published["published_greedy"][:, 4:], new[:, :6])
