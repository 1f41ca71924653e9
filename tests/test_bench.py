"""`jaxllm bench`: what it prints and refuses, and that what it counts is what is there. No speeds are compared."""

import dataclasses
import json
import pathlib
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import bench, cli, native, peers
from jaxllm.checkpoint.canonical import flatten
from jaxllm.commands import bench as command
from jaxllm.config import params_shape
from jaxllm.errors import ConfigError
from jaxllm.model import Model
from jaxllm.quant import FORMATS, quantize_model
from jaxllm.random_weights import random_model
from jaxllm.shapes import SHAPES, described, shape
from tests import folders
from tests import random_model as models

ROOT = pathlib.Path(jaxllm.__file__).parents[1]
TINY = dict(SHAPES["smollm2-135m"]) | dict(
    num_hidden_layers=2,
    hidden_size=192,
    intermediate_size=256,
    num_attention_heads=3,
    num_key_value_heads=1,
    vocab_size=512,
)
MEDIANS = ("decode_tok_s", "prefill_tok_s", "bandwidth_gb_s", "matmul_tflop_s")
KEYS = {
    *MEDIANS,
    *("model", "shape", "format", "dtype", "parameters", "parameter_bytes", "prompt_tokens", "new_tokens"),
    *("decode_prompt_tokens", "batch", "rounds", "bandwidth_by", "bytes_per_step", "decode_roofline_tok_s"),
    *("bandwidth_share", "flops_per_token", "prefill_roofline_tok_s", "matmul_share", "peak_rss_mb", "spread"),
    *("device_kind", "processor", "cores", "native_kernels", "versions"),
}
STARTS = {"ttft_cold_s", "ttft_warm_s", "compile_s", "start"}


@pytest.fixture
def run(capsys, monkeypatch):
    """Run `bench` with a small buffer and product -> (exit code, stdout, stderr)."""
    monkeypatch.setattr(bench.measure, "__kwdefaults__", bench.measure.__kwdefaults__ | {"read": 2**22})
    monkeypatch.setattr(bench.multiplier, "__defaults__", ((64, 128, 128),))
    monkeypatch.setitem(SHAPES, "tiny", TINY)

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main(["bench", *map(str, argv)])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


QUICK = ("--prompt", 40, "--new", 4, "--rounds", 2)


# ---- the command ------------------------------------------------------------------------------------------


def test_json_has_every_figure(run):
    code, out, _ = run("--shape", "tiny", "--format", "int8_g32", "--starts", 0, "--json", *QUICK)
    found = json.loads(out)
    assert code == 0
    assert found.keys() == KEYS
    assert (found["shape"], found["format"], found["rounds"]) == ("tiny", "int8_g32", 2)
    assert found["spread"].keys() == set(MEDIANS)
    for name in MEDIANS:
        assert 0 < found["spread"][name]["min"] <= found[name] <= found["spread"][name]["max"]
    assert found["bandwidth_share"] == pytest.approx(found["decode_tok_s"] / found["decode_roofline_tok_s"])
    roof = found["bandwidth_gb_s"] * 1e9 / found["bytes_per_step"]
    assert found["decode_roofline_tok_s"] == pytest.approx(roof, rel=1e-3)


def test_starts_compile_when_cold_and_find_when_warm(run, tmp_path):
    folder = folders.write(tmp_path / "model")
    code, out, _ = run(folder, "--prompt", 8, "--new", 4, "--rounds", 1, "--json")
    found = json.loads(out)
    assert code == 0
    assert found.keys() == KEYS | STARTS
    cold, warm = found["start"]["cold"], found["start"]["warm"]
    assert (cold["found"], warm["found"]) == (0, warm["programs"])
    assert cold["programs"] == warm["programs"] > 0
    assert found["compile_s"] == cold["compile_s"] > 0
    assert found["ttft_warm_s"] == warm["ttft_s"] > warm["import_s"] > 0
    assert found["spread"]["ttft_cold_s"] == {"min": found["ttft_cold_s"], "max": found["ttft_cold_s"]}


def test_the_table_has_every_part(run):
    code, out, _ = run("--shape", "tiny", "--starts", 0, *QUICK)
    assert code == 0
    for word in ("tiny: ", "decode", "prefill of 40", "share", "memory reads", "bf16 products", "GB/s", "jaxlib"):
        assert word in out


def test_the_table_of_starts():
    runs = [{f"{n}_s": 0.5 for n in ("ttft", "import", "load", "trace", "lower", "compile", "run")}]
    runs[0] |= {"programs": 4, "found": 0}
    found = bench._start_report(runs, [runs[0] | {"found": 4}])
    [(title, rows)] = command._starts(found)
    assert "first token" in title
    assert dict(rows)["    programs compiled"].split() == ["4", "0"]


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (("--shape", "llama-3.2-1"), 1, "did you mean llama-3.2-1b"),
        (("--shape", "gpt-9"), 1, "There are smollm2-135m"),
        (("--shape", "tiny", "--format", "q9"), 1, "no weight format 'q9'"),
        (("here", "--shape", "tiny"), 2, "leave out MODEL"),
        (("--rounds", "0"), 2, "of at least 1"),
        (("--shape", "tiny", "--prompt", 9000, "--starts", 0), 1, "the context is 8192"),
        (("--shape", "tiny", "--compare", "vllm=x"), 1, "there is no peer 'vllm'; there are llama.cpp"),
        (("--shape", "tiny", "--compare", "llama.cpp"), 1, "llama.cpp=PATH"),
        (("--shape", "tiny", "--compare", "llama.cpp=/no/such.gguf"), 1, "there is no /no/such.gguf"),
    ],
)
def test_refusals(run, argv, code, says):
    got, _, err = run(*argv)
    assert got == code
    assert says in err


# ---- what is counted --------------------------------------------------------------------------------------


def test_reading_is_positive_and_by_whom_is_said():
    read, by = bench.reader(2**20)
    assert read() > 0
    assert by.startswith("native kernel" if native.unavailable() is None else "XLA's maximum")


@pytest.mark.skipif(native.unavailable() is not None, reason="the native kernels are not in use")
@pytest.mark.parametrize("size", [2, 6, 34, 2**20 + 14, 3 * 2**20])
@pytest.mark.parametrize("threads", [0, 1])
def test_the_native_read_reads_every_byte(size, threads):
    x = np.random.default_rng(size).integers(0, 2**32, size, dtype=np.uint32)
    found = jax.jit(lambda x: native.read(x, threads=threads))(x)
    assert np.asarray(found).view(np.uint64)[0] == np.bitwise_xor.reduce(x.view(np.uint64))


@pytest.mark.skipif(native.unavailable() is not None, reason="the native kernels are not in use")
def test_the_native_read_takes_whole_words():
    with pytest.raises(Exception, match="whole 8 bytes"):
        jax.block_until_ready(jax.jit(native.read)(jnp.ones(3, jnp.uint32)))


def plain(name: str) -> Model:
    config = models.CONFIGS[name]
    return Model(config, models.params(config))


def cache_bytes(model: Model) -> int:
    """Of one token, in f32: keys, values and its position in each layer."""
    return sum(4 * (2 * b.mixer.kv_heads * b.mixer.head_dim + 1) for b in model.config.blocks)


def unread_bytes(model: Model) -> int:
    """Of an embedding that is not the head, all rows but one."""
    return 0 if model.config.tied else 4 * (model.config.vocab - 1) * model.config.width


def test_bytes_of_a_step_are_weights_and_filled_cache():
    model = plain("full")
    work = bench.Work(new=32)  # 48 tokens on average
    weights = model.nbytes - unread_bytes(model)
    assert bench.bytes_per_step(model, work) == pytest.approx(weights + 48 * cache_bytes(model))


def test_bytes_of_experts_are_of_those_chosen():
    """One row reads top_k of them; of the rows of a large batch, some choose each."""
    model = plain("moe")
    ffn = model.config.blocks[1].ffn
    one = bench.bytes_per_step(model, bench.Work(new=8))
    flat = flatten(model.params)
    routed = sum(flat[f"layers.1.ffn.{n}.w"].nbytes for n in ("gate", "up", "down"))
    rest = model.nbytes - routed
    caches = 36 * cache_bytes(model)
    assert one == pytest.approx(rest + routed * ffn.top_k / ffn.experts + caches - unread_bytes(model))
    assert bench._read_share("layers.1.ffn.up.w", model.config, 10**6) == pytest.approx(1)


def test_flops_are_those_xla_counts():
    """Of one layer's products, as XLA's own cost analysis has them (jaxllm's kernels are hidden from it)."""
    config = dataclasses.replace(described(TINY), dtype="float32")
    model, T = random_model(config), 64
    from jaxllm import layers, ops

    def whole(params, tokens):
        x, _, _ = layers.hidden(config, params, tokens, jaxllm.init_state(config, 1, T))
        return layers.logits(config, params, x[:, -1])

    with ops.portable():
        cost = jax.jit(whole).lower(model.params, jnp.zeros((1, T), jnp.int32)).compile().cost_analysis()
    # XLA's code multiplies by the masked half of the scores too, and counts what is no product.
    ours = bench.flops_per_token(config, 2 * T) - config.width * config.vocab * (2 / (2 * T) - 2 / T)
    assert ours * T == pytest.approx(cost["flops"], rel=0.06)


# ---- shapes and their weights -----------------------------------------------------------------------------

PUBLISHED = {  # billions, from the models' cards
    "smollm2-135m": 0.1345,
    "smollm2-360m": 0.3618,
    "smollm2-1.7b": 1.711,
    "qwen3-0.6b": 0.5960,
    "qwen3-1.7b": 1.7206,
    "qwen3-4b": 4.0225,
    "qwen3-8b": 8.1907,
    "qwen3-30b-a3b": 30.5321,
    "llama-3.2-1b": 1.2358,
    "llama-3.2-3b": 3.2127,
    "llama-3.1-8b": 8.0303,
    "mistral-7b": 7.2480,
    "mixtral-8x7b": 46.7028,
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_as_many_parameters_as_published(name):
    config = described(shape(name))
    count = sum(int(np.prod(s, dtype=np.int64)) for s in params_shape(config).values())
    assert count / 1e9 == pytest.approx(PUBLISHED[name], rel=1e-3)
    assert config.dtype == "bfloat16"


def test_an_unknown_shape_is_refused():
    with pytest.raises(ConfigError, match=r"there is no shape 'qwen3-8'; did you mean qwen3-8b"):
        shape("qwen3-8")


def layout(model: Model) -> tuple:
    leaves = [(a.shape, a.dtype) for a in jax.tree.leaves(model.params)]
    return model.config, jax.tree.structure(model.params), leaves


@pytest.mark.parametrize("format", FORMATS)
def test_random_weights_are_laid_out_as_quantized_ones(format):
    config = described(TINY | {"num_hidden_layers": 1})
    made = random_model(config, format=format)
    assert layout(made) == layout(quantize_model(random_model(config), format))


def test_random_experts_are_laid_out_as_quantized_ones():
    kind = dict(SHAPES["qwen3-30b-a3b"]) | dict(hidden_size=64, num_experts=4, moe_intermediate_size=96)
    kind |= dict(num_experts_per_tok=2)
    small = kind | dict(vocab_size=300, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    config = described(small)
    made = random_model(config, format="int4_g32")
    assert layout(made) == layout(quantize_model(random_model(config), "int4_g32"))


def test_random_weights_differ_from_layer_to_layer_and_run():
    model = random_model(described(TINY), format="q4f16_1")
    one, two = (model.params["layers"][i]["mixer"]["q"]["w"].codes for i in (0, 1))
    assert not np.array_equal(one, two)
    logits, _ = jaxllm.forward(model.config, model.params, jnp.arange(5)[None])
    assert np.isfinite(logits).all()
    assert np.std(logits) > 0.01


# ---- peers ------------------------------------------------------------------------------------------------

PEER = """
import sys, json
ask = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print("loading ...")
print(json.dumps({"engine": ask["--engine"], "version": "1", "decode_tok_s": 10.0, "prefill_tok_s": 50.0,
    "ttft_s": 0.5, "load_s": 0.1, "peak_rss_mb": None, "prompt": ask["--prompt"]}))
"""


@pytest.fixture
def peer(monkeypatch, tmp_path):
    """A script in the place of llama.cpp's, run by this Python."""
    monkeypatch.setattr(peers, "SCRIPTS", tmp_path)
    monkeypatch.setenv("JAXLLM_PEER_LLAMA_CPP", sys.executable)
    script = tmp_path / "run_llama_cpp.py"
    script.write_text(PEER)
    return script


def test_a_peer_is_compared(run, peer):
    code, out, _ = run("--shape", "tiny", "--starts", 0, "--json", *QUICK, "--compare", f"llama.cpp={peer}")
    found = json.loads(out)
    theirs = found["peers"]["llama.cpp"]
    assert code == 0
    assert theirs["decode_tok_s_ratio"] == pytest.approx(found["decode_tok_s"] / 10)
    assert theirs["prefill_tok_s_ratio"] == pytest.approx(found["prefill_tok_s"] / 50)
    assert (theirs["version"], theirs["prompt"]) == ("1", "40")
    assert "times as fast" in run("--shape", "tiny", "--starts", 0, *QUICK, "--compare", f"llama.cpp={peer}")[1]


def test_a_peer_that_fails_is_told(run, peer):
    peer.write_text("raise SystemExit('no such weights')")
    code, _, err = run("--shape", "tiny", "--starts", 0, *QUICK, "--compare", f"llama.cpp={peer}")
    assert code == 1
    assert "llama.cpp could not be measured" in err
    assert "no such weights" in err


@pytest.mark.parametrize("python", ["", "/no/such/python"])
def test_a_peer_that_is_not_installed_is_told(run, peer, monkeypatch, python):
    monkeypatch.setenv("JAXLLM_PEER_LLAMA_CPP", python)
    code, _, err = run("--shape", "tiny", "--compare", f"llama.cpp={peer}")
    assert code == 1
    assert "pip install llama-cpp-python" in err
    assert "set JAXLLM_PEER_LLAMA_CPP=ENV/bin/python" in err


def test_peers_without_a_checkout_are_told(run, peer):
    peer.unlink()
    code, _, err = run("--shape", "tiny", "--compare", f"llama.cpp={peer.parent}")
    assert code == 1
    assert "source checkout" in err


@pytest.mark.parametrize("name", peers.PEERS)
def test_every_peer_has_its_script(name):
    """Each says what it takes without its engine being there."""
    script = ROOT / "benchmarks" / "peers" / peers.PEERS[name].script
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert name in done.stdout
    assert f"`{name}`" in (script.parent / "README.md").read_text()


@pytest.mark.slow
def test_transformers_is_a_peer_and_its_checkpoints_load(run, tmp_path, monkeypatch):
    """The whole way with a peer that the tests have: made, measured, compared, and read by jaxllm."""
    made = runpy.run_path(str(ROOT / "benchmarks" / "peers" / "make_checkpoints.py"))["make"]
    made(dict(TINY), tmp_path / "hub")
    monkeypatch.setenv("JAXLLM_PEER_TRANSFORMERS", sys.executable)
    quick = ("--starts", 0, "--prompt", 8, "--new", 2, "--rounds", 1, "--json")
    code, out, err = run(tmp_path / "hub", *quick, "--compare", f"transformers={tmp_path / 'hub'}")
    assert (code, err) == (0, "")
    theirs = json.loads(out)["peers"]["transformers"]
    assert theirs["decode_tok_s"] > 0
    assert theirs["version"].startswith("transformers ")
    assert len(jaxllm.load(tmp_path / "hub").tokenizer.encode("some words")) > 0


# ---- the picture ------------------------------------------------------------------------------------------


def test_the_picture_has_a_bar_for_each_line(run, tmp_path):
    _, out, _ = run("--shape", "tiny", "--starts", 0, "--json", *QUICK)
    line = json.loads(out) | {"peers": {"llama.cpp": {"decode_tok_s": 3.0, "prefill_tok_s": 2.0}}}
    (tmp_path / "results.jsonl").write_text(f"{json.dumps(line)}\n{out}")
    script = runpy.run_path(str(ROOT / "benchmarks" / "roofline.py"))
    for kind in ("decode", "prefill"):
        figure = script["draw"](script["read"](tmp_path / "results.jsonl"), kind)
        heights = [bar.get_height() for bar in figure.axes[0].patches]
        assert heights == [line[f"{kind}_roofline_tok_s"], line[f"{kind}_tok_s"]] * 2
    (tmp_path / "wrong.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match="line 1 holds nothing"):
        script["read"](tmp_path / "wrong.jsonl")
