"""Readers of packed weights against values that other people's programs got from the same bytes."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest

from jaxllm.checkpoint.packed import packed
from jaxllm.checkpoint.safetensors import open_file, read_metadata
from jaxllm.quant import QTensor, dequantize, products

VECTORS = pathlib.Path(__file__).parent / "packed_vectors.safetensors"
CONFIG = {"model_type": "llama", "dtype": "float32"}
# What the packages work out in 16 bits; the others are exact, up to the order of f32 products.
ROUNDED = {"compressed-nvfp4": 2**-8, "compressed-mxfp8": 2**-8, "bnb-int8": 2**-10, "awq-gemm": 2**-10}


def texts() -> dict[str, dict]:
    """Case -> its settings, and the metadata of its file."""
    with VECTORS.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return {name: json.loads(text) for name, text in json.loads(file.read(length))["__metadata__"].items()}


def read(case: str, tmp_path: pathlib.Path):
    """(what the reader gives, what it should stand for) of a case."""
    from safetensors.numpy import save_file

    found, text = open_file(VECTORS), texts()[case]
    parts = {name.partition("/")[2]: t() for name, t in found.items() if name.startswith(f"{case}/")}
    want = parts.pop("want").astype(np.float32)
    save_file(parts, tmp_path / "model.safetensors", text["metadata"] or None)
    values = CONFIG | {"quantization_config": text["quantization_config"]}
    readers = packed(values, open_file(tmp_path / "model.safetensors"), metadata=lambda: read_metadata(tmp_path))
    assert list(readers) == ["m.weight"]
    return readers["m.weight"](), want


@pytest.mark.filterwarnings("ignore:packed weights")
@pytest.mark.parametrize("case", texts())
def test_values_are_those_of_the_package(case, tmp_path):
    got, want = read(case, tmp_path)
    assert isinstance(got, QTensor) or "expanded" in case
    values = dequantize(got, np.float32) if isinstance(got, QTensor) else got
    assert values.shape == want.shape
    tolerance = ROUNDED.get(case, 2e-7)
    assert np.abs(values - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize("case", [name for name in texts() if "expanded" not in name])
def test_packed_weights_stay_packed(case, tmp_path):
    """Codes take no more bytes than in the file, padding of whole words aside."""
    q, _ = read(case, tmp_path)
    stored = max(t.dtype.itemsize * np.prod(t.shape) for t in open_file(tmp_path / "model.safetensors").values())
    assert q.codes.nbytes + (0 if q.high is None else q.high.nbytes) <= stored
    assert q.nbytes < 4 * q.size


# ---- GPTQ, AWQ: vectors of AutoGPTQ and MLC ---------------------------------------------------------------------


def gptq_vectors(shared, name: str, tmp_path: pathlib.Path):
    from safetensors.numpy import save_file

    z = np.load(shared / "gptq_ref" / name)
    save_file({f"m.{k}": z[k] for k in ("qweight", "qzeros", "scales", "g_idx")}, tmp_path / "model.safetensors")
    config = CONFIG | {"quantization_config": dict(quant_method="gptq", bits=4, group_size=128, desc_act=False)}
    return z, packed(config, open_file(tmp_path / "model.safetensors"))["m.weight"]()


@pytest.mark.parametrize("name", ["gptq4_k256_n256_g128.npz", "gptq4_k1024_n1024_g128.npz"])
def test_gptq_vectors(shared, name, tmp_path):
    z, q = gptq_vectors(shared, name, tmp_path)
    assert np.array_equal(dequantize(q, np.float32), z["W"].T)  # [in, out] there
    got = np.asarray(products.matmul(z["inp"].reshape(1, -1).astype(np.float32), q))[0]
    assert np.abs(got - z["out"]).max() <= 1e-5 * np.abs(z["out"]).max()
    published = [z[k] for k in z.files if k.startswith("published")]
    assert published
    for reference in published:  # of kernels that add up in 16 bits
        assert np.allclose(got, reference, rtol=3e-5, atol=5e-3)


def test_awq_vectors(shared, tmp_path):
    """The layout of MLC's test is that of AutoAWQ's GEMV: rows of words, fields in order."""
    from safetensors.numpy import save_file

    z = np.load(shared / "mlc_ref" / "mlc_awq_vectors.npz")
    parts = {f"m.{k}": z[k] for k in ("qweight", "qzeros", "scales")}
    save_file(parts, tmp_path / "model.safetensors")
    config = CONFIG | {"quantization_config": dict(quant_method="awq", bits=4, group_size=128, version="gemv")}
    q = packed(config, open_file(tmp_path / "model.safetensors"))["m.weight"]()
    assert np.array_equal(dequantize(q, np.float64).astype(np.float32), z["dq"].astype(np.float32))


def test_bfloat16_is_a_dtype_by_name():
    assert np.dtype("bfloat16") == ml_dtypes.bfloat16
