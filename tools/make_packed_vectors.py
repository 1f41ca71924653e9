"""Write tests/packed_vectors.safetensors: small weights packed by the packages that define the formats.

python tools/make_packed_vectors.py          (needs torch, compressed-tensors, bitsandbytes, torchao, autoawq)

Made with compressed-tensors 0.20.0, bitsandbytes 0.50.2, torchao 0.18.0 and autoawq 0.2.7.post3. Each case is the
tensors of one module named "m", what the package itself expands them to ("want"), and its settings.
"""

from __future__ import annotations

import json
import pathlib

import torch
from safetensors.torch import save_file

OUT = pathlib.Path(__file__).parents[1] / "tests" / "packed_vectors.safetensors"
Case = tuple[dict[str, torch.Tensor], torch.Tensor, dict, dict]  # tensors, want, quantization_config, metadata


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def compressed(kind: str, scale: torch.Tensor, shape=(24, 64), *, zero=None, extra=None, **weights) -> Case:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights), format=kind)
    codec = BaseCompressor.get_value_from_registry(kind)
    given = {"weight": weight(*shape), "weight_scale": scale, **(extra or {})}
    if zero is not None:
        given["weight_zero_point"] = zero
    packed = codec.compress(given, scheme)
    want = codec.decompress(dict(packed), scheme)["weight"]
    group = json.loads(scheme.model_dump_json())
    return packed, want, dict(quant_method="compressed-tensors", format=kind, config_groups={"group_0": group}), {}


def steps(shape, many: tuple[int, ...], levels: float) -> torch.Tensor:
    """Scales of that shape under which `weight` uses most of its levels, each another."""
    base = torch.linspace(0.8, 1.6, int(torch.tensor(many).prod())).reshape(many)
    return base * weight(*shape).abs().max() / levels


def compressed_cases() -> dict[str, Case]:
    s, by_group = (24, 64), dict(strategy="group", group_size=32)
    zero = lambda *many: torch.randint(-3, 4, many, generator=torch.Generator().manual_seed(1)).to(torch.int8)
    powers = lambda *many: (
        2.0 ** torch.arange(-4, -4 + int(torch.tensor(many).prod())).remainder(5).sub(4).reshape(many)
    )
    fp = dict(num_bits=8, type="float")
    four = dict(num_bits=4, type="float")
    uneven = dict(num_bits=8, symmetric=False, strategy="channel")
    return {
        "pack4": compressed("pack-quantized", steps(s, (24, 2), 7), num_bits=4, **by_group),
        "pack4-zero": compressed(
            "pack-quantized", steps(s, (24, 2), 7), zero=zero(24, 2), num_bits=4, symmetric=False, **by_group
        ),
        "pack4-channel": compressed("pack-quantized", steps(s, (24, 1), 7), num_bits=4, strategy="channel"),
        "pack8": compressed("pack-quantized", steps(s, (24, 2), 127), num_bits=8, **by_group),
        "pack8-zero": compressed("pack-quantized", steps(s, (24, 1), 127), zero=zero(24, 1), **uneven),
        "pack3": compressed("pack-quantized", steps(s, (24, 2), 3), num_bits=3, **by_group),
        "pack6-zero": compressed(
            "pack-quantized", steps(s, (24, 2), 31), zero=zero(24, 2), num_bits=6, symmetric=False, **by_group
        ),
        "int8-channel": compressed("int-quantized", steps(s, (24, 1), 127), num_bits=8, strategy="channel"),
        "int8-zero": compressed("int-quantized", steps(s, (24, 1), 127), zero=zero(24, 1), **uneven),
        "int8-tensor": compressed("int-quantized", steps(s, (1,), 127), num_bits=8, strategy="tensor"),
        "fp8-channel": compressed("float-quantized", steps(s, (24, 1), 448), strategy="channel", **fp),
        "fp8-tensor": compressed("float-quantized", steps(s, (1,), 448), strategy="tensor", **fp),
        "fp8-block": compressed(
            "float-quantized", steps(s, (2, 2), 448), strategy="block", block_structure=[16, 32], **fp
        ),
        "nvfp4": compressed(
            "nvfp4-pack-quantized",
            steps(s, (24, 4), 6 / 200).to(torch.float8_e4m3fn).float(),
            extra={"weight_global_scale": torch.tensor([200.0])},
            strategy="tensor_group",
            group_size=16,
            **four,
        ),
        "mxfp4": compressed("mxfp4-pack-quantized", powers(24, 2), **by_group, **four),
        "mxfp8": compressed("mxfp8-quantized", powers(24, 2), **by_group, **fp, scale_dtype=torch.uint8),
    }


def expanded(data: torch.Tensor, state) -> torch.Tensor:
    """By bitsandbytes' generic code: its kernel for CPUs lets no block go beyond a row, which they may."""
    from bitsandbytes import functional as F
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    absmax = state.absmax
    if state.nested:
        absmax = F.dequantize_blockwise(absmax, state.state2) + state.offset
    return _dequantize_4bit_compute(
        data.reshape(-1), absmax, state.code, state.blocksize, state.shape, state.dtype
    )


def bitsandbytes_cases() -> dict[str, Case]:
    from bitsandbytes import functional as F

    settings = dict(quant_method="bitsandbytes", load_in_4bit=True)
    cases: dict[str, Case] = {}
    for name, kind, shape, double in (
        ("nf4", "nf4", (24, 64), False),
        ("nf4-double", "nf4", (260, 64), True),
        ("fp4", "fp4", (24, 128), False),
        ("nf4-cut", "nf4", (12, 96), True),  # blocks of 64 codes and rows of 96
        ("nf4-rows", "nf4", (32, 16), False),  # blocks of four rows
        ("fp4-expanded", "fp4", (10, 40), False),
    ):
        data, state = F.quantize_4bit(weight(*shape), blocksize=64, compress_statistics=double, quant_type=kind)
        parts = {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
        cases[name] = {"weight": data, **parts}, expanded(data, state), settings, {}
    data, scb, _ = F.int8_vectorwise_quant(weight(24, 64).half())
    tensors = {"weight": data, "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    settings = dict(quant_method="bitsandbytes", load_in_8bit=True)
    cases["int8"] = tensors, F.int8_vectorwise_dequant(data, scb), settings, {}
    return cases


def torchao_cases() -> dict[str, Case]:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
        quantize_,
    )

    configs = {
        "int8": Int8WeightOnlyConfig(version=2),
        "int4-unpacked": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32), version=2),
        "fp8": Float8WeightOnlyConfig(version=2),
    }
    cases: dict[str, Case] = {}
    for name, config in configs.items():
        net = torch.nn.Sequential()
        net.add_module("m", torch.nn.Linear(64, 24, bias=False))
        net.m.weight.data = weight(24, 64)
        quantize_(net, config)
        tensors, metadata = flatten_tensor_state_dict(net.state_dict())
        short = {k.removeprefix("m."): v for k, v in tensors.items()}
        cases[name] = short, net.m.weight.dequantize(), dict(quant_method="torchao"), metadata
    return cases


def awq_cases() -> dict[str, Case]:
    from awq.utils.packing_utils import dequantize_gemm

    g = torch.Generator().manual_seed(2)
    words = lambda *shape: torch.randint(-(2**31), 2**31, shape, generator=g).to(torch.int32)
    tensors = {"qweight": words(64, 3), "qzeros": words(2, 3), "scales": (weight(2, 24).abs() / 10).half()}
    want = dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"], 4, 32).T
    return {"gemm": (tensors, want, dict(quant_method="awq", bits=4, group_size=32, version="gemm"), {})}


def main() -> None:
    makers = dict(compressed=compressed_cases, bnb=bitsandbytes_cases, torchao=torchao_cases, awq=awq_cases)
    tensors, texts = {}, {}
    for maker, cases in makers.items():
        for name, (parts, want, settings, metadata) in cases().items():
            case = f"{maker}-{name}"
            kept = {f"{case}/m.{k}": v.detach().clone().contiguous() for k, v in parts.items() if v is not None}
            tensors |= kept | {f"{case}/want": want.detach().clone().contiguous()}
            texts[case] = json.dumps({"quantization_config": settings, "metadata": metadata})
    save_file(tensors, OUT, texts)
    print(f"{OUT}: {len(texts)} cases, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
