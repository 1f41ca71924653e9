"""GGUF files: tensor types to the last bit, a real model in nine formats, split files, and files that are none."""

import contextlib
import dataclasses
import json
import pathlib
import struct
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxllm
from jaxllm import cli, decode
from jaxllm.checkpoint.canonical import flatten
from jaxllm.checkpoint.gguf import read_gguf
from jaxllm.checkpoint.gguf_types import TYPES, floats, values
from jaxllm.checkpoint.source import open_source
from jaxllm.errors import CheckpointError, ConfigError, JaxllmError, Notice
from jaxllm.model import load_config
from jaxllm.quant import QTensor, dequantize
from tests.gguf_convert import write

BY_NAME = {kind.name: kind for kind in TYPES.values()}
FORMATS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
PACKED = [kind.name for kind in TYPES.values() if kind.format]
EXPANDED = [kind.name for kind in TYPES.values() if kind.expanded]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(np.asarray(a, np.float32).view(np.uint32), np.asarray(b, np.float32).view(np.uint32))


# ---- tensor types ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in BY_NAME if n[0] != "I" or n[1] == "Q"])
def test_values_are_those_of_ggml(name, shared):
    if not (file := shared / "gguf_vectors" / "gguf_dequant_vectors.npz").is_file():
        pytest.skip("the GGUF vectors are not on this machine")
    with np.load(file) as vectors:
        if f"{name}_raw" not in vectors:
            pytest.skip(f"there are no vectors of {name}")
        raw, want = np.ascontiguousarray(vectors[f"{name}_raw"]).reshape(-1), vectors[f"{name}_deq"]
    assert same_bits(floats(BY_NAME[name], raw, want.shape), want)
    x = values(BY_NAME[name], raw, want.shape)
    assert isinstance(x, QTensor) == (name in PACKED)
    if name in PACKED:
        assert same_bits(dequantize(x, np.float32), want)
        assert x.shape == want.shape


@pytest.mark.parametrize("name", PACKED + EXPANDED)
def test_any_bytes_are_what_the_gguf_package_makes_of_them(name):
    gguf = pytest.importorskip("gguf")
    kind, rng = BY_NAME[name], np.random.default_rng(0)
    raw = rng.integers(0, 256, (6, 512 // kind.block, kind.nbytes), np.uint8)
    if name == "MXFP4":
        raw[..., 0] %= 255  # 255 is NaN here, as the OCP's specification has it
    kept = getattr(gguf.GGMLQuantizationType, name)
    with np.errstate(all="ignore"):  # scales that are NaN or infinite
        want = gguf.quants.dequantize(raw.reshape(6, -1), kept)
        got = floats(kind, raw.reshape(-1), (2, 3, 512)).reshape(6, 512)
    assert np.isfinite(want).mean() > 0.5
    assert np.array_equal(got, want, equal_nan=True)


def test_a_large_tensor_is_unpacked_in_parts(monkeypatch):
    kind, rng = BY_NAME["Q5_K"], np.random.default_rng(1)
    raw = rng.integers(0, 100, 40 * 2 * kind.nbytes, np.uint8)
    whole = values(kind, raw, (40, 512))
    monkeypatch.setattr("jaxllm.checkpoint.gguf_types.AT_ONCE", 3 * 512)
    parts = values(kind, raw, (40, 512))
    assert all(np.array_equal(a, b) for a, b in zip(whole.parts().values(), parts.parts().values(), strict=True))


# ---- a real model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(shared) -> pathlib.Path:
    if not (shared / "stories260K" / "gguf").is_dir():
        pytest.skip("the stories260K files are not on this machine")
    return shared / "stories260K"


def longer(model: jaxllm.Model) -> jaxllm.ModelConfig:
    """The file says 128 positions, and the model was trained on 512."""
    return dataclasses.replace(model.config, max_len=512)


@pytest.mark.parametrize("name", FORMATS)
def test_logits_and_perplexity(name, stories):
    import jax

    model = jaxllm.load(stories / "gguf" / f"{name}.gguf", dtype="float32")
    run = jax.jit(jaxllm.forward, static_argnums=0)
    with np.load(stories / "golden_gguf.npz") as golden:
        logits, _ = run(longer(model), model.params, golden["ids"][None])
        assert np.abs(logits[0] - golden[f"{name}_dequant_f64_logits"]).max() < 1e-3
    with np.load(stories / "ppl_windows.npz") as data:
        windows = data["windows"]
    said = json.loads((stories / "golden_ppl.json").read_text())["per_window"]
    want = said.get("fp32" if name == "f32" else f"gguf_{name}_dequant", [])[:4]
    logits, _ = run(longer(model), model.params, windows[: len(want), :-1]) if want else (np.zeros((0, 1, 1)), 0)
    chosen = np.take_along_axis(jax.nn.log_softmax(logits), windows[: len(want), 1:, None], -1)
    assert np.allclose(-chosen[..., 0].mean(-1), want, rtol=1e-4)


def test_what_is_packed_stays_packed(stories):
    leaves = flatten(jaxllm.load(stories / "gguf" / "q4_0.gguf").params)
    kinds = {path: x.format.name if isinstance(x, QTensor) else str(x.dtype) for path, x in leaves.items()}
    assert kinds["embed.w"] == kinds["layers.3.mixer.k.w"] == "q4_0"
    assert kinds["head.w"] == "q8_0"
    assert kinds["layers.0.ffn.down.w"] == "float16"  # its rows are no multiple of 32
    assert kinds["norm.w"] == "float32"


def test_greedy_text_with_its_own_tokenizer(stories):
    model = jaxllm.load(stories / "stories260Ktok512.gguf", dtype="float32")
    made = decode.generate(model, "", max_new_tokens=120)
    expected = (stories / "expected_greedy_200.txt").read_text()
    assert made.text.strip()[:300] == expected.strip()[: len(made.text.strip()[:300])]
    assert len(made.text) > 200
    assert model.eos_ids == {2}


def test_the_command_line(stories, capsys):
    file = str(stories / "gguf" / "q8_0.gguf")
    assert cli.main(["generate", "--model", file, "--max-new-tokens", "12", "Once upon a time"]) == 0
    assert "there was a little girl" in capsys.readouterr().out
    assert cli.main(["info", "--json", file]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model_type"] == "llama"
    assert told["parameters"] == 292800


# ---- small models written here -----------------------------------------------------------------------------

LLAMA = {
    "block_count": 1,
    "context_length": 64,
    "embedding_length": 64,
    "feed_forward_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
SHAPES = {
    "token_embd": (96, 64),
    "output_norm": (64,),
    "blk.0.attn_norm": (64,),
    "blk.0.ffn_norm": (64,),
    "blk.0.attn_q": (64, 64),
    "blk.0.attn_k": (32, 64),
    "blk.0.attn_v": (32, 64),
    "blk.0.attn_output": (64, 64),
    "blk.0.ffn_gate": (64, 64),
    "blk.0.ffn_up": (64, 64),
    "blk.0.ffn_down": (64, 64),
}


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"{name}.weight": rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def plain(tmp_path) -> pathlib.Path:
    pytest.importorskip("gguf")
    return write(tmp_path / "plain.gguf", "llama", LLAMA, tensors())


def test_a_folder_of_one_file(plain):
    assert load_config(plain.parent).width == 64
    assert jaxllm.load(plain.parent).name == "plain.gguf"
    write(plain.with_name("other.gguf"), "llama", LLAMA, tensors())
    with pytest.raises(CheckpointError, match=r"several GGUF files \(other.gguf, plain.gguf\)"):
        jaxllm.load(plain.parent)


def test_no_output_is_a_tied_head(plain):
    assert jaxllm.load(plain).config.tied
    more = tensors() | {"output.weight": np.ones((96, 64), np.float32)}
    assert not jaxllm.load(write(plain.with_name("untied.gguf"), "llama", LLAMA, more)).config.tied


def test_the_config_needs_no_tokenizer_and_no_weights(plain):
    data = plain.read_bytes()
    assert jaxllm.load(plain).tokenizer is None
    assert load_config(plain).dtype == "float32"
    plain.write_bytes(data[:-100])  # the last tensor is cut: the header is still whole, and tells of it
    with pytest.raises(CheckpointError, match="not a whole GGUF file"):
        load_config(plain)


def test_what_is_not_understood_is_told(plain):
    strange = write(
        plain.with_name("strange.gguf"), "llama", LLAMA | {"attention.temperature_scale": 0.5}, tensors()
    )
    with pytest.raises(ConfigError, match=r"llama\.attention\.temperature_scale=0\.5 is not understood"):
        jaxllm.load(strange)
    assert jaxllm.load(strange, ignore=["llama.attention.temperature_scale"]).size > 0


def test_an_unknown_architecture(plain):
    file = write(plain.with_name("t5.gguf"), "t5", {}, tensors())
    with pytest.raises(
        ConfigError, match=r"architecture 't5' is not known to jaxllm. Known are: arcee, .*, qwen2,"
    ):
        jaxllm.load(file)


def test_a_file_of_a_vocabulary_only(plain):
    with pytest.raises(CheckpointError, match=r"no tensor token_embd.weight, so it is no model"):
        jaxllm.load(write(plain.with_name("vocab.gguf"), "llama", LLAMA, {}))


@pytest.mark.parametrize(
    "changes", [{"attention.head_count": 10**6}, {"attention.key_length": 7}, {"block_count": 3}]
)
def test_metadata_that_does_not_fit(plain, changes):
    file = write(plain.with_name("misfit.gguf"), "llama", LLAMA | changes, tensors())
    with pytest.raises((ConfigError, CheckpointError)):
        jaxllm.load(file)


def test_metadata_of_another_type(plain):
    for key, value in (("block_count", "many"), ("embedding_length", True), ("attention.head_count", [1, 2])):
        file = write(plain.with_name("typed.gguf"), "llama", LLAMA | {key: value}, tensors())
        with pytest.raises(ConfigError, match=f"llama.{key} should be a"):
            jaxllm.load(file)


def test_saved_in_the_own_format_it_is_the_same(tmp_path):
    pytest.importorskip("gguf")
    metadata, made = wide(**{"blk.0.ffn_up": "Q4_K", "blk.0.attn_q": "Q3_K", "blk.0.attn_v": "MXFP4"})
    made["rope_freqs.weight"] = np.linspace(1, 8, 32, dtype=np.float32)
    model = jaxllm.load(write(tmp_path / "mixed.gguf", "llama", metadata, made))
    jaxllm.save(model, tmp_path / "own")
    again = jaxllm.load(tmp_path / "own")
    assert again.config == model.config
    want, got = flatten(model.params), flatten(again.params)
    assert got.keys() == want.keys()
    for path, leaf in want.items():
        parts = leaf.parts() if isinstance(leaf, QTensor) else {"": leaf}
        others = got[path].parts() if isinstance(leaf, QTensor) else {"": got[path]}
        assert all(np.asarray(parts[k]).tobytes() == np.asarray(others[k]).tobytes() for k in parts)


def test_recommended_sampling(plain):
    said = {"general.sampling.temp": 0.5, "general.sampling.top_k": 20}
    model = jaxllm.load(write(plain.with_name("said.gguf"), "llama", LLAMA | said, tensors()))
    assert model.defaults == {"temperature": 0.5, "top_k": 20, "do_sample": True}


def test_experts_in_one_tensor_or_in_one_each(plain):
    """Files of the first Mixtral conversions name every expert by itself."""
    metadata = LLAMA | {"expert_count": 3, "expert_used_count": 2}
    dense = {name: x for name, x in tensors().items() if ".ffn_" not in name}
    dense |= {
        "blk.0.ffn_norm.weight": np.ones(64, np.float32),
        "blk.0.ffn_gate_inp.weight": np.eye(3, 64, dtype="f4"),
    }
    rng = np.random.default_rng(0)
    stacks = {part: rng.standard_normal((3, 64, 64), np.float32) for part in ("gate", "up", "down")}
    whole = {f"blk.0.ffn_{part}_exps.weight": x for part, x in stacks.items()}
    single = {f"blk.0.ffn_{part}.{e}.weight": w for part, x in stacks.items() for e, w in enumerate(x)}
    a, b = (
        flatten(jaxllm.load(write(plain.with_name(name), "llama", metadata, dense | more)).params)
        for name, more in (("whole.gguf", whole), ("single.gguf", single))
    )
    assert a.keys() == b.keys()
    assert a["layers.0.ffn.up.w"].shape == (3, 64, 64)
    assert all(np.array_equal(a[path], b[path]) for path in a)


def quantized(name: str, shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, object]:
    """Random bytes of a type with tame scales, for the writer."""
    import gguf

    kind, rng = BY_NAME[name], np.random.default_rng(seed)
    raw = rng.integers(0, 60, (*shape[:-1], shape[-1] // kind.block * kind.nbytes), np.uint8)
    return raw, getattr(gguf.GGMLQuantizationType, name)


def wide(**replaced) -> tuple[dict, dict]:
    """A model whose rows are long enough for every type."""
    shapes = {n: tuple(256 if s == 64 else s for s in shape) for n, shape in SHAPES.items()}
    shapes["blk.0.attn_k"] = shapes["blk.0.attn_v"] = (128, 256)
    made = {f"{n}.weight": np.ones(s, np.float32) / 16 for n, s in shapes.items()}
    made |= {f"{n}.weight": quantized(kind, shapes[n]) for n, kind in replaced.items()}
    return LLAMA | {"embedding_length": 256, "feed_forward_length": 256}, made


def test_expanded_types_give_one_notice(tmp_path):
    pytest.importorskip("gguf")
    names = {"blk.0.ffn_up": "IQ2_XS", "blk.0.ffn_down": "IQ1_M", "blk.0.attn_q": "IQ2_XS", "blk.0.attn_v": "Q4_K"}
    metadata, made = wide(**names)
    file = write(tmp_path / "few.gguf", "llama", metadata, made)
    with pytest.warns(Notice, match=r"3 tensors are expanded to bfloat16.*\(2 of IQ2_XS, 1 of IQ1_M\)") as told:
        params = jaxllm.load(file).params
    assert len(told) == 1
    assert params["layers"][0]["ffn"]["up"]["w"].dtype == "bfloat16"
    assert params["layers"][0]["mixer"]["v"]["w"].format.name == "q4_k"


@pytest.mark.parametrize("name", PACKED)
def test_rows_of_packed_queries_are_reordered(name, tmp_path):
    """Pairs of neighbours become halves, whatever the type: the same as reordering the values."""
    pytest.importorskip("gguf")
    metadata, made = wide(**{"blk.0.attn_q": name})
    file = write(tmp_path / "packed.gguf", "llama", metadata, made)
    q = jaxllm.load(file).params["layers"][0]["mixer"]["q"]["w"]
    raw, _ = made["blk.0.attn_q.weight"]
    want = (
        floats(BY_NAME[name], raw.reshape(-1), (256, 256)).reshape(4, 32, 2, 256).swapaxes(1, 2).reshape(256, 256)
    )
    got = np.asarray(
        dequantize(dataclasses.replace(q, **{k: np.asarray(v) for k, v in q.parts().items()}), np.float32)
    )
    assert np.array_equal(got, want, equal_nan=True)


def test_the_factor_beside_an_nvfp4_weight(tmp_path):
    pytest.importorskip("gguf")
    metadata, made = wide(**{"blk.0.ffn_up": "NVFP4"})
    plain = jaxllm.load(write(tmp_path / "one.gguf", "llama", metadata, made))
    made["blk.0.ffn_up.scale"] = np.full(1, 0.25, np.float32)
    scaled = jaxllm.load(write(tmp_path / "two.gguf", "llama", metadata, made))
    one, two = (
        np.asarray(dequantize(m.params["layers"][0]["ffn"]["up"]["w"], np.float32)) for m in (plain, scaled)
    )
    assert np.abs(one).max() > 0
    assert np.array_equal(two, one / 4)


# ---- the container -----------------------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def entry(name: str, sizes: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    numbers = struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
    return text(name) + numbers


def container(
    pairs: list[bytes] = (), entries: list[bytes] = (), data: bytes = bytes(4096), version: int = 3, **counts: int
) -> bytes:
    start = b"GGUF" + struct.pack(
        "<IQQ", version, counts.get("n_tensors", len(entries)), counts.get("n_pairs", len(pairs))
    )
    head = start + b"".join(pairs) + b"".join(entries)
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + data


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions(version, tmp_path):
    data = np.arange(1024, dtype="<f4").tobytes()
    pairs = [pair("a", 4, struct.pack("<I", 7)), pair("b", 9, struct.pack("<IQ", 8, 2) + text("x") + text("é"))]
    pairs.append(pair("c", 9, struct.pack("<IQ3h", 3, 3, 1, -2, 3)))
    (tmp_path / "x.gguf").write_bytes(container(pairs, [entry("t", (4, 2), 0, 64)], data, version))
    file = read_gguf(tmp_path / "x.gguf")
    assert file.metadata["a"] == 7
    assert file.metadata["b"] == ["x", "é"]
    assert file.metadata["c"].tolist() == [1, -2, 3]
    assert file.tensors["t"].shape == (2, 4)
    assert values(TYPES[0], file.tensors["t"].read(), (2, 4)).tolist() == [[16, 17, 18, 19], [20, 21, 22, 23]]


def test_another_alignment(tmp_path):
    pairs = [pair("general.alignment", 4, struct.pack("<I", 8))]
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + pairs[0] + entry("t", (2,), 0, 8)
    head = head.ljust(-(-len(head) // 8) * 8, b"\0")
    (tmp_path / "x.gguf").write_bytes(head + np.arange(4, dtype="<f4").tobytes())
    assert read_gguf(tmp_path / "x.gguf").tensors["t"].read().view("<f4").tolist() == [2, 3]


HUGE = 2**60
HOSTILE = {
    "empty": b"",
    "only magic": b"GGUF",
    "no magic": b"GGML" + container()[4:],
    "version 1": container(version=1),
    "version 4": container(version=4),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64),
    "huge count of tensors": container(n_tensors=HUGE),
    "huge count of metadata": container(n_pairs=HUGE),
    "huge key": container([struct.pack("<Q", HUGE)]),
    "long key": container([pair("k" * 70000, 4, bytes(4))]),
    "huge text": container([pair("k", 8, struct.pack("<Q", HUGE))]),
    "text beyond the file": container([pair("k", 8, struct.pack("<Q", 5000))]),
    "huge array": container([pair("k", 9, struct.pack("<IQ", 5, HUGE))]),
    "huge array of texts": container([pair("k", 9, struct.pack("<IQ", 8, HUGE))]),
    "nested array": container([pair("k", 9, struct.pack("<IQIQ", 9, 1, 9, 1))]),
    "unknown kind of metadata": container([pair("k", 13, bytes(8))]),
    "unknown kind of array": container([pair("k", 9, struct.pack("<IQ", 77, 1) + bytes(8))]),
    "key twice": container([pair("k", 4, bytes(4))] * 2),
    "key that is no text": container([struct.pack("<Q", 2) + b"\xff\xfe" + bytes(8)]),
    "tensor twice": container(entries=[entry("t"), entry("t", offset=128)]),
    "tensors overlap": container(entries=[entry("a", (64,)), entry("b", (64,), offset=32)]),
    "tensor inside another": container(entries=[entry("a", (512,)), entry("b", (8,), offset=64)]),
    "tensor beyond the file": container(entries=[entry("a", (8192,))]),
    "offset beyond the file": container(entries=[entry("a", (8,), offset=HUGE)]),
    "sizes that overflow": container(entries=[entry("a", (2**40, 2**40, 2**40))]),
    "size of 2^60": container(entries=[entry("a", (HUGE,))]),
    "size of nothing": container(entries=[entry("a", (0,))]),
    "many sizes": container(entries=[entry("a", (1,) * 5)]),
    "2^32 sizes": container(entries=[text("a") + struct.pack("<I", 2**32 - 1) + bytes(64)]),
    "unknown type": container(entries=[entry("a", (32,), 4)]),
    "type of the future": container(entries=[entry("a", (32,), 1000)]),
    "row that is no whole block": container(entries=[entry("a", (33,), 2)]),
    "odd offset": container(entries=[entry("a", (8,), offset=8)]),
    "no alignment": container([pair("general.alignment", 4, bytes(4))]),
    "odd alignment": container([pair("general.alignment", 4, struct.pack("<I", 12))]),
    "huge alignment": container([pair("general.alignment", 10, struct.pack("<Q", HUGE))]),
    "alignment in words": container([pair("general.alignment", 8, text("32"))]),
    "truncated": container([pair("k", 8, text("v"))], [entry("t")])[:60],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name, tmp_path):
    import tracemalloc

    path = tmp_path / "hostile.gguf"
    path.write_bytes(HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"hostile\.gguf is (not|neither)"):
            jaxllm.load(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 1400), st.integers(0, 255)), min_size=1, max_size=6))
def test_no_bytes_of_a_header_break_the_reader(changes, plain):
    """Whatever a header says, the file is read or refused with a sentence."""
    path = plain.with_name("fuzzed.gguf")
    data = bytearray(plain.read_bytes())
    for at, byte in changes:
        data[at] = byte
    path.write_bytes(data)
    with contextlib.suppress(JaxllmError):
        load_config(path)
    with contextlib.suppress(CheckpointError):
        assert sum(t.nbytes for t in read_gguf(path).tensors.values()) <= len(data)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(max_size=200), numbers=st.lists(st.integers(0, 2**64 - 1), max_size=6))
def test_no_junk_breaks_the_reader(junk, numbers, tmp_path):
    path = tmp_path / "junk.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + struct.pack(f"<{len(numbers)}Q", *numbers) + junk)
    with contextlib.suppress(CheckpointError):
        assert read_gguf(path).tensors == {}


# ---- split files -------------------------------------------------------------------------------------------


def split(folder: pathlib.Path, count: int = 3, **wrong) -> list[pathlib.Path]:
    """The plain model in parts, as llama.cpp's gguf-split leaves it."""
    pytest.importorskip("gguf")
    import gguf

    made, parts = tensors(), []
    for i in range(count):
        path = folder / f"model-{i + 1:05d}-of-{count:05d}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        if i == 0:
            for key, value in LLAMA.items():
                (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"llama.{key}", value)
        writer.add_uint16("split.no", wrong.get(f"no{i}", i))
        writer.add_uint16("split.count", wrong.get("said", count))
        writer.add_int32("split.tensors.count", wrong.get("tensors", len(made)))
        for name in [*list(made)[i::count], *wrong.get(f"more{i}", ())]:
            writer.add_tensor(name, made[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        parts.append(path)
    return parts


def test_all_parts_are_one_model(tmp_path, plain):
    (tmp_path / "parts").mkdir()
    parts = split(tmp_path / "parts")
    want = flatten(jaxllm.load(plain).params)
    for given_path in (parts[0], parts[2], tmp_path / "parts"):
        got = flatten(jaxllm.load(given_path).params)
        assert got.keys() == want.keys()
        assert all(np.array_equal(got[path], want[path]) for path in want)
        assert open_source(given_path).packed_bytes == sum(part.stat().st_size for part in parts)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"no1": 0}, "should be part 1 of 3, but says 0 of 3"),
        ({"no0": 2, "no2": 0}, "should be part 0 of 3, but says 2 of 3"),
        ({"said": 2}, "is a part of 2; it should be named like"),
        ({"tensors": 99}, "hold 11 tensors, and should hold 99"),
        ({"more2": ["token_embd.weight"]}, "repeats the tensor 'token_embd.weight' of another part"),
    ],
)
def test_parts_that_contradict_each_other(wrong, sentence, tmp_path):
    parts = split(tmp_path, **wrong)
    with pytest.raises(CheckpointError, match=sentence):
        jaxllm.load(parts[0])


def test_a_part_is_missing(tmp_path):
    parts = split(tmp_path)
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 3 parts, model-00002-of-00003.gguf first"):
        jaxllm.load(parts[0])
    renamed = parts[0].rename(tmp_path / "first.gguf")
    with pytest.raises(CheckpointError, match=r"should be named like NAME-00001-of-00003.gguf"):
        jaxllm.load(renamed)


def test_nothing_is_warned_of_without_need(plain):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jaxllm.load(plain)
