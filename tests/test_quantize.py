"""Making packed weights: MLC's numbers bit by bit, recipes, jaxllm's own folder, the command, hostile folders."""

import contextlib
import json
import pathlib
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import jaxllm
from jaxllm.checkpoint import native
from jaxllm.checkpoint.canonical import flatten
from jaxllm.checkpoint.safetensors import open_file
from jaxllm.cli import main
from jaxllm.config import params_shape
from jaxllm.errors import CheckpointError, ConfigError, JaxllmError
from jaxllm.model import Model
from jaxllm.quant import FORMATS, QTensor, Recipe, dequantize, encode, named, quantize, read_recipe, recipe
from jaxllm.quant.qtensor import unpack
from jaxllm.quant.recipe import converted
from tests import folders, random_model


@pytest.fixture(scope="module")
def tiny() -> Model:
    return jaxllm.load(jaxllm.bundled("draft"))


def codes(q: QTensor) -> np.ndarray:
    return unpack(q.codes, q.high, q.format.bits)


def same(a: dict, b: dict) -> bool:
    """Whether two parameter trees hold the same bits."""
    one, two = jax.tree.flatten(a), jax.tree.flatten(b)
    return one[1] == two[1] and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(one[0], two[0], strict=True)
    )


# ---- MLC-LLM's numbers --------------------------------------------------------------------------------------


def mlc_codes(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """u32 [N, words] -> u8 [N, columns]: fields from the low end, 32 // bits of them a word."""
    per = 32 // bits
    shifts = (np.arange(per) * bits).astype(np.uint32)
    fields = words[:, :, None] >> shifts & np.uint32(2**bits - 1)
    return fields.reshape(len(words), -1)[:, :columns].astype(np.uint8)


@pytest.mark.parametrize("shape", ["2x13", "16x128", "16x120", "64x172"])
@pytest.mark.parametrize("name", ["q3f16_1", "q4f16_1", "q4f32_1"])
def test_group_quantization_is_that_of_mlcs_own_tests(name, shape, shared):
    """Their numpy form divides by the scale before it is rounded to f16: near ties codes are neighbours."""
    vectors = np.load(shared / "mlc_ref" / "mlc_group_quant_vectors.npz")
    w, words, scale, values = (vectors[f"{name}_{shape}_{part}"] for part in ("w", "q", "scale", "dq"))
    q = encode(w, FORMATS[name])
    f, K = q.format, w.shape[1]
    np.testing.assert_array_equal(q.scale, scale)
    got, wanted = codes(q), mlc_codes(words, f.bits, K)
    assert not got[:, K:].any()  # padding
    exact = w.astype(np.float64) / np.repeat(scale.astype(np.float64), f.group, 1)[:, :K] + f.center
    tie = np.abs(exact - np.floor(exact) - 0.5) < (2**-7 if f.dtype == "float16" else 1e-5)
    np.testing.assert_array_equal(got[:, :K][~tie], wanted[~tie])
    assert np.abs(got[:, :K].astype(int) - wanted).max() <= 1
    assert tie.mean() < 0.02
    np.testing.assert_allclose(dequantize(q, np.float64)[~tie], values[~tie], rtol=2e-3, atol=1e-6)


def mlc_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of an MLC folder as they lie in its one shard; f32 is stored as bf16."""
    kinds = {"uint32": np.uint32, "float16": np.float16, "float32": ml_dtypes.bfloat16}
    (shard,) = json.loads((folder / "tensor-cache.json").read_text())["records"]
    data = (folder / shard["dataPath"]).read_bytes()
    found = {}
    for r in shard["records"]:
        part = data[r["byteOffset"] : r["byteOffset"] + r["nbytes"]]
        found[r["name"]] = np.frombuffer(part, kinds[r["dtype"]]).reshape(r["shape"])
    return found


@pytest.mark.parametrize("name", ["q4f16_1", "q4f32_1"])
def test_a_whole_checkpoint_becomes_what_mlc_makes_of_it(name, shared):
    made = mlc_tensors(shared / "mlc_golden" / f"out_{name}")
    model = jaxllm.load(shared / "mlc_golden" / "tinyllama")
    flat = flatten(jaxllm.quantize(model, name).params)
    fused = {"qkv_proj": "mixer.q mixer.k mixer.v", "o_proj": "mixer.o", "gate_up_proj": "ffn.gate ffn.up"}
    fused |= {"down_proj": "ffn.down"}
    compared = 0
    for stem in (n.removesuffix(".q_weight") for n in made if n.endswith(".q_weight")):
        layer, last = (stem.split(".") * 3)[2], stem.split(".")[-1]
        ends = {"embed_tokens": ["embed.w"], "lm_head": ["head.w"]}
        paths = ends.get(last) or [f"layers.{layer}.{p}.w" for p in fused[last].split()]
        parts = [jax.tree.map(np.asarray, flat[p]) for p in paths]
        got = np.concatenate([codes(q) for q in parts])
        np.testing.assert_array_equal(got, mlc_codes(made[f"{stem}.q_weight"], 4, got.shape[1]), err_msg=stem)
        scale = np.concatenate([q.scale for q in parts]).astype(made[f"{stem}.q_scale"].dtype)
        np.testing.assert_array_equal(scale, made[f"{stem}.q_scale"], err_msg=stem)
        compared += len(parts)
    assert compared == sum(isinstance(leaf, QTensor) for leaf in flat.values())


def test_mlc_zero_groups_and_infinities():
    w = np.ones((2, 64), np.float16)
    w[0, :32] = 0
    w[1, 5], w[1, 6] = np.inf, -np.inf
    q = encode(w, FORMATS["q4f16_1"])
    assert not codes(q)[0, :32].any()
    assert q.scale[0, 0] == 0
    assert codes(q)[1, 5] == codes(q)[1, 6] == 0
    assert codes(q)[1, 32:].tolist() == [14] * 32


def test_mlc_halves_round_to_even_and_in_older_files_away():
    w = np.array([[7, 0.5, 1.5, -0.5, -1.5, *[0] * 27]], np.float16)
    assert codes(encode(w, FORMATS["q4f16_1"]))[0, :5].tolist() == [14, 8, 8, 6, 6]
    assert codes(encode(w, named("q4f16_1", rounding="away")))[0, :5].tolist() == [14, 8, 9, 7, 6]


def test_mlc_bf16_rounds_only_the_scale():
    w = np.random.default_rng(0).standard_normal((8, 64)).astype(ml_dtypes.bfloat16)
    groups = w.astype(np.float32).reshape(8, 2, 32)
    scale = (np.abs(groups).max(-1) / np.float32(7)).astype(ml_dtypes.bfloat16)
    wanted = np.clip(np.rint(groups / scale.astype(np.float32)[..., None] + np.float32(7)), 0, 14)
    q = encode(w, FORMATS["q4bf16_1"])
    np.testing.assert_array_equal(q.scale, scale)
    np.testing.assert_array_equal(codes(q), wanted.reshape(8, 64))


# ---- accuracy -----------------------------------------------------------------------------------------------


def nll(model: Model, windows: np.ndarray) -> float:
    y, _ = jax.jit(jaxllm.forward, static_argnums=0)(model.config, model.params, jnp.asarray(windows[:, :-1]))
    logp = jax.nn.log_softmax(y.astype(jnp.float32))
    return float(-jnp.take_along_axis(logp, jnp.asarray(windows[:, 1:])[..., None], -1).mean())


def test_four_bits_are_not_worse_than_those_of_llama_cpp(shared):
    """In q4_0.gguf of this model `down` is f16, the head q8_0, and all else 4 bits; so here."""
    folder = shared / "stories260K"
    windows = np.load(folder / "ppl_windows.npz")["windows"]
    model = jaxllm.load(folder / "hf")
    untied = replace(model.config, tied=False), {**model.params, "head": dict(model.params["embed"])}
    model = replace(model, config=untied[0], params=untied[1])
    assert nll(model, windows) == pytest.approx(2.00844, abs=1e-4)
    rules = [("**.down.w", None), ("head.w", "int8_g32")]
    four = jaxllm.quantize(model, Recipe([*rules, ("**", "int4_g32")]))
    eight = jaxllm.quantize(model, Recipe([*rules, ("**", "int8_g32")]))
    assert nll(four, windows) <= 2.11040  # llama.cpp's own figure for q4_0.gguf
    assert nll(eight, windows) <= 2.00844 * 1.001


@pytest.mark.parametrize("sign", [1, -1])
def test_groups_of_four_bits_err_no_more_than_q4_0(sign):
    """Their rule written again: d = extreme / -8 in f16, code = trunc(w / d + 8.5), at most 15."""
    w = sign * np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)
    groups = w.reshape(64, 8, 32)
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)
    d = extreme / np.float32(-8)
    theirs = (np.minimum(np.trunc(groups / d + 8.5), 15) - 8) * d.astype(np.float16).astype(np.float32)
    ours = dequantize(encode(w, FORMATS["int4_g32"]), np.float32).reshape(groups.shape)
    error = [np.square(x - groups).sum(-1) for x in (ours, theirs)]
    assert (error[0] <= error[1] * 1.002).mean() > 0.99
    assert error[0].sum() < error[1].sum()


# ---- recipes ------------------------------------------------------------------------------------------------


def packed(params: dict) -> set[str]:
    return {path for path, leaf in flatten(params).items() if isinstance(leaf, QTensor)}


KEPT = {  # what no default recipe packs, besides vectors
    "full": set(),
    "mla": {"layers.0.mixer.k_b", "layers.0.mixer.v_b", "layers.1.mixer.k_b", "layers.1.mixer.v_b"},
    "moe": {"layers.1.ffn.router.w"},
    "learned": {"positions.w"},
    "recurrent": {"layers.1.mixer.conv.w", "layers.1.mixer.a_log"},
}


@pytest.mark.parametrize("name", KEPT)
def test_default_rules_pack_every_matrix_but_those_that_are_tables(name):
    config = random_model.CONFIGS[name]
    params = random_model.params(config)
    made = quantize(params, recipe("int8", config))
    matrices = {p for p, shape in params_shape(config).items() if len(shape) >= 2}
    assert packed(made) == matrices - KEPT[name]
    assert {p: x.shape for p, x in flatten(made).items()} == params_shape(config)
    tokens = random_model.tokens(1, 7)
    exact, near = (np.asarray(jaxllm.forward(config, p, tokens)[0]) for p in (params, made))
    assert 0 < np.abs(exact - near).max() < 0.25 * np.abs(exact).max()


@pytest.mark.parametrize(("name", "ends"), [("q4f16_1", True), ("q4f16_2", False), ("fp8_e4m3", False)])
def test_the_ends_are_packed_where_the_format_says_so(name, ends):
    config = random_model.CONFIGS["full"]
    decided = recipe(name, config).assign(params_shape(config))
    assert (decided["embed.w"] is not None, decided["head.w"] is not None) == (ends, ends)
    assert decided["layers.0.mixer.q.w"] == FORMATS[name]


@pytest.mark.parametrize(("experts", "kept"), [(256, True), (257, False)])
def test_only_routers_of_up_to_256_experts_are_spared(experts, kept):
    config = random_model.config(random_model.block(ffn=random_model.moe(experts=experts)))
    decided = recipe("q4f16_1", config).assign(params_shape(config))
    assert (decided["layers.0.ffn.router.w"] is None) == kept


def test_the_first_rule_that_matches_decides():
    config = random_model.CONFIGS["full"]
    rules = [("layers.0.*.q.w", "int8"), ("layers.*.mixer.[qk].w", "nf4"), ("layers.*.mixer.**", None)]
    params = quantize(random_model.params(config), Recipe([*rules, ("**", "int4_g32")]))
    flat = flatten(params)
    kinds = {p: leaf.format.name for p, leaf in flat.items() if isinstance(leaf, QTensor)}
    assert kinds["layers.0.mixer.q.w"] == "int8"
    assert kinds["layers.1.mixer.q.w"] == kinds["layers.0.mixer.k.w"] == "nf4"
    assert "layers.0.mixer.o.w" not in kinds
    assert kinds["layers.1.ffn.down.w"] == kinds["embed.w"] == "int4_g32"


@pytest.mark.parametrize(
    "rules",
    [
        [("layers.7.**", "int8")],
        [("**", "int8"), ("layers.0.mixer.q.w", "nf4")],  # nothing is left for it
        [("**.pre.w", "int8")],  # norms are never packed
        [("layers.*.mixer.q.b", None)],
    ],
)
def test_a_rule_that_decides_about_nothing_is_an_error(rules):
    config = random_model.CONFIGS["full"]
    with pytest.raises(ConfigError, match=r"decide about no weight: .*mixer\.q\.w"):
        quantize(random_model.params(config), Recipe(rules))


@pytest.mark.parametrize(
    "rules",
    ["**", [("**",)], [("**", 4)], [(3, "int8")], {"**": "int8"}, ["ab"], [("**", {"base": "int8", "grup": 1})]],
)
def test_what_is_no_recipe_is_refused(rules):
    with pytest.raises(ConfigError):
        Recipe(rules)


def test_recipes_survive_json(tmp_path):
    own = replace(FORMATS["int4_g32"], name="mine", group=16)
    rules = Recipe([("head.w", "q8f16_1"), ("embed.w", None), ("layers.**", own)], "float16")
    folders.write_json(tmp_path / "r.json", rules.as_json())
    assert read_recipe(tmp_path / "r.json") == rules


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"rules": 3}', '{"rules": [], "dtype": "int8"}', '{"rule": []}']
)
def test_files_that_are_no_recipe_are_refused(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ConfigError, match=r"r\.json"):
        read_recipe(tmp_path / "r.json")
    with pytest.raises(ConfigError, match="no recipe"):
        read_recipe(tmp_path / "absent.json")


def test_nothing_given_is_changed_and_every_tensor_is_told():
    config = random_model.CONFIGS["moe"]
    params = random_model.params(config)
    before = jax.tree.map(np.array, params)
    told = []
    quantize(params, recipe("q4f16_1", config), on_tensor=told.append)
    assert same(params, before)
    assert sorted(told) == sorted(params_shape(config))


@pytest.mark.parametrize(("name", "dtype"), [("q4f16_1", "float16"), ("q4bf16_1", "bfloat16"), ("nf4", "float32")])
def test_the_format_says_what_is_computed_in(name, dtype):
    config = random_model.CONFIGS["moe"]
    model = jaxllm.quantize(Model(config, random_model.params(config)), name)
    flat = flatten(model.params)
    assert model.config.dtype == dtype
    assert {str(x.dtype) for x in flat.values() if x.ndim >= 2} == {dtype}
    assert flat["norm.w"].dtype == np.float32  # vectors stay


@pytest.mark.parametrize("name", ["q0f32", "q0f16", "q0bf16"])
def test_unquantized_formats_are_what_they_say(name, tiny):
    model = jaxllm.quantize(tiny, name)
    kind = FORMATS[name].levels
    assert {str(x.dtype) for x in flatten(model.params).values() if x.ndim >= 2} == {kind}
    assert model.config.dtype == kind


def test_a_packed_leaf_is_rounded_again_only_for_another_format():
    q = encode(np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32), FORMATS["int8"])
    assert converted(q, None) is not q
    assert same(converted(q, None), q)
    assert same(converted(q, FORMATS["int8"]), q)
    again = converted(q, FORMATS["nf4"])
    assert same(again, encode(dequantize(q, np.float32), FORMATS["nf4"]))
    assert converted(q, None, "bfloat16").dtype_name == "bfloat16"


def test_factors_of_latent_attention_are_packed_where_a_rule_names_them():
    config = random_model.CONFIGS["mla"]
    params = random_model.params(config)
    made = quantize(params, Recipe([("layers.0.mixer.k_b", "int8"), ("layers.0.mixer.v_b", "int8")]))
    assert packed(made) == {"layers.0.mixer.k_b", "layers.0.mixer.v_b"}
    tokens = random_model.tokens(1, 7)
    exact, near = (np.asarray(jaxllm.forward(config, p, tokens)[0]) for p in (params, made))
    assert 0 < np.abs(exact - near).max() < 0.1 * np.abs(exact).max()


# ---- folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["q3f16_1", "int5_g64", "uint4_g32", "fp8_e4m3_block", "mxfp4", "nvfp4", "ternary"]
)
def test_a_saved_model_is_loaded_bit_by_bit(name, tiny, tmp_path):
    model = jaxllm.quantize(tiny, name)
    jaxllm.save(model, tmp_path / "out")
    again = jaxllm.load(tmp_path / "out")
    assert same(again.params, model.params)
    assert again.config == model.config
    assert (again.eos_ids, again.defaults) == (model.eos_ids, model.defaults)
    assert again.tokenizer.encode("Once upon a time") == tiny.tokenizer.encode("Once upon a time")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_unquantized_model_is_saved_too_and_saved_again(tiny, tmp_path):
    jaxllm.save(tiny, tmp_path / "a")
    jaxllm.save(jaxllm.load(tmp_path / "a"), tmp_path / "b")
    again = jaxllm.load(tmp_path / "b")
    assert same(again.params, tiny.params)
    assert again.config == tiny.config
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "layers.0.mixer.q.w" in load_file(tmp_path / "a" / "model.safetensors")


def test_the_tokenizer_is_written_where_its_files_are_gone(tiny, tmp_path):
    jaxllm.save(replace(tiny, folder=None), tmp_path / "out")
    again = jaxllm.load(tmp_path / "out").tokenizer
    assert again.encode("Hello there") == tiny.tokenizer.encode("Hello there")
    assert (again.eos_id, again.special_ids) == (tiny.tokenizer.eos_id, tiny.tokenizer.special_ids)
    assert again.chat_template == tiny.tokenizer.chat_template


FAMILIES = ["llama", "gpt2", "gemma3_text", "gpt_neox", "mixtral", "cohere"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_layout_is_canonical_once(kind, tmp_path):
    """Fused, turned, interleaved and shifted tensors are put in order when they are read, not a second time."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
    sizes |= dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
    sizes |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if kind == "gpt_neox":
        del sizes["num_key_value_heads"], sizes["head_dim"]
    if kind == "mixtral":
        sizes |= dict(num_local_experts=3)
    if kind == "gpt2":
        sizes = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes))
    theirs.save_pretrained(tmp_path / "hf")
    model = jaxllm.load(tmp_path / "hf")
    jaxllm.save(model, tmp_path / "plain")
    again = jaxllm.load(tmp_path / "plain")
    assert same(again.params, model.params)
    assert again.config == model.config
    jaxllm.model.quantize_files(tmp_path / "hf", tmp_path / "packed", format="int8")
    made = jaxllm.load(tmp_path / "packed")
    assert same(made.params, jaxllm.quantize(model, "int8").params)
    assert packed(made.params)


def test_a_head_of_unit_rows_is_scaled_once(tmp_path):
    """Such a head is normed when it is first read, and packed as it then is."""
    values = folders.CONFIG | dict(model_type="baichuan", z_loss_weight=0, num_key_value_heads=4)
    source = tmp_path / "in"
    source.mkdir()
    folders.write_json(source / "config.json", values)
    config = jaxllm.load_config(source)
    assert config.unit_head
    with native.Writer(tmp_path / "out") as writer:
        for path, leaf in flatten(random_model.params(config)).items():
            writer.put(path, encode(np.asarray(leaf), FORMATS["int8"]) if path == "head.w" else leaf)
        writer.close(values)
    head = flatten(jaxllm.load(tmp_path / "out").params)["head.w"]
    assert isinstance(head, QTensor)
    assert np.linalg.norm(dequantize(head, np.float32), axis=1).std() > 0.01


def test_large_models_go_into_several_files(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "SHARD", 300_000)
    jaxllm.save(tiny, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == tiny.nbytes
    assert same(jaxllm.load(tmp_path / "out").params, tiny.params)


def test_many_tensors_go_into_several_files(tmp_path):
    """The room that is left for a header is never overrun."""
    values = {"x" * 100 + f".{i}": np.arange(3, dtype=np.float32) + i for i in range(1000)}
    with native.Writer(tmp_path / "out") as writer:
        for name, x in values.items():
            writer.put(name, x)
        writer.close({})
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    found = {name: x for file in files for name, x in load_file(file).items()}
    assert found.keys() == values.keys()
    assert all(np.array_equal(found[name], x) for name, x in values.items())


def test_what_exists_is_not_overwritten(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    jaxllm.save(tiny, tmp_path / "out")  # an empty folder is nothing
    with pytest.raises(CheckpointError, match="exists already"):
        jaxllm.save(tiny, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="exists already"):
        native.Writer(tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        native.Writer(tmp_path / "file" / "out")


def test_a_failed_save_leaves_nothing(tiny, tmp_path):
    def fail():
        with native.Writer(tmp_path / "out") as writer:
            writer.put("norm.w", np.ones(3, np.float32))
            assert list(tmp_path.iterdir())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(tmp_path.iterdir())
    shutil.copytree(tiny.folder, tmp_path / "in")
    whole = (tmp_path / "in" / "model.safetensors").read_bytes()
    (tmp_path / "in" / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(CheckpointError):
        jaxllm.model.quantize_files(tmp_path / "in", tmp_path / "out", format="int8")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_models_that_cannot_be_saved_are_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="has no values"):
        jaxllm.save(replace(tiny, values={}), tmp_path / "out")
    params = {**tiny.params, "norm": {"w": tiny.params["norm"]["w"][1:]}}
    with pytest.raises(CheckpointError, match=r"norm\.w"):
        jaxllm.save(replace(tiny, params=params), tmp_path / "out")
    with native.Writer(tmp_path / "out") as writer, pytest.raises(CheckpointError, match="is a object"):
        writer.put("norm.w", object())


# ---- the command --------------------------------------------------------------------------------------------


def test_the_command_makes_what_the_function_makes(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["quantize", str(tiny.folder), str(out), "--format", "q4f16_1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    made = jaxllm.load(out)
    assert same(made.params, jaxllm.quantize(tiny, "q4f16_1").params)
    assert report["weights"] == tiny.size
    assert report["bytes"] == made.nbytes
    assert report["bits_per_weight"] == pytest.approx(8 * made.nbytes / made.size, abs=1e-3)
    assert set(report["formats"]) == {"q4f16_1", str(tiny.params["norm"]["w"].dtype)}
    assert sum(report["formats"].values()) == tiny.size
    assert made.config.dtype == "float16"


def test_a_recipe_file_comes_before_the_format(tiny, tmp_path, capsys):
    rules = {"rules": [["embed.w", "int8_g32"], ["layers.0.**", None]], "dtype": "bfloat16"}
    folders.write_json(tmp_path / "r.json", rules)
    args = ["quantize", str(tiny.folder), str(tmp_path / "out"), "--recipe", str(tmp_path / "r.json")]
    assert main([*args, "--format", "nf4"]) == 0
    assert "bits each" in capsys.readouterr().out
    flat = flatten(jaxllm.load(tmp_path / "out").params)
    assert flat["embed.w"].format.name == "int8_g32"
    assert flat["layers.0.ffn.up.w"].dtype == jnp.bfloat16
    assert not isinstance(flat["layers.0.ffn.up.w"], QTensor)
    assert flat["layers.1.ffn.up.w"].format.name == "nf4"
    assert {str(x.dtype) for x in flat.values() if x.ndim >= 2} == {"bfloat16"}


def test_a_packed_folder_can_be_quantized_again(tiny, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    jaxllm.model.quantize_files(tiny.folder, first, format="int8")
    jaxllm.model.quantize_files(first, second, rules=[("layers.0.mixer.q.w", "nf4")])
    a, b = (flatten(jaxllm.load(p).params) for p in (first, second))
    assert b["layers.0.mixer.q.w"].format.name == "nf4"
    assert same(b["layers.1.mixer.q.w"], a["layers.1.mixer.q.w"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--format", "q5"], "there is no weight format 'q5'"),
        (["--recipe", "absent.json"], "no recipe"),
    ],
)
def test_mistakes_are_told_in_a_sentence(tiny, tmp_path, capsys, args, words):
    assert main(["quantize", str(tiny.folder), str(tmp_path / "out"), *args]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_something_to_do_must_be_given(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["quantize", "x", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "--format or --recipe" in capsys.readouterr().err


def test_the_peak_is_a_tensor_and_not_the_model(tmp_path):
    """260 MB in all, 8 MB in the largest tensor, and less than 60 MB beyond what the process had before."""
    values = folders.CONFIG | dict(hidden_size=1024, intermediate_size=2048, num_hidden_layers=8, vocab_size=1024)
    values |= dict(num_attention_heads=8, num_key_value_heads=8)
    values.pop("head_dim", None)
    source = tmp_path / "in"
    source.mkdir()
    folders.write_json(source / "config.json", values)
    config = jaxllm.load_config(source)
    tensors = {folders.hub_name(p): np.full(shape, 0.5, np.float32) for p, shape in params_shape(config).items()}
    save_file(tensors, source / "model.safetensors")
    script = """
        import resource, sys
        from jaxllm.model import quantize_files
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        import jax; jax.devices()
        before = peak()
        quantize_files(sys.argv[1], sys.argv[2], format="q4f32_1")
        print(peak() - before)
    """
    arguments = [sys.executable, "-c", textwrap.dedent(script), str(source), str(tmp_path / "out")]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert sum(x.nbytes for x in tensors.values()) > 250e6
    assert int(run.stdout) * 1024 < 60e6


# ---- hostile folders ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """A packed model of two layers and width 16."""
    root = tmp_path_factory.mktemp("saved")
    source = root / "in"
    source.mkdir()
    folders.write_json(source / "config.json", folders.CONFIG)
    save_file(folders.tensors(), source / "model.safetensors")
    jaxllm.model.quantize_files(source, root / "out", rules=[("layers.**", "int5_g32"), ("embed.w", "nvfp4")])
    return root / "out"


def write_tensors(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """safetensors' own writer does not know all dtypes."""
    with native.Writer(path.with_name("other")) as writer:
        for name, x in tensors.items():
            writer.put(name, x)
        writer.close({})
    (path.with_name("other") / path.name).replace(path)
    shutil.rmtree(path.with_name("other"))


def refused(saved: pathlib.Path, folder: pathlib.Path, config: dict | None = None, change=None) -> str:
    """The sentence with which a changed copy is refused."""
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    if config is not None:
        folders.write_json(folder / "config.json", config)
    if change:
        tensors = {name: read() for name, read in open_file(folder / "model.safetensors").items()}
        change(tensors)
        write_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(JaxllmError) as caught:
        jaxllm.load(folder)
    return str(caught.value)


def described(saved: pathlib.Path) -> dict:
    return json.loads((saved / "config.json").read_text())


def test_the_folder_itself_is_good(saved):
    assert len(packed(jaxllm.load(saved).params)) == 15


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (("version",), 2, "reads version 1"),
        (("version",), None, "reads version 1"),
        (("formats",), [], "the objects formats and tensors"),
        (("formats",), {}, "which formats does not list"),
        (("tensors",), "x", "the objects formats and tensors"),
        (("formats", "nvfp4", "bits"), 7, "codes of 7 bits"),
        (("formats", "nvfp4", "bits"), 5, "too few for 5 bits"),
        (("formats", "nvfp4", "group"), -16, "group of a weight format"),
        (("formats", "nvfp4", "group"), 32, "groups of 16 columns instead of 32"),
        (("formats", "nvfp4", "levels"), "__import__('os')", "are not known"),
        (("formats", "int5_g32", "activations"), "complex64", "activations of dtype"),
        (("formats", "int5_g32", "evil"), 1, "no field 'evil'"),
        (("tensors", "embed.w", "columns"), 10**15, "columns should be a size"),
        (("tensors", "embed.w", "columns"), 10**11, "columns in codes"),
        (("tensors", "embed.w", "columns"), True, "columns should be a size"),
        (("tensors", "embed.w", "dtype"), "object", "dtype one of"),
        (("tensors", "embed.w", "format"), ["nvfp4"], "which formats does not list"),
        (("tensors", "embed.w"), 3, "should have format, columns and dtype"),
        (("tensors", "gone.w"), {"format": "nvfp4", "columns": 16, "dtype": "float32"}, "are missing"),
    ],
)
def test_hostile_descriptions_are_refused(saved, tmp_path, where, value, words):
    config = described(saved)
    at = config["quantization_config"]
    for key in where[:-1]:
        at = at[key]
    at[where[-1]] = value
    assert words in refused(saved, tmp_path / "x", config)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("embed.w.codes", lambda x: x[:, :3].copy(), "columns in codes"),
        ("embed.w.codes", lambda x: x.astype(np.float32), "codes float32"),
        ("embed.w.codes", lambda x: x.reshape(-1), "codes uint8"),
        ("embed.w.codes", lambda x: x[1:].copy(), "shape"),
        ("embed.w.scale", lambda x: x[1:].copy(), "scale of shape"),
        ("embed.w.scale", lambda x: x.reshape(-1)[:0].reshape(0), "with scales"),
        ("embed.w.super_scale", lambda x: np.zeros((len(x), 3), np.float32), "do not fit"),
        ("embed.w.super_scale", lambda x: np.zeros((len(x), 0), np.float32), "do not fit"),
        ("layers.0.ffn.up.w.high", lambda x: None, "high bits are missing"),
        ("layers.0.ffn.up.w.high", lambda x: x[:, 1:].copy(), "high of shape"),
        ("layers.0.ffn.up.w.scale", lambda x: None, "its scale are missing"),
        ("layers.0.ffn.up.w.order", lambda x: np.zeros(16, np.int32), "no order of its columns"),
        ("layers.0.ffn.up.w.input_scale", lambda x: np.zeros(16, np.float32), "input_scale of shape"),
        ("layers.0.ffn.up.w.super_offset", lambda x: np.zeros((24, 1), np.float32), "do not fit"),
        ("surprise.w", lambda x: np.zeros((4, 4), np.float32), "no place surprise.w"),
        ("norm.w", lambda x: x.astype(np.int32), "dtype int32"),
        ("norm.w", lambda x: None, "norm.w [16] is missing"),
    ],
)
def test_hostile_tensors_are_refused(saved, tmp_path, name, change, words):
    def apply(tensors):
        value = change(tensors.pop(name, None))
        if value is not None:
            tensors[name] = value

    assert words in refused(saved, tmp_path / "x", change=apply)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_put_into_the_description_is_read_or_refused(saved, tmp_path, data):
    config = described(saved)
    at = config["quantization_config"]
    while True:
        key = data.draw(st.sampled_from(sorted(at)))
        if not isinstance(at[key], dict) or data.draw(st.booleans()):
            break
        at = at[key]
    at[key] = data.draw(JSON)
    shutil.copytree(saved, tmp_path / "x", dirs_exist_ok=True)
    folders.write_json(tmp_path / "x" / "config.json", config)
    with contextlib.suppress(JaxllmError):  # and nothing else
        jaxllm.load(tmp_path / "x")


@given(st.integers(0, 2**16 + 20_000), st.binary(min_size=1, max_size=4))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_written_over_the_file_is_read_or_refused(saved, tmp_path, at, junk):
    shutil.copytree(saved, tmp_path / "x", dirs_exist_ok=True)
    whole = bytearray((saved / "model.safetensors").read_bytes())
    at = at % 4000 if at % 2 else at % len(whole)
    whole[at : at + len(junk)] = junk
    (tmp_path / "x" / "model.safetensors").write_bytes(whole)
    with contextlib.suppress(JaxllmError):  # and nothing else
        jaxllm.load(tmp_path / "x")


def test_info_gives_the_bytes_of_a_folder_that_is_packed(tmp_path, capsys):
    assert main(["quantize", str(jaxllm.bundled("target")), str(tmp_path / "q"), "--format", "q4f16_1"]) == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path / "q"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["memory"]["parameter_bytes"]
    assert abs(said / jaxllm.load(tmp_path / "q").nbytes - 1) < 0.02
