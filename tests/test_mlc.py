"""MLC-LLM's weight folders: its own files as goldens, read and written."""

from __future__ import annotations

import json
import pathlib
import shutil
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

import jaxllm
from jaxllm import cli, layers, ops
from jaxllm.checkpoint import mlc, mlc_writer
from jaxllm.checkpoint.canonical import destination, flatten
from jaxllm.checkpoint.mlc_files import Written
from jaxllm.checkpoint.mlc_index import read_index
from jaxllm.checkpoint.mlc_names import ARCHITECTURES, REFUSED
from jaxllm.checkpoint.mlc_writer import SCHEMES, write_mlc
from jaxllm.checkpoint.source import open_source
from jaxllm.families import model_config
from jaxllm.quant import FORMATS, QTensor, dequantize
from jaxllm.quant.encode import encode
from jaxllm.quant.qtensor import unpack
from tests import folders
from tests.parity import QUICK, all_cases

FORWARD = jax.jit(layers.forward, static_argnums=0, compiler_options=QUICK)
GOLDEN = ("q0f16", "q4f16_1", "q4f32_1")
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def written(shared, tmp_path_factory):
    """The golden checkpoint in each of MLC-LLM's schemes that has a golden."""
    out = tmp_path_factory.mktemp("golden")
    return {q: write_mlc(shared / "mlc_golden" / "tinyllama", out / q, q) for q in GOLDEN}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Llama whose rows are no whole number of groups: widths of 16 and 24, groups of 32 and 40."""
    return folders.write(tmp_path_factory.mktemp("tiny") / "hub")


@pytest.fixture(scope="module")
def converted(tiny, tmp_path_factory):
    """It in every scheme."""
    out = tmp_path_factory.mktemp("converted")
    return {q: write_mlc(tiny, out / q, q) for q in SCHEMES}


# ---- against MLC-LLM's own files --------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", GOLDEN)
def test_every_file_is_the_one_mlc_llm_writes(written, shared, scheme):
    found = files(written[scheme])
    assert found.pop(mlc.CONFIG)
    assert found == files(shared / "mlc_golden" / f"out_{scheme}")


@pytest.mark.parametrize(("scheme", "most"), [("q4f32_1", 1e-5), ("q4f16_1", 0.03)])
def test_logits_are_those_of_its_own_library(written, shared, scheme, most):
    """In q4f16_1 its library multiplies and adds in f16, which moves its logits, of size 4, by 0.02.

    The definition is held against it: the CPU's kernels round activations to 8 bits beside 4-bit weights."""
    golden = np.load(shared / "mlc_golden" / f"tiny_{scheme}_logits.npz")
    model = jaxllm.load(written[scheme])
    with ops.portable():
        logits, _ = FORWARD(model.config, model.params, golden["tokens"][None])
    logits = np.asarray(logits[0, -len(golden["logits"]) :], np.float32)
    assert np.abs(logits - golden["logits"]).max() < most
    np.testing.assert_array_equal(logits.argmax(-1), golden["logits"].argmax(-1))


@pytest.mark.parametrize("scheme", ["q3f16_1", "q4f16_1", "q4f32_1"])
@pytest.mark.parametrize("shape", ["2x13", "16x128", "16x120", "64x172"])
def test_words_and_scales_of_its_own_tests(shared, scheme, shape):
    """They divide in f32, where its library rounds to f16 in between: few codes differ, and by one."""
    vectors = np.load(shared / "mlc_ref" / "mlc_group_quant_vectors.npz")
    w, words, scale, values = (vectors[f"{scheme}_{shape}_{k}"] for k in ("w", "q", "scale", "dq"))
    q = encode(w, FORMATS[scheme])
    np.testing.assert_array_equal(q.scale, scale)
    codes, high = mlc.from_words(words, q.format.bits)
    read = replace(q, codes=codes, high=high)
    np.testing.assert_array_equal(mlc_writer.to_words(read), words)
    np.testing.assert_allclose(dequantize(read, np.float32), values, rtol=1e-6)
    one, two = (unpack(x.codes, x.high, q.format.bits).astype(int) for x in (q, read))
    assert np.abs(one - two).max() <= 1
    assert (one != two).mean() <= (0 if scheme == "q4f32_1" else 0.005)


def test_awq_of_its_own_tests(shared):
    """They have the layout of its first AWQ: words along the in axis, nibbles in order."""
    vectors = np.load(shared / "mlc_ref" / "mlc_awq_vectors.npz")
    folder = mlc.Folder(pathlib.Path(), {}, {}, None, mlc.scheme("q4f16_awq"), (128, 128))
    q = mlc._awq(folder, "w", {k: vectors[k] for k in ("qweight", "qzeros", "scales")}, None)
    assert (q.shape, q.format.group) == ((2, 4096), 128)
    np.testing.assert_allclose(dequantize(q, np.float32), vectors["dq"], rtol=1e-6)


def blank_shards(index: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The index in a folder of its own, with files of the right size that hold nothing."""
    shutil.copyfile(index, folder / index.name.removeprefix("phi3_"))
    for record in json.loads(index.read_text())["records"]:
        with (folder / record["dataPath"]).open("wb") as file:
            file.truncate(record["nbytes"])
    return folder / index.name.removeprefix("phi3_")


def test_a_real_folder_is_understood(shared, tmp_path):
    """Qwen 2.5 0.5B in q4f16_1 as its users have it, but for the values."""
    shutil.copyfile(shared / "mlc_meta" / "mlc-chat-config.json", tmp_path / mlc.CONFIG)
    index = read_index(blank_shards(shared / "mlc_meta" / "tensor-cache.json", tmp_path))
    source = open_source(tmp_path)
    config = model_config(source.family, source.values)
    assert (config.width, config.vocab, len(config.blocks), config.tied) == (896, 151936, 24, True)
    assert source.values["eos_token_id"] == [151645, 151643]
    assert source.generation["temperature"] == 0.7
    assert source.generation["top_p"] == 0.8
    found = mlc.tensors(mlc.open_folder(tmp_path), index)
    assert len(found) == 170
    assert all(destination(name, source.family) for name in found)
    down = found["model.layers.0.mlp.down_proj.weight"]()
    assert isinstance(down, QTensor)
    assert (down.shape, down.format) == ((896, 4864), FORMATS["q4f16_1"])


def hub_names_of_qwen() -> list[str]:
    layer = [f"self_attn.{x}_proj.{leaf}" for x in "qkv" for leaf in ("weight", "bias")]
    layer += ["self_attn.o_proj.weight", *(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down"))]
    layer += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    layers = [f"model.layers.{i}.{name}" for i in range(24) for name in layer]
    return sorted([*layers, "model.embed_tokens.weight", "model.norm.weight"])


def stored_in(index: pathlib.Path) -> dict[str, tuple[list[int], str]]:
    """Name -> (shape, dtype) of an index."""
    records = [t for shard in json.loads(index.read_text())["records"] for t in shard["records"]]
    return {t["name"]: (t["shape"], t["dtype"]) for t in records}


def rewritten(monkeypatch, tmp_path, makes, stored) -> list[dict]:
    """The shards that the tensors `makes` give, sums and bytes left out."""
    monkeypatch.setattr(Written, "_commit", lambda self, records, data: self.shards.append(dict(records=records)))
    out = Written(tmp_path)
    for made in makes:
        stem = made.name.removesuffix("weight")
        parts = [f"{stem}q_weight", f"{stem}q_scale"] if f"{stem}q_weight" in stored else [made.name]
        for name in parts:
            shape, dtype = stored[name]
            out.add(name, np.zeros(shape, dtype))
    out._flush()
    return [shard["records"] for shard in out.shards]


def test_shards_and_order_of_a_real_folder(shared, tmp_path, monkeypatch):
    path = shared / "mlc_meta" / "tensor-cache.json"
    index = json.loads(path.read_text())
    names = hub_names_of_qwen()
    makes = mlc_writer.plan(ARCHITECTURES["qwen2"], names, tied=True)
    assert rewritten(monkeypatch, tmp_path, makes, stored_in(path)) == [s["records"] for s in index["records"]]
    assert mlc_writer.loaded(makes, {"one": names}, dict.fromkeys(names, 1)) == len(names)


def test_shards_and_order_of_a_checkpoint_in_two_files(shared, tmp_path, monkeypatch):
    """Phi 3 mini: the index of the hub starts with the head, which lies in the second file."""
    path = shared / "mlc_meta" / "phi3_ndarray-cache.json"
    layer = ["input_layernorm", "post_attention_layernorm", "mlp.down_proj", "mlp.gate_up_proj"]
    layer += ["self_attn.o_proj", "self_attn.qkv_proj"]
    names = [f"model.layers.{i}.{name}.weight" for i in range(32) for name in layer]
    names = sorted([*names, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])

    def second(name: str) -> bool:
        number = int(name.split(".")[2]) if "layers" in name else 99
        return name != "model.embed_tokens.weight" and (number > 21 or (number == 21 and "o_proj" not in name))

    by_file: dict[bool, list[str]] = {}
    for name in names:
        by_file.setdefault(second(name), []).append(name)
    makes = mlc_writer.plan(ARCHITECTURES["phi3"], [n for part in by_file.values() for n in part], tied=False)
    index = json.loads(path.read_text())
    assert rewritten(monkeypatch, tmp_path, makes, stored_in(path)) == [s["records"] for s in index["records"]]
    assert mlc_writer.loaded(makes, by_file, dict.fromkeys(names, 1)) == len(names)


def test_parameters_are_counted_as_often_as_their_file_is_loaded():
    """A fused tensor in two files loads the second one early; in its turn it is loaded again."""
    by_file = {"b": ["lm_head.weight", "x.mlp.up_proj.weight"], "a": ["w.weight", "x.mlp.gate_proj.weight"]}
    makes = mlc_writer.plan(ARCHITECTURES["llama"], [n for part in by_file.values() for n in part], tied=False)
    assert [m.name for m in makes] == ["lm_head.weight", "x.mlp.gate_up_proj.weight", "w.weight"]
    sizes = {"lm_head.weight": 1, "x.mlp.up_proj.weight": 10, "w.weight": 100, "x.mlp.gate_proj.weight": 1000}
    assert mlc_writer.loaded(makes, by_file, sizes) == 1111
    by_file = {
        "b": ["lm_head.weight", "x.mlp.up_proj.weight"],
        "c": ["w.weight"],
        "a": ["x.mlp.gate_proj.weight", "z"],
    }
    makes = mlc_writer.plan(ARCHITECTURES["llama"], [n for part in by_file.values() for n in part], tied=False)
    assert mlc_writer.loaded(makes, by_file, sizes | {"z": 10000}) == 11111 + 11000


# ---- there and back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_written_is_read(converted, scheme):
    format, weights = FORMATS[scheme], folders.tensors()
    model = jaxllm.load(converted[scheme])
    params = flatten(model.params)
    assert model.config.dtype == format.dtype
    shards = [file for file in converted[scheme].iterdir() if file.suffix == ".bin"]
    assert open_source(converted[scheme]).packed_bytes == sum(file.stat().st_size for file in shards)
    for path, leaf in params.items():
        w = weights[folders.hub_name(path)].astype(DTYPES[format.dtype])
        ends = path in ("embed.w", "head.w")
        if w.ndim == 1 or scheme in mlc.PLAIN or (ends and not format.ends):
            w = w.astype(ml_dtypes.bfloat16).astype(np.float32) if format.dtype == "float32" else w
            np.testing.assert_array_equal(np.asarray(leaf), w, err_msg=path)
            continue
        want = encode(w, format)
        assert (leaf.format, leaf.shape, leaf.dtype) == (format, want.shape, want.dtype)
        scale = want.scale.astype(ml_dtypes.bfloat16) if format.dtype == "float32" else want.scale
        np.testing.assert_array_equal(np.asarray(leaf.scale), scale.astype(want.scale.dtype), err_msg=path)
        codes = [
            unpack(np.asarray(q.codes), None if q.high is None else np.asarray(q.high), format.bits)
            for q in (leaf, want)
        ]
        np.testing.assert_array_equal(*codes, err_msg=path)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_writing_what_was_read_gives_the_same_bytes(converted, tmp_path, scheme):
    again = write_mlc(converted[scheme], tmp_path / "again", scheme)
    assert files(again) == files(converted[scheme])


def test_transposed_layouts_hold_the_same_words(converted):
    """Of q4f16_0 and q4f16_1: all but the embedding is turned."""
    one, two = (
        {t.name: np.asarray(mlc.read(t)) for t in mlc.checked_index(converted[q]).tensors}
        for q in ("q4f16_0", "q4f16_1")
    )
    assert one.keys() == two.keys()
    turned = [n for n in one if n.rpartition(".")[2] in ("q_weight", "q_scale") and "embed" not in n]
    assert len(turned) == 2 * (4 * 2 + 1)
    for name in one:
        np.testing.assert_array_equal(one[name].T if name in turned else one[name], two[name])


def test_another_scheme_from_an_unquantized_folder(converted, tiny, tmp_path):
    """q0f32 is stored as bf16, so this is what the rounded checkpoint gives."""
    weights = {n: w.astype(ml_dtypes.bfloat16).astype(np.float32) for n, w in folders.tensors().items()}
    want = write_mlc(folders.write(tmp_path / "rounded", weights), tmp_path / "want", "q4f16_1")
    again = files(write_mlc(converted["q0f32"], tmp_path / "again", "q4f16_1"))
    expected = files(want)
    assert again["params_shard_0.bin"] != b""
    one, two = (json.loads(f["tensor-cache.json"])["records"][0]["records"] for f in (again, expected))
    assert sorted(t["name"] for t in one) == sorted(t["name"] for t in two)
    a, b = (jaxllm.load(p).params["layers"][1]["ffn"]["down"]["w"] for p in (tmp_path / "again", want))
    np.testing.assert_array_equal(a.codes, b.codes)


def test_halves_may_be_rounded_away_from_zero(tmp_path):
    weights = folders.tensors()
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name][:] = 1.5
    weights[name][:, 0] = 7.0  # a scale of 1, and 1.5 + 7 lies between two codes
    hub = folders.write(tmp_path / "hub", weights)
    found = {}
    for rounding in ("even", "away"):
        folder = write_mlc(hub, tmp_path / rounding, "q4f16_1", rounding=rounding)
        q = jaxllm.load(folder).params["layers"][0]["ffn"]["down"]["w"]
        found[rounding] = set(unpack(np.asarray(q.codes), None, 4)[:, 1:24].ravel().tolist())
    assert found == {"even": {8}, "away": {9}}


def test_the_config_beside_the_weights(tmp_path):
    generation = dict(temperature=0.6, top_p=0.95, eos_token_id=[2, 3])
    hub = folders.write(tmp_path / "hub", generation=generation)
    tokenizer = jaxllm.bundled() / "tokenizer.json"
    shutil.copyfile(tokenizer, hub / "tokenizer.json")
    out = write_mlc(hub, tmp_path / "out", "q4f16_1")
    chat = json.loads((out / mlc.CONFIG).read_text())
    assert (chat["model_type"], chat["quantization"], chat["vocab_size"]) == ("llama", "q4f16_1", 64)
    assert (chat["context_window_size"], chat["temperature"], chat["top_p"]) == (64, 0.6, 0.95)
    assert chat["tokenizer_files"] == ["tokenizer.json"]
    assert (out / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    assert chat["conv_template"]["stop_token_ids"] == [2, 3]
    model = jaxllm.load(out)
    assert model.eos_ids == {2, 3}
    assert model.defaults["temperature"] == 0.6
    assert model.tokenizer is not None


def test_a_packed_model_generates(converted):
    model = jaxllm.load(converted["q3f16_1"])
    logits, _ = FORWARD(model.config, model.params, np.array([[1, 5, 9]]))
    plain = jaxllm.load(converted["q0f16"])
    want, _ = FORWARD(plain.config, plain.params, np.array([[1, 5, 9]]))
    assert np.isfinite(np.asarray(logits)).all()
    assert np.corrcoef(np.ravel(logits), np.ravel(want))[0, 1] > 0.8


def test_the_command_line(tiny, tmp_path, capsys):
    mlc_writer.main([str(tiny), str(tmp_path / "one"), "--format", "q4f16_1"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "one")
    cli.main(["quantize", str(tiny), str(tmp_path / "two"), "--format", "q4f16_1", "--to", "mlc", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert report["weights"] == sum(w.size for w in folders.tensors().values())
    assert report["bytes"] == (tmp_path / "two" / "params_shard_0.bin").stat().st_size


# ---- architectures ----------------------------------------------------------------------------------------

# Cases of the parity table, one at least for each architecture that is written.
CASES = """
llama mistral-full qwen2 qwen2-tied qwen3 qwen3-bias gemma gemma2-plain gpt2 mixtral gpt_neox gpt_bigcode phi phi3
qwen qwen2_moe qwen3_moe deepseek deepseek_v2 deepseek_v3 stablelm baichuan internlm internlm2 orion chatglm
starcoder2 cohere minicpm gptj olmo olmo2 nemotron
"""
THEIRS = """
llama llama4 mistral ministral3 gemma gemma2 gemma3 gemma3_text gpt2 mixtral gpt_neox gpt_bigcode phi-msft phi phi3
phi3_v qwen qwen2 qwen2_moe qwen3 qwen3-embedding qwen3_5 qwen3_5_text qwen3_moe deepseek deepseek_v2 deepseek_v3
stablelm baichuan internlm internlm2 rwkv5 rwkv6 orion llava chatglm eagle medusa bert bert-bge starcoder2 cohere
minicpm gptj olmo olmo2 nemotron
"""


@pytest.mark.parametrize("name", CASES.split())
def test_architectures_are_written_and_read(name, tmp_path):
    pytest.importorskip("transformers")
    from tests.tiny import build, save

    case = all_cases()[name]
    reference = build(case.model_type, case.values, attn=case.attn)
    if case.prepare:
        case.prepare(reference)
    hub = save(reference, tmp_path / "hub")
    if case.convert:
        case.convert(hub)
    want = jaxllm.load(hub, max_len=case.max_len)
    found = jaxllm.load(write_mlc(hub, tmp_path / "mlc", "q0f32"), max_len=case.max_len)
    assert found.config == want.config
    one, two = flatten(found.params), flatten(want.params)
    assert one.keys() == two.keys()
    for path in one:
        rounded = np.asarray(two[path], np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
        # w + 1 is rounded once where MLC-LLM has it, and w where the hub does.
        np.testing.assert_allclose(one[path], rounded, rtol=2**-7, atol=2**-8, err_msg=path)
        if not path.endswith((".pre.w", ".post.w", "norm.w")):
            np.testing.assert_array_equal(one[path], rounded, err_msg=path)


def test_all_of_mlc_llms_architectures_are_read_or_refused_by_name():
    theirs = THEIRS.split()
    assert len(theirs) == 47
    assert ARCHITECTURES.keys() | REFUSED.keys() == set(theirs)
    assert not ARCHITECTURES.keys() & REFUSED.keys()
