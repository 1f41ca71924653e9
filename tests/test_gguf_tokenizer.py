"""Tokenizers from GGUF metadata, against llama.cpp's test vectors and the tokenizers they were made of."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from jaxllm.checkpoint.gguf import read_gguf
from jaxllm.checkpoint.gguf_model import open_file
from jaxllm.errors import TokenizerError
from jaxllm.tokenizer import Tokenizer
from jaxllm.tokenizer_files import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    byte_alphabet,
    joins,
    llama3_specials,
    parse_merges,
    parse_ranks,
)
from jaxllm.tokenizer_gguf import GPT2, PRE, from_metadata
from tests.gguf_convert import write
from tests.test_gguf import LLAMA, tensors

G = "tokenizer.ggml."
NOWHERE = pathlib.Path("made.gguf")
Cases = list[tuple[str, list[int]]]


def vectors(folder: pathlib.Path, name: str) -> Cases:
    """The texts of llama.cpp's test, and the ids transformers gives them."""
    base = folder / "tokenizers" / "ggml_vocab" / f"ggml-vocab-{name}.gguf"
    if not (texts := base.with_name(base.name + ".inp")).is_file():
        pytest.skip("the GGUF vocabularies are not on this machine")
    inputs = texts.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = base.with_name(base.name + ".out").read_text().splitlines()
    assert len(lines) == 46
    return [(text, [int(i) for i in line.split()]) for text, line in zip(inputs, lines, strict=False)]


def wrong(tokenizer: Tokenizer, cases: Cases) -> list[str]:
    return [text for text, ids in cases if tokenizer.encode(text, add_special=False) != ids]


@pytest.mark.parametrize("name", ["llama-spm", "phi-3", "gpt-2", "deepseek-coder"])
def test_vocabularies_of_llama_cpp(name, shared):
    cases = vectors(shared, name)
    path = shared / "tokenizers" / "ggml_vocab" / f"ggml-vocab-{name}.gguf"
    tokenizer = from_metadata(read_gguf(path).metadata, path)
    assert wrong(tokenizer, cases) == []
    assert tokenizer.bos_id is not None
    starts = tokenizer.encode("x")[0] == tokenizer.bos_id
    assert starts == (name != "gpt-2")
    if name != "deepseek-coder":  # which has letters among its added tokens
        assert all(tokenizer.decode(ids) == text.strip(" ") for text, ids in cases if text == text.strip(" "))


def test_special_tokens_of_phi3_take_the_space_behind_them(shared):
    path = shared / "tokenizers" / "ggml_vocab" / "ggml-vocab-phi-3.gguf"
    reference = shared / "tokenizers" / "phi3" / "tokenizer.json"
    if not path.is_file() or not reference.is_file():
        pytest.skip("the Phi-3 vocabularies are not on this machine")
    from tokenizers import Tokenizer as Backend

    tokenizer, want = from_metadata(read_gguf(path).metadata, path), Backend.from_file(str(reference))
    text = "<|user|>\nHello <|end|>\n<|assistant|>\n"
    assert tokenizer.encode(text, add_special=False) == want.encode(text, add_special_tokens=False).ids
    rendered = tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    assert rendered.endswith("<|user|>\nHi<|end|>\n<|assistant|>\n")


def test_stories(shared):
    path = shared / "stories260K" / "stories260Ktok512.gguf"
    golden = shared / "tokenizers" / "golden_encodings.json"
    if not path.is_file() or not golden.is_file():
        pytest.skip("the stories260K files are not on this machine")
    said = json.loads(golden.read_text())
    tokenizer = from_metadata(read_gguf(path).metadata, path)
    pairs = zip(said["texts"], said["tok"]["stories260K_tok512"]["ids"], strict=True)
    # the model file drops spaces, which the metadata does not say, and knows no special tokens in a text
    cases = [(text, ids) for text, ids in pairs if text == " ".join(text.split(" ")).strip() and "  " not in text]
    cases = [(text, ids) for text, ids in cases if "<s>" not in text]
    assert len(cases) > 10
    assert wrong(tokenizer, cases) == []


# ---- metadata made here of other files ---------------------------------------------------------------------


def byte_level(pre: str, tokens: list[str], merges: list[tuple[str, str]], **more: Any) -> dict[str, Any]:
    kinds = np.full(len(tokens), NORMAL)
    for index in more.pop("control", ()):
        kinds[index] = CONTROL
    lines = [f"{left} {right}" for left, right in merges]
    parts = dict(model="gpt2", pre=pre, tokens=tokens, merges=lines, token_type=kinds, **more)
    return {G + name: value for name, value in parts.items()}


def llama3(shared: pathlib.Path) -> dict[str, Any]:
    path = shared / "tokenizers" / "llama3" / "tokenizer.model"
    if not path.is_file():
        pytest.skip("Llama 3's vocabulary is not on this machine")
    ranks, letters = parse_ranks(path, path.read_bytes()), byte_alphabet()
    spell = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [(spell[left], spell[right]) for left, right in joins(ranks, ranks, ranks)]
    tokens = [*sorted(spell.values(), key=dict(zip(spell.values(), ranks.values(), strict=True)).get)]
    named = dict(bos_token_id=128000, eos_token_id=128001, eot_token_id=128009)
    tokens += llama3_specials()
    return byte_level("llama-bpe", tokens, merges, control=range(128000, 128256), **named)


def test_llama3(shared):
    tokenizer = from_metadata(llama3(shared), NOWHERE)
    assert wrong(tokenizer, vectors(shared, "llama-bpe")) == []
    assert tokenizer.encode("a")[0] == tokenizer.bos_id == 128000
    assert tokenizer.encode("<|eot_id|>", add_special=False) == [128009]
    assert 128009 in tokenizer.special_ids


def test_qwen2(shared):
    folder = shared / "tokenizers" / "qwen2.5"
    if not (folder / "vocab.json").is_file():
        pytest.skip("Qwen 2.5's vocabulary is not on this machine")
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    tokens = sorted(vocab, key=vocab.get)
    tokenizer = from_metadata(byte_level("qwen2", tokens, parse_merges(folder / "merges.txt", vocab)), NOWHERE)
    assert wrong(tokenizer, vectors(shared, "qwen2")) == []
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


def test_deepseek_v3(shared):
    import gzip

    from tokenizers import Tokenizer as Backend

    path = shared / "tokenizers" / "deepseek_r1" / "tokenizer.json.gz"
    if not path.is_file():
        pytest.skip("DeepSeek R1's vocabulary is not on this machine")
    said = json.loads(gzip.decompress(path.read_bytes()))
    vocab = said["model"]["vocab"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in said["model"]["merges"]]
    tokenizer = from_metadata(byte_level("deepseek-v3", sorted(vocab, key=vocab.get), merges), NOWHERE)
    reference = Backend.from_str(json.dumps(said))
    texts = [text for text, _ in vectors(shared, "gpt-2")] + [
        "12345 号，人々が「x=1」",
        "\u2028a\t\n  b",
        "l'été!?...",
    ]
    cases = [(text, reference.encode(text, add_special_tokens=False).ids) for text in texts]
    assert wrong(tokenizer, cases) == []


# Published with each model, as its tokenizer.json has them: what `pre` stands for.
PIECES = {
    "gpt-2": ("I'll  pay 1234 ", ["I", "'ll", "Ġ", "Ġpay", "Ġ1234", "Ġ"]),
    "llama-bpe": ("I'LL pay 1234!\n\n", ["I", "'LL", "Ġpay", "Ġ", "123", "4", "!ĊĊ"]),
    "qwen2": ("I'LL pay 12", ["I", "'LL", "Ġpay", "Ġ", "1", "2"]),
    "starcoder": ("pay 12", ["pay", "Ġ", "1", "2"]),
    "falcon": ("a+b 12345", ["a", "+", "b", "Ġ", "123", "45"]),
    "tekken": ("HelloWorld 12", ["Hello", "World", "Ġ", "1", "2"]),
    "gpt-4o": ("HelloWorld's 1234", ["Hello", "World's", "Ġ", "123", "4"]),
    "deepseek-v3": ("a1234 你好b", ["a", "123", "4", "Ġ", "ä½łå¥½", "b"]),
    "bloom": ("pay, 12.", ["pay", ",", "Ġ12", "."]),
    "seed-coder": ("a!\nb", ["a", "!", "Ċ", "b"]),
}


@pytest.mark.parametrize("name", PIECES)
def test_how_a_text_is_cut(name):
    from jaxllm.tokenizer_gguf import _split

    text, want = PIECES[name]
    got = [piece for piece, _ in _split(PRE[name].patterns).pre_tokenize_str(text)]
    assert got == want


@pytest.mark.parametrize("name", PRE)
def test_every_pre_tokenizer_keeps_the_text(name):
    from jaxllm.tokenizer_gguf import _split

    text = "It's 1,234.5 – naïve “ÄÖÜ”\r\n\n  你好 かな 한국 ৩ é \t x_y"
    letters = {letter: byte for byte, letter in enumerate(byte_alphabet())}
    pieces = [piece for piece, _ in _split(PRE[name].patterns).pre_tokenize_str(text)]
    assert bytes(letters[c] for c in "".join(pieces)).decode() == text
    assert len(pieces) > 8


def test_the_gpt2_pattern_is_that_of_the_library():
    from tokenizers.pre_tokenizers import ByteLevel

    from jaxllm.tokenizer_gguf import _split

    text = "I'll've  12 naïve…  x\n\n y "
    assert _split((GPT2,)).pre_tokenize_str(text) == ByteLevel(add_prefix_space=False).pre_tokenize_str(text)


# ---- what the metadata may say -----------------------------------------------------------------------------


def spm(**changes: Any) -> dict[str, Any]:
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        "a",
        "b",
        "ab",
        "▁ab",
        "<|im_end|>",
    ]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 5, CONTROL]
    scores = np.zeros(len(tokens), np.float32)
    scores[-3:-1] = -1, -2
    usual = dict(model="llama", tokens=tokens, scores=scores, token_type=np.asarray(kinds))
    return {G + k if "." not in k else k: v for k, v in (usual | changes).items() if v is not None}


def test_flags_and_defaults():
    plain = from_metadata(spm(), NOWHERE)
    assert plain.encode("ab") == [1, 263]
    assert plain.decode(plain.encode("ab é")) == "ab é"
    flags = spm(add_bos_token=False, add_eos_token=True, add_space_prefix=False, padding_token_id=2**32 - 1)
    other = from_metadata(flags, NOWHERE)
    assert other.encode("ab") == [262, 2]
    assert other.pad_id is None


def test_chat_templates():
    found = {"tokenizer.chat_template": "{{ messages[0].content }}!", "tokenizer.chat_template.tool_use": "tools"}
    tokenizer = from_metadata(spm() | found, NOWHERE)
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "hi!"
    assert tokenizer.chat_template == {"default": "{{ messages[0].content }}!", "tool_use": "tools"}


def test_no_tokenizer():
    assert from_metadata({}, NOWHERE) is None
    assert from_metadata({G + "model": "no_vocab"}, NOWHERE) is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "t5"}, "is of the kind 't5'; 'llama' and 'gpt2' are read"),
        ({"tokens": None}, "tokens should be a list of texts"),
        ({"tokens": np.arange(4)}, "tokens should be a list of texts"),
        ({"scores": None}, "scores should be 265 numbers, one a token, but is NoneType"),
        ({"scores": np.zeros(3)}, "scores should be 265 numbers, one a token, but is 3 numbers"),
        ({"token_type": np.zeros(3)}, "token_type should be 265 numbers"),
        ({"bos_token_id": 265}, "bos_token_id is 265, and there are 265 tokens"),
        ({"bos_token_id": "1"}, "bos_token_id is '1'"),
        ({"add_bos_token": 1}, "add_bos_token should be true or false, but is 1"),
        ({"add_space_prefix": "yes"}, "add_space_prefix should be true or false"),
        ({"tokenizer.chat_template": 5}, "chat_template"),
        ({"model": "gpt2", "pre": "nonesuch"}, "pre-tokenizer is 'nonesuch'; known are a.x-4.0,"),
        ({"model": "gpt2", "pre": "gpt-2"}, "merges is missing"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["ab"]}, "the merge 'ab' does not name two tokens"),
        (
            {"model": "gpt2", "pre": "gpt-2", "merges": ["a c"]},
            "no byte-level vocabulary that can be used|do not fit",
        ),
    ],
)
def test_what_is_malformed_is_told(changes, sentence):
    with pytest.raises(TokenizerError, match=sentence):
        from_metadata(spm(**changes), NOWHERE)


def test_what_ends_an_answer(tmp_path):
    pytest.importorskip("gguf")
    vocabulary = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in spm().items()}
    weights = tensors() | {"token_embd.weight": np.ones((265, 64), np.float32)}
    file = write(tmp_path / "ends.gguf", "llama", LLAMA | vocabulary, weights)
    assert open_file(file)[0]["eos_token_id"] == [2, 264]
    file = write(tmp_path / "eot.gguf", "llama", LLAMA | vocabulary | {G + "eot_token_id": 260}, weights)
    assert open_file(file)[0]["eos_token_id"] == [2, 260, 264]
