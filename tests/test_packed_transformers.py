"""Readers of packed weights against transformers' own code, on CPU."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import layers
from jaxllm.checkpoint.packed import packed
from jaxllm.checkpoint.safetensors import open_file
from jaxllm.quant import QTensor, dequantize, products
from tests import folders, tiny
from tests.cases.bitnet import CASES as BITNET
from tests.parity import TOLERANCE, all_cases
from tests.test_packed_models import save

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

CONFIG = folders.CONFIG | dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, dtype="float32")
TOKENS = np.random.default_rng(0).integers(3, 96, (2, 12))


@pytest.fixture(autouse=True)
def eager():
    """Their functions are compiled with a C++ compiler otherwise."""
    with torch.compiler.set_stance("force_eager"):
        yield


def theirs(net) -> np.ndarray:
    with torch.no_grad():
        return net(torch.tensor(TOKENS), use_cache=False).logits.float().numpy()


def ours(folder) -> tuple[jaxllm.Model, np.ndarray]:
    model = jaxllm.load(folder)
    return model, np.asarray(layers.forward(model.config, model.params, TOKENS)[0])


def stored(net) -> dict[str, np.ndarray]:
    """The tensors that transformers would save."""
    return {name: x.detach().numpy() for name, x in net.state_dict().items()}


def config_of(net, **method) -> dict:
    return net.config.to_dict() | {"quantization_config": method}


# ---- fp8 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", ["float", "ue8m0"])
@pytest.mark.parametrize("block", [[16, 32], None])
def test_fp8_is_what_transformers_makes_and_expands(tmp_path, scales, block):
    from safetensors.torch import save_file
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    settings = types.SimpleNamespace(weight_block_size=block, scale_fmt=scales)
    maker = Fp8Quantize(types.SimpleNamespace(quantization_config=settings))
    plain = {name: torch.tensor(x) for name, x in folders.tensors(CONFIG).items()}
    tensors = {n: x for n, x in plain.items() if "_proj" not in n}
    want = {}
    for name in plain.keys() - tensors.keys():
        made = maker.convert({name: plain[name]})
        tensors |= {n: x.contiguous() for n, x in made.items()}
        codes, scale = made.values()
        want[name] = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32).numpy()
    method = dict(quant_method="fp8", weight_block_size=block, scale_fmt=scales, activation_scheme="dynamic")
    folder = save(tmp_path, {}, CONFIG | {"quantization_config": method})
    save_file(tensors, folder / "model.safetensors")
    first = jaxllm.load(folder).params["layers"][0]
    for path, name in (("mixer.q", "self_attn.q_proj"), ("ffn.down", "mlp.down_proj")):
        part, leaf = path.split(".")
        q = first[part][leaf]["w"]
        assert isinstance(q, QTensor)
        got = np.asarray(dequantize(q, np.float32))
        assert np.array_equal(got, want[f"model.layers.0.{name}.weight"])


def test_activations_in_fp8_are_rounded_as_transformers_does(tmp_path):
    """Its linear map for compressed-tensors, a scale for each row of weights and of activations."""
    from safetensors.torch import save_file
    from transformers.integrations.compressed_tensors import quantize_fp8_per_row

    g = torch.Generator().manual_seed(2)
    weight, x = (torch.randn(n, 64, generator=g) for n in (24, 7))
    (codes, scale), (rounded, by) = quantize_fp8_per_row(weight), quantize_fp8_per_row(x)
    want = (rounded.float() * by[:, None]) @ (codes.float() * scale[:, None]).T
    save_file({"m.weight": codes, "m.weight_scale": scale[:, None].contiguous()}, tmp_path / "model.safetensors")
    tokens = dict(num_bits=8, type="float", symmetric=True, dynamic=True, strategy="token")
    group = dict(targets=["Linear"], input_activations=tokens)
    group["weights"] = dict(num_bits=8, type="float", strategy="channel")
    method = dict(quant_method="compressed-tensors", format="float-quantized", config_groups={"a": group})
    q = packed({"quantization_config": method}, open_file(tmp_path / "model.safetensors"))["m.weight"]()
    got = np.asarray(products.matmul(jnp.asarray(x.numpy()), jax.tree.map(jnp.asarray, q)))
    assert np.abs(got - want.numpy()).max() <= 1e-6 * np.abs(want.numpy()).max()


# ---- MXFP4 --------------------------------------------------------------------------------------------------


def test_gpt_oss_in_mxfp4(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    case, rng = all_cases()["gpt_oss"], np.random.default_rng(1)
    net = tiny.build(case.model_type, case.values, attn=case.attn)
    tensors = stored(net)
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        E, K, N = tensors.pop(name).shape
        blocks = rng.integers(0, 256, (E, N, K // 32, 16)).astype(np.uint8)
        scales = rng.integers(119, 124, (E, N, K // 32)).astype(np.uint8)
        values = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32)
        with torch.no_grad():
            net.get_parameter(name).copy_(values)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    model, got = ours(save(tmp_path, tensors, config_of(net, quant_method="mxfp4")))
    experts = model.params["layers"][0]["ffn"]
    assert [experts[n]["w"].format.name for n in ("gate", "up", "down")] == ["mxfp4"] * 3
    want = theirs(net)
    assert np.abs(got - want).max() <= TOLERANCE * np.abs(want).max()


# ---- BitNet -------------------------------------------------------------------------------------------------


def bitnet(linear_class: str, mode: str):
    """A tiny model whose linear maps are transformers' own, with random weights, and its settings."""
    from transformers import BitNetQuantConfig
    from transformers.integrations.bitnet import replace_with_bitnet_linear

    case = BITNET["bitnet"]
    net = tiny.build(case.model_type, case.values)
    plain = {n: x.clone() for n, x in net.state_dict().items()}
    settings = BitNetQuantConfig(linear_class=linear_class, quantization_mode=mode)
    replace_with_bitnet_linear(net, modules_to_not_convert=["lm_head"], quantization_config=settings)
    net = net.to_empty(device="cpu").float().eval()
    net.model.rotary_emb.__init__(net.config)
    return net, plain, dict(quant_method="bitnet", linear_class=linear_class, quantization_mode=mode)


SCALES = {"bitlinear": 7.5, "autobitlinear": 0.13}  # one divides, the other multiplies


def fill(net, plain, linear_class: str, mode: str) -> None:
    """The plain weights; offline random codes for the linear maps, and a scale."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in net.state_dict().items():
            if name.endswith("weight_scale"):
                x.fill_(SCALES[linear_class])
            elif "_proj.weight" not in name or mode == "online":
                x.copy_(plain[name])
            else:
                codes = torch.randint(-1, 2, plain[name].shape, generator=g)
                x.copy_(four_a_byte(codes) if x.dtype == torch.uint8 else codes)


def four_a_byte(codes):
    from transformers.integrations.bitnet import pack_weights

    return pack_weights(codes.int().clone())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of their imports
@pytest.mark.parametrize(
    ("linear_class", "mode"),
    [("bitlinear", "offline"), ("autobitlinear", "offline"), ("autobitlinear", "online")],
)
def test_bitnet_rounds_as_transformers_does(tmp_path, linear_class, mode):
    net, plain, method = bitnet(linear_class, mode)
    fill(net, plain, linear_class, mode)
    tensors = {n: np.ascontiguousarray(x) for n, x in stored(net).items()}
    if linear_class == "autobitlinear" and mode == "offline":  # saved packed, expanded when they load it
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            tensors[name] = four_a_byte(torch.tensor(tensors[name])).numpy()
    model, got = ours(save(tmp_path, tensors, config_of(net, **method) | {"dtype": "float32"}))
    assert model.params["layers"][0]["mixer"]["q"]["w"].format.name == "ternary"
    error = np.abs(got - theirs(net)) / np.abs(theirs(net)).max()
    # An activation beside the middle of two steps may fall on either side: a few logits move a little.
    assert np.median(error) < 1e-6
    assert error.max() < 2e-2
