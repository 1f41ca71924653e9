"""Files for LiteRT and LiteRT-LM: what they compute is the live model, and their codes are ours."""

import importlib.util
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import cli, decode, layers, quant
from jaxllm.checkpoint.canonical import flatten
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.export import build, litert_file, litert_program, target
from jaxllm.export.options import Options
from jaxllm.export.targets import litert
from jaxllm.model import Model
from jaxllm.quant import QTensor
from jaxllm.quant.encode import encode
from tests import random_model
from tests.test_export import CONFIGS, KINDS, SMALL, here, model_of

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in litert.NEEDS),
    reason="litert-converter, ai-edge-litert and litert-lm-builder are not all installed",
)
ENGINE = pytest.mark.skipif(not importlib.util.find_spec("litert_lm"), reason="litert-lm is not installed")
BUNDLE = Options(context=256, chunk=32, platform=litert.BUNDLE)
PROMPT = "def read_lines(path):\n"


def exported(model: Model, out, options: Options = SMALL) -> build.Exported:
    with here():
        return build.export(model, "litert", out, options=options)


@pytest.fixture(scope="module")
def bundled() -> Model:
    return jaxllm.load(dtype="float32")


# ---- what is computed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("q4f16_1", "int8")])
def test_every_kind_of_model_goes_through(kind, tmp_path):
    name, _, options = KINDS[kind]
    said = exported(model_of(name), tmp_path / kind, options).manifest["verification"]
    assert said["verified"] == "executed"
    assert said["tokens_equal"] == said["tokens"] == options.batch * (33 + 5)
    assert said["max_difference"] < 2e-6 * said["largest_logit"]


@pytest.mark.parametrize(
    ("config", "format"), [("full", "q4f16_1"), ("moe", "q4f16_1"), ("mla", "int8"), ("tied", "int8")]
)
def test_packed_weights_keep_their_codes(config, format, tmp_path):
    """Each parameter in the file, packed where a product or a look-up reads it, has exactly our values."""
    model = model_of(config, format)
    export = exported(model, tmp_path / "out")
    said = export.manifest["verification"]
    assert said["tokens_equal"] + said["near_ties"] == said["tokens"]
    found = stored(export.folder / litert.FILE)
    assert sum(kind != "float32" for kind, _ in found.values()) >= 4
    for path, leaf in flatten(model.params).items():
        ours = np.asarray(quant.dequantize(leaf, jnp.float32) if isinstance(leaf, QTensor) else leaf, np.float32)
        parts = [path] if path in found or f"{path}_half" in found else [f"{path}.{i}" for i in range(len(ours))]
        whole = np.reshape([(found.get(f"{part}_half") or found[part])[1] for part in parts], ours.shape)
        assert (whole == ours).all(), path


def stored(path) -> dict[str, tuple[str, np.ndarray]]:
    """Name of each parameter -> (its type in the file, its values), read by the schema's own description."""
    from ai_edge_litert import schema_py_generated as schema

    data = path.read_bytes()
    model = schema.Model.GetRootAs(data, 0)
    kinds = {number: name for name, number in vars(schema.TensorType).items() if isinstance(number, int)}
    found = {}

    def raw(tensor) -> np.ndarray:
        buffer = model.Buffers(tensor.Buffer())
        return np.frombuffer(data, np.uint8, buffer.Size(), buffer.Offset())

    for graph in map(model.Subgraphs, range(model.SubgraphsLength())):
        for tensor in map(graph.Tensors, range(graph.TensorsLength())):
            name, shape = tensor.Name().decode(), tensor.ShapeAsNumpy()
            if model.Buffers(tensor.Buffer()).Offset() < 2 or name.endswith("_scales"):
                continue
            kind, bytes_ = kinds[tensor.Type()].lower(), raw(tensor)
            if kind.startswith("float"):
                values = bytes_.view("<f4" if kind == "float32" else "<f2").astype(np.float32).reshape(shape)
            else:
                codes = bytes_.view(np.int8)
                if kind == "int4":
                    codes = np.stack([codes << 4 >> 4, codes >> 4], -1)
                values = codes.reshape(shape) * scales(schema, graph, tensor, raw)
            known = found.setdefault(names(name), (kind, values))
            assert (known[1] == values).all()
    return found


def scales(schema, graph, tensor, raw) -> np.ndarray:
    """f32, one for each weight or row."""
    described = tensor.Quantization()
    if described.DetailsType() != schema.QuantizationDetails.BlockwiseQuantization:
        return described.ScaleAsNumpy()[:, None]
    blocks = schema.BlockwiseQuantization()
    blocks.Init(described.Details().Bytes, described.Details().Pos)
    rows = raw(graph.Tensors(blocks.Scales())).view("<f2").astype(np.float32)
    return np.repeat(rows.reshape(tensor.ShapeAsNumpy()[0], -1), blocks.BlockSize(), 1)


def names(tensor: str) -> str:
    """prefill_embed.w:0 and the like -> embed.w"""
    return tensor.partition(":")[0].removeprefix("prefill_").removeprefix("decode_")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_products_read_weights_of_16_bits(dtype, tmp_path):
    config = replace(CONFIGS["full"], dtype=dtype)
    export = exported(Model(config, random_model.params(config, dtype=dtype)), tmp_path / "out")
    found = stored(export.folder / litert.FILE)
    assert export.manifest["target"]["limits"]["matrices"] == {"float16": 15, "float32": 6}
    for path, leaf in flatten(random_model.params(config, dtype=dtype)).items():
        kind, values = found.get(f"{path}_half") or found[path]
        small = 2.0**-25 if dtype == "bfloat16" and kind == "float16" else 0  # float16's steps near zero
        np.testing.assert_allclose(values, np.asarray(leaf, np.float32), rtol=0, atol=small)


def test_numbers_beyond_float16_stay_float32(tmp_path):
    config = replace(CONFIGS["full"], dtype="bfloat16")
    params = random_model.params(config, dtype="bfloat16")
    params["layers"][0]["mixer"]["q"]["w"] = params["layers"][0]["mixer"]["q"]["w"].at[0, 0].set(1e5)
    found = list(litert_file._matrices(flatten(params)))
    assert [path for path, leaf in found if leaf.ndim == 2 and not litert_file._halves(leaf)] == [
        "layers.0.mixer.q.w"
    ]


def test_a_parameter_is_stored_once_for_both_programs(tmp_path):
    model = model_of("tied")
    export = exported(model, tmp_path / "out")
    weights = sum(4 * x.size for x in flatten(model.params).values())
    assert weights < export.manifest["files"][litert.FILE]["bytes"] < weights + 120_000


def test_four_bits_take_four_and_a_half(tmp_path):
    wide = random_model.config(random_model.block(), vocab=4096, width=256)
    model = jaxllm.quantize(Model(wide, random_model.params(wide)), "q4f16_1")
    export = exported(model, tmp_path / "out")
    packed = sum(x.nbytes for x in flatten(model.params).values() if isinstance(x, QTensor))
    others = sum(4 * x.size for x in flatten(model.params).values() if not isinstance(x, QTensor))
    down = flatten(model.params)["layers.0.ffn.down.w"]  # 40 columns are no whole groups
    expected = packed + others - down.nbytes + 4 * down.size
    assert export.manifest["target"]["limits"]["matrices"]["int4"] == 8
    assert 0 < export.manifest["files"][litert.FILE]["bytes"] - expected < 120_000


def test_the_bundled_model_generates_what_live_does(bundled, tmp_path):
    """As the command makes it, verified in a fresh process; 64 greedy tokens."""
    out = tmp_path / "out"
    sizes = ["--dtype", "float32", "--context", "256", "--chunk", "32"]
    assert cli.main(["export", str(jaxllm.bundled()), "--target", "litert", "--out", str(out), *sizes]) == 0
    live = decode.generate(bundled, PROMPT, max_new_tokens=64, max_len=256, eos=())
    runner = litert.Runner(out, build.manifests.opened(out))
    ids = bundled.tokenizer.encode(PROMPT)
    assert list(itertools.islice(runner.greedy(ids, 32), 64)) == list(live.completions[0].tokens)


# ---- LiteRT-LM --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(bundled, tmp_path_factory):
    return exported(bundled, tmp_path_factory.mktemp("lm") / "out", BUNDLE)


def test_a_bundle_has_the_engines_conventions(bundle, bundled):
    found = bundle.manifest["programs"]
    assert [p["name"] for p in found["prefill"]["inputs"] if p["role"] == "input"] == ["input_pos", "tokens"]
    assert {p["name"] for p in found["prefill"]["outputs"]} == {
        f"kv_cache_{part}_{i}" for part in "kv" for i in range(len(bundled.config.blocks))
    }
    logits = next(p for p in found["decode"]["outputs"] if p["role"] == "result")
    assert logits["shape"] == [1, 1, bundled.config.vocab]
    assert bundle.manifest["verification"]["tokens_equal"] == bundle.manifest["verification"]["tokens"]


@ENGINE
def test_the_engine_says_what_live_does(bundle, bundled):
    """64 greedy tokens, by the bundle's own tokenizer; and the engine was part of the verification."""
    from jaxllm.export import litert_lm

    live = decode.generate(bundled, PROMPT, max_new_tokens=64, max_len=256)
    assert litert_lm.speak(bundle.folder / litert_lm.FILE, PROMPT, 64) == live.text
    assert "LiteRT-LM" in bundle.manifest["verification"]["where"]


@ENGINE
def test_the_engine_writes_a_chat_as_the_template_has_it(bundle, bundled):
    import litert_lm

    asked = [{"role": "user", "content": PROMPT.strip()}]
    live = decode.generate(bundled, bundled.tokenizer.encode_chat(asked), max_new_tokens=32, max_len=256)
    greedy = litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0)
    path = str(bundle.folder / litert.litert_lm.FILE)
    with (
        litert_lm.Engine(path, cache_dir=":nocache") as engine,
        engine.create_conversation(sampler_config=greedy, max_output_tokens=32) as conversation,
    ):
        said = conversation.send_message(asked[0]["content"])
    assert "".join(part.text for part in said.contents) == live.text


@ENGINE
def test_an_engine_that_says_something_else_is_noticed(bundle, monkeypatch):
    monkeypatch.setattr(litert.litert_lm, "speak", lambda *a: "something else")
    with pytest.raises(CheckpointError, match="LiteRT-LM says 'something else' where"):
        litert.runner(bundle.folder, bundle.manifest)


def test_rings_become_whole_caches_in_a_bundle():
    """A window of a model is a mask there: the program agrees with the live one behind its window."""
    config = CONFIGS["window"]
    leaves = {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in litert_program.params_shape(config).items()}
    options = Options(context=64, chunk=8)
    prefill, one = litert.litert_lm.conventional(config, leaves, options)
    params = flatten(random_model.params(config))
    caches = {k: jnp.zeros(x.shape, x.dtype) for k, x in one.specs[1].items()}
    assert all(x.shape[2] == 64 for x in caches.values())
    ids = random_model.tokens(21)
    for start in (0, 8, 16):
        part = np.zeros(8, np.int32)
        part[: len(ids[start : start + 8])] = ids[start : start + 8]
        at = np.where(np.arange(8) < len(ids) - start, start + np.arange(8), 0).astype(np.int32)
        _, caches = prefill.call(params, caches, {"tokens": part[None], "input_pos": at})
    results, _ = one.call(params, caches, {"tokens": np.array([[5]]), "input_pos": np.array([21])})
    expected, _ = layers.forward(config, random_model.params(config), jnp.asarray([[*ids.tolist(), 5]]))
    np.testing.assert_allclose(results["logits"][0, 0], expected[0, -1], atol=2e-5)


# ---- what cannot be ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "format", "options", "says"),
    [
        (
            "full",
            "int4_g32",
            SMALL,
            "embed.w is in int4_g32: its scales have either sign .* q4f16_1 takes as many",
        ),
        ("full", "int8_g32", SMALL, "8 bits with one scale a row only"),
        ("full", "nf4", SMALL, "not whole numbers times a scale"),
        ("full", "uint4_g32", SMALL, "not whole numbers times a scale"),
        ("full", "q4bf16_1", SMALL, "float16 scales of 32, 64, 128, 256 columns"),
        ("full", "int3_g32", SMALL, "codes of 4 and 8 bits"),
        ("full", "w8a8", SMALL, "how activations are rounded"),
        ("mla", None, BUNDLE, "keeps keys and values of attention"),
        ("recurrent", None, BUNDLE, "keeps keys and values of attention"),
        ("full", None, replace(BUNDLE, batch=2), "leave --batch out"),
        ("full", None, replace(BUNDLE, context=None, window=20), "leave --window out"),
        ("full", None, replace(SMALL, sampler="in-graph"), "leave --sampler out"),
    ],
)
def test_refusals_come_before_any_work(config, format, options, says, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_loaded", lambda *a: pytest.fail("that is work"))
    options = options if options.context is None else replace(options, context=64, chunk=8)
    with pytest.raises(ConfigError, match=f"litert cannot take this model: .*{says}"):
        build.export(model_of(config), "litert", tmp_path / "out", format=format, options=options)
    assert list(tmp_path.iterdir()) == []


def test_an_operation_that_is_not_there_is_found_without_weights(monkeypatch):
    monkeypatch.setattr(litert_program, "ABSENT", ("RSQRT",))
    found = target.find("litert").refuses(CONFIGS["full"], {}, {}, replace(SMALL, context=48, platform="tflite"))
    assert found == "LiteRT has no RSQRT, which it needs"


def test_negative_scales_are_turned_where_codes_allow_it():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 64)).astype(np.float32)
    packed = encode(weight, quant.named("q4f16_1"))
    turned = replace(packed, scale=packed.scale * np.array([[-1], [1], [-1], [1]], np.float16))
    codes = np.frombuffer(litert_file._coded(turned), np.int8).reshape(4, -1)
    values = np.stack([codes << 4 >> 4, codes >> 4], -1).reshape(4, 64) * np.repeat(
        np.abs(turned.scale).astype(np.float32), 32, 1
    )
    assert (values == np.asarray(quant.dequantize(turned, np.float32))).all()
    lowest = encode(weight, quant.named("int4_g32"))
    assert (lowest.scale < 0).any()
    with pytest.raises(ConfigError, match="a negative scale and the code -8"):
        litert_file._coded(lowest)
