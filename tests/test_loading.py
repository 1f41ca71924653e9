"""Checkpoint folders: what is read, what is refused and in which words, and how much memory it takes."""

import json
import pathlib
import subprocess
import sys
import textwrap
import types

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxllm
from jaxllm import decode
from jaxllm.checkpoint.canonical import flatten
from jaxllm.checkpoint.safetensors import open_file, read_folder
from jaxllm.errors import CheckpointError, ConfigError, JaxllmError, MissingExtraError, TokenizerError
from jaxllm.files import read_object, write_whole
from jaxllm.model import Model
from tests import folders
from tests.folders import CONFIG


def refusal(folder: pathlib.Path, kind: type = CheckpointError, **options) -> str:
    """The sentence with which a folder is refused."""
    with pytest.raises(kind) as caught:
        jaxllm.load(folder, **options)
    assert type(caught.value) is kind
    return str(caught.value)


def config_refusal(tmp_path: pathlib.Path, *, drop: tuple[str, ...] = (), **changes) -> str:
    """The same for a config.json that differs from a good one. No weights are written: none may be read."""
    values = {k: v for k, v in (CONFIG | changes).items() if k not in drop}
    folders.write_json(tmp_path / "config.json", values)
    return refusal(tmp_path, ConfigError)


def same(a: Model, b: Model) -> bool:
    one, two = flatten(a.params), flatten(b.params)
    return one.keys() == two.keys() and all(
        x.dtype == two[k].dtype and np.array_equal(np.asarray(x), np.asarray(two[k])) for k, x in one.items()
    )


# ---- what is read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_come_as_stored(tmp_path, dtype):
    weights = folders.tensors(dtype=dtype)
    model = jaxllm.load(folders.write(tmp_path, weights))
    leaves = flatten(model.params)
    assert leaves.keys() == {*jaxllm.config.params_shape(model.config)}
    for path, x in leaves.items():
        want = weights[folders.hub_name(path)]
        assert x.dtype == want.dtype
        assert np.array_equal(np.asarray(x).view(np.uint8), want.view(np.uint8)), path
    assert model.config.dtype == dtype
    assert model.size == sum(w.size for w in weights.values())
    assert model.nbytes == sum(w.nbytes for w in weights.values())


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("asked", ["float32", "float16", "bfloat16"])
def test_the_dtype_asked_for_is_that_of_matrices_and_activations(tmp_path, stored, asked):
    weights = folders.tensors(dtype=stored)
    model = jaxllm.load(folders.write(tmp_path, weights), dtype=asked)
    for path, x in flatten(model.params).items():
        want = weights[folders.hub_name(path)]
        want = want.astype(asked) if want.ndim == 2 else want
        assert x.dtype == want.dtype
        assert np.array_equal(np.asarray(x), want)
    logits, _ = jaxllm.forward(model.config, model.params, np.array([[1, 2, 3]]))
    assert model.config.dtype == asked
    assert np.isfinite(logits).all()


def test_doubles_become_singles(tmp_path):
    weights = {k: v.astype(np.float64) for k, v in folders.tensors().items()}
    model = jaxllm.load(folders.write(tmp_path, weights))
    assert {str(x.dtype) for x in flatten(model.params).values()} == {"float32"}


def test_a_dtype_that_is_none(tmp_path):
    assert "float32, bfloat16, float16, got 'int8'" in refusal(folders.write(tmp_path), ConfigError, dtype="int8")


@pytest.mark.parametrize("files", [2, 3])
def test_one_file_and_several_give_equal_parameters(tmp_path, files):
    one = folders.write(tmp_path / "one")
    several = folders.write(tmp_path / "several", files=files)
    assert len(list(several.glob("*.safetensors"))) == files
    assert same(jaxllm.load(one), jaxllm.load(several))
    (several / "model.safetensors.index.json").unlink()  # the files alone say the same
    assert same(jaxllm.load(one), jaxllm.load(several))


def test_every_number_format_is_read_as_the_formats_own_library_does(tmp_path):
    rng = np.random.default_rng(0)
    kinds = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]
    wanted = {k: np.frombuffer(rng.bytes(48), np.uint8).copy() for k in kinds}
    wanted = {k: (v % 2 if k == "?" else v).view(k).reshape(2, -1) for k, v in wanted.items()}
    wanted |= {"bf16": np.arange(6, dtype=ml_dtypes.bfloat16), "none": np.zeros((3, 0), np.float32)}
    wanted |= {"one": np.array(3.5, np.float32)}
    save_file(wanted, tmp_path / "a.safetensors", metadata={"format": "np"})
    readers, reference = open_file(tmp_path / "a.safetensors"), load_file(tmp_path / "a.safetensors")
    assert readers.keys() == reference.keys()
    for name, read in readers.items():
        x = read()
        assert (x.dtype, x.shape) == (reference[name].dtype, reference[name].shape)
        assert x.tobytes() == reference[name].tobytes()


def test_readers_read_no_values_before_they_are_called(tmp_path):
    folders.write(tmp_path)
    readers = read_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="has only 60 of its 64 bytes left"):
        readers.pop("model.norm.weight")()  # the last in the file
    assert all(read().size for read in readers.values())


def test_without_tokenizer_files_there_is_no_tokenizer(tmp_path):
    model = jaxllm.load(folders.write(tmp_path))
    assert model.tokenizer is None
    assert model.pieces([1, 2]) == ()
    with pytest.raises(TokenizerError, match=r"has no tokenizer files.*give token ids"):
        decode.generate(model, "text", max_new_tokens=1)
    out = decode.generate(model, [1, 2], max_new_tokens=3)
    assert len(out[0].tokens) == 3
    assert out[0].text is None


def test_the_model_says_what_it_is(tmp_path):
    model = jaxllm.load(folders.write(tmp_path / "tiny"))
    assert repr(model) == (
        f"Model('tiny', {model.size:,} parameters in {model.nbytes / 1e6:.1f} MB, 2 layers, width 16, "
        "vocabulary 64, float32)"
    )


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_load_config_reads_no_weights(tmp_path, name):
    folders.write_json(tmp_path / "config.json", CONFIG | {name: "bfloat16"})
    config = jaxllm.load_config(tmp_path)
    assert (config.vocab, config.width, len(config.blocks), config.dtype) == (64, 16, 2, "bfloat16")


# ---- config.json --------------------------------------------------------------------------------------------


def test_an_unknown_model_type_gets_the_near_ones(tmp_path):
    said = config_refusal(tmp_path, model_type="lama")
    assert "'lama' is not known to jaxllm; did you mean llama" in said
    assert str(tmp_path) in said
    assert "Known are: " in config_refusal(tmp_path, model_type="entirely_else")


def test_a_refused_model_type_says_what_is_lacking(tmp_path):
    assert "jaxllm lacks its time-mixing recurrence" in config_refusal(tmp_path, model_type="rwkv")


@pytest.mark.parametrize("value", [None, 3, ["llama"], {"a": 1}])
def test_a_model_type_of_another_kind(tmp_path, value):
    assert "is not known to jaxllm" in config_refusal(tmp_path, model_type=value)


def test_an_unknown_activation_gets_the_list(tmp_path):
    said = config_refusal(tmp_path, hidden_act="tanhish")
    assert "hidden_act is 'tanhish'; jaxllm knows silu, " in said


@pytest.mark.parametrize(
    "name", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "hidden_act"]
)
def test_a_missing_size(tmp_path, name):
    said = config_refusal(tmp_path, drop=(name,))
    assert name in said
    assert "is missing; it should be" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", "16"),
        ("hidden_size", 0),
        ("hidden_size", -16),
        ("hidden_size", 16.5),
        ("hidden_size", True),
        ("hidden_size", 10**18),
        ("hidden_size", [16]),
        ("num_hidden_layers", 10**6),
        ("num_attention_heads", 10**9),
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", float("nan")),
        ("tie_word_embeddings", "yes"),
        ("hidden_act", 3),
        ("rope_scaling", "linear"),
    ],
)
def test_a_value_of_the_wrong_kind(tmp_path, name, value):
    said = config_refusal(tmp_path, **{name: value})
    assert f"{name} should be " in said
    assert ", got " in said


def test_an_unknown_rope_type_gets_the_list(tmp_path):
    said = config_refusal(tmp_path, rope_scaling={"rope_type": "spiral", "factor": 2.0})
    assert "rope type 'spiral' is not known; jaxllm has default, linear" in said


@pytest.mark.parametrize(
    "rope", [{"rope_type": "linear", "factor": 0}, {"rope_type": "default", "rope_theta": 1e-320}]
)
def test_a_rotary_table_that_is_not_finite(tmp_path, rope):
    said = config_refusal(tmp_path, rope_scaling=rope, head_dim=256, hidden_size=1024)
    assert "not finite" in said


def test_an_unread_field_that_matters_can_be_ignored(tmp_path):
    folders.write(tmp_path, folders.tensors(), config=CONFIG | {"swirl_factor": 2.5})
    said = refusal(tmp_path, ConfigError)
    assert "swirl_factor=2.5 is not understood; if it does not matter, pass ignore=['swirl_factor']" in said
    model = jaxllm.load(tmp_path, ignore=["swirl_factor"])
    assert same(model, jaxllm.load(folders.write(tmp_path / "plain")))


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_an_unread_field_that_says_nothing_is_no_problem(tmp_path, value):
    folders.write_json(tmp_path / "config.json", CONFIG | {"swirl_factor": value})
    assert jaxllm.load_config(tmp_path).width == 16


def test_everything_wrong_with_a_config_is_in_one_error(tmp_path):
    said = config_refusal(
        tmp_path,
        drop=("vocab_size",),
        hidden_act="tanhish",
        rms_norm_eps="small",
        num_key_value_heads=3,
        rope_scaling={"rope_type": "spiral"},
        swirl_factor=1,
        twist={"a": [1]},
    )
    for part in ("vocab_size", "tanhish", "small", "3 key-value heads", "spiral", "swirl_factor", "twist"):
        assert part in said, part
    assert str(tmp_path / "config.json") in said


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"a": 1}}', "\ufeff{}", '{"a": ' * 5000])
def test_a_config_that_is_no_object(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in refusal(tmp_path, ConfigError)


def test_a_folder_without_config(tmp_path):
    assert "has no config.json" in refusal(tmp_path, ConfigError)


@pytest.mark.parametrize("method", [{"quant_method": "aqlm", "bits": 4}, "awq"])
def test_weights_packed_in_an_unknown_way_are_refused(tmp_path, method):
    said = config_refusal(tmp_path, quantization_config=method)
    assert str(tmp_path / "config.json") in said
    assert ("'aqlm' are not read; read are gptq, awq" if isinstance(method, dict) else "an object") in said


# ---- positions wanted -----------------------------------------------------------------------------------------

LONG = {
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [2.0, 4.0]},
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 32}


def frequencies(folder: pathlib.Path, **options) -> tuple[int, np.ndarray]:
    config = jaxllm.load_config(folder, **options)
    return config.max_len, np.array(config.blocks[0].mixer.rope.inv_freq)


def test_longrope_takes_its_long_factors_where_more_positions_are_wanted(tmp_path):
    folders.write_json(tmp_path / "config.json", CONFIG | LONG | {"model_type": "phi3"})
    plain = np.array([1.0, 0.01])
    short, long = frequencies(tmp_path), frequencies(tmp_path, max_len=64)
    assert (short[0], long[0]) == (16, 64)
    np.testing.assert_allclose(short[1], plain)
    np.testing.assert_allclose(long[1], plain / [2, 4])


def test_dynamic_scaling_grows_with_the_positions_wanted(tmp_path):
    folders.write_json(tmp_path / "config.json", CONFIG | DYNAMIC)
    assert frequencies(tmp_path)[0] == 32
    length, grown = frequencies(tmp_path, max_len=64)
    base = 10000 * (2.0 * 64 / 32 - 1) ** (4 / 2)  # transformers' _compute_dynamic_ntk_parameters
    assert length == 64
    np.testing.assert_allclose(grown, [1.0, base**-0.5])


def test_other_models_refuse_more_positions_than_they_were_made_for(tmp_path):
    folders.write(tmp_path)
    said = refusal(tmp_path, ConfigError, max_len=65)
    assert "max_len=65 was asked for; the model was made for 64 positions" in said
    assert jaxllm.load(tmp_path, max_len=64).config.max_len == 64


# ---- weights that do not fit ----------------------------------------------------------------------------------


def test_every_difference_is_in_one_error(tmp_path):
    weights = folders.tensors()
    del weights["model.layers.0.self_attn.q_proj.weight"]
    del weights["model.norm.weight"]
    weights["model.layers.1.mlp.up_proj.weight"] = np.zeros((24, 17), np.float32)
    weights["model.layers.0.self_attn.w_pack.weight"] = np.zeros((4, 4), np.float32)
    weights["model.layers.7.mlp.up_proj.weight"] = np.zeros((24, 16), np.float32)
    weights["model.layers.0.self_attn.k_proj.bias"] = np.zeros(8, np.float32)
    weights["transformer.layers.1.self_attn.o_proj.weight"] = np.zeros((16, 16), np.float32)
    weights["model.layers.0.mlp.down_proj.weight"] = np.zeros((16, 24), np.int8)
    said = refusal(folders.write(tmp_path, weights))
    assert said.startswith(f"{tmp_path} does not hold the weights its config describes")
    for line in (
        "layers.0.mixer.q.w [16, 16] is missing",
        "norm.w [16] is missing",
        "model.layers.1.mlp.up_proj.weight: layers.1.ffn.up.w should have shape [24, 16], got [24, 17]",
        "model.layers.0.self_attn.w_pack.weight: not a tensor of this architecture",
        "model.layers.7.mlp.up_proj.weight: layer 7, but the config has 2",
        "model.layers.0.self_attn.k_proj.bias: the config has no place layers.0.mixer.k.b for it",
        "layers.1.mixer.o.w was already given",
        "model.layers.0.mlp.down_proj.weight: values of dtype int8 are not read",
    ):
        assert line in said, line
    assert "layers.1.ffn.up.w [24, 16] is missing" not in said  # it is there, of another shape


MIXTRAL = CONFIG | {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 1}


def mixtral() -> folders.Tensors:
    weights = {k: v for k, v in folders.tensors().items() if ".mlp." not in k}
    rng = np.random.default_rng(1)
    for i in range(2):
        moe = f"model.layers.{i}.block_sparse_moe."
        weights[moe + "gate.weight"] = rng.standard_normal((3, 16), np.float32)
        for e in range(3):
            for name, shape in (("w1", (24, 16)), ("w2", (16, 24)), ("w3", (24, 16))):
                weights[f"{moe}experts.{e}.{name}.weight"] = rng.standard_normal(shape, np.float32)
    return weights


def test_experts_are_stacked(tmp_path):
    weights = mixtral()
    ffn = jaxllm.load(folders.write(tmp_path, weights, config=MIXTRAL)).params["layers"][1]["ffn"]
    rows = [weights[f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"] for e in range(3)]
    assert np.array_equal(ffn["down"]["w"], np.stack(rows))


def test_incomplete_stacks_of_experts(tmp_path):
    weights = mixtral()
    del weights["model.layers.1.block_sparse_moe.experts.1.w2.weight"]
    weights["model.layers.0.block_sparse_moe.experts.3.w1.weight"] = np.zeros((24, 16), np.float32)
    weights["model.layers.0.block_sparse_moe.experts.0.w3.weight"] = np.zeros((16, 24), np.float32)
    said = refusal(folders.write(tmp_path, weights, config=MIXTRAL))
    assert "layers.1.ffn.down.w [3, 16, 24] lacks 1 of its 3 rows, the first is 1" in said
    assert "experts.3.w1.weight: layers.0.ffn.gate.w" in said
    assert "experts.0.w3.weight: layers.0.ffn.up.w should have shape" in said


def test_more_experts_than_tensors_take_no_memory(tmp_path):
    folders.write(tmp_path, mixtral(), config=MIXTRAL | {"num_local_experts": 2**31})
    assert f"has {2**31} rows, and there are" in refusal(tmp_path)


# ---- files that are not there or not whole --------------------------------------------------------------------


def test_pickles_only(tmp_path):
    folders.write_json(tmp_path / "config.json", CONFIG)
    assert "has no .safetensors file" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    said = refusal(tmp_path)
    assert "PyTorch pickles (pytorch_model.bin)" in said
    assert "save_pretrained(folder, safe_serialization=True)" in said


def change_index(folder: pathlib.Path, **changes: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    folders.write_json(path, index)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model-00009-of-00002.safetensors", "which is not in"),
        ("../x.safetensors", "only name files in its own folder"),
        ("/etc/passwd", "only name files in its own folder"),
        ("..", "which is not in"),
        ("x" * 300, "which is not in"),
        ("a\0b", "which is not in"),
        ("\ud800", "which is not in"),
    ],
)
def test_an_index_that_names_a_file_that_is_not_there(tmp_path, name, said):
    folder = folders.write(tmp_path / "a", files=2)
    (tmp_path / "x.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    change_index(folder, **{"model.norm.weight": name})
    assert said in refusal(folder)


def test_an_index_that_names_a_tensor_its_file_lacks(tmp_path):
    folders.write(tmp_path, files=2)
    change_index(tmp_path, **{"model.more.weight": "model-00001-of-00002.safetensors"})
    said = refusal(tmp_path)
    assert "model-00001-of-00002.safetensors lacks 1 tensors that" in said
    assert "model.more.weight" in said


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 9999]
)
def test_an_index_that_is_none(tmp_path, text):
    folders.write(tmp_path, files=2)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "is not an index of safetensors files" in refusal(tmp_path)


def test_two_files_with_one_tensor(tmp_path):
    folders.write(tmp_path, files=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file({"model.norm.weight": np.ones(16, np.float32)}, tmp_path / "more.safetensors")
    assert "repeats tensors of another file, 'model.norm.weight'" in refusal(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_truncated_file(tmp_path, keep):
    path = folders.write(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    said = refusal(tmp_path)
    assert f"{path} is not a whole safetensors file" in said
    assert "download it again" in said


def test_a_file_in_place_of_a_folder(tmp_path):
    path = folders.write(tmp_path) / "model.safetensors"
    assert "give the folder it lies in" in refusal(path)


@pytest.mark.parametrize("path", ["/no/such/folder", "nowhere", "a" * 5000, "a\0b", "x/y/z", 5])
def test_a_path_that_is_not_there(path):
    with pytest.raises(CheckpointError, match=r"there is no folder|cannot be opened|expected a folder"):
        jaxllm.load(path)


def test_a_bundled_model_that_is_none():
    with pytest.raises(CheckpointError, match="'target', 'draft', 'medusa' and 'eagle', got 'other'"):
        jaxllm.bundled("other")


# ---- the hub ------------------------------------------------------------------------------------------------


def hub(monkeypatch, answer) -> list:
    """huggingface_hub with a snapshot_download of ours; the calls it got."""
    calls = []

    def snapshot_download(name, **options):
        calls.append((name, options))
        return answer()

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


def test_a_hub_id_is_fetched(tmp_path, monkeypatch):
    folder = folders.write(tmp_path / "snapshot")
    calls = hub(monkeypatch, lambda: str(folder))
    monkeypatch.chdir(tmp_path)
    assert same(jaxllm.load("org/name", revision="v1"), jaxllm.load(folder))
    ((name, options),) = calls
    assert (name, options["revision"]) == ("org/name", "v1")
    patterns = options["allow_patterns"]
    assert "*.safetensors" in patterns
    others = set(patterns) - {"chat_templates/*", "params_shard_*.bin"}  # the latter are MLC-LLM's, and no pickles
    assert not any(p.endswith(("bin", "pt", "*")) for p in others)


def test_a_folder_comes_before_a_hub_id(tmp_path, monkeypatch):
    folders.write(tmp_path / "org" / "name")
    calls = hub(monkeypatch, lambda: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    assert jaxllm.load("org/name").config.width == 16
    assert calls == []


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("HTTP 500"), ValueError("bad name")])
def test_a_hub_that_does_not_answer(monkeypatch, error):
    def answer():
        raise error

    hub(monkeypatch, answer)
    with pytest.raises(CheckpointError, match=f"the hub did not give it .*{error}.*HF_TOKEN"):
        jaxllm.load("org/name")


def test_the_errors_of_the_real_hub_library(monkeypatch):
    errors = pytest.importorskip("huggingface_hub.errors")

    def answer():
        raise errors.LocalEntryNotFoundError("offline")

    hub(monkeypatch, answer)
    with pytest.raises(CheckpointError, match="LocalEntryNotFoundError: offline"):
        jaxllm.load("org/name")


def test_a_hub_id_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'jaxllm\[hub\]'"):
        jaxllm.load("org/name")


# ---- end tokens and defaults ------------------------------------------------------------------------------------


def with_tokenizer(folder: pathlib.Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "</s>": 5}, unk_token="a")).save(str(folder / "tokenizer.json"))
    folders.write_json(folder / "tokenizer_config.json", {"eos_token": "</s>"})


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "want"),
    [
        ({"eos_token_id": [7, 8]}, 6, True, {7, 8}),
        ({"eos_token_id": 0}, 6, True, {0}),
        ({"eos_token_id": None, "temperature": 0.5}, 6, True, {6}),
        (None, [6, 9], True, {6, 9}),
        (None, None, True, {5}),
        (None, None, False, set()),
        ({"eos_token_id": []}, 6, True, set()),
    ],
)
def test_where_end_tokens_come_from(tmp_path, generation, config, tokenizer, want):
    folders.write(tmp_path, config=CONFIG | {"eos_token_id": config}, generation=generation)
    if tokenizer:
        with_tokenizer(tmp_path)
    model = jaxllm.load(tmp_path)
    assert model.eos_ids == want
    assert model.defaults == (generation or {})


@pytest.mark.parametrize("value", ["</s>", [1, "2"], {"a": 1}, True, 1.0, [[1]]])
def test_end_tokens_that_are_no_ids(tmp_path, value):
    folders.write(tmp_path, generation={"eos_token_id": value})
    assert "eos_token_id should be a token id or a list of them, got" in refusal(tmp_path, ConfigError)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\x00"])
def test_a_generation_config_that_is_none(tmp_path, text):
    (folders.write(tmp_path) / "generation_config.json").write_text(text)
    assert "generation_config.json" in refusal(tmp_path, ConfigError)


# ---- memory -------------------------------------------------------------------------------------------------

WIDE = CONFIG | dict(
    vocab_size=4096, hidden_size=2048, intermediate_size=4096, num_attention_heads=16, head_dim=128
)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> pathlib.Path:
    """About 150 MB of bf16."""
    return folders.write(tmp_path_factory.mktemp("wide"), folders.tensors(WIDE, "bfloat16"), config=WIDE)


MEASURE = """
    import json, pathlib, sys
    import jax, jax.numpy as jnp
    import jaxllm
    from jaxllm import decode
    from jaxllm.checkpoint.canonical import flatten

    def peak():  # ru_maxrss would begin with what the process that started this one had
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    jnp.zeros(1).block_until_ready()
    start = peak()
    model = jaxllm.load(sys.argv[1], **json.loads(sys.argv[2]))
    loaded = peak() - start
    out = decode.generate(model, [1, 2, 3, 4], max_new_tokens=8, eos=())
    assert len(out[0].tokens) == 8
    largest = max(x.nbytes for x in flatten(model.params).values())
    state = jaxllm.state.nbytes(out.prefix.state)
    print(json.dumps([loaded, peak() - start, model.nbytes, largest, state]))
"""


def measured(folder: pathlib.Path, **options) -> list[int]:
    """Bytes: peak of loading, peak of all, parameters, largest tensor, state."""
    args = [sys.executable, "-c", textwrap.dedent(MEASURE), str(folder), json.dumps(options)]
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_parameters_are_in_memory_once(wide):
    loaded, whole, parameters, largest, state = measured(wide)
    assert 120e6 < parameters < 200e6
    assert 0.9 * parameters < loaded < parameters + largest + 60e6, (
        f"{loaded / 1e6:.0f} MB for {parameters / 1e6:.0f}"
    )
    assert whole < 1.3 * parameters + state + 400e6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_a_cast_holds_one_tensor_more(wide):
    loaded, _, parameters, largest, _ = measured(wide, dtype="float32")
    assert loaded < parameters + 2 * largest + 60e6, f"{loaded / 1e6:.0f} MB for {parameters / 1e6:.0f}"


# ---- files are written whole ------------------------------------------------------------------------------------


def test_a_failure_in_the_middle_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    write_whole(path, b"old")

    def half(self, data):
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", half)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_takes_the_place_of_the_old(tmp_path):
    write_whole(tmp_path / "a", b"old")
    write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 1


def test_every_error_is_one_of_ours():
    kinds = (CheckpointError, ConfigError, MissingExtraError, TokenizerError)
    assert all(issubclass(kind, JaxllmError) for kind in kinds)
    assert jnp.zeros(1).dtype == jnp.float32


@pytest.mark.parametrize(
    ("data", "what", "why"),
    [
        (None, "cannot be read", "No such file"),
        (b"{", "is not valid JSON", "line 1 column 2"),
        (b"\xff", "is not valid JSON", "utf-8"),
        (b"[" * 10**6, "is not valid JSON", "recursion"),
        (b"[1]", "should hold an object", "got list"),
    ],
)
def test_an_object_is_read_or_a_sentence_says_why_not(tmp_path, data, what, why):
    path = tmp_path / "a.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match=why) as caught:
        read_object(path, CheckpointError, "get it again")
    assert str(caught.value).startswith(f"{path} {what}")
    assert str(caught.value).endswith("; get it again")


def test_an_object_that_is_not_there_has_its_own_sentence(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_object(tmp_path / "a.json", ConfigError, "get it again", missing="there is none")
    assert str(caught.value) == "there is none"
    (tmp_path / "a.json").write_text('{"a": [1]}', encoding="utf-8")
    assert read_object(tmp_path / "a.json", ConfigError, "get it again", missing="") == {"a": [1]}
