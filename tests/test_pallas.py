"""The Pallas kernels, interpreted on the CPU, against the definition in `ops` and `products` and against f64."""

import contextlib
import os
import pathlib
import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accelerator
from jaxllm import cli, kernels, ops
from jaxllm.errors import JaxllmError
from jaxllm.kernels import attention, coding, dense, grouped, product, tiles, tune
from jaxllm.kernels.tiles import Tiles
from jaxllm.quant import FORMATS, dequantize, encode, named, products
from tests.test_native import BF16, F32, case, definition, normal

PLATFORMS = ("tpu", "cuda")
SMALL = {"tpu": Tiles(16, 128, 256), "cuda": Tiles(16, 32, 64, split=2)}


def packed(name, *shape, seed=0, **changes):
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jax.tree.map(jnp.asarray, encode(w, named(name, **changes)))


def exact(x, w):
    w = w if isinstance(w, jax.Array) else dequantize(w, F32)
    return np.asarray(x, np.float64) @ np.asarray(w, np.float64).T


def near(got, want, dtype=F32):
    """Within what f32 sums lose; bf16 weights have 8 bits."""
    most = np.abs(want).max()
    assert np.abs(np.asarray(got, np.float64) - want).max() <= (2e-2 if dtype == BF16 else 2e-6) * most


# ---- products ---------------------------------------------------------------------------------------------

# One of each way that codes, zeros and scales lie in memory.
KINDS = ["q4f16_1", "q4bf16_1", "q4f32_1", "uint4_g64", "int4", "int8", "int8_g64", "uint8_g32", "q8f16_1"]
KINDS += ["fp8_e4m3", "fp8_e5m2_tensor", "fp8_e4m3_block", "mxfp4", "mxfp8"]


@pytest.mark.parametrize(
    ("name", "platform"),
    [(name, "tpu") for name in KINDS] + [(name, "cuda") for name in ("q4f16_1", "uint4_g64", "int8", "mxfp8")],
)
def test_every_coding_is_multiplied(name, platform):
    """17 rows are more than a tile, 48 out less than one (TPU), 640 columns no multiple of one (TPU)."""
    x, w = normal((17, 640)), packed(name, 48, 640)
    got = dense.matmul(x, w, platform=platform, tiles=SMALL[platform], interpret=True)
    assert got.dtype == F32
    near(got, exact(x, w))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 32), (5, 272, 576), (33, 64, 1600)])
def test_shapes_that_fit_no_tile(m, n, k, platform):
    x, w = normal((m, k), BF16), packed("q4f16_1", n, k)
    want = products.matmul(x, w)
    got = dense.matmul(x, w, platform=platform, tiles=SMALL[platform], interpret=True)
    near(got, np.asarray(want, np.float64), BF16)
    if n % 128:
        near(dense.matmul(x, w, platform=platform, interpret=True), np.asarray(want, np.float64), BF16)


@pytest.mark.parametrize("name", ["q4f16_1", "q4f32_1", "mxfp8"])
def test_more_groups_than_a_register_has_lanes(name):
    """On TPU 128 scales are read at a time; 4352 columns have 136 groups of 32."""
    x, w = normal((3, 4352)), packed(name, 24, 4352)
    near(dense.matmul(x, w, platform="tpu", tiles=Tiles(16, 128, 2048), interpret=True), exact(x, w))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_columns_that_are_no_whole_groups(platform):
    w = packed("q4f16_1", 32, 40)
    assert w.codes.shape[1] * 2 == 64
    near(dense.matmul(normal((2, 40)), w, platform=platform, interpret=True), exact(normal((2, 40)), w))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_columns_in_another_order(platform):
    order = jnp.asarray(np.random.default_rng(0).permutation(64), jnp.int32)
    w, x = replace(packed("int4_g32", 16, 64), order=order), normal((2, 64))
    near(dense.matmul(x, w, platform=platform, interpret=True), exact(x, w))


@pytest.mark.parametrize("name", ["float16", "float8_e8m0fnu"])
def test_every_bit_pattern_of_a_scale(name):
    """All 65,536 half floats and all 256 powers of two: what arithmetic makes of them inside a kernel."""
    dtype = jnp.dtype(name)
    bits = np.arange(2 ** (8 * dtype.itemsize)).astype(f"u{dtype.itemsize}")
    got = jax.jit(partial(coding.numbers, dtype=name))(jnp.asarray(bits))
    want = bits.view(dtype).astype(np.float32)
    normal_ = ~(np.abs(want) < 2.0**-126) | (want == 0)  # the CPU's compiled code drops denormals
    np.testing.assert_array_equal(np.asarray(got)[normal_], want[normal_])
    assert normal_.sum() >= len(bits) - 1


def test_the_kernels_see_what_no_number_is():
    x = normal((3, 64)).at[1, 5].set(jnp.nan)
    got = dense.matmul(x, packed("q4f16_1", 16, 64), platform="tpu", interpret=True)
    assert np.isnan(got[1]).all()
    assert np.isfinite(got[jnp.array([0, 2])]).all()


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("w8a8", (16, 64), "rounds activations"),
        ("nvfp4", (16, 64), "super scales"),
        ("nf4", (16, 128), "not nf4 in 4"),
        ("q3f16_1", (16, 80), "highs"),
        ("q4f16_1", (2, 16, 64), "a matrix"),
    ],
)
def test_what_is_refused_says_why(name, shape, words):
    assert words in dense.refuses(normal((1, shape[-1])), packed(name, *shape), "tpu")


def test_a_gpu_refuses_what_its_tiles_do_not_divide():
    x = normal((1, 64))
    assert dense.refuses(x, packed("q4f16_1", 33, 64), "tpu") is None
    assert "do not divide 33x64" in dense.refuses(x, packed("q4f16_1", 33, 64), "cuda")
    assert "powers of two" in dense.refuses(normal((1, 192)), packed("int4_g32", 16, 192, group=96), "cuda")
    assert "float16" in dense.refuses(x.astype(jnp.float16), packed("q4f16_1", 32, 64), "cuda")


def test_an_older_gpu_refuses_what_it_lacks(monkeypatch):
    monkeypatch.setattr(product, "capability", lambda: 8.0)
    assert "compute capability 8.9" in dense.refuses(normal((1, 64)), packed("fp8_e4m3", 16, 64), "cuda")
    assert dense.refuses(normal((1, 64)), packed("fp8_e5m2_tensor", 16, 64), "cuda") is None
    monkeypatch.setattr(kernels, "present", lambda: "cuda")
    assert kernels._absent.__wrapped__() is None
    monkeypatch.setattr(tiles, "capability", lambda: 7.5)
    assert "compute capability 8.0" in kernels._absent.__wrapped__()


@pytest.mark.parametrize(("platform", "reason"), [("tpu", "several TPUs"), ("cuda", "None")])
def test_several_accelerators(monkeypatch, platform, reason):
    """XLA for GPUs splits kernels by rules, that for TPUs does not."""
    monkeypatch.setattr(kernels, "present", lambda: platform)
    monkeypatch.setattr(tiles, "capability", lambda: 9.0)
    monkeypatch.setattr(jax, "devices", lambda: [None, None])
    assert reason in str(kernels._absent.__wrapped__())


def test_every_format_is_taken_or_refused_with_a_reason():
    taken = []
    for name in FORMATS:
        if name.startswith("q0"):
            continue
        w = packed(name, 16, 1920)
        reason = dense.refuses(normal((1, 1920)), w, "cuda")
        taken += [] if reason else [name]
        assert reason is None or len(reason) > 10
    assert {"q4f16_1", "q4bf16_1", "int4_g128", "uint4_g64", "int8_g64", "fp8_e4m3", "mxfp4"} <= set(taken)


# ---- experts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("R", "E", "name"),
    [(1, 4, "q4f16_1"), (50, 5, "plain"), (50, 5, "uint4_g32"), (50, 5, "fp8_e4m3"), (50, 5, "mxfp4")],
)
def test_each_row_meets_its_own_expert(R, E, name, platform):
    """Fewer rows than experts; an expert without rows; one with more than a block of them."""
    expert = jnp.asarray(np.sort(np.random.default_rng(R).choice([0, 1, E - 1], R, p=[0.7, 0.2, 0.1])), jnp.int32)
    x = normal((R, 64))
    w = normal((E, 32, 64)) if name == "plain" else packed(name, E, 32, 64)
    got = grouped.grouped_matmul(x, w, expert, platform=platform, tiles=SMALL[platform], interpret=True)
    with ops.portable():
        want = np.asarray(ops.grouped_matmul(x, w, expert), np.float64)
    near(got, want)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_all_rows_to_the_last_expert(platform):
    x, w = normal((40, 32), BF16), normal((3, 16, 32), BF16, 1)
    expert = jnp.full(40, 2, jnp.int32)
    got = grouped.grouped_matmul(x, w, expert, platform=platform, tiles=SMALL[platform], interpret=True)
    near(got, exact(x, w[2]), BF16)


# ---- attention --------------------------------------------------------------------------------------------

CASES = [  # B, T, K, G, h, S
    ((1, 1, 3, 3, 64, 640), "causal", BF16),
    ((2, 5, 2, 1, 32, 33), "window", F32),
    ((1, 3, 1, 4, 24, 200), "causal", BF16),
    ((2, 4, 2, 2, 16, 96), "random", F32),
    ((1, 1, 1, 1, 5, 1), "causal", F32),
    ((1, 2, 2, 1, 64, 256), "window", BF16),
    ((1, 1, 1, 3, 16, 256), "window", F32),
]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(("shape", "kind", "dtype"), CASES, ids=str)
def test_attention_is_softmax_attention(shape, kind, dtype, platform):
    q, k, v, mask = case(*shape, kind, dtype)
    if reason := attention.refuses(q, k, v, platform):
        assert platform == "cuda"
        assert "a multiple of 16 slots" in reason
        return
    sinks = normal(q.shape[2:4])
    softcap, sinks = (3.0, sinks) if dtype == F32 else (None, None)
    want = definition(q, k, v, mask, sinks, 0.3, softcap)
    few = Tiles(0, 0, 128 if platform == "tpu" else 32, split=3)
    run = partial(attention.attend, q, k, v, mask, sinks, scale=0.3, softcap=softcap, platform=platform)
    got = run(tiles=few, interpret=True)
    assert got.dtype == dtype
    assert np.abs(np.asarray(got, np.float64) - want).max() < (2e-2 if dtype == BF16 else 2e-5)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_tree_of_drafts_and_a_query_that_sees_nothing(platform):
    """Any mask will do; what is behind the last visible slot is never read, so it may be no number."""
    q, k, v, mask = case(2, 4, 2, 2, 16, 256, "random", F32)
    mask = mask.at[..., 100:].set(False).at[1, 2].set(False)
    k, v = (a.at[:, :, 160:].set(jnp.nan) for a in (k, v))
    few = Tiles(0, 0, 128 if platform == "tpu" else 32, split=2)
    got = attention.attend(q, k, v, mask, scale=0.3, platform=platform, tiles=few, interpret=True)
    with ops.portable():
        want = ops.attend(q, k[:, :, :100], v[:, :, :100], mask[..., :100], scale=0.3)
    assert (np.asarray(got[1, 2]) == 0).all()
    np.testing.assert_allclose(got.at[1, 2].set(0), want.at[1, 2].set(0), atol=2e-6)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_sinks_alone_and_a_row_of_the_batch_that_sees_nothing(platform):
    q, k, v, mask = case(2, 1, 2, 2, 16, 64, "causal", F32)
    mask = mask.at[0].set(False)
    got = attention.attend(q, k, v, mask, normal((2, 2)), scale=0.3, platform=platform, interpret=True)
    assert (np.asarray(got[0]) == 0).all()
    want = definition(q[1:], k[1:], v[1:], mask[1:], normal((2, 2)), 0.3, None)
    np.testing.assert_allclose(got[1:], want, atol=2e-5)


def test_a_bias_or_many_queries_go_the_other_way():
    q, k, v, _ = case(1, 65, 1, 1, 16, 80, "causal", F32)
    taken = partial(kernels.attend, platforms=("tpu",), scale=0.3, softcap=None)
    assert list(taken(q[:, :64], k, v, None)) == ["tpu"]
    assert taken(q[:, :64], k, v, jnp.zeros((1, 1, 64, 1, 80))) == {}
    assert taken(q, k, v, None) == {}
    assert "1 to 64 queries" in attention.refuses(q, k, v, "tpu")


# ---- which code is taken ----------------------------------------------------------------------------------


def both(x, w, experts, expert, q, k, mask):
    packed_ = ops.matmul(x, w), ops.grouped_matmul(x, experts, expert)
    return packed_, ops.attend(q, k, k, mask, scale=0.3)


def arguments():
    q, k, _, mask = case(1, 2, 1, 2, 16, 32, "causal", F32)
    experts = packed("q4f16_1", 2, 32, 64)
    return normal((3, 64)), packed("q4f16_1", 32, 64), experts, jnp.asarray([0, 1, 1], jnp.int32), q, k, mask


TARGETS = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}


def device_of(platform):
    """From JAX 0.11 on Triton wants to know for which GPU, where there is none."""
    if platform != "cuda":
        return contextlib.nullcontext()
    kind, types = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"), (jax.sharding.AxisType.Auto,)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), types, abstract_device=kind))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("platform", PLATFORMS)
def test_an_export_has_the_kernels_that_it_asks_for(platform):
    export = partial(jax.export.export, platforms=[platform])
    checks = [jax.export.DisabledSafetyCheck.custom_call(TARGETS[platform])]
    calls = lambda f: (
        export(jax.jit(f), disabled_checks=checks)(*arguments()).mlir_module().count(TARGETS[platform])
    )
    assert calls(both) == 0
    with kernels.compiled_for(platform), device_of(platform):
        assert calls(both) == 3
        with ops.portable():
            assert calls(both) == 0


def test_on_a_cpu_the_definition_is_run_and_differentiated():
    want = jax.jit(both)(*arguments())
    loss = lambda x, w, q, k, mask: ops.matmul(x, w).sum() + ops.attend(q, k, k, mask, scale=0.3).sum()
    x, w, _, _, q, k, mask = arguments()
    slopes = jax.grad(loss, (0, 2, 3))(x, w, q, k, mask)
    with kernels.compiled_for("tpu", "cuda"):
        jax.tree.map(np.testing.assert_array_equal, jax.jit(both)(*arguments()), want)
        jax.tree.map(
            partial(np.testing.assert_allclose, atol=1e-6), jax.grad(loss, (0, 2, 3))(x, w, q, k, mask), slopes
        )
        of_scales = jax.grad(lambda w: ops.matmul(x, w).sum(), allow_int=True)(w).scale
    assert np.abs(np.asarray(of_scales, np.float32)).max() > 0


def test_a_platform_without_kernels_is_an_error():
    with pytest.raises(JaxllmError, match="tpu, cuda, hopper, not for 'rocm'"):
        kernels.compiled_for("rocm")


def alone(code, **env):
    env = {"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu", **env}
    folder = pathlib.Path(kernels.__file__).parents[2]
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=env)


def test_a_cpu_never_imports_pallas():
    """Nor does a program on it differ: the kernels are absent from what is traced."""
    code = (
        "import sys, jax, jax.numpy as jnp; from jaxllm import kernels, ops; q = jnp.ones((1, 1, 1, 2, 16));"
        "k = jnp.ones((1, 1, 32, 16)); m = jnp.ones((1, 1, 32), bool);"
        "jax.jit(lambda *a: ops.attend(*a, scale=0.3))(q, k, k, m);"
        "print([n for n in sys.modules if 'jax.experimental.pallas' in n], kernels.describe())"
    )
    assert alone(code).stdout.strip() == "[] not in use: there is no TPU and no NVIDIA GPU here"


def test_it_can_be_turned_off():
    code = "from jaxllm import kernels\nwith kernels.compiled_for('tpu'): print(kernels.describe())"
    assert alone(code).stdout.strip() == "in use, tpu"
    assert alone(code, JAXLLM_PALLAS="off").stdout.strip() == "not in use: JAXLLM_PALLAS=off"
    run = alone(code, JAXLLM_PALLAS="yes")
    assert "JAXLLM_PALLAS should be on or off; got 'yes'" in run.stderr


# ---- tile sizes -------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiles.stored.cache_clear()
    yield tmp_path
    tiles.stored.cache_clear()


def test_a_stored_choice_is_taken(cache):
    key, found = dense.key(packed("q4f16_1", 32, 64)), Tiles(16, 32, 64)
    usual = tiles.chosen("matmul", "tpu", key, 5)
    assert tiles.store("tpu", {f"matmul {key} 16": found}) == cache / "jaxllm" / "tiles.json"
    assert tiles.chosen("matmul", "tpu", key, 5) == found != usual
    assert tiles.chosen("matmul", "tpu", key, 17) != found
    assert tiles.chosen("matmul", "cuda", key, 5) != found


NO_TABLES = ["{", "[]", '{"tpu": {"a": {"rows": "many"}}}', '{"tpu": {"a": {"depth": 1}}}']
NO_TABLES += ['{"tpu": {"a": {"rows": 16, "out": 64, "columns": 96}}}', '{"tpu": {"a": {"rows": 16}}}']


@pytest.mark.parametrize("text", NO_TABLES)
def test_what_is_no_table_of_tiles_is_an_error(cache, text):
    tiles.path().parent.mkdir(parents=True)
    tiles.path().write_text(text)
    with pytest.raises(JaxllmError, match="no table of tile sizes"):
        tiles.stored()


def test_defaults_cover_any_number_of_rows():
    for platform, table in tiles.DEFAULTS.items():
        for op, rows in table.items():
            assert [most for most, _ in rows] == sorted(most for most, _ in rows)
            assert tiles.chosen(op, platform, "", 10**6) == rows[-1][1]


# ---- the tuner and the benchmark --------------------------------------------------------------------------


def test_without_an_accelerator_there_is_nothing_to_tune(capsys):
    assert cli.main(["tune", "--shape", "64x64", "--format", "q4f16_1"]) == 1
    assert "there is no TPU and no NVIDIA GPU here" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["64", "0x3", "axb", "1x2x3x4"])
def test_a_shape_is_two_or_three_numbers(capsys, text):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tune", "--shape", text])
    assert stopped.value.code == 2
    assert "expected NxK or ExNxK" in capsys.readouterr().err


@pytest.fixture
def pretended(monkeypatch, cache):
    """As if this CPU were a TPU: kernels are interpreted, and two tiles are tried."""
    monkeypatch.setattr(tune, "bodies", lambda: ("tpu",))
    monkeypatch.setattr(tune, "PACE", 0.0)
    for module, name in ((dense, "matmul"), (grouped, "grouped_matmul"), (attention, "attend")):
        monkeypatch.setattr(module, name, partial(getattr(module, name), interpret=True))
    two = lambda platform, op, rows: iter([Tiles(16, 128, 256), Tiles(16, 256, 128)])
    monkeypatch.setattr(tune, "candidates", two)


def test_what_was_tuned_is_found_again(pretended):
    said = []
    found = tune.tune_product("q4f16_1", (16, 64), 3, report=said.append)
    found |= tune.tune_product(None, (2, 16, 32), 5, report=said.append)
    found |= tune.tune_attend((1, 1, 1, 2, 16, 32), report=said.append)
    assert len(found) == 3
    assert len(said) >= 3
    tiles.store("tpu", found)
    assert tiles.chosen("matmul", "tpu", dense.key(packed("q4f16_1", 16, 64)), 3) in found.values()
    assert tiles.chosen("grouped", "tpu", dense.key(tune.weight(None, 2, 16, 32)), 3) in found.values()
    assert tiles.chosen("attend", "tpu", "bfloat16 h16 S32", 2) in found.values()
    assert tune.tune_product("nf4", (16, 64), 3, report=said.append) == {}
    assert "not tuned, it knows" in said[-1]


def test_candidates_begin_with_the_default_and_never_repeat():
    assert {platform: set(table) for platform, table in tune.TRIED.items()} == {
        platform: set(table) for platform, table in tiles.DEFAULTS.items()
    }
    for platform, table in tune.TRIED.items():
        for op in table:
            tried = list(tune.candidates(platform, op, 20))
            assert tried[0] == tiles.chosen(op, platform, "", 20)
            assert len(set(tried)) == len(tried) > 4
            assert max(t.rows for t in tried[1:]) <= 32


def test_the_benchmark_runs_at_toy_size(monkeypatch):
    monkeypatch.setattr(accelerator, "checks", lambda *_: [dict(kind="kernel", right=True)])  # as the tests above
    found = list(accelerator.lines(["toy-moe"], ["q4f16_1"], accelerator.TOY, ["tpu"], True))
    kinds = [line["kind"] for line in found]
    assert kinds[:2] == ["peak", "kernel"]
    assert kinds[2:] == ["decode", "decode", "prefill", "prefill"]
    assert all(line["share_of_copy"] > 0 for line in found if line["kind"] == "decode")


def test_the_benchmark_counts_what_a_step_reads():
    """Of 4 experts one row visits 2 on average, very many rows all of them."""
    config = accelerator.MODELS["toy-moe"]
    params = accelerator.random_params(config, "bf16", jax.random.key(0))
    every = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - params["embed"]["w"].nbytes - 64 * 2
    experts = 2 * 3 * 4 * 32 * 64 * 2
    assert accelerator.weight_bytes(config, params, 10**6) == every
    assert accelerator.weight_bytes(config, params, 1) == every - experts / 2
    assert accelerator.active_weights(config) == 2 * (3 * 2 * 32 * 64 + 4 * 64 + 2 * 64 * 64 + 2 * 32 * 64)


def test_a_wrong_kernel_is_a_line_that_says_so():
    right = accelerator._checked("matmul", "x", jnp.ones((2, 2)), np.ones((2, 2)))
    wrong = accelerator._checked("matmul", "x", jnp.ones((2, 2)), np.full((2, 2), 1.1))
    assert (right["right"], wrong["right"]) == (True, False)
