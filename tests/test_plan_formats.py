"""Planned bytes of every weight format against real quantized parameters, and against what a process takes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import cli, decode, native
from jaxllm.checkpoint import source
from jaxllm.checkpoint.canonical import flatten
from jaxllm.config import params_shape
from jaxllm.errors import ConfigError
from jaxllm.model import Model, save
from jaxllm.plan import plan
from jaxllm.quant import FORMATS, QTensor, dequantize, products
from jaxllm.quant.encode import encode
from jaxllm.quant.recipe import Recipe, quantize_model
from jaxllm.state import init_state, nbytes
from tests import random_model


def tiny(name):
    config = random_model.CONFIGS[name]
    return Model(config, random_model.params(config))


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_are_those_of_quantized_parameters(format):
    for model in (
        *map(tiny, ("full", "moe", "mla", "recurrent", "learned")),
        jaxllm.load(jaxllm.bundled("draft")),
    ):
        made = plan(model.config, format=format)
        quantized = quantize_model(model, format)
        assert made.parameter_bytes == quantized.nbytes
        assert made.dtype == quantized.config.dtype
        assert made.state_bytes == nbytes(init_state(quantized.config, 1, model.config.max_len))
        assert made.format == format


def test_bytes_of_a_recipe():
    model = tiny("full")
    mixed = Recipe((("layers.*.ffn.**", "q8f16_1"), ("layers.1.mixer.**", None), ("**", "int4_g32")), "bfloat16")
    made = plan(model.config, format=mixed)
    quantized = quantize_model(model, mixed)
    assert (made.format, made.dtype) == ("recipe", "bfloat16")
    assert made.parameter_bytes == quantized.nbytes
    assert made.bits_per_weight == pytest.approx(8 * quantized.nbytes / model.size)
    assert plan(model.config, format=FORMATS["q4f16_1"]).format == "q4f16_1"


def test_formats_without_a_dtype_take_the_given_one():
    model = tiny("full")
    made = plan(model.config, format="int4_g32", dtype="bfloat16")
    cast = replace(model, config=replace(model.config, dtype="bfloat16"))
    params = jax.tree.map(lambda x: x.astype("bfloat16") if x.ndim > 1 else x, model.params)
    assert made.parameter_bytes == quantize_model(replace(cast, params=params), "int4_g32").nbytes
    assert plan(model.config, format="q4f16_1", dtype="float16").dtype == "float16"


def test_refusals():
    config = random_model.CONFIGS["full"]
    with pytest.raises(ConfigError, match="there is no weight format 'q5'"):
        plan(config, format="q5")
    with pytest.raises(ConfigError, match="q4f16_1 computes in float16"):
        plan(config, format="q4f16_1", dtype="float32")
    with pytest.raises(ConfigError, match="decide about no weight"):
        plan(config, format=Recipe((("nothing.w", "int4_g32"),)))


# ---- blocks of packed matrices --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 1024), (257, 512), (129, 8192)])
def test_blocks_are_the_whole_product(shape):
    rng = np.random.default_rng(0)
    q = encode(rng.standard_normal(shape).astype(np.float32), FORMATS["int4_g32"])
    x = rng.standard_normal((3, shape[1])).astype(np.float32)
    whole = x.astype(np.float64) @ dequantize(q, np.float32).T.astype(np.float64)
    np.testing.assert_allclose(products.matmul(jnp.asarray(x), q), whole, rtol=1e-4, atol=1e-3)


def abstract(model, config):
    """Shapes of the model's parameters in q8f16_1, for a program that is only compiled."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), quantize_model(model, "q8f16_1").params)


def test_only_a_block_of_the_weights_is_expanded_at_a_time():
    """However many layers: a step's temporaries stay far below the weights in f32, and are about as planned."""
    if jax.default_backend() != "cpu":
        pytest.skip("how XLA for CPU orders what does not depend on activations")

    def temporaries(layers):
        config = llama(layers=layers)
        model = Model(config, random_model.params(config))
        quantized = replace(config, dtype="float16")
        state = jax.eval_shape(partial(init_state, quantized, 1, 64, chunk=32))
        shapes = [jax.ShapeDtypeStruct(*s) for s in (((1, 512), "float16"), ((1, 32), "int32"), ((1,), "int32"))]
        program = decode.prefill_chunk.lower(quantized, abstract(model, config), state, *shapes).compile()
        planned = plan(config, context=64, chunk=32, format="q8f16_1").activation_bytes
        return program.memory_analysis().temp_size_in_bytes, planned

    (two, planned_two), (four, planned_four) = temporaries(2), temporaries(4)
    one_layer = 4 * sum(np.prod(s) for p, s in params_shape(llama(layers=1)).items() if p.startswith("layers.0"))
    assert four - two < 0.5 * one_layer  # two whole layers would be twice that
    assert 0.8 < planned_two / two < 2.5
    assert 0.8 < planned_four / four < 2.5


# ---- a process ------------------------------------------------------------------------------------------

LLAMA = dict(head_dim=64, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=12)
BIG = LLAMA | dict(hidden_size=768, intermediate_size=2048, vocab_size=49152)
# As many layers, and every matrix just large enough to be read in blocks: the programs are as large.
SMALL = LLAMA | dict(hidden_size=544, intermediate_size=128, vocab_size=512)


def values_of(**changes):
    values = json.loads((jaxllm.bundled() / "config.json").read_text())
    return values | dict(max_position_embeddings=2048, **changes)


def config_of(values):
    from jaxllm.families import family, model_config

    return model_config(family(values["model_type"]), values)


def llama(*, layers):
    return config_of(values_of(**SMALL | dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=layers)))


def random_folder(folder, sizes, format):
    """A saved random model of these sizes in a format."""
    values = values_of(**sizes)
    config = replace(config_of(values), dtype="float32")
    model = Model(config, random_model.params(config), values=values)
    save(quantize_model(model, format), folder)
    return folder


CHILD = """
import json, sys
import numpy as np
import jaxllm
from jaxllm import decode
folder, batch, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = jaxllm.load(folder)
prompt = [[1 + i % 400 for i in range(80)]] * batch
def run():
    options = dict(max_new_tokens=8, max_len=context, prefill_chunk_size=32, eos=())
    assert len(decode.generate(model, prompt, **options)[0].tokens) == 8
run()  # compiles
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark begins anew
run()
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def resident(folder, kernels, batch, context):
    """Bytes: the most that a process holds while it generates, compilation left out."""
    command = [sys.executable, "-c", CHILD, str(folder), str(batch), str(context)]
    # What is freed goes back to the system at once, where glibc would keep it for later.
    given_back = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "131072")
    env = os.environ | given_back | {"MALLOC_ARENA_MAX": "1", "JAXLLM_NATIVE": kernels}
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    return 1024 * int(run.stdout)


@pytest.mark.parametrize(
    ("format", "kernels", "share"),
    [("q0bf16", "off", 0.05), ("q8f16_1", "off", 0.15), ("q8f16_1", "on", 0.05), ("q4f16_1", "on", 0.05)],
)
def test_plan_is_near_what_a_process_takes(format, kernels, share, tmp_path, monkeypatch):
    """Most resident memory while a second generation runs (context 2048, chunks of 32), over that of the same
    process with a tenth of the parameters and as many layers: so Python, jax and programs are not counted;
    parameters, caches and temporaries are. XLA's temporaries with packed weights are an upper bound."""
    if not sys.platform.startswith("linux") or jax.default_backend() != "cpu":
        pytest.skip("resident memory is read from /proc")
    if kernels == "off":
        monkeypatch.setattr(native, "unavailable", lambda: "it is off")  # as it is in the processes
    elif reason := native.unavailable():
        pytest.skip(f"no native kernels: {reason}")
    room, folders = dict(batch=1, context=2048), {}
    for name, sizes in (("big", BIG), ("small", SMALL)):
        folders[name] = random_folder(tmp_path / name, sizes, format)
    needs = {
        name: plan(config_of(values_of(**sizes)), **room, chunk=32, format=format).total_bytes
        for name, sizes in (("big", BIG), ("small", SMALL))
    }
    taken = resident(folders["big"], kernels, **room) - resident(folders["small"], kernels, **room)
    assert taken == pytest.approx(needs["big"] - needs["small"], rel=share)


# ---- the command ----------------------------------------------------------------------------------------


def test_info_of_one_format(capsys):
    assert cli.main(["info", "--format", "q4f16_1", "--context", "256"]) == 0
    assert "weights in q4f16_1 (4.5" in capsys.readouterr().out
    assert cli.main(["info", "--format", "q4f16_1", "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["format"] == "q4f16_1"
    assert memory["parameter_bytes"] == quantize_model(jaxllm.load(), "q4f16_1").nbytes
    assert cli.main(["info", "--format", "q5"]) == 1
    assert "there is no weight format" in capsys.readouterr().err


def test_info_of_every_format(capsys):
    assert cli.main(["info", "--formats", "--json", "--batch", "2", "--context", "128"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table.keys() == {"as stored", *FORMATS}
    assert table["as stored"]["parameter_bytes"] == jaxllm.load().nbytes
    assert table["int4_g128"]["bits_per_weight"] < table["int4_g32"]["bits_per_weight"]
    assert cli.main(["info", "--formats"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(FORMATS) + 3
    with pytest.raises(SystemExit):
        cli.main(["info", "--formats", "--format", "q4f16_1"])


def test_packed_leaves_are_what_was_counted():
    """A leaf that the plan took for packed is packed."""
    model = quantize_model(jaxllm.load(), "q4f16_1")
    packed = {path for path, x in flatten(model.params).items() if isinstance(x, QTensor)}
    assert "embed.w" in packed
    assert len(packed) == 1 + 7 * 8


def test_info_reads_the_config_once(capsys, monkeypatch):
    opened, original = [], source.read_config
    monkeypatch.setattr(source, "read_config", lambda folder: opened.append(folder) or original(folder))
    assert cli.main(["info", "--json"]) == 0
    assert opened == [jaxllm.bundled()]
    assert json.loads(capsys.readouterr().out)["memory"]["parameter_bytes"] == jaxllm.load().nbytes
    assert source.open_source(jaxllm.bundled()).packed_bytes is None
