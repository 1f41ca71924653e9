"""GGUF files that we write: our reader gets the same model back, and llama.cpp computes it."""

import importlib.util
import pathlib
from dataclasses import replace

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm import cli, decode
from jaxllm.checkpoint import gguf_writer
from jaxllm.checkpoint.canonical import flatten
from jaxllm.checkpoint.gguf import read_gguf
from jaxllm.errors import ConfigError
from jaxllm.export import build, gguf_tokens, manifest, target
from jaxllm.export.options import Options
from jaxllm.families import family, model_config
from jaxllm.model import Model
from jaxllm.quant import QTensor, named
from jaxllm.tokenizer_gguf import from_metadata
from tests import random_model
from tests.test_export import here
from tests.tiny import common

SMALL = Options(context=64, chunk=16)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=64, rope_theta=5e5)
GEMMA = dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=8, hidden_activation="gelu_pytorch_tanh")
GRANITE = dict(embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.5, logits_scaling=2.0)
EXPERTS = dict(num_experts_per_tok=2)
CASES = {  # name -> (model_type, config.json)
    "llama": ("llama", dict(rms_norm_eps=1e-5)),
    "llama-3": ("llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True, max_position_embeddings=512)),
    "llama-linear": ("llama", dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4))),
    "llama-biased": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "mistral": ("mistral", dict(sliding_window=None, head_dim=32, rope_theta=1e6)),
    "mixtral": ("mixtral", EXPERTS | dict(num_local_experts=4, sliding_window=None)),
    "qwen2": ("qwen2", dict(rope_theta=1e6, tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(head_dim=32, rope_theta=1e6)),
    "qwen3_moe": (
        "qwen3_moe",
        EXPERTS
        | dict(head_dim=32, num_experts=4, moe_intermediate_size=32, norm_topk_prob=True, mlp_only_layers=[]),
    ),
    "gemma2": ("gemma2", GEMMA | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0)),
    "gemma3": ("gemma3_text", GEMMA | dict(num_hidden_layers=7, sliding_window_pattern=6, rope_theta=1e6)),
    "granite": ("granite", GRANITE),
    "olmo2": ("olmo2", dict()),
}
engine = pytest.mark.skipif(not importlib.util.find_spec("llama_cpp"), reason="llama-cpp-python is not installed")


def model_of(name: str, **changes) -> Model:
    kind, values = CASES[name]
    act = {} if "hidden_activation" in values else {"hidden_act": "silu"}
    values = common(**act | values | changes) | {"model_type": kind}
    config = model_config(family(kind), values)
    return Model(config, random_model.params(config), name=name, values=values)


def written(model: Model, path):
    formats = manifest.formats_of(model)
    assert gguf_writer.refuses(model.config, model.values, formats) is None
    more = gguf_tokens.metadata_of(model.tokenizer, model.config.vocab)
    gguf_writer.write_gguf(path, model.config, model.values, flatten(model.params), more)
    return path


def test_the_ten_families_are_compared():
    assert {kind for kind, _ in CASES.values()} == gguf_writer.KINDS.keys()


@pytest.mark.parametrize("name", CASES)
def test_our_reader_gets_the_same_parameters(name, tmp_path):
    model = model_of(name)
    back = jaxllm.load(written(model, tmp_path / "model.gguf"))
    expected, found = flatten(model.params), flatten(back.params)
    assert found.keys() == expected.keys()
    assert all((np.asarray(found[path]) == np.asarray(x)).all() for path, x in expected.items())
    assert next(gguf_writer._differences(back.config, model.config, "config"), None) is None


@pytest.mark.parametrize("format", ["int4_g32", "int8_g32", "q4f16_1", "q8f16_1", "q0bf16", "q0f16"])
def test_codes_are_moved_and_not_rounded(format, tmp_path):
    model = jaxllm.quantize(model_of("llama"), format)
    path = written(model, tmp_path / "model.gguf")
    kinds = {t.kind.name for name, t in read_gguf(path).tensors.items() if "attn_q.w" in name or "embd" in name}
    assert kinds == {
        {"int4": "Q4_0", "q4f1": "Q4_0", "int8": "Q8_0", "q8f1": "Q8_0"}.get(format[:4], format[2:].upper())
    }
    back = flatten(jaxllm.load(path).params)
    for at, leaf in flatten(model.params).items():
        assert (values(back[at]) == values(leaf)).all(), at


def values(leaf) -> np.ndarray:
    if isinstance(leaf, QTensor):
        return np.asarray(jaxllm.quant.dequantize(jax.tree.map(np.asarray, leaf), np.float32))
    return np.asarray(leaf, np.float32)


@engine
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_the_model(name, tmp_path):
    """The same greedy tokens through chunks and steps, and logits in f32's own noise."""
    with here():
        export = build.export(model_of(name), "gguf", tmp_path / name, options=SMALL)
    said = export.manifest["verification"]
    assert said["tokens_equal"] == said["tokens"] == 38
    rounded = "gemma" in name  # llama.cpp looks gelu up in a table of float16
    assert said["max_difference"] < (2e-4 if rounded else 2e-6) * said["largest_logit"]
    assert said["verified"] == "executed"


@engine
@pytest.mark.parametrize("format", ["int4_g32", "int8_g32", "q0bf16"])
def test_llama_cpp_computes_packed_weights(format, tmp_path):
    with here():
        options = replace(SMALL, batch=2)
        export = build.export(model_of("qwen2"), "gguf", tmp_path / "out", format=format, options=options)
    said = export.manifest["verification"]
    assert said["tokens_equal"] + said["near_ties"] == said["tokens"] == 76
    assert said["max_difference"] < 0.03 * said["largest_logit"]
    assert manifest.opened(export.folder)["programs"]["decode"]["files"] == {"gguf": "model.gguf"}


@engine
def test_the_bundled_model_and_its_tokenizer(tmp_path):
    """In a fresh process; llama.cpp's ids and its 64 greedy tokens are ours."""
    import llama_cpp

    out = tmp_path / "out"
    argv = ["export", str(jaxllm.bundled()), "--target", "gguf", "--dtype", "float32", "--context", "256", "--out"]
    assert cli.main([*argv, str(out)]) == 0
    engine = llama_cpp.Llama(str(out / "model.gguf"), n_ctx=256, verbose=False, logits_all=False)
    live, prompt = jaxllm.load(dtype="float32"), "def read_lines(path):\n"
    for text in (*gguf_tokens.PROBES, prompt):
        assert engine.tokenize(text.encode(), add_bos=False) == live.tokenizer.encode(text, add_special=False)
    tokens = []
    for token in engine.generate(live.tokenizer.encode(prompt), temp=0.0, repeat_penalty=1.0):
        tokens.append(token)
        if len(tokens) == 64:
            break
    assert tokens == list(decode.generate(live, prompt, max_new_tokens=64, eos=()).completions[0].tokens)


def test_a_tokenizer_comes_back_with_its_ids():
    tokenizer = jaxllm.load().tokenizer
    keys = gguf_tokens.metadata_of(tokenizer, 5000)
    assert len(keys["tokenizer.ggml.tokens"]) == 5000
    back = from_metadata(gguf_tokens._as_read(keys), pathlib.Path("here"))
    for text in (*gguf_tokens.PROBES, "def f(x):\n    return x\n"):
        assert back.encode(text) == tokenizer.encode(text)
    with pytest.raises(ConfigError, match="4096 tokens, and the model's vocabulary 4000"):
        gguf_tokens.metadata_of(tokenizer, 4000)


@pytest.mark.parametrize(
    ("name", "changes", "format", "says"),
    [
        ("mistral", dict(sliding_window=16), None, "no sliding window in this architecture"),
        ("qwen2", dict(rope_parameters=LLAMA3, max_position_embeddings=512), None, "no such scaling"),
        (
            "llama",
            dict(hidden_act="gelu"),
            None,
            r"would say otherwise: config.blocks\[0\].ffn.act as silu, and it is gelu",
        ),
        ("gemma2", dict(query_pre_attn_scalar=20), None, r"would say otherwise: config.blocks\[0\].mixer.scale"),
        ("llama", {}, "nf4", "in nf4, which no type of GGUF holds exactly; int4_g32 is Q4_0"),
        ("llama", {}, "uint4_g32", "in uint4_g32, which no type"),
        (
            "llama",
            dict(intermediate_size=80),
            "int4_g32",
            "ffn.down.w has 80 columns, and GGUF packs 32 at a time",
        ),
    ],
)
def test_what_a_file_could_not_say_is_refused_before_any_work(name, changes, format, says, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_loaded", lambda *a: pytest.fail("that is work"))
    with pytest.raises(ConfigError, match=f"gguf cannot take this model: .*({says})"):
        build.export(model_of(name, **changes), "gguf", tmp_path / "out", format=format, options=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_other_refusals():
    gguf = target.find("gguf")
    llama, mamba = model_of("llama"), random_model.CONFIGS["recurrent"]
    assert "leave --window out" in gguf.refuses(llama.config, llama.values, {}, Options(window=8))
    assert "leave --sampler out" in gguf.refuses(llama.config, llama.values, {}, Options(sampler="in-graph"))
    assert "this is mamba" in gguf.refuses(mamba, {"model_type": "mamba"}, {}, SMALL)
    assert "this is of no type" in gguf.refuses(llama.config, {}, {}, SMALL)
    assert "layers other than attention" in gguf.refuses(mamba, {"model_type": "llama"}, {}, SMALL)
    assert gguf.allowed(llama.config, {"embed.w": named("int4_g32")}) > gguf.allowed(llama.config, {})
