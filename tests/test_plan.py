"""The planned numbers against the bytes of real parameters and states, and against what XLA allots."""

import dataclasses
import json
import pathlib
from functools import partial

import jax
import pytest

import jaxllm
from jaxllm import decode, native
from jaxllm.checkpoint.canonical import nest
from jaxllm.config import MLA, MLP, Attention, Block, DeltaNet, Mamba, ModelConfig, MoE, Norm, Rope, params_shape
from jaxllm.errors import ConfigError, ContextError
from jaxllm.plan import plan
from jaxllm.state import init_state, nbytes

RMS = Norm("rms", 1e-5)
ROPE = Rope((1.0,) * 16)
ATTENTION = Attention(4, 2, 32, 32**-0.5, ROPE)
EXPERTS = MoE(8, 2, 256, "silu")
BLOCKS = {
    "attention": Block(ATTENTION, MLP(256, "silu"), RMS),
    "wide mlp": Block(ATTENTION, MLP(2048, "silu"), RMS),
    "window": Block(dataclasses.replace(ATTENTION, window=64), MLP(256, "silu"), RMS),
    "latent": Block(MLA(4, 32, 32, 64, None, Rope((1.0,) * 8), 0.2, RMS), MLP(256, "silu"), RMS),
    "experts": Block(ATTENTION, EXPERTS, RMS),
    "mamba": Block(Mamba(256, 16, 4, 8), None, RMS),
    "delta": Block(DeltaNet(2, 4, 32, 32, 4, RMS), MLP(256, "silu"), RMS),
}


def config_of(*names: str) -> ModelConfig:
    return ModelConfig(512, 128, tuple(BLOCKS[n] for n in names), RMS, tied=True, max_len=1024)


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_parameters_and_state_are_those_of_a_loaded_model(dtype):
    model = jaxllm.load(dtype=dtype)
    made = plan(jaxllm.load_config(), batch=3, context=300, chunk=64, dtype=dtype)
    assert made.parameters == model.size == sum(made.parts.values()) == made.active_parameters
    assert made.parameter_bytes == model.nbytes
    assert made.dtype == model.config.dtype
    state = init_state(model.config, 3, 300, chunk=64)
    assert made.state_bytes == nbytes(state) == sum(a.nbytes for a in jax.tree.leaves(state))


@pytest.mark.parametrize("name", BLOCKS)
def test_state_of_every_kind_of_layer(name):
    config = config_of(name, "attention")
    made = plan(config, batch=2, context=512, chunk=32)
    assert made.state_bytes == sum(a.nbytes for a in jax.tree.leaves(init_state(config, 2, 512, chunk=32)))
    kinds = {type(part).__name__.lower() for b in config.blocks for part in (b.mixer, b.ffn) if part}
    assert made.parts.keys() == {"embed", "norm", *kinds}


@pytest.mark.parametrize(
    ("name", "batch", "chunk"), [*((name, 1, 128) for name in BLOCKS if name != "experts"), ("experts", 4, 32)]
)
@pytest.mark.parametrize("kernels", [True, False], ids=["native", "xla"])
def test_activations_are_about_what_xla_allots(name, batch, chunk, kernels, monkeypatch):
    if jax.default_backend() != "cpu":
        pytest.skip("the bounds are those of XLA for CPU")
    if kernels and native.unavailable():
        pytest.skip(native.unavailable())
    if not kernels:
        monkeypatch.setattr(native, "unavailable", lambda: "it is off")
    jax.clear_caches()  # programs traced with the other setting
    config, context = config_of(*[name] * 3), 512
    made = plan(config, batch=batch, context=context, chunk=chunk)
    params = nest({path: jax.ShapeDtypeStruct(s, "float32") for path, s in params_shape(config).items()})
    state = jax.eval_shape(partial(init_state, config, batch, context, chunk=chunk))
    last = jax.ShapeDtypeStruct((batch, config.width), "float32")
    tokens, n_new = (jax.ShapeDtypeStruct(s, "int32") for s in ((batch, chunk), (batch,)))
    program = decode.prefill_chunk.lower(config, params, state, last, tokens, n_new).compile()
    assert 0.8 < made.activation_bytes / program.memory_analysis().temp_size_in_bytes < 1.8


def test_a_token_uses_only_the_chosen_experts():
    config = config_of("experts", "attention")
    made = plan(config)
    unused = 6 * 3 * EXPERTS.hidden * config.width  # 6 of 8 experts, three matrices each
    assert made.parameters - made.active_parameters == unused


def test_total_and_logits():
    made = plan(config_of("attention"), batch=5, context=64)
    assert made.logits_bytes == 2 * 5 * 512 * 4
    assert made.chunk == 64
    larger = max(made.activation_bytes, made.logits_bytes)
    assert made.total_bytes == made.parameter_bytes + made.state_bytes + larger


def test_refusals_are_sentences():
    with pytest.raises(ConfigError, match="dtype should be one of"):
        plan(config_of("attention"), dtype="int3")
    with pytest.raises(ContextError, match="made for 1024"):
        plan(config_of("attention"), context=2000)
    with pytest.raises(ContextError, match="at least 1"):
        plan(config_of("attention"), batch=0)


def test_parameters_are_those_transformers_counts(tmp_path: pathlib.Path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    values = json.loads((jaxllm.bundled() / "config.json").read_text())
    values |= dict(vocab_size=1000, hidden_size=96, intermediate_size=200, tie_word_embeddings=False)
    (tmp_path / "config.json").write_text(json.dumps(values))
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    assert plan(jaxllm.load_config(tmp_path)).parameters == theirs.num_parameters()
