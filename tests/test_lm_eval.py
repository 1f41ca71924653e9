"""The harness's requests against direct scoring, and its own evaluation where it is installed."""

import json
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest

import jaxllm
from jaxllm import decode
from jaxllm.errors import ContextError, JaxllmError, MissingExtraError, TokenizerError
from jaxllm.lm_eval import Requests, harness
from tests import plain

TEXT = """def add(a, b):
    return a + b


def load(path):
    with open(path) as file:
        return json.load(file.read())"""


@dataclass
class Request:
    """As the harness's Instance."""

    args: tuple


def requests(*args):
    return [Request(a) for a in args]


@pytest.fixture(scope="module")
def model():
    return jaxllm.load(jaxllm.bundled("draft"), dtype="float32")


@pytest.fixture(scope="module")
def lm(model):
    return Requests(model, max_gen_toks=12)


def short(model, max_len):
    return replace(model, config=replace(model.config, max_len=max_len))


def logprobs(model, ids):
    """f64 [T - 1, V]: of what follows each token but the last."""
    logits = plain.logits(model, ids).astype(np.float64)
    x = logits[:-1] - logits[:-1].max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def direct(model, context, continuation):
    """(log-probability, greedy) of token ids, from the logits."""
    ids, n = context + continuation, len(continuation)
    table = logprobs(model, ids)[-n:]
    return table[np.arange(n), continuation].sum(), table.argmax(-1).tolist() == continuation


# ---- log-likelihoods ------------------------------------------------------------------------------------


def test_loglikelihood_is_the_sum_over_the_continuation(model, lm):
    pairs = [("import os\n\ndef f(path):\n    return", " os.path.join"), (TEXT, "x"), ("class A:", "\n    def")]
    got = lm.loglikelihood(requests(*pairs))
    encode = model.tokenizer.encode
    for (context, continuation), (value, greedy) in zip(pairs, got, strict=True):
        before, whole = encode(context), encode(context + continuation)
        expected = direct(model, before, whole[len(before) :])
        assert (value, greedy) == (pytest.approx(expected[0], abs=2e-4), expected[1])
    scored = decode.score(model, pairs[0][0] + pairs[0][1])[0].logprobs
    n = len(encode(pairs[0][0] + pairs[0][1])) - len(encode(pairs[0][0]))
    assert got[0][0] == pytest.approx(sum(scored[-n:]), abs=1e-5)


def test_what_greedy_decoding_gives_is_greedy(model, lm):
    context = "class Stack:\n    def __init__("
    out = decode.generate(model, context, max_new_tokens=6, eos=())[0]
    text = model.tokenizer.decode(out.tokens)
    (value, greedy), (worse, other) = lm.loglikelihood(requests((context, text), (context, "zebra")))
    assert greedy
    assert not other
    assert worse < value


def test_spaces_before_a_word_belong_to_it(model, lm):
    whole, (moved, _) = lm.loglikelihood(requests(("import", " sys"), ("import ", "sys")))
    assert whole[0] == moved


def test_an_empty_context_is_the_first_token(model, lm):
    ids = model.tokenizer.encode("import sys", add_special=False)
    ((value, _),) = lm.loglikelihood(requests(("", "import sys")))
    assert value == pytest.approx(direct(model, [model.tokenizer.bos_id], ids)[0], abs=1e-4)


def test_long_contexts_lose_their_beginning(model):
    small = Requests(short(model, 24))
    before, whole = model.tokenizer.encode(TEXT), model.tokenizer.encode(TEXT + "\n    pass")
    ((value, _),) = small.loglikelihood(requests((TEXT, "\n    pass")))
    new = whole[len(before) :]
    assert value == pytest.approx(direct(model, before[-(24 - len(new)) :], new)[0], abs=1e-4)
    with pytest.raises(ContextError, match="the context is 24"):
        small.loglikelihood(requests(("a", TEXT)))


def test_rolling_counts_every_token_once_with_a_full_context(model):
    size, first = 15, model.tokenizer.bos_id
    small, ids = Requests(short(model, size + 1)), model.tokenizer.encode(TEXT, add_special=False)
    assert len(ids) > 2 * size
    windows = list(small._rolling(ids))
    assert [t for _, new in windows for t in new] == ids
    assert [len(old) + len(new) for old, new in windows] == [size + 1] * len(windows)
    expected = direct(model, [first], ids[:size])[0]
    for start in range(size, len(ids), size):
        end = min(start + size, len(ids))
        expected += direct(model, ids[end - size - 1 : start], ids[start:end])[0]
    (value,) = small.loglikelihood_rolling(requests((TEXT,)))
    assert value == pytest.approx(expected, abs=1e-3)
    whole = Requests(model).loglikelihood_rolling(requests((TEXT,), ("",)))
    assert whole == [pytest.approx(direct(model, [first], ids)[0], abs=1e-3), 0]


# ---- generation -----------------------------------------------------------------------------------------


def test_generation_is_greedy_and_stops_before_its_end(model, lm):
    contexts = ["import os\n\ndef read(", "class Test(unittest.", "x ="]
    got = lm.generate_until(requests(*((c, {"until": ["\n"], "max_gen_toks": 20}) for c in contexts)))
    for context, text in zip(contexts, got, strict=True):
        assert text == decode.generate(model, context, max_new_tokens=20, stop="\n")[0].text
        assert "\n" not in text


def test_options_of_each_request_are_its_own(model, lm):
    short_, long_, other = lm.generate_until(
        requests(("def f(", {"max_gen_toks": 2}), ("def f(", {}), ("def f(", {"until": "(", "do_sample": False}))
    )
    assert long_.startswith(short_)
    assert len(long_) > len(short_)
    assert "(" not in other
    warm = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12}
    first, again = (lm.generate_until(requests(("def f(", warm)))[0] for _ in range(2))
    assert first == again != long_
    assert Requests(model, seed=1).generate_until(requests(("def f(", warm)))[0] != first
    assert lm.generate_until(requests(("def f(", warm | {"do_sample": False}))) == [long_]


def test_refusals(model, lm, monkeypatch):
    with pytest.raises(JaxllmError, match="no beams"):
        lm.generate_until(requests(("a", {"beams": 4})))
    with pytest.raises(ContextError, match="the context is 1024"):
        lm.generate_until(requests(("a", {"max_gen_toks": 5000})))
    with pytest.raises(TokenizerError, match="no tokenizer"):
        Requests(replace(model, tokenizer=None))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(MissingExtraError, match="lm_eval"):
        harness(model)


def test_chat(model, lm):
    talk = [{"role": "user", "content": "import os"}]
    text = lm.apply_chat_template(talk)
    assert lm._encode(text) == model.tokenizer.encode_chat(talk)  # one <s>, not two
    assert lm.chat_template(True) == model.tokenizer.chat_template
    assert lm.chat_template() is None


# ---- the harness itself ---------------------------------------------------------------------------------


@pytest.fixture
def tasks(tmp_path):
    """Three tasks of lines of code: which line follows, how probable the texts are, and the line itself."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.task import ConfigurableTask

    documents = [
        {
            "context": "import os\n\ndef size(path):\n    return os.path.",
            "right": "getsize(path)",
            "wrong": "zebra",
        },
        {"context": "class A:\n    def __init__(self, x):\n        self.", "right": "x = x", "wrong": "[[["},
        {"context": "try:\n    import json\nexcept ", "right": "ImportError:", "wrong": "while 1"},
    ]
    path = tmp_path / "lines.json"
    path.write_text("\n".join(map(json.dumps, documents)))
    data = dict(dataset_path="json", dataset_kwargs={"data_files": {"test": str(path)}}, test_split="test")
    data |= {"dataset_kwargs": data["dataset_kwargs"] | {"cache_dir": str(tmp_path / "cache")}}
    choose = dict(output_type="multiple_choice", doc_to_text="{{context}}", doc_to_target=0)
    choose |= dict(doc_to_choice="{{[right, wrong]}}", target_delimiter="", metric_list=[{"metric": "acc"}])
    roll = dict(output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{context}}{{right}}")
    roll |= dict(metric_list=[{"metric": "bits_per_byte"}])
    write = dict(output_type="generate_until", doc_to_text="{{context}}", doc_to_target="{{right}}")
    write |= dict(generation_kwargs={"until": ["\n"], "max_gen_toks": 8}, metric_list=[{"metric": "exact_match"}])
    named = {"choose": choose, "roll": roll, "write": write}
    made = {name: ConfigurableTask(config={"task": name, **data, **task}) for name, task in named.items()}
    return made, documents


@pytest.mark.filterwarnings("ignore")
def test_in_the_harness(model, tasks):
    import lm_eval

    made, documents = tasks
    got = lm_eval.evaluate(harness(model), made, bootstrap_iters=0)["results"]
    lm = Requests(model)
    right, wrong = (
        lm.loglikelihood(requests(*((d["context"], d[k]) for d in documents))) for k in ("right", "wrong")
    )
    acc = np.mean([a[0] > b[0] for a, b in zip(right, wrong, strict=True)])
    assert got["choose"]["acc,none"] == acc
    texts = [d["context"] + d["right"] for d in documents]
    bits = -sum(lm.loglikelihood_rolling(requests(*((t,) for t in texts)))) / np.log(2)
    assert got["roll"]["bits_per_byte,none"] == pytest.approx(bits / sum(len(t.encode()) for t in texts), rel=1e-6)
    options = {"until": ["\n"], "max_gen_toks": 8}
    written = lm.generate_until(requests(*((d["context"], options) for d in documents)))
    exact = np.mean([text == d["right"] for text, d in zip(written, documents, strict=True)])
    assert got["write"]["exact_match,none"] == exact
