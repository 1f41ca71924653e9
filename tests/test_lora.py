"""Adapters against PEFT's logits, several at once, trained through frozen weights; and folders that are none."""

import contextlib
import json
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import jaxllm
from jaxllm import decode, lora, quant
from jaxllm.errors import CheckpointError, ConfigError, JaxllmError
from jaxllm.model import Model
from jaxllm.quant import QTensor
from tests import folders, random_model

FORWARD = jax.jit(jaxllm.forward, static_argnums=0)
TOKENS = np.random.default_rng(0).integers(0, 96, (3, 9)).astype(np.int32)

# ---- PEFT's logits -----------------------------------------------------------------------------------------

LLAMA = dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
PEFT = {  # name: (model type, what is adapted)
    "llama": ("llama", LLAMA),
    "llama, scaled by the root of the rank": ("llama", LLAMA | dict(r=3, use_rslora=True)),
    "llama, patterns": (
        "llama",
        LLAMA | dict(rank_pattern={"layers.0.self_attn.q_proj": 2, "up_proj": 5}, alpha_pattern={"o_proj": 3}),
    ),
    "llama, some layers": ("llama", dict(target_modules=["q_proj"], layers_to_transform=[1])),
    "llama, both ends": ("llama", dict(target_modules=["embed_tokens", "lm_head", "v_proj"])),
    "phi3, fused": ("phi3", dict(target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])),
    "cohere, neighbouring rotary pairs": ("cohere", LLAMA),
    "gpt2, matrices lie the other way": ("gpt2", dict(target_modules=["c_attn", "c_proj", "c_fc"])),
    "gpt_neox, fused by head": ("gpt_neox", dict(target_modules=["query_key_value", "dense"])),
    "qwen2_moe, shared expert": (
        "qwen2_moe",
        dict(target_modules=["q_proj", "gate_proj", "shared_expert.up_proj"]),
    ),
}
VALUES = {
    "gpt2": dict(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": dict(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    ),
    "qwen2_moe": dict(moe_intermediate_size=32, shared_expert_intermediate_size=48, num_experts=4),
}


@pytest.fixture
def peft():
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft")


def base(model_type: str):
    """A tiny transformers model; its ends are not tied where it has the choice."""
    from tests import tiny

    values = VALUES.get(model_type, {})
    usual = dict(tie_word_embeddings=model_type == "cohere", num_hidden_layers=2)
    full = values if "vocab_size" in values else tiny.common(**usual, **values)
    return tiny.build(model_type, full | dict(pad_token_id=0))


def adapted(peft, model, folder, seed: int, **config):
    """A PEFT adapter of random values, saved; the model with it."""
    import torch

    usual = dict(r=4, lora_alpha=12, task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = peft.get_peft_model(model, peft.LoraConfig(**(usual | config))).eval()
        for name, p in found.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, std=0.2)
        found.save_pretrained(folder, save_embedding_layers=False)
    return found


def reference(model, tokens) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens)).long()).logits.numpy()


def ours(model: Model, params=None, tokens=TOKENS) -> np.ndarray:
    return np.asarray(FORWARD(model.config, params or model.params, jnp.asarray(tokens))[0])


def worst(got, want) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("name", PEFT)
def test_logits_equal_those_of_peft(name, peft, tmp_path):
    model_type, config = PEFT[name]
    theirs = base(model_type)
    plain = reference(theirs, TOKENS)
    theirs.save_pretrained(tmp_path / "base")
    theirs = adapted(peft, theirs, tmp_path / "adapter", 1, **config)
    want = reference(theirs, TOKENS)
    assert worst(want, plain) > 1e-3  # the adapter does something

    model = lora.load_adapter(jaxllm.load(tmp_path / "base"), tmp_path / "adapter")
    assert worst(ours(model), want) < 2e-5
    assert worst(ours(model, lora.merge(model.params)), want) < 2e-5
    assert worst(ours(model, lora.merge(model.params, -1)), plain) < 2e-5


def test_several_chosen_by_row(peft, tmp_path):
    theirs = base("llama")
    theirs.save_pretrained(tmp_path / "base")
    model, want = jaxllm.load(tmp_path / "base"), [reference(theirs, TOKENS)]
    configs = (LLAMA, LLAMA | dict(r=7, lora_alpha=3), dict(target_modules=["k_proj"], r=2))
    for i, config in enumerate(configs):
        found = adapted(peft, theirs, tmp_path / str(i), i, **config)
        want.append(reference(found, TOKENS))
        theirs = found.unload()
        model = lora.load_adapter(model, tmp_path / str(i))
    assert lora.count(model.params) == 3

    @jax.jit
    def logits(params):
        traces.append(1)
        return jaxllm.forward(model.config, params, TOKENS)[0]

    traces = []
    for rows in ([0, 1, 2], [2, 2, -1], [-1, 0, 3]):
        got = logits(lora.choose(model.params, rows))
        for i, adapter in enumerate(rows):
            assert worst(got[i], want[0 if adapter in (-1, 3) else adapter + 1][i]) < 2e-5
    assert traces == [1]  # another choice is another value, not another program
    for adapter in range(3):
        assert worst(ours(model, lora.choose(model.params, adapter)), want[adapter + 1]) < 2e-5
    with pytest.raises(JaxllmError, match="there are 3 adapters; say which"):
        ours(model)
    with pytest.raises(JaxllmError, match="chosen for 2 rows, but the batch has 3"):
        ours(model, lora.choose(model.params, [0, 1]))


# ---- packed bases, generation, dtypes ----------------------------------------------------------------------


def small(format: str | None = None, name: str = "full", **config) -> Model:
    config = replace(random_model.CONFIGS[name], **config)
    model = Model(config, random_model.params(config))
    return quant.quantize_model(model, format) if format else model


def with_random(model: Model, *seeds: int, targets=("layers.**",), rank: int = 3) -> Model:
    """Adapters that do something."""
    params = model.params
    for seed in seeds:
        params = lora.new(params, jax.random.key(seed), rank=rank, targets=targets)
    noise = lambda path, x: x + 0.3 * jax.random.normal(jax.random.key(len(str(path))), x.shape, x.dtype)
    trained = jax.tree_util.tree_map_with_path(noise, lora.trainable(params))
    return replace(model, params=lora.with_trained(params, trained))


@pytest.mark.parametrize("format", [None, "q4f16_1", "int8", "fp8_e4m3", "nvfp4", "w8a8"])
def test_a_packed_base_and_its_adapter(format):
    model = small(format)
    model = replace(model, config=replace(model.config, dtype="float32"))
    tokens = random_model.tokens(2, 7)
    found = with_random(model, 1)
    dense = jax.tree.map(
        lambda x: quant.dequantize(x, jnp.float32) if isinstance(x, QTensor) else x.astype(jnp.float32),
        model.params,
        is_leaf=lambda x: isinstance(x, QTensor),
    )
    merged = lora.merge(
        lora.with_trained(with_random(replace(model, params=dense), 1).params, lora.trainable(found.params))
    )
    got, plain = ours(found, tokens=tokens), ours(model, tokens=tokens)
    assert worst(got, plain) > 1e-2
    if format != "w8a8":  # rounds what its adapted layers read
        assert worst(got, ours(model, merged, tokens)) < (2e-5 if format is None else 2e-3)
    assert isinstance(lora.merge(found.params, -1)["layers"][0]["mixer"]["q"]["w"], QTensor) == bool(format)


@pytest.mark.parametrize("name", ["window", "mla", "moe", "parallel", "recurrent"])
def test_every_kind_of_layer(name):
    model = with_random(small(name=name), 1)
    tokens = random_model.tokens(2, 7)
    assert worst(ours(model, tokens=tokens), ours(model, lora.merge(model.params), tokens)) < 2e-5


def test_generation_by_row():
    model = with_random(small(), 1, 2)
    model = replace(model, params=lora.choose(model.params, [1, -1, 0]))
    prompts = [[5, 6, 7, 8], [5, 6, 7, 8], [9, 3]]
    together = decode.generate(model, prompts, max_new_tokens=6)
    for i, adapter in enumerate([1, -1, 0]):
        one = replace(model, params=lora.choose(model.params, adapter))
        assert decode.generate(one, prompts[i], max_new_tokens=6)[0].tokens == together[i].tokens
    assert together[0].tokens != together[1].tokens


def test_a_base_is_packed_under_its_adapters():
    model = with_random(small(), 1)
    packed = quant.quantize_model(model, "q4f32_1")
    assert isinstance(packed.params["layers"][0]["mixer"]["q"]["w"].w, QTensor)
    want = quant.quantize_model(small(), "q4f32_1")
    for x, y in zip(jax.tree.leaves(lora.merge(packed.params, -1)), jax.tree.leaves(want.params), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    for path, part in lora.trainable(packed.params).items():
        np.testing.assert_array_equal(part["b"], lora.trainable(model.params)[path]["b"])


def test_adapters_are_not_saved_unmerged(tmp_path):
    model = replace(with_random(small(), 1), values={"model_type": "llama"})
    with pytest.raises(CheckpointError, match="merge"):
        jaxllm.save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_bfloat16_stays_bfloat16():
    model = small(dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    model = with_random(replace(model, params=params), 1)
    tokens = random_model.tokens(2, 7)
    assert worst(ours(model, tokens=tokens), ours(model, lora.merge(model.params), tokens)) < 0.05
    assert lora.merge(model.params)["layers"][0]["mixer"]["q"]["w"].dtype == jnp.bfloat16
    assert model.nbytes > sum(x.nbytes for x in jax.tree.leaves(params))


# ---- training ----------------------------------------------------------------------------------------------


def loss(trained, model, tokens):
    y = jaxllm.forward(model.config, lora.with_trained(model.params, trained), tokens)[0]
    return -jnp.take_along_axis(jax.nn.log_softmax(y[:, :-1]), tokens[:, 1:, None], -1).mean()


@pytest.mark.parametrize("format", [None, "q4f16_1", "int8", "fp8_e4m3"])
def test_gradients_are_those_of_differences(format):
    model = small(format)
    model = with_random(replace(model, config=replace(model.config, dtype="float32")), 1)
    trained, tokens = lora.trainable(model.params), jnp.asarray(random_model.tokens(2, 6))
    of = jax.jit(lambda trained: loss(trained, model, tokens))
    gradient = jax.jit(jax.grad(of))(trained)
    assert jax.tree.structure(gradient) == jax.tree.structure(trained)
    direction = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), trained)
    step = lambda e: float(of(jax.tree.map(lambda x, d: x + e * d, trained, direction)))
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)))
    assert float(slope) == pytest.approx((step(1e-3) - step(-1e-3)) / 2e-3, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("format", [None, "q4f16_1"])
def test_training_lowers_the_loss(format):
    optax = pytest.importorskip("optax")
    model = small(format)
    tokens = jnp.asarray(random_model.tokens(4, 8))
    model = replace(model, params=lora.new(model.params, jax.random.key(0), rank=4, alpha=8))
    before = jax.tree.leaves(lora.merge(model.params, -1))
    trained = lora.trainable(model.params)
    optimizer = optax.adam(1e-2)
    memory, losses = optimizer.init(trained), []
    step = jax.jit(jax.value_and_grad(lambda t: loss(t, model, tokens)))
    for _ in range(15):
        value, gradient = step(trained)
        losses.append(float(value))
        updates, memory = optimizer.update(gradient, memory)
        trained = optax.apply_updates(trained, updates)
    assert losses[-1] < losses[0] - 0.3
    after = jax.tree.leaves(lora.merge(lora.with_trained(model.params, trained), -1))
    assert all(x is y for x, y in zip(before, after, strict=True))  # the base is frozen


def test_a_new_adapter_changes_nothing_yet():
    model = small()
    tokens = random_model.tokens(2, 7)
    params = lora.new(model.params, jax.random.key(0), rank=4)
    np.testing.assert_array_equal(ours(model, params, tokens), ours(model, tokens=tokens))
    assert sorted(lora.trainable(params)) == [f"layers.{i}.mixer.{p}.w" for i in (0, 1) for p in "qv"]


TWO = lora.Adapter(np.ones((1, 2)), np.ones((2, 1)), 1.0)


@pytest.mark.parametrize(
    ("call", "say"),
    [
        (lambda p: lora.new(p, jax.random.key(0), rank=4, targets=("layers.*.mixer.query.w",)), "is named"),
        (lambda p: lora.new(p, jax.random.key(0), rank=4, targets=("norm.w",)), "is named"),
        (lambda p: lora.new(p, jax.random.key(0), rank=0), "rank should be"),
        (lambda p: lora.choose(p, 0), "have no adapter"),
        (lambda p: lora.merge(p), "have no adapter"),
        (lambda p: lora.trainable(p), "have no adapter"),
        (lambda p: lora.merge(lora.new(p, jax.random.key(0), rank=4), 1), "adapters 0 to 0"),
        (lambda p: lora.choose(lora.new(p, jax.random.key(0), rank=4), [0.5]), "adapter numbers"),
        (lambda p: lora.choose(lora.new(p, jax.random.key(0), rank=4), [[0]]), "adapter numbers"),
        (lambda p: lora.with_trained(lora.new(p, jax.random.key(0), rank=4), {}), "paths of trainable"),
        (lambda p: lora.add(p, {"nowhere": lora.Adapter(jnp.ones((1, 2)), jnp.ones((2, 1)), 1.0)}), "no weight"),
        (
            lambda p: lora.add(p, {"head.w": lora.Adapter(jnp.ones((1, 2)), jnp.ones((2, 1)), 1.0)}),
            "an adapter of",
        ),
    ],
)
def test_wrong_calls_say_what_is_wrong(call, say):
    with pytest.raises(JaxllmError, match=say):
        call(small().params)


# ---- folders that are no adapter -----------------------------------------------------------------------------

CONFIG = dict(peft_type="LORA", r=2, lora_alpha=4, target_modules=["q_proj"], bias="none", task_type="CAUSAL_LM")
STEM = "base_model.model.model.layers.0.self_attn.q_proj"


def folder_of(folder, tensors=None, **changes):
    """An adapter of the model of tests.folders, with its config changed."""
    usual = {"A": np.ones((2, 16), np.float32), "B": np.ones((16, 2), np.float32)}
    usual = {f"{STEM}.lora_{part}.weight": x for part, x in usual.items()}
    folder.mkdir(exist_ok=True)
    save_file(usual if tensors is None else tensors(usual), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    return folder


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return jaxllm.load(folders.write(tmp_path_factory.mktemp("host")))


def refused(host, folder) -> str:
    with pytest.raises(JaxllmError) as caught:
        lora.load_adapter(host, folder)
    assert len(str(caught.value)) < 3000
    return str(caught.value)


def test_the_folder_is_right_to_begin_with(host, tmp_path):
    model = lora.load_adapter(host, folder_of(tmp_path))
    assert list(lora.trainable(model.params)) == ["layers.0.mixer.q.w"]
    assert float(model.params["layers"][0]["mixer"]["q"]["w"].scale[0]) == 2.0


@pytest.mark.parametrize(
    ("changes", "say"),
    [
        (dict(peft_type="IA3"), "peft_type is 'IA3'"),
        (dict(use_dora=True), "use_dora is True"),
        (dict(bias="all"), "bias is 'all'"),
        (dict(lora_bias=True), "lora_bias is True"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save is"),
        (dict(init_lora_weights="pissa_niter_4"), "changes the base"),
        (dict(layer_replication=[[0, 1]]), "layer_replication is"),
        (dict(target_parameters=["x"]), "target_parameters is"),
        (dict(something_new=7), "something_new is 7"),
        (dict(r=0), "r is 0"),
        (dict(r="2"), "r is '2'"),
        (dict(r=3), "its rank is 2, and adapter_config.json says 3"),
        (dict(lora_alpha=None), "lora_alpha is None"),
        (dict(rank_pattern=[1]), "rank_pattern is"),
        (dict(rank_pattern={"q_proj": -1}), "rank_pattern is"),
        (dict(rank_pattern={"(a+)+$": 2}), "no name of a module"),
    ],
)
def test_configs_that_are_refused(host, tmp_path, changes, say):
    assert say in refused(host, folder_of(tmp_path, **changes))


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): x for name, x in tensors.items()}


def reshaped(part, *shape, dtype=np.float32):
    return lambda tensors: {n: np.zeros(shape, dtype) if part in n else x for n, x in tensors.items()}


@pytest.mark.parametrize(
    ("tensors", "say"),
    [
        (lambda t: {}, "no adapter in it"),
        (lambda t: {n: x for n, x in t.items() if "_A" in n}, "the parts A and B"),
        (renamed("lora_A", "lora_magnitude_vector"), "no part of a LoRA"),
        (renamed("base_model.model.", ""), "no part of a LoRA"),
        (renamed("q_proj", "query"), "not a tensor of this architecture"),
        (renamed("layers.0", "layers.7"), "layer 7"),
        (renamed("self_attn.q_proj", "input_layernorm"), "the adapter of layers.0.mixer.pre.w should be"),
        (reshaped("lora_A", 2, 17), "should be of [16, 16]"),
        (reshaped("lora_A", 3, 16), "not of one rank"),
        (reshaped("lora_B", 8, 2), "should be of [16, 16]"),
        (reshaped("lora_B", 16), "should be matrices"),
        (reshaped("lora_B", 16, 2, dtype=np.int8), "should be matrices of floats"),
        (reshaped("lora_B", 16, 0), "should be matrices of floats"),
    ],
)
def test_tensors_that_are_refused(host, tmp_path, tensors, say):
    assert say in refused(host, folder_of(tmp_path, tensors))


def test_files_that_are_not_there(host, tmp_path):
    assert "adapter_config.json cannot be read" in refused(host, tmp_path)
    folder_of(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    assert "is a pickle" in refused(host, tmp_path)
    with pytest.raises(ConfigError, match="model type None"):
        lora.load_adapter(replace(host, values={}), folder_of(tmp_path))


def test_an_embedding_that_is_the_head(tmp_path):
    tied = jaxllm.load(folders.write(tmp_path / "tied", config=folders.CONFIG | {"tie_word_embeddings": True}))
    stem = "base_model.model.model.embed_tokens.lora_embedding_"
    tensors = {f"{stem}A": np.ones((2, 64), np.float32), f"{stem}B": np.ones((16, 2), np.float32)}
    assert "the embedding is the head, too" in refused(tied, folder_of(tmp_path / "a", lambda _: tensors))


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_give_the_own_error(host, tmp_path, data):
    folder = folder_of(tmp_path)
    file = folder / data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at : at + 1] = data.draw(st.binary(max_size=3))
    file.write_bytes(content)
    with contextlib.suppress(ConfigError, CheckpointError):  # or it is still an adapter
        lora.load_adapter(host, folder)


def test_the_folders_below_are_as_peft_saves_them(peft, tmp_path):
    """Their names, and that its config is read as a whole."""
    theirs = base("llama")
    adapted(peft, theirs, tmp_path / "adapter", 1, target_modules=["q_proj"])
    assert f"{STEM}.lora_A.weight" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
