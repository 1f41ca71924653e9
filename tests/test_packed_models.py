"""Small Llamas packed in every format, loaded, and compared with the same values loaded as plain weights."""

import json
import warnings
from dataclasses import replace

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm import layers
from jaxllm.errors import Notice
from jaxllm.quant import QTensor
from jaxllm.quant.formats import LEVELS
from tests import folders, packers

CONFIG = folders.CONFIG | dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, dtype="float32")
TOKENS = np.random.default_rng(5).integers(0, 64, (2, 9))


def ct(kind, activations=None, **weights):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    method = dict(quant_method="compressed-tensors", format=kind, ignore=["lm_head"])
    return method | {"config_groups": {"group_0": group}}


INT8 = dict(num_bits=8, type="int", symmetric=True, dynamic=True, strategy="token")
STATIC = dict(num_bits=8, type="int", symmetric=True, dynamic=False, strategy="tensor")
F8 = dict(num_bits=8, type="float", symmetric=True, dynamic=True, strategy="token")
BLOCKS = dict(num_bits=8, type="float", symmetric=True, dynamic=True, strategy="group", group_size=32)
FOUR = dict(num_bits=4, type="int", strategy="group", group_size=32, symmetric=True)
GPTQ = dict(quant_method="gptq", bits=4, group_size=32, sym=True, desc_act=False)
FP8 = dict(quant_method="fp8", activation_scheme="dynamic")
BNB = dict(quant_method="bitsandbytes", load_in_4bit=True)
NVFP4 = dict(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True)
p = packers

FORMATS = {  # name: (quantization_config, packer, its options, the format's name or None where expanded)
    "gptq": (GPTQ, p.gptq, dict(sym=True), "int4_g32"),
    "gptq-zeros": (GPTQ | dict(sym=False), p.gptq, {}, "uint4_g32"),
    "gptq-v2": (GPTQ | dict(checkpoint_format="gptq_v2"), p.gptq, dict(v2=True), "uint4_g32"),
    "gptq-order": (GPTQ | dict(desc_act=True), p.gptq, dict(act_order=True), "uint4_g32"),
    "gptq-order3": (GPTQ | dict(desc_act=True, bits=3), p.gptq, dict(act_order=True, bits=3), "uint3_g32"),
    "gptq2": (GPTQ | dict(bits=2), p.gptq, dict(bits=2), "uint2_g32"),
    "gptq3": (GPTQ | dict(bits=3), p.gptq, dict(bits=3, sym=True), "int3_g32"),
    "gptq8": (GPTQ | dict(bits=8), p.gptq, dict(bits=8, sym=True), "int8_g32"),
    "gptq8-zeros": (GPTQ | dict(bits=8), p.gptq, dict(bits=8), "uint8_g32"),
    "gptq-rows": (GPTQ | dict(group_size=-1), p.gptq, dict(group=None), "uint4"),
    "gptq-short": (GPTQ | dict(group_size=128), p.gptq, dict(group=128), "uint4_g128"),
    "gptq-short3": (GPTQ | dict(group_size=128, bits=3), p.gptq, dict(group=128, bits=3), "uint3_g128"),
    "awq": (dict(quant_method="awq", bits=4, group_size=32, version="gemm"), p.awq, {}, "uint4_g32"),
    "awq-gemv": (dict(quant_method="awq", w_bit=4, q_group_size=32, version="GEMV"), p.awq_gemv, {}, "uint4_g32"),
    "fp8": (FP8 | dict(weight_block_size=[16, 32]), p.fp8, dict(block=(16, 32)), "fp8_e4m3_g32_a8"),
    "fp8-cut": (FP8 | dict(weight_block_size=[48, 40]), p.fp8, dict(block=(48, 40)), "fp8_e4m3_g40_a8"),
    "fp8-tensor": (FP8, p.fp8, {}, "fp8_e4m3_a8"),
    "fp8-static": (
        FP8 | dict(activation_scheme="static"),
        p.fp8,
        dict(leaf="weight_scale", static="input_scale"),
        "fp8_e4m3_a8",
    ),
    "fbgemm": (dict(quant_method="fbgemm_fp8"), p.fp8, dict(block="row", leaf="weight_scale"), "fp8_e4m3_a8"),
    "modelopt": (
        dict(quant_method="modelopt", quant_algo="FP8"),
        p.fp8,
        dict(leaf="weight_scale", static="input_scale"),
        "fp8_e4m3_a8",
    ),
    "modelopt-nvfp4": (
        dict(quant_method="modelopt", quant_algo="NVFP4"),
        p.nvfp4,
        dict(names=("weight", "weight_scale_2"), divide=False),
        "nvfp4",
    ),
    "ct-4": (ct("pack-quantized", **FOUR), p.ct_pack, {}, "int4_g32"),
    "ct-4-zeros": (ct("pack-quantized", **FOUR | dict(symmetric=False)), p.ct_pack, dict(zeros=True), "uint4_g32"),
    "ct-4-order": (
        ct("pack-quantized", **FOUR | dict(actorder="group")),
        p.ct_pack,
        dict(act_order=True),
        "int4_g32",
    ),
    "ct-8": (
        ct("pack-quantized", num_bits=8, strategy="channel"),
        p.ct_pack,
        dict(bits=8, group=None),
        "int8",
    ),
    "ct-w8a8": (ct("int-quantized", INT8, num_bits=8, strategy="channel"), p.ct_int8, {}, "int8_a8"),
    "ct-w8a8-static": (
        ct("int-quantized", STATIC, num_bits=8, strategy="channel"),
        p.ct_int8,
        dict(static=True),
        "int8_a8",
    ),
    "ct-fp8": (
        ct("float-quantized", F8, num_bits=8, type="float", strategy="channel"),
        p.fp8,
        dict(block="row", leaf="weight_scale"),
        "fp8_e4m3_a8",
    ),
    "ct-fp8-tensor": (
        ct("naive-quantized", num_bits=8, type="float", strategy="tensor"),
        p.fp8,
        dict(leaf="weight_scale"),
        "fp8_e4m3",
    ),
    "ct-fp8-block": (
        ct("float-quantized", BLOCKS, num_bits=8, type="float", strategy="block", block_structure=[16, 32]),
        p.fp8,
        dict(block=(16, 32), leaf="weight_scale"),
        "fp8_e4m3_g32_a8",
    ),
    "ct-nvfp4": (ct("nvfp4-pack-quantized", **NVFP4), p.nvfp4, {}, "nvfp4"),
    "ct-mxfp4": (
        ct("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        p.ct_mxfp4,
        {},
        "mxfp4",
    ),
    "nf4": (BNB, p.bnb4, dict(table=LEVELS["nf4"]), "nf4_g32"),
    "fp4": (BNB, p.bnb4, dict(table=LEVELS["fp4"], kind="fp4", double=False), "fp4_g32"),
    "bnb-int8": (dict(load_in_8bit=True), p.bnb8, {}, "int8"),
    "hqq": (dict(quant_method="hqq"), p.hqq, {}, "uint4_g32"),
    "hqq-8": (dict(quant_method="hqq"), p.hqq, dict(bits=8, view=np.float16), "uint8_g32"),
    "hqq-3": (dict(quant_method="hqq"), p.hqq, dict(bits=3), "uint3_g32"),
    "hqq-2": (dict(quant_method="hqq"), p.hqq, dict(bits=2, group=16), "uint2_g16"),
    "hqq-1": (dict(quant_method="hqq"), p.hqq, dict(bits=1), "uint1_g32"),
    "hqq-axis0": (dict(quant_method="hqq"), p.hqq, dict(axis=0, bits=3), None),
    "torchao-int4": (dict(quant_method="torchao"), p.torchao_int4, {}, "int4_g32"),
    "torchao-int8": (dict(quant_method="torchao"), p.torchao_int8, {}, "int8"),
    "bitnet": (dict(quant_method="bitnet"), p.ternary, dict(divides=True), "ternary"),
    "bitnet-auto": (
        dict(quant_method="bitnet", linear_class="autobitlinear", quantization_mode="offline"),
        p.ternary,
        {},
        "ternary",
    ),
    "bitnet-loose": (
        dict(quant_method="bitnet", linear_class="autobitlinear"),
        p.ternary,
        dict(loose=True),
        "ternary",
    ),
}
TORCHAO = {"torchao-int4": "Int4Tensor", "torchao-int8": "Int8Tensor"}


def written(tmp_path, name):
    """(folder of the packed model, folder of the plain one with the values that the packer says)."""
    settings, packer, options, _ = FORMATS[name]
    rng, plain = np.random.default_rng(3), folders.tensors(CONFIG)
    stored, metadata = {}, {}
    for full, x in list(plain.items()):
        if not full.endswith("_proj.weight"):
            stored[full] = x
            continue
        module = full.removesuffix(".weight")
        parts, plain[full] = packer(rng, *x.shape, **options)
        stored |= {f"{module}.{leaf}": np.ascontiguousarray(part) for leaf, part in parts.items()}
        metadata[full] = json.dumps({"_type": TORCHAO.get(name), "_data": {}})
    save(tmp_path / "packed", stored, CONFIG | {"quantization_config": settings}, metadata)
    return tmp_path / "packed", folders.write(tmp_path / "plain", plain, config=CONFIG)


def save(folder, tensors, config, metadata=None):
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    folders.write_json(folder / "config.json", config)
    save_file(tensors, folder / "model.safetensors", metadata)
    return folder


def load_quietly(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        return jaxllm.load(folder)


def without_rounding(params):
    """The same weights, with activations as they are."""
    plain = lambda q: replace(q, input_scale=None, format=replace(q.format, activations=None))
    is_packed = lambda x: isinstance(x, QTensor)
    return jax.tree.map(lambda x: plain(x) if is_packed(x) else x, params, is_leaf=is_packed)


def logits(model, params=None):
    return np.asarray(layers.forward(model.config, params or model.params, TOKENS)[0])


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_the_values(name, tmp_path):
    packed, plain = written(tmp_path, name)
    model, reference = load_quietly(packed), jaxllm.load(plain)
    q = model.params["layers"][0]["ffn"]["down"]["w"]
    want_format = FORMATS[name][3]
    assert (q.format.name if isinstance(q, QTensor) else None) == want_format
    assert str(q.dtype) == "float32"
    got, want = logits(model, without_rounding(model.params)), logits(reference)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    assert want_format is None or model.nbytes < reference.nbytes


@pytest.mark.parametrize(
    "name", [n for n, row in FORMATS.items() if row[3] and (row[3].endswith("_a8") or row[3] == "ternary")]
)
def test_activations_are_rounded_where_the_file_says_so(name, tmp_path):
    packed, plain = written(tmp_path, name)
    model, reference = load_quietly(packed), jaxllm.load(plain)
    error = np.abs(logits(model) - logits(reference)).max() / np.abs(logits(reference)).max()
    assert 1e-4 < error < 0.5


# ---- other architectures, and files that mix formats -----------------------------------------------------------


def packed_modules(weights, names, packer, **options):
    """(tensors with the modules of those names packed, the values of all)."""
    rng, stored, plain = np.random.default_rng(7), dict(weights), dict(weights)
    for name in names:
        x = stored.pop(f"{name}.weight")
        parts, plain[f"{name}.weight"] = packer(rng, *x.shape, **options)
        stored |= {f"{name}.{leaf}": np.ascontiguousarray(part) for leaf, part in parts.items()}
    return stored, plain


def compare(tmp_path, config, settings, stored, plain):
    model = load_quietly(save(tmp_path / "packed", stored, config | {"quantization_config": settings}))
    reference = jaxllm.load(save(tmp_path / "plain", plain, config))
    got, want = logits(model, without_rounding(model.params)), logits(reference)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    return model


@pytest.mark.parametrize("options", [{}, dict(act_order=True), dict(sym=True, bits=3)])
def test_fused_matrices_are_split_packed(tmp_path, options):
    layer, config = "model.layers.0.", CONFIG | dict(model_type="phi3")
    weights = folders.tensors(CONFIG)
    qkv = [weights.pop(f"{layer}self_attn.{n}_proj.weight") for n in "qkv"]
    gate_up = [weights.pop(f"{layer}mlp.{n}_proj.weight") for n in ("gate", "up")]
    weights |= {f"{layer}self_attn.qkv_proj.weight": np.concatenate(qkv)}
    weights |= {f"{layer}mlp.gate_up_proj.weight": np.concatenate(gate_up)}
    names = [
        f"{layer}{n}" for n in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ]
    settings = GPTQ | dict(bits=options.get("bits", 4))
    model = compare(tmp_path, config, settings, *packed_modules(weights, names, packers.gptq, **options))
    assert all(isinstance(model.params["layers"][0]["mixer"][n]["w"], QTensor) for n in "qkvo")


def of_experts(tmp_path, settings, packer, **options):
    """A mixture of four experts, all their matrices packed, as `compare` has it."""
    layer, config = (
        "model.layers.0.",
        CONFIG | dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2),
    )
    weights = {n: x for n, x in folders.tensors(CONFIG).items() if ".mlp." not in n}
    rng, moe = np.random.default_rng(9), f"{layer}block_sparse_moe."
    weights[f"{moe}gate.weight"] = rng.standard_normal((4, 64)).astype(np.float32)
    experts = [f"{moe}experts.{e}.{w}" for e in range(4) for w in ("w1", "w2", "w3")]
    weights |= {f"{n}.weight": np.zeros((64, 96) if n.endswith("w2") else (96, 64), np.float32) for n in experts}
    return compare(tmp_path, config, settings, *packed_modules(weights, experts, packer, **options))


@pytest.mark.parametrize("options", [{}, dict(act_order=True)])
def test_experts_are_stacked_packed(tmp_path, options):
    model = of_experts(tmp_path, GPTQ, packers.gptq, **options)
    assert model.params["layers"][0]["ffn"]["down"]["w"].shape == (4, 64, 96)


def test_experts_whose_activations_have_a_scale_come_back(tmp_path):
    static = dict(leaf="weight_scale", static="input_scale")
    others = dict(modules_to_not_convert=["q_proj", "k_proj", "v_proj", "o_proj", "gate", "lm_head"])
    model = of_experts(tmp_path, FP8 | others | dict(activation_scheme="static"), packers.fp8, **static)
    assert model.params["layers"][0]["ffn"]["down"]["w"].input_scale.shape == (4,)
    jaxllm.save(model, tmp_path / "own")
    np.testing.assert_array_equal(logits(jaxllm.load(tmp_path / "own")), logits(model))


def test_groups_of_modules_with_formats_of_their_own(tmp_path):
    layer = "model.layers.0."
    eight = dict(targets=["re:.*down_proj$"], weights=dict(num_bits=8, strategy="channel"))
    floats = dict(targets=[f"{layer}self_attn.q_proj"], weights=dict(num_bits=8, type="float", strategy="channel"))
    four = dict(targets=["Linear"], weights=FOUR)
    settings = dict(quant_method="compressed-tensors", format="mixed-precision", ignore=["lm_head", "re:.*o_proj"])
    settings["config_groups"] = {"a": four, "b": eight, "c": floats}
    stored, plain = packed_modules(
        folders.tensors(CONFIG), [f"{layer}mlp.down_proj"], packers.ct_pack, bits=8, group=None
    )
    stored, values = packed_modules(
        stored, [f"{layer}self_attn.q_proj"], packers.fp8, block="row", leaf="weight_scale"
    )
    plain |= {n: x for n, x in values.items() if n in plain and "down_proj" not in n}
    names = [f"{layer}{n}_proj" for n in ("self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")]
    stored, values = packed_modules(stored, names, packers.ct_pack)
    plain |= {f"{n}.weight": values[f"{n}.weight"] for n in names}
    model = compare(tmp_path, CONFIG, settings, stored, plain)
    first = model.params["layers"][0]
    assert first["ffn"]["down"]["w"].format.name == "int8"
    assert first["mixer"]["q"]["w"].format.name == "fp8_e4m3"
    assert first["ffn"]["up"]["w"].format.name == "int4_g32"
    assert not isinstance(first["mixer"]["o"]["w"], QTensor)


def test_modules_with_bits_of_their_own(tmp_path):
    """GPTQModel's `dynamic`: bits and groups are told by a module's shapes."""
    layer = "model.layers.0."
    stored, plain = packed_modules(
        folders.tensors(CONFIG), [f"{layer}mlp.down_proj"], packers.gptq, bits=8, group=48, sym=True
    )
    names = [f"{layer}self_attn.{n}_proj" for n in "qkvo"]
    stored, values = packed_modules(stored, names, packers.gptq)
    plain |= {f"{n}.weight": values[f"{n}.weight"] for n in names}
    model = compare(tmp_path, CONFIG, GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, stored, plain)
    assert model.params["layers"][0]["ffn"]["down"]["w"].format.name == "int8_g48"


# ---- notices ----------------------------------------------------------------------------------------------------


def told(tmp_path, stored, settings) -> str:
    folder = save(tmp_path, stored, CONFIG | {"quantization_config": settings})
    with pytest.warns(Notice) as found:
        jaxllm.load(folder)
    (notice,) = found
    assert notice.filename == __file__
    return str(notice.message)


def test_what_is_expanded_is_told_once(tmp_path):
    layer = "model.layers.0."
    names = [f"{layer}mlp.down_proj", f"{layer}mlp.up_proj"]
    stored, _ = packed_modules(folders.tensors(CONFIG), names, packers.hqq, axis=0)
    assert "groups run across rows of the matrix, so they are expanded (2 times)" in told(
        tmp_path, stored, dict(quant_method="hqq")
    )


def test_what_is_not_rounded_is_told(tmp_path):
    stored, _ = packed_modules(folders.tensors(CONFIG), ["model.layers.0.mlp.down_proj"], packers.ct_pack)
    stored["model.layers.0.self_attn.k_scale"] = np.float32([1])
    settings = ct("pack-quantized", INT8, **FOUR) | {"kv_cache_scheme": {"num_bits": 8}}
    said = told(tmp_path, stored, settings)
    assert "the scales of a quantized cache are not used (1 time)" in said
    assert "activations stay as they are, the file rounds them in other groups than weights (1 time)" in said
