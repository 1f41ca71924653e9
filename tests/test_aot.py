"""Every Pallas kernel compiled for the machines it is for, at the sizes of real models, without such a machine.

`.ci/aot` runs this in an environment of its own, with the compilers of TPU and CUDA; elsewhere it is skipped. That
something compiles says that the compiler takes it and that it fits; what it computes, tests/test_pallas.py says.
"""

import importlib.util
import os
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxllm
from jaxllm import kernels, ops
from jaxllm.export import build
from jaxllm.export.options import Options
from jaxllm.kernels import attention, dense, grouped
from jaxllm.model import Model
from jaxllm.quant import encode, named
from tests import random_model

CUDA = next(
    (f"jax_plugins.xla_cuda{n}" for n in (12, 13) if importlib.util.find_spec(f"jax_cuda{n}_plugin")),
    "jax_plugins.xla_cuda12",
)
COMPILERS = {"tpu": "libtpu", "cuda": CUDA, "hopper": CUDA}
CALLS = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton", "hopper": "mosaic_gpu_v2"}
TARGETS = {  # the kind of kernels, and the machine
    "v4": ("tpu", "v4:2x2x1"),
    "v5e": ("tpu", "v5e:2x2"),
    "v6e": ("tpu", "v6e:2x2"),
    "h100": ("cuda", "h100"),
    "h100-mosaic": ("hopper", "h100"),
}
# What the compiler asks of a device: the fields of XLA's GpuTargetConfigProto, as an H100 reports them.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024 thread_dim_limit_z: 64 device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a" device_address_bits: 64 name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# out x in: attention, feed-forward and head of Llama 3.2 1B and of Llama 3.1 8B
SMALL = [(2048, 2048), (512, 2048), (8192, 2048), (2048, 8192), (128256, 2048)]
LARGE = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096)]
FORMATS = ("uint4_g128", "int8_g64", "int8", "fp8_e4m3", "fp8_e5m2_tensor", "fp8_e4m3_block", "mxfp4")
# Up to 16 rows have the same tiles, so 8 need no more than a few cases.
PRODUCTS = [("q4f16_1", n, k, rows) for n, k in SMALL + LARGE for rows in (1, 512)]
PRODUCTS += [("q4f16_1", n, k, rows) for n, k in [(2048, 8192), (4096, 14336)] for rows in (8, 64)]
PRODUCTS += [(name, 4096, 14336, rows) for name in FORMATS for rows in (1, 512)]
# What is compiled for v4 and v6e: their compiler is that of v5e, which gets everything.
FEW = [("q4f16_1", 2048, 8192, 1), ("q4f16_1", 4096, 14336, 512), ("mxfp4", 4096, 14336, 1)]
FEW += [("fp8_e4m3", 4096, 14336, 512), ("q4f16_1", 4096), ("plain", 8)]
HEADS = [  # B, T, K, G, h, S: decoding, drafts, a long cache, one of no power of two
    *((B, 1, 8, 4, h, 4096) for B in (1, 64) for h in (64, 128)),
    (1, 8, 8, 4, 64, 4096),
    (2, 1, 4, 8, 128, 32768),
    (1, 1, 8, 4, 128, 640),
]
EXPERTS = [(form, rows) for form in ("plain", "q4f16_1", "fp8_e4m3", "mxfp4") for rows in (8, 4096)]

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")


@pytest.fixture(scope="module", params=TARGETS)
def target(request):
    """(platform, placement on one of its devices), or a skip where its compiler is not installed."""
    platform, machine = TARGETS[request.param]
    package = COMPILERS[platform].split(".")[0]
    if not importlib.util.find_spec(package) or not importlib.util.find_spec(COMPILERS[platform]):
        assert not os.environ.get("JAXLLM_AOT"), f"JAXLLM_AOT is set, and {COMPILERS[platform]} is not installed"
        pytest.skip(f"{COMPILERS[platform]} is not installed")
    jax.devices("cpu")
    more = dict(topology="1x1x1", target_config=H100) if machine == "h100" else {}
    found = topologies.get_topology_desc(machine, kernels.LOWERED[platform], **more)
    return platform, NamedSharding(Mesh(np.array(found.devices[:1]), ("x",)), PartitionSpec())


def compiled(target, module, f, *args):
    """The program of f on the target; it has exactly one kernel. Skipped where Hopper has none but Triton's."""
    platform, place = target
    if platform == "hopper" and (reason := module.refuses(*args[: 3 if module is attention else 2], platform)):
        pytest.skip(f"left to Triton: {reason}")
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), args)
    with kernels.compiled_for(platform), jax.sharding.use_abstract_mesh(place.mesh.abstract_mesh):
        made = jax.jit(lambda *a: f(*a)).lower(*args).compile()
    assert made.as_text().count(f'custom_call_target="{CALLS[platform]}"') == 1
    return made


def weight(name, *shape, dtype=jnp.bfloat16):
    """The shapes of a weight in that format, without a value."""
    if name == "plain":
        return jax.ShapeDtypeStruct(shape, dtype)
    one = encode(np.ones((1, shape[-1]), np.float32), named(name))
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((*shape[:-1], *a.shape[1:]), a.dtype), one)


def left_out(target, case):
    if target[1].mesh.devices.flat[0].device_kind in ("TPU v4", "TPU v6 lite") and case not in FEW:
        pytest.skip("compiled for v5e; here a few stand for all")


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_products(target, case):
    name, n, k, rows = case
    left_out(target, case)
    x = jax.ShapeDtypeStruct((rows, k), jnp.bfloat16)
    made = compiled(target, dense, ops.matmul, x, weight(name, n, k))
    # The weight is never expanded, which would take 2 n k: there is room for the rows and f32 products alone.
    assert made.memory_analysis().temp_size_in_bytes < n * k // 2 + rows * (8 * k + 4 * n * (rows > 64))


def test_products_of_f32(target):
    compiled(
        target, dense, ops.matmul, jax.ShapeDtypeStruct((8, 4096), jnp.float32), weight("q4f16_1", 4096, 4096)
    )


@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_attention(target, shape):
    B, T, K, G, h, S = shape
    array = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)
    args = array(B, T, K, G, h), array(B, K, S, h), array(B, K, S, h), array(B, T, S, dtype=jnp.bool)
    if B == 1 and S == 4096:
        capped = lambda q, k, v, m, sinks: ops.attend(q, k, v, m, sinks=sinks, scale=0.1, softcap=30.0)
        compiled(target, attention, capped, *args, array(K, G, dtype=jnp.float32))
    else:
        compiled(target, attention, partial(ops.attend, scale=0.1), *args)


@pytest.mark.parametrize(("name", "format", "calls"), [("full", "int8", 9), ("moe", "int4_g32", 20)])
def test_an_exported_model_has_its_kernels_inside(target, name, format, calls, tmp_path):
    """libtpu compiles what is in the directory, and the kernels say, interpreted, what the live model says."""
    if target[1].mesh.devices.flat[0].device_kind != "TPU v5 lite":
        pytest.skip("exports are compiled for v5e alone")
    config = random_model.CONFIGS[name]
    model = jaxllm.quantize(Model(config, random_model.params(config), name=name), format)
    options = Options(context=64, chunk=8, platform="tpu", kernels="pallas")
    export = build.export(model, "stablehlo", tmp_path / "out", options=options)
    record = export.manifest["verification"]
    assert record["verified"] == "compiled"
    assert record["where"].startswith("TPU v5 lite's compiler; its kernels interpreted by XLA on cpu")
    assert record["tokens_equal"] == record["tokens"]
    assert record["max_difference"] <= record["allowed"] <= 1e-4 * record["largest_logit"]
    for program in ("prefill", "decode"):
        made = jax.export.deserialize(bytearray((export.folder / f"{program}.jax_export").read_bytes()))
        assert made.mlir_module().count("tpu_custom_call") == calls


@pytest.mark.parametrize(("name", "rows"), EXPERTS, ids=str)
def test_experts(target, name, rows):
    """The 128 experts of Qwen3-30B-A3B."""
    left_out(target, (name, rows))
    x, expert = jax.ShapeDtypeStruct((rows, 2048), jnp.bfloat16), jax.ShapeDtypeStruct((rows,), jnp.int32)
    compiled(target, grouped, ops.grouped_matmul, x, weight(name, 128, 768, 2048), expert)
