"""Figures of a comparison against numpy in f64 from the full logits; the command; what is refused."""

import json
import math
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm import cli
from jaxllm.comparison import _cut, compare, estimate, from_transformers, picture
from jaxllm.errors import ContextError, JaxllmError, MissingExtraError
from jaxllm.model import Model
from jaxllm.quant import QTensor
from jaxllm.quant.recipe import quantize_model
from jaxllm.taps import Taps
from tests import random_model

pytestmark = pytest.mark.slow

CONFIG = random_model.CONFIGS["full"]
TOKENS = random_model.tokens(70, seed=5).tolist()


def model(name="full", seed=0, **changes):
    config = replace(random_model.CONFIGS[name], **changes)
    return Model(config, random_model.params(config, seed), name=f"{name}{seed}")


def four_bits(whole):
    """The model with its matrices in 4 bits."""
    return replace(quantize_model(whole, "int4_g32"), name="four bits")


def windows_of(tokens, context):
    return [tokens[i : i + context] for i in range(0, len(tokens) - 1, context - 1)]


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def full_logits(m, window):
    return np.asarray(jaxllm.forward(m.config, m.params, np.array([window], np.int32))[0][0, :-1], np.float64)


def direct(a, b, windows):
    """nll of both, KL and whether the top agrees, each a list of one array [n - 1] a window; the largest gap."""
    nll_a, nll_b, kl, same, gap = [], [], [], [], 0.0
    for window in windows:
        la, lb = full_logits(a, window), full_logits(b, window)
        pa, pb, at = log_softmax(la), log_softmax(lb), np.arange(len(window) - 1)
        nll_a.append(-pa[at, window[1:]])
        nll_b.append(-pb[at, window[1:]])
        kl.append((np.exp(pa) * (pa - pb)).sum(-1))
        same.append(la.argmax(-1) == lb.argmax(-1))
        gap = max(gap, np.abs(la - lb).max())
    return nll_a, nll_b, kl, same, gap


@pytest.mark.parametrize("name", ["full", "window", "mla", "moe", "parallel", "learned", "recurrent"])
def test_figures_are_those_of_the_full_logits(name, monkeypatch):
    monkeypatch.setattr("jaxllm.comparison.LOGITS", 48 * 7)  # seven rows of logits at a time
    a = model(name)
    b = four_bits(a)
    got = compare(a, b, TOKENS, context=24)
    nll_a, nll_b, kl, same, gap = direct(a, b, windows_of(TOKENS, 24))
    assert (got.windows, got.tokens, got.context) == (3, 69, 24)
    assert got.a.nll.mean == pytest.approx(np.concatenate(nll_a).mean(), rel=1e-6)
    assert got.b.nll.mean == pytest.approx(np.concatenate(nll_b).mean(), rel=1e-6)
    assert got.b.perplexity == pytest.approx(math.exp(np.concatenate(nll_b).mean()), rel=1e-5)
    np.testing.assert_allclose(got.kl, np.concatenate(kl), rtol=1e-4, atol=1e-7)
    assert got.kl_mean == pytest.approx(np.concatenate(kl).mean(), rel=1e-5)
    assert got.kl_quantile(0.999) == pytest.approx(np.quantile(np.concatenate(kl), 0.999), rel=1e-4)
    assert got.agreement == np.concatenate(same).mean()
    assert got.agreement < 1
    assert got.largest_logit_difference == pytest.approx(gap, rel=1e-5)
    assert got.difference.mean == pytest.approx(got.b.nll.mean - got.a.nll.mean, rel=1e-9)
    own = np.concatenate(nll_b)
    assert got.b.nll.token_error == pytest.approx(own.std(ddof=1) / math.sqrt(69), rel=1e-5)
    sums = np.array([(w - own.mean()).sum() for w in nll_b])
    assert got.b.nll.window_error == pytest.approx(math.sqrt(3 / 2 * (sums**2).sum()) / 69, rel=1e-4)


@pytest.mark.parametrize("name", ["full", "parallel"])
def test_layer_errors_are_those_of_the_taps(name):
    a, tokens = model(name), np.array([TOKENS[:30]])
    b = four_bits(a)
    got = compare(a, b, TOKENS[:30]).layers
    keep = Taps(keep=("layers.*.in", "layers.*.out"))
    kept_a, kept_b = (jaxllm.capture(m.config, m.params, tokens, keep)[1] for m in (a, b))

    def relative(x, y):
        return float((np.linalg.norm(x - y, axis=-1) / np.linalg.norm(x, axis=-1)).mean())

    for i, layer in enumerate(got):
        entered, left = (np.asarray(kept_a[f"layers.{i}.{end}"]) for end in ("in", "out"))
        assert layer.drift == pytest.approx(relative(left, np.asarray(kept_b[f"layers.{i}.out"])), rel=1e-4)
        alone = Taps(keep=(f"layers.{i}.out",), edit={f"layers.{i}.in": lambda x, y=entered: y})
        alone = np.asarray(jaxllm.capture(b.config, b.params, tokens, alone)[1][f"layers.{i}.out"])
        assert layer.own == pytest.approx(relative(left - entered, alone - entered), rel=1e-3)
    assert len(got) == 2
    assert got[0].own > 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_differs_from_itself_by_exactly_nothing(dtype):
    a = model(dtype=dtype)
    for m in (a, four_bits(a)):
        got = compare(m, m, TOKENS, context=16)
        assert (got.kl == 0).all()
        assert (got.agreement, got.largest_logit_difference) == (1.0, 0.0)
        assert (got.difference.mean, got.difference.token_error, got.difference.window_error) == (0, 0, 0)
        assert all((layer.drift, layer.own) == (0, 0) for layer in got.layers)


def test_one_wrong_matrix_shows_in_its_layer_alone():
    a = model()
    layers = list(a.params["layers"])
    layers[1] = layers[1] | {"ffn": layers[1]["ffn"] | {"up": {"w": layers[1]["ffn"]["up"]["w"] * 1.1}}}
    got = compare(a, replace(a, params=a.params | {"layers": layers}), TOKENS)
    assert (got.layers[0].drift, got.layers[0].own) == (0, 0)
    assert got.layers[1].own > 0.01
    assert got.kl_mean > 0


def test_tiny_divergences_are_exact():
    """Weights that differ by 1e-5: the sum of p log(p / q) would drown in the rounding of f32."""
    a = model()
    b = replace(a, params=a.params | {"head": {"w": a.params["head"]["w"] * 1.00001}})
    got = compare(a, b, TOKENS)
    kl = np.concatenate(direct(a, b, [TOKENS])[2])
    assert kl.mean() < 1e-9
    np.testing.assert_allclose(got.kl, kl, rtol=0.05, atol=1e-13)


def test_sizes_count_scales_and_what_stays_whole():
    a = model()
    b = four_bits(a)
    got = compare(a, b, TOKENS)
    assert got.a.bits_per_weight == 32
    leaves = jax.tree.leaves(b.params, is_leaf=lambda x: isinstance(x, QTensor))
    assert got.b.nbytes == sum(x.nbytes for x in leaves)
    assert got.b.bits_per_weight == pytest.approx(8 * got.b.nbytes / a.size)
    assert 4.5 < got.b.bits_per_weight < 6


def test_estimates():
    rng = np.random.default_rng(0)
    independent = estimate([rng.normal(size=50) for _ in range(200)])
    assert independent.window_error == pytest.approx(independent.token_error, rel=0.2)
    shifted = estimate([rng.normal(size=50) + rng.normal() for _ in range(200)])
    assert shifted.window_error > 3 * shifted.token_error  # tokens of a window go together
    assert math.isnan(estimate([np.ones(9)]).window_error)


def test_every_token_is_predicted_once():
    text = [([0, *range(1, 12)], True)]
    plain = [([*range(12)], False), ([7], False)]
    assert [w.tolist() for w in _cut(text, 5, 0)] == [[0, 1, 2, 3, 4], [0, 5, 6, 7, 8], [0, 9, 10, 11]]
    assert [w.tolist() for w in _cut(plain, 5, 0)] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10, 11]]
    assert _cut([([0], True)], 5, 0) == []
    got = compare(model(), model(seed=1), [TOKENS[:20], TOKENS[20:50]], context=8, windows=4)
    assert (got.windows, got.context) == (4, 8)


def test_other_shapes_have_figures_but_no_layers():
    got = compare(model(), model("learned", seed=3), TOKENS)
    assert got.layers == ()
    assert got.kl_mean > 0.1
    a, b = model(), model(seed=1)
    plain = compare(a, b, TOKENS, by_layer=False)
    assert plain.layers == ()
    assert plain.kl_mean == compare(a, b, TOKENS).kl_mean


def test_against_transformers_itself():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    text = "def load(path):\n    with open(path) as file:\n        return json.load(file)\n"
    ours = jaxllm.load(dtype="float32")
    got = compare(from_transformers(jaxllm.bundled()), ours, text)
    assert got.kl_quantile(1) < 1e-8
    assert (got.agreement, got.layers) == (1.0, ())
    assert got.largest_logit_difference < 1e-3
    assert got.a.nll.mean == pytest.approx(got.b.nll.mean, abs=1e-5)
    assert got.a.parameters == got.b.parameters


def test_windows_of_the_reference(shared):
    """The mean of 20 windows of the published figure, whatever the cut."""
    published = json.loads((shared / "stories260K/golden_ppl.json").read_text())["nll"]["fp32"]
    windows = np.load(shared / "stories260K/ppl_windows.npz")["windows"].tolist()
    stories = jaxllm.load(shared / "stories260K/hf")
    got = compare(stories, stories, windows, context=256)
    assert (got.windows, got.tokens) == (20, 20 * 255)
    assert got.a.nll.mean == pytest.approx(published, abs=2e-6)


# ---- refusals -------------------------------------------------------------------------------------------


def test_refusals_are_sentences():
    a = model()
    with pytest.raises(JaxllmError, match="predicts 48 tokens and full0 50"):
        compare(a, model(vocab=50), TOKENS)
    with pytest.raises(ContextError, match="2 to 96 tokens"):
        compare(a, a, TOKENS, context=97)
    with pytest.raises(JaxllmError, match="at least two tokens"):
        compare(a, a, [3])
    with pytest.raises(JaxllmError, match="no tokenizer"):
        compare(a, a, "text")


def test_other_tokenizers_are_refused():
    from tokenizers import Tokenizer, models

    from jaxllm.tokenizer import Tokenizer as Ours

    def reading(order):
        vocabulary = {letter: i for i, letter in enumerate(order)}
        return Ours(Tokenizer(models.BPE(vocabulary, [])))

    a, b = (replace(model(), tokenizer=reading(order)) for order in ("abc", "acb"))
    assert compare(a, a, "abcabc").tokens == 5
    with pytest.raises(JaxllmError, match="read the text differently"):
        compare(a, b, "abcabc")


def test_a_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    got = compare(model(), four_bits(model()), TOKENS)
    picture(got, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(JaxllmError, match="cannot be written"):
        picture(got, tmp_path / "missing" / "out.png")
    with pytest.raises(JaxllmError, match=r"or \.svg"):
        picture(got, tmp_path / "out.what")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="notebook"):
        picture(got, tmp_path / "out.png")


# ---- the command ----------------------------------------------------------------------------------------


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.py"
    path.write_text("def add(a, b):\n    return a + b\n" * 4)
    return str(path)


def run(capsys, *arguments):
    status = cli.main(["compare", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_command_as_json_and_picture(capsys, text_file, tmp_path):
    bundled, png = str(jaxllm.bundled("draft")), tmp_path / "out.png"
    options = ("--text", text_file, "--dtype-a", "float32", "--json", "--picture", str(png), "--context", "32")
    status, out, err = run(capsys, bundled, bundled, *options)
    assert (status, err) == (0, "")
    got = json.loads(out)
    assert got["a"]["bits_per_weight"] > 31 > 17 > got["b"]["bits_per_weight"]
    assert 0 < got["kl"]["mean"] <= got["kl"]["max"] < 0.01
    assert len(got["layers"]) == 2
    assert png.read_bytes()[:4] == b"\x89PNG"


def test_command_in_words(capsys, text_file):
    bundled = str(jaxllm.bundled("draft"))
    status, out, _ = run(capsys, bundled, bundled, "--text", text_file)
    assert status == 0
    for words in ("perplexity", "bits per weight", "KL(A || B)", "same most likely token", "100.00 %", "layer 1"):
        assert words in out


def test_command_refuses(capsys, text_file):
    bundled = str(jaxllm.bundled("draft"))
    status, _, err = run(capsys, bundled, "/nowhere/at/all", "--text", text_file)
    assert status == 1
    assert "there is no folder" in err
    with pytest.raises(SystemExit):
        run(capsys, bundled, "--text", text_file)
    assert "--format" in capsys.readouterr().err
