"""MLC-LLM folders made by hand: schemes that are only read, and files that are refused."""

from __future__ import annotations

import copy
import hashlib
import json
import pathlib
import shutil
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxllm
from jaxllm import layers
from jaxllm.checkpoint import mlc
from jaxllm.checkpoint.canonical import flatten
from jaxllm.checkpoint.mlc_index import read_index
from jaxllm.checkpoint.mlc_writer import write_mlc
from jaxllm.errors import CheckpointError, ConfigError, JaxllmError
from jaxllm.quant import QTensor, dequantize
from tests import folders
from tests.parity import QUICK, all_cases

FORWARD = jax.jit(layers.forward, static_argnums=0, compiler_options=QUICK)
MODEL = {k: v for k, v in folders.CONFIG.items() if k != "model_type"}
E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


def made(folder: pathlib.Path, tensors: dict[str, np.ndarray], scheme: str, **model) -> pathlib.Path:
    """One shard of these tensors with its index and config, written here and not by the package."""
    folder.mkdir(parents=True, exist_ok=True)
    data, records = b"", []
    for name, x in tensors.items():
        kept = x.astype(ml_dtypes.bfloat16) if x.dtype == np.float32 else x
        record = dict(name=name, shape=list(x.shape), dtype=x.dtype.name, format="f32-to-bf16")
        records.append(record | dict(nbytes=kept.nbytes, byteOffset=len(data)))
        data += np.ascontiguousarray(kept).tobytes()
    (folder / "params_shard_0.bin").write_bytes(data)
    shard = dict(dataPath="params_shard_0.bin", format="raw-shard", nbytes=len(data), records=records)
    shard["md5sum"] = hashlib.md5(data).hexdigest()
    folders.write_json(folder / "tensor-cache.json", {"metadata": {}, "records": [shard]})
    chat = dict(model_type="llama", quantization=scheme, model_config=MODEL | model)
    folders.write_json(folder / mlc.CONFIG, chat)
    return folder


def fused(dtype: type) -> dict[str, np.ndarray]:
    """The tiny Llama's tensors under MLC-LLM's names."""
    weights = {n: w.astype(dtype) for n, w in folders.tensors().items()}
    out = {}
    for name, w in weights.items():
        for first, others, to in (
            ("q_proj", ("k_proj", "v_proj"), "qkv_proj"),
            ("gate_proj", ("up_proj",), "gate_up_proj"),
        ):
            if f".{first}." in name:
                parts = [w, *(weights[name.replace(first, other)] for other in others)]
                out[name.replace(first, to)] = np.concatenate(parts)
                break
        else:
            if not any(f".{x}_proj." in name for x in ("k", "v", "up")):
                out[name] = w
    return out


def matrices(tensors: dict[str, np.ndarray]) -> list[str]:
    return [n for n, x in tensors.items() if x.ndim == 2 and "embed" not in n and "lm_head" not in n]


def expanded(model) -> list[np.ndarray]:
    """Its q, k, v of the first layer, as values, one above the other."""
    mixer = model.params["layers"][0]["mixer"]
    return np.concatenate([np.asarray(dequantize(mixer[x]["w"], np.float32)) for x in "qkv"])


# ---- schemes that are only read ---------------------------------------------------------------------------


def test_awq(tmp_path):
    """Words hold eight out columns in the order 0 2 4 6 1 3 5 7; zeros likewise."""
    rng, tensors = np.random.default_rng(0), fused(np.float16)
    want = {}
    for name in matrices(tensors):
        N, K = tensors[name].shape
        G = K // 8
        codes, zero = rng.integers(0, 16, (K, N)), rng.integers(0, 16, (G, N))
        scale = rng.uniform(0.1, 1, (G, N)).astype(np.float16)
        want[name] = ((codes - np.repeat(zero, 8, 0)) * np.repeat(scale, 8, 0).astype(np.float32)).T
        del tensors[name]
        stem = name.removesuffix("weight")
        for part, x in (("qweight", awq_words(codes)), ("qzeros", awq_words(zero)), ("scales", scale)):
            tensors[stem + part] = x
    model = jaxllm.load(made(tmp_path, tensors, "q4f16_autoawq"))
    np.testing.assert_array_equal(expanded(model), want["model.layers.0.self_attn.qkv_proj.weight"])
    assert model.config.dtype == "float16"


def awq_words(codes: np.ndarray) -> np.ndarray:
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * place)
    return words


@pytest.mark.parametrize("packed", [False, True], ids=["fp8", "u32"])
def test_fp8_with_a_scale_a_matrix(tmp_path, packed):
    tensors = fused(np.float16)
    want = {}
    for name in matrices(tensors):
        w, stem = tensors.pop(name), name.removesuffix("weight")
        scale = np.array([np.abs(w.astype(np.float32)).max() / 448], ml_dtypes.bfloat16).astype(np.float32)
        codes = (w.astype(np.float32) / scale).astype(E4M3)
        want[name] = codes.astype(np.float32) * scale
        tensors[f"{stem}q_weight"] = codes.view(np.uint32) if packed else codes
        tensors[f"{stem}q_scale"] = scale
        tensors[f"{stem}q_calibration_scale"] = np.ones(1, np.float32)
    model = jaxllm.load(made(tmp_path, tensors, "e4m3_e4m3_f16"))
    np.testing.assert_array_equal(expanded(model), want["model.layers.0.self_attn.qkv_proj.weight"])


def test_fp8_without_a_scale(tmp_path):
    tensors = fused(np.float16)
    for name in matrices(tensors):
        tensors[f"{name.removesuffix('weight')}q_weight"] = tensors.pop(name).astype(E5M2)
    model = jaxllm.load(made(tmp_path, tensors, "e5m2_e5m2_f16"))
    want = tensors["model.layers.0.self_attn.qkv_proj.q_weight"].astype(np.float32)
    np.testing.assert_array_equal(expanded(model), want)


def test_fp8_with_block_scales(tmp_path):
    """Blocks of 8 rows and 16 columns, neither of which divides every matrix."""
    tensors, rng, want = fused(ml_dtypes.bfloat16), np.random.default_rng(0), {}
    for name in matrices(tensors):
        N, K = tensors[name].shape
        scale = rng.integers(1, 64, (-(-N // 8), -(-K // 16))).astype(np.float32)
        codes = tensors[name].astype(E4M3)
        wide = np.repeat(np.repeat(scale, 8, 0)[:N], 16, 1)[:, :K]
        tensors[name], want[name] = codes, codes.astype(np.float32) * wide
        tensors[f"{name}_scale_inv"] = scale
    folder = made(tmp_path, tensors, "fp8_e4m3fn_bf16_block_scale", weight_block_size=[8, 16])
    model = jaxllm.load(folder)
    np.testing.assert_array_equal(expanded(model), want["model.layers.0.self_attn.qkv_proj.weight"])
    down = model.params["layers"][1]["ffn"]["down"]["w"]
    np.testing.assert_array_equal(dequantize(down, np.float32), want["model.layers.1.mlp.down_proj.weight"])


@pytest.mark.parametrize("name", ["ndarray-cache.json", "tensor-cache-b16.json", "ndarray-cache-b16.json"])
def test_other_names_of_the_index(tmp_path, name):
    folder = write_mlc(folders.write(tmp_path / "hub"), tmp_path / "mlc", "q4f32_1")
    want = jaxllm.load(folder).params["layers"][0]
    kept = "tensor-cache-b16.json" if "b16" in name else "tensor-cache.json"
    (folder / kept).rename(folder / "kept")
    for other in folder.glob("*-cache*.json"):
        other.unlink()
    (folder / "kept").rename(folder / name)
    found = jaxllm.load(folder).params["layers"][0]
    np.testing.assert_array_equal(found["mixer"]["pre"]["w"], want["mixer"]["pre"]["w"])
    one, two = found["mixer"]["q"]["w"], want["mixer"]["q"]["w"]
    assert one.scale.dtype == two.scale.dtype == np.float32
    np.testing.assert_array_equal(one.scale, two.scale)


def test_experts_stay_packed(tmp_path):
    """Mixtral's [experts, out, in] in groups, against the same values unpacked."""
    pytest.importorskip("transformers")
    from tests.tiny import build, save

    case = all_cases()["mixtral"]
    hub = save(build(case.model_type, case.values), tmp_path / "hub")
    model = jaxllm.load(write_mlc(hub, tmp_path / "mlc", "q4f32_1"))
    ffn = model.params["layers"][0]["ffn"]
    assert [ffn[x]["w"].format.name for x in ("gate", "up", "down")] == ["q4f32_1"] * 3
    tokens = np.arange(3, 12)[None]
    found, _ = FORWARD(model.config, model.params, tokens)
    packed = lambda x: isinstance(x, QTensor)
    plain = jax.tree.map(lambda x: dequantize(x) if packed(x) else x, model.params, is_leaf=packed)
    want, _ = FORWARD(model.config, plain, tokens)
    np.testing.assert_allclose(found, want, atol=1e-4)


# ---- what is refused --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    return write_mlc(folders.write(folder / "hub"), folder / "mlc", "q4f16_1")


@pytest.fixture
def broken(good, tmp_path):
    shutil.copytree(good, tmp_path / "mlc")
    return tmp_path / "mlc"


def change(folder: pathlib.Path, how) -> None:
    """Apply `how` to the parsed index."""
    path = folder / "tensor-cache.json"
    index = json.loads(path.read_text())
    how(index, index["records"][0], index["records"][0]["records"])
    path.write_text(json.dumps(index))


def put(*path, value):
    def how(index, shard, tensors):
        at = {"index": index, "shard": shard, "tensors": tensors}[path[0]]
        for key in path[1:-1]:
            at = at[key]
        at[path[-1]] = value

    return how


HOSTILE = {
    "no records": (put("index", "records", value=None), "records should be list"),
    "a shard that is a number": (put("index", "records", 0, value=3), "should be dict"),
    "a path out of the folder": (put("shard", "dataPath", value="../x"), "name of a file"),
    "a whole path": (put("shard", "dataPath", value="/etc/passwd"), "name of a file"),
    "a path that is no text": (put("shard", "dataPath", value=["a"]), "name of a file"),
    "another name": (put("shard", "dataPath", value="params_shard_7.bin"), "is missing"),
    "another encoding of shards": (put("shard", "format", value="npz"), "raw-shard"),
    "more bytes than there are": (put("shard", "nbytes", value=2**40), "should have 1099511627776 bytes"),
    "a negative size": (put("shard", "nbytes", value=-1), "should be a size"),
    "no md5": (put("shard", "md5sum", value="abc"), "32 hexadecimal"),
    "another md5": (put("shard", "md5sum", value="0" * 32), "has the md5"),
    "no tensors": (put("shard", "records", value=[]), "take 0 of its"),
    "a tensor that is text": (put("tensors", 0, value="x"), "should be dict"),
    "no name": (put("tensors", 0, "name", value=None), "has no name"),
    "a name twice": (put("tensors", 1, "name", value="lm_head.q_weight"), "twice"),
    "an unknown dtype": (put("tensors", 0, "dtype", value="object"), "is not one of"),
    "a dtype that is a list": (put("tensors", 0, "dtype", value=[]), "is not one of"),
    "an unknown format": (put("tensors", 0, "format", value="zip"), "f32-to-bf16 or raw"),
    "an absurd shape": (put("tensors", 0, "shape", value=[2**40, 2**40]), "does not take"),
    "a negative axis": (put("tensors", 0, "shape", value=[-1, 4]), "should be a size"),
    "an axis of a half": (put("tensors", 0, "shape", value=[0.5]), "should be a size"),
    "many axes": (put("tensors", 0, "shape", value=[1] * 100), "does not take"),
    "other bytes than its shape has": (put("tensors", 0, "nbytes", value=7), "does not take"),
    "an offset within another tensor": (put("tensors", 1, "byteOffset", value=1), "ends at"),
    "an offset outside": (put("tensors", 1, "byteOffset", value=2**40), "ends at"),
    "an offset that is text": (put("tensors", 1, "byteOffset", value="0"), "should be a size"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_index_is_refused(broken, name):
    how, words = HOSTILE[name]
    change(broken, how)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=words):
        jaxllm.load(broken)
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()


def test_a_changed_byte_is_noticed(broken):
    shard = broken / "params_shard_0.bin"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="md5"):
        jaxllm.load(broken)


def test_a_truncated_shard_is_refused(broken):
    shard = broken / "params_shard_0.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="should have"):
        jaxllm.load(broken)


@pytest.mark.parametrize(
    "text", ["", "[", "[]", "{}", '{"records": 1}', "[" * 100_000, '{"a": 1, "a": 2}', "\ud800"]
)
def test_an_index_that_is_none(broken, text):
    (broken / "tensor-cache.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match="does not describe its shards"):
        jaxllm.load(broken)


def test_a_tensor_that_is_missing(broken):
    change(broken, lambda index, shard, tensors: tensors[0].update(name="other.q_weight"))
    with pytest.raises(CheckpointError):
        jaxllm.load(broken)


def test_words_with_bits_that_stand_for_nothing(tmp_path):
    folder = write_mlc(folders.write(tmp_path / "hub"), tmp_path / "mlc", "q3f16_1")
    shard, index = folder / "params_shard_0.bin", json.loads((folder / "tensor-cache.json").read_text())
    data = bytearray(shard.read_bytes())
    data[3] |= 0x80
    shard.write_bytes(data)
    change(folder, put("shard", "md5sum", value=hashlib.md5(data).hexdigest()))
    assert index["records"][0]["records"][0]["name"].endswith("q_weight")
    with pytest.raises(CheckpointError, match="last two bits"):
        jaxllm.load(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(quantization="q4f16_ft"), "convert the model again with q4f16_1"),
        (dict(quantization="q9"), "none of MLC-LLM's"),
        (dict(quantization=None), "none of MLC-LLM's"),
        (dict(model_type="llava"), "vision tower"),
        (dict(model_type="rwkv6"), "time-mixing"),
        (dict(model_type="nothing"), "none of MLC-LLM's"),
        (dict(model_type=["llama"]), "none of MLC-LLM's"),
        (dict(model_config=None), "gen_config"),
        (dict(model_config={}), "is missing"),
        (dict(model_config={"kwargs": 3}), "is missing"),
        (dict(model_type="gemma3"), "text_config"),
        (dict(model_type="phi", model_config={"rotary_dim": "x", "n_embd": 1, "n_head": 1}), "does not fit"),
    ],
)
def test_configs_that_are_refused(broken, changes, words):
    path = broken / mlc.CONFIG
    folders.write_json(path, json.loads(path.read_text()) | changes)
    with pytest.raises(ConfigError, match=words):
        jaxllm.load(broken)


@pytest.mark.parametrize("text", ["", "[]", "{", "3"])
def test_a_config_that_is_none(broken, text):
    (broken / mlc.CONFIG).write_text(text)
    with pytest.raises(ConfigError, match="mlc-chat-config"):
        jaxllm.load(broken)


def test_weights_without_their_config(broken):
    (broken / mlc.CONFIG).unlink()
    with pytest.raises(ConfigError, match="gen_config"):
        jaxllm.load(broken)


def test_numbered_tensors_are_refused(shared, tmp_path):
    """RedPajama 3B as converted in the summer of 2023: without md5 sums, names and a config."""
    index = shared / "mlc_meta" / "rp3b_ndarray-cache.json"
    shutil.copyfile(index, tmp_path / "ndarray-cache.json")
    for record in json.loads(index.read_text())["records"]:
        with (tmp_path / record["dataPath"]).open("wb") as file:
            file.truncate(record["nbytes"])
    chat = dict(model_type="llama", quantization="q4f16_0", model_config=MODEL)
    folders.write_json(tmp_path / mlc.CONFIG, chat)
    with pytest.raises(CheckpointError, match="numbers its tensors"):
        jaxllm.load(tmp_path)
    shutil.copyfile(shared / "mlc_meta" / "rp3b_mlc-chat-config.json", tmp_path / mlc.CONFIG)
    with pytest.raises(ConfigError, match="none of MLC-LLM's"):
        jaxllm.load(tmp_path)


def test_what_cannot_be_written(good, tmp_path):
    hub = folders.write(tmp_path / "hub")
    with pytest.raises(ConfigError, match="q4f16_1"):
        write_mlc(hub, tmp_path / "out", "int4")
    with pytest.raises(ConfigError, match="even"):
        write_mlc(hub, tmp_path / "out", "q4f16_1", rounding="up")
    with pytest.raises(CheckpointError, match="already holds"):
        write_mlc(hub, good, "q4f16_1")
    weights = folders.tensors()
    del weights["model.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(CheckpointError, match="k_proj"):
        write_mlc(folders.write(tmp_path / "less", weights), tmp_path / "out", "q4f16_1")
    other = folders.write(tmp_path / "other")
    folders.write_json(other / "config.json", folders.CONFIG | {"model_type": "granite"})
    with pytest.raises(ConfigError, match="not written"):
        write_mlc(other, tmp_path / "out", "q4f16_1")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def spots(value, path=()):
    """Every place in a parsed index."""
    yield path
    for key, child in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from spots(child, (*path, key))


STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers(-3, 2**40), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_index_is_read_or_refused(good, tmp_path, data):
    """And where it is read, no tensor reaches beyond its shard."""
    index = json.loads((good / "tensor-cache.json").read_text())
    index = copy.deepcopy(index)
    tensors = index["records"][0]["records"]
    del tensors[3:-1]
    path = data.draw(st.sampled_from(list(spots(index))[1:]))
    at = index
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = data.draw(STRANGE)
    folder = tmp_path / "any"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(good / "params_shard_0.bin", folder / "params_shard_0.bin")
    (folder / "tensor-cache.json").write_text(json.dumps(index))
    try:
        found = read_index(folder / "tensor-cache.json")
    except JaxllmError:
        return
    assert all(t.start + t.nbytes <= t.path.stat().st_size for t in found.tensors)


# ---- architectures that are only read ---------------------------------------------------------------------


def hub_folder(name: str, folder: pathlib.Path) -> tuple[dict, dict[str, np.ndarray]]:
    """config.json and tensors of a case of the parity table."""
    from safetensors.numpy import load_file

    from tests.tiny import build, save

    case = all_cases()[name]
    save(build(case.model_type, case.values, attn=case.attn), folder)
    if case.convert:
        case.convert(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def same_model(found, want) -> None:
    assert found.config == want.config
    one, two = flatten(found.params), flatten(want.params)
    assert one.keys() == two.keys()
    for path in one:
        np.testing.assert_allclose(one[path], two[path], rtol=2**-7, atol=2**-7, err_msg=path)


def test_gemma3_and_its_nested_config(tmp_path):
    """The text model's fields lie inside, those MLC-LLM has no name for one level deeper; w + 1 is stored."""
    pytest.importorskip("transformers")
    config, tensors = hub_folder("gemma3_text-old", tmp_path / "hub")
    out = {}
    for name, w in tensors.items():
        if name == "lm_head.weight" or ".up_proj." in name:
            continue
        w = w + 1 if name.endswith("norm.weight") else w
        if ".gate_proj." in name:
            w = np.concatenate([w, tensors[name.replace("gate_proj", "up_proj")]])
        out["language_model." + name.replace("gate_proj", "gate_up_proj")] = w
    own = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    own += ("head_dim", "rms_norm_eps", "hidden_activation", "query_pre_attn_scalar", "rope_scaling")
    text = {k: config[k] for k in own if k in config}
    text["kwargs"] = {k: v for k, v in config.items() if k not in (*own, "vocab_size", "rope_theta")}
    text |= dict(position_embedding_base=config["rope_theta"], context_window_size=8192, prefill_chunk_size=2048)
    folder = made(tmp_path / "mlc", out, "q0f32")
    model = dict(text_config=text, vocab_size=config["vocab_size"], is_text_model=True, context_window_size=8192)
    chat = dict(model_type="gemma3_text", quantization="q0f32", model_config=model)
    folders.write_json(folder / mlc.CONFIG, chat)
    same_model(jaxllm.load(folder), jaxllm.load(tmp_path / "hub"))


def test_phi_in_its_first_spelling(tmp_path):
    pytest.importorskip("transformers")
    config, _ = hub_folder("phi", tmp_path / "hub")
    want = jaxllm.load(tmp_path / "hub")
    folder = write_mlc(tmp_path / "hub", tmp_path / "mlc", "q0f32")
    mixer = want.config.blocks[0].mixer
    chat = json.loads((folder / mlc.CONFIG).read_text())
    chat["model_type"] = "phi-msft"
    chat["model_config"] = dict(
        model_type="phi-msft",
        vocab_size=config["vocab_size"],
        n_positions=want.config.max_len,
        n_embd=want.config.width,
        n_layer=len(want.config.blocks),
        n_inner=want.config.blocks[0].ffn.hidden,
        n_head=mixer.heads,
        n_head_kv=mixer.kv_heads,
        rotary_dim=mixer.rope.dims,
        position_embedding_base=10000,
        layer_norm_epsilon=want.config.norm.eps,
        context_window_size=want.config.max_len,
        head_dim=mixer.head_dim,
        tensor_parallel_shards=1,
    )
    folders.write_json(folder / mlc.CONFIG, chat)
    same_model(jaxllm.load(folder), want)


def test_llama4_and_its_nested_config(tmp_path):
    """Experts stay as the hub has them, [experts, in, gate then up]."""
    pytest.importorskip("transformers")
    config, tensors = hub_folder("llama4_text-old", tmp_path / "hub")
    out = {}
    for name, w in tensors.items():
        if ".shared_expert.up_proj." in name or (".up_proj." in name and "experts" not in name):
            continue
        if name.endswith(".gate_proj.weight"):
            w = np.concatenate([w, tensors[name.replace("gate_proj", "up_proj")]])
        out[
            name.replace("gate_proj.weight", "gate_up_proj.weight").replace(
                "router.weight", "router.router.weight"
            )
        ] = w
    folder = made(tmp_path / "mlc", out, "q0f32")
    text = {k: v for k, v in config.items() if k not in ("model_type", "rope_theta")}
    text |= dict(rope_theta=config.get("rope_theta", 500000.0), prefill_chunk_size=128)
    model = dict(text_config=text, vocab_size=config["vocab_size"], tensor_parallel_shards=1)
    folders.write_json(folder / mlc.CONFIG, dict(model_type="llama4", quantization="q0f32", model_config=model))
    same_model(jaxllm.load(folder), jaxllm.load(tmp_path / "hub"))
