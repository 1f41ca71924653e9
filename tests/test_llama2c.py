"""llama2.c's files against what run.c and runq.c made of them, and files that are none."""

import json
import pathlib
import struct
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxllm
from jaxllm import decode
from jaxllm.checkpoint import llama2c
from jaxllm.errors import CheckpointError, JaxllmError, Notice
from jaxllm.quant import QTensor


@pytest.fixture(scope="module")
def stories(shared):
    folder = shared / "stories260K"
    if not folder.is_dir():
        pytest.skip("the stories260K files are not on this machine")
    return folder


def alone(path: pathlib.Path, folder: pathlib.Path, *beside: pathlib.Path) -> pathlib.Path:
    """A copy of a file in a folder of its own, with those beside it."""
    for file in (path, *beside):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder / path.name


def tiny(version: int, *, tied: bool = True, hidden: int = 12, vocab: int = 9) -> bytes:
    """A file written here: two layers, width 8, two heads, one of keys, groups of 4."""
    D, L, kv = 8, 2, 4
    h = llama2c.Header(version, D, hidden, L, 2, 1, vocab, 16, tied, 4 if version == 2 else None)
    start = struct.pack("<7i", D, hidden, L, 2, 1, vocab if tied or version else -vocab, 16)
    if version:
        start = struct.pack("<Ii", 0x616B3432, version) + start + struct.pack("<Bi", tied, h.group or 0)
        start = start.ljust(256, b"\0")
    rng = np.random.default_rng(version)
    floats = lambda n: rng.random(n, np.float32).tobytes()
    codes = lambda n: rng.integers(-127, 128, n).astype("i1").tobytes() + floats(n // 4)
    matrices = [vocab * D] * (2 - tied) + [D * D, D * D, kv * D, kv * D] * L + [3 * hidden * D] * L
    norms = floats(D * (2 * L + 1))
    if version == 2:
        return start + norms + b"".join(codes(n) for n in _in_order(matrices, tied, L))
    return start + norms + floats(sum(matrices)) + (floats(16 * 4) if version == 0 else b"")


def _in_order(matrices: list[int], tied: bool, layers: int) -> list[int]:
    """Sizes as version 2 has them: embedding, q, k, v, o, w1, w2, w3 of each layer, head."""
    embed, *rest = matrices if tied else matrices[1:]
    wide, narrow, gated = rest[0], rest[2], rest[-1] // 3
    sizes = [embed, *[wide] * layers, *[narrow] * 2 * layers, *[wide] * layers, *[gated] * 3 * layers]
    return sizes if tied else [*sizes, embed]


# ---- what run.c says ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stories260K.bin", "stories260K_v1.bin"])
def test_greedy_text_is_that_of_run_c(stories, name):
    model = jaxllm.load(stories / name)
    out = decode.generate(model, [1], max_new_tokens=200)
    want = (stories / "expected_greedy_200.txt").read_text().rstrip("\n")
    assert out.text == want


@pytest.mark.parametrize("name", ["stories260K.bin", "stories260K_v1.bin"])
def test_logits_are_those_of_run_c(stories, name):
    model, want = jaxllm.load(stories / name), np.load(stories / "golden_once.npz")
    tokens = jnp.asarray([[*want["prompt_ids"], *want["greedy_ids"]]], jnp.int32)
    got = jaxllm.forward(model.config, model.params, tokens)[0][0]
    np.testing.assert_allclose(got[: len(want["c_logits"])], want["c_logits"], atol=2e-4)


def test_packed_logits_are_those_of_the_dequantized_weights(stories):
    with pytest.warns(Notice, match="5 weights .*down_proj.* are expanded to float32.* groups of 8"):
        model = jaxllm.load(stories / "stories260K-q8.bin")
    want = np.load(stories / "golden_q8_once.npz")
    prompt = want["prompt_ids"].tolist()
    tokens = jnp.asarray([[*prompt, *want["greedy_ids"]]], jnp.int32)
    got = jaxllm.forward(model.config, model.params, tokens)[0][0]
    np.testing.assert_allclose(got[len(prompt) - 1 : -1], want["step_logits"], atol=1e-4)
    assert got[len(prompt) - 1 : -1].argmax(-1).tolist() == want["greedy_ids"].tolist()
    layer = model.params["layers"][0]
    assert isinstance(layer["mixer"]["q"]["w"], QTensor)
    assert isinstance(model.params["embed"]["w"], QTensor)
    assert not isinstance(layer["ffn"]["down"]["w"], QTensor)
    assert layer["ffn"]["down"]["w"].dtype == jnp.float32


def test_packed_prompt_and_end(stories):
    with pytest.warns(Notice):
        model = jaxllm.load(stories / "stories260K-q8.bin")
    want = np.load(stories / "golden_q8_once.npz")
    assert model.tokenizer.encode("Once upon a time") == want["prompt_ids"].tolist()
    assert model.eos_ids == {1, 2}


# ---- the vocabulary beside it ------------------------------------------------------------------------------

TEXTS = ["Once upon a time", "Zoë saw 7 žluté koně!", "a\nb\tc", "", "日本語"]
BLANKS = " two  blanks"


@pytest.mark.parametrize("vocabulary", ["tok512.bin", "tok512.model"])
def test_both_kinds_of_vocabulary_spell_alike(stories, tmp_path, vocabulary):
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(stories / "tok512.model"))
    tokenizer = jaxllm.load(alone(stories / "stories260K.bin", tmp_path, stories / vocabulary)).tokenizer
    for text in TEXTS:
        assert tokenizer.encode(text) == [1, *theirs.encode(text)]
        assert tokenizer.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    # The model says that blanks are joined, which its llama2.c form does not keep: run.c spells each.
    blanks = tokenizer.decode(tokenizer.encode(BLANKS))
    assert blanks == (BLANKS if vocabulary.endswith("bin") else theirs.decode(theirs.encode(BLANKS)))


def test_no_vocabulary_is_no_tokenizer(stories, tmp_path):
    assert jaxllm.load(alone(stories / "stories260K.bin", tmp_path)).tokenizer is None


def test_one_of_another_size_is_passed_over(stories, tmp_path):
    path = alone(stories / "stories260K.bin", tmp_path)
    (tmp_path / "tokenizer.bin").write_bytes((stories / "tok512.bin").read_bytes()[:-12])
    assert jaxllm.load(path).tokenizer is None


def test_two_that_differ_are_not_chosen_between(stories, tmp_path):
    path = alone(stories / "stories260K.bin", tmp_path, stories / "tok512.bin")
    data = bytearray((stories / "tok512.bin").read_bytes())
    assert jaxllm.load(path).tokenizer is not None
    (tmp_path / "same.bin").write_bytes(data)
    assert jaxllm.load(path).tokenizer is not None
    data[4:8] = struct.pack("<f", 7.0)  # the score of its first token
    (tmp_path / "other.bin").write_bytes(data)
    assert jaxllm.load(path).tokenizer is None


# ---- layouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_every_byte_has_a_place(tmp_path, version, tied):
    path = tmp_path / "x.bin"
    path.write_bytes(tiny(version, tied=tied))
    model = jaxllm.load(path)
    assert model.config.tied == tied
    assert ("head" in model.params) == (not tied)
    assert jaxllm.forward(model.config, model.params, jnp.zeros((1, 2), jnp.int32))[0].shape == (1, 2, 9)


def test_whole_rows_stay_packed_without_a_notice(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(tiny(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = jaxllm.load(path)
    assert isinstance(model.params["layers"][1]["ffn"]["down"]["w"], QTensor)


# ---- files that are none ------------------------------------------------------------------------------------


def refusal(path) -> str:
    with pytest.raises(JaxllmError) as caught:
        jaxllm.load(path)
    return str(caught.value)


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("change", [-4, -1, 1, 4, -200])
def test_another_length_is_refused(tmp_path, version, change):
    data = tiny(version)
    path = tmp_path / "x.bin"
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    assert ("should have" if version else "give the folder") in refusal(path)


@pytest.mark.parametrize("field", range(7))
@pytest.mark.parametrize("value", [0, -1, 2**31 - 1, -(2**31), 3])
def test_absurd_sizes_are_refused(tmp_path, field, value):
    for version in (0, 1, 2):
        data, at = bytearray(tiny(version)), (8 if version else 0) + 4 * field
        if struct.unpack_from("<i", data, at)[0] == value or (version and field == 6 and value == 3):
            continue  # a shorter context is a right file
        struct.pack_into("<i", data, at, value)
        path = tmp_path / f"{version}.bin"
        path.write_bytes(data)
        assert len(refusal(path)) < 500


@pytest.mark.parametrize(
    ("at", "layout", "value", "say"),
    [
        (4, "<i", 3, "versions 0, 1 and 2"),
        (4, "<i", -1, "versions 0, 1 and 2"),
        (36, "<B", 7, "shared classifier of 7"),
        (37, "<i", 0, "group size is 0"),
        (37, "<i", -4, "group size is -4"),
        (37, "<i", 7, "do not divide"),
        (37, "<i", 2**30, "group size is"),
        (4, "<i", 1, "should have"),
    ],
)
def test_hostile_headers(tmp_path, at, layout, value, say):
    data = bytearray(tiny(2))
    struct.pack_into(layout, data, at, value)
    (tmp_path / "x.bin").write_bytes(data)
    assert say in refusal(tmp_path / "x.bin")


def test_damaged_scales_are_refused(tmp_path):
    data = bytearray(tiny(2))
    data[-4:] = struct.pack("<f", float("nan"))
    (tmp_path / "x.bin").write_bytes(data)
    assert "not all finite and positive" in refusal(tmp_path / "x.bin")


@given(st.binary(max_size=300), st.booleans())
@settings(max_examples=200, deadline=None)
def test_noise_is_no_checkpoint(tmp_path_factory, noise, magic):
    path = tmp_path_factory.mktemp("noise") / "x.bin"
    path.write_bytes(struct.pack("<I", 0x616B3432) + noise if magic else noise)
    with pytest.raises(CheckpointError):
        jaxllm.load(path)


def test_pickles_are_not_taken_for_one(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"PK\x03\x04" + bytes(5000))
    assert "give the folder" in refusal(path)
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert "give the folder" in refusal(tmp_path / "config.json")
