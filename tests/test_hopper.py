"""The kernels in Mosaic GPU, interpreted on the CPU, against the definition in f64.

What the interpreter does not know is the product of registers with shared memory: there the kernel's code
multiplies without one. That, and all layouts, are the compiler's to check (tests/test_aot.py).
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import kernels
from jaxllm.kernels import attention, coding, dense, grouped, tiles
from jaxllm.kernels.tiles import Tiles
from jaxllm.quant import FORMATS, encode, named
from tests.test_native import BF16, F32, case, definition, normal
from tests.test_pallas import KINDS, both, device_of, exact, near, packed

mosaic = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
FEW = Tiles(8, 64, 64, split=2, stages=2)


def interpreter():
    """JAX 0.10 has it, but under no public name."""
    if hasattr(mosaic, "InterpretGPUParams"):
        return mosaic.InterpretGPUParams()
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


def every_coding():
    """(format, codes) of each way that codes become numbers: all 256 bytes."""
    seen = {}
    for name in FORMATS:
        if name.startswith("q0"):
            continue
        w = encode(np.ones((1, 1920), np.float32), named(name))
        if not coding.refuses(w):
            c = coding.coding(w)
            kind = np.arange(256).astype(np.uint8).view(w.codes.dtype)
            seen.setdefault((c.levels, c.planes, c.center, w.codes.dtype), (c, kind))
    return list(seen.values())


@pytest.mark.parametrize(
    ("c", "codes"), every_coding(), ids=lambda a: str(a) if isinstance(a, coding.Coding) else ""
)
def test_codes_become_bfloat16_without_rounding(c, codes):
    for plane in range(c.planes):
        got = coding.exact(jnp.asarray(codes), plane, c)
        assert got.dtype == BF16
        want = coding.levels(jnp.asarray(codes), plane, c) * coding.unit(plane, c)
        np.testing.assert_array_equal(np.asarray(got, np.float32), want)


@pytest.mark.parametrize("name", KINDS)
def test_every_coding_is_multiplied(name):
    """Two steps of columns, of two groups each where it has any."""
    x, w = normal((3, 256), BF16), packed(name, 64, 256)
    assert dense.refuses(x, w, "hopper") is None
    columns = 2 * (coding.coding(w).group or 64)
    few = Tiles(8, 64, min(columns, 128), stages=2)
    got = dense.matmul(x, w, platform="hopper", tiles=few, interpret=interpreter())
    assert got.dtype == F32
    near(got, exact(x, w))


@pytest.mark.parametrize(
    ("m", "n", "k", "size"),
    [
        (1, 64, 64, None),
        (11, 192, 192, FEW),
        (20, 256, 64, Tiles(32, 128, 512)),
        (64, 64, 320, Tiles(64, 64, 64, 5)),
    ],
)
def test_shapes_and_tiles(m, n, k, size):
    """The usual tiles; more rows than a tile, and three slabs; two slabs in a program; columns shared by five."""
    x, w = normal((m, k), BF16), packed("q4f16_1", n, k)
    near(dense.matmul(x, w, platform="hopper", tiles=size, interpret=interpreter()), exact(x, w))


@pytest.mark.parametrize(("R", "name"), [(1, "q4f16_1"), (20, "plain"), (12, "uint4_g32"), (12, "fp8_e4m3")])
def test_each_row_meets_its_own_expert(R, name):
    """Fewer rows than experts; an expert without rows; one with more than a block of them."""
    expert = jnp.asarray(np.sort(np.random.default_rng(R).choice([0, 1, 3], R, p=[0.7, 0.2, 0.1])), jnp.int32)
    x = normal((R, 64), BF16)
    w = normal((4, 64, 64), BF16) if name == "plain" else packed(name, 4, 64, 64)
    got = grouped.grouped_matmul(x, w, expert, platform="hopper", tiles=FEW, interpret=interpreter())
    want = [exact(row, jax.tree.map(lambda a, e=e: a[e], w)) for row, e in zip(x, expert, strict=True)]
    near(got, np.stack(want))


def test_no_number_stays_in_its_row():
    x = normal((3, 64), BF16).at[1, 5].set(jnp.nan)
    got = dense.matmul(x, packed("q4f16_1", 64, 64), platform="hopper", interpret=interpreter())
    assert np.isnan(got[1]).all()
    assert np.isfinite(got[jnp.array([0, 2])]).all()


def test_what_is_refused_says_why():
    refuses = partial(dense.refuses, platform="hopper")
    w = packed("q4f16_1", 64, 64)
    assert "bfloat16, not float32" in refuses(normal((1, 64)), w)
    assert "1 to 64 rows, not 65" in refuses(normal((65, 64), BF16), w)
    assert "do not divide 32x64" in refuses(normal((1, 64), BF16), packed("q4f16_1", 32, 64))
    assert "do not divide 64x96" in refuses(normal((1, 96), BF16), packed("q4f16_1", 64, 96))
    assert "powers of two up to 256" in refuses(normal((1, 192), BF16), packed("int4_g32", 64, 192, group=96))
    assert "not at 9" in refuses(normal((1, 64), BF16), packed("int4_g32", 64, 64, center=9))
    experts = normal((2, 64, 64))
    assert "bfloat16, not float32" in grouped.refuses(normal((1, 64), BF16), experts, "hopper")


# ---- attention --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "kind"), [((1, 1, 2, 3, 64, 320), "causal"), ((2, 5, 1, 4, 128, 192), "random")]
)
def test_attention_is_the_definition(shape, kind):
    """Blocks of 64 slots, shared out to three programs; a mask for all queries of a row, and one for each."""
    q, k, v, mask = case(*shape, kind, BF16)
    assert attention.refuses(q, k, v, "hopper") is None
    sinks = normal(q.shape[2:4]) if kind == "causal" else None
    few = Tiles(0, 0, 64, split=3, stages=2)
    run = partial(attention.attend, q, k, v, mask, sinks, scale=0.3, softcap=3.0, platform="hopper", tiles=few)
    got = run(interpret=interpreter())
    assert got.dtype == BF16
    want = definition(q, k, v, mask, sinks, 0.3, 3.0)
    assert np.abs(np.asarray(got, np.float64) - want).max() < 2e-2


def test_blocks_behind_the_last_visible_slot_are_not_read():
    q, k, v, mask = case(2, 1, 1, 2, 64, 256, "causal", BF16)
    mask = mask.at[..., 100:].set(False).at[1].set(False)  # and a row of the batch that sees nothing
    k, v = (a.at[:, :, 128:].set(jnp.nan) for a in (k, v))
    got = attention.attend(q, k, v, mask, scale=0.3, platform="hopper", interpret=interpreter())
    assert (np.asarray(got[1]) == 0).all()
    want = definition(q[:1], k[:1, :, :100], v[:1, :, :100], mask[:1, :, :100], None, 0.3, None)
    assert np.abs(np.asarray(got[:1], np.float64) - want).max() < 2e-2


def test_attention_that_is_refused_says_why():
    for h, S, dtype in ((32, 64, BF16), (64, 96, BF16), (64, 64, F32)):
        q, k, v, _ = case(1, 1, 1, 1, h, S, "causal", dtype)
        assert "on Hopper it takes bfloat16, heads of 64 or 128" in attention.refuses(q, k, v, "hopper")


# ---- which body is taken ----------------------------------------------------------------------------------


def calls(*args):
    """How many kernels of Mosaic GPU and of Triton a program for Hopper has."""
    names = ("mosaic_gpu_v2", "__gpu$xla.gpu.triton")
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]
    with kernels.compiled_for("hopper"), device_of("cuda"):
        text = jax.export.export(jax.jit(lambda *a: both(*a)), platforms=["cuda"], disabled_checks=checks)(
            *args
        ).mlir_module()
    return [text.count(f"@{name}") for name in names]


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_what_hopper_refuses_is_left_to_triton(monkeypatch):
    q, k, _, mask = case(1, 2, 1, 2, 64, 64, "causal", BF16)
    w, experts = packed("q4f16_1", 64, 64), packed("q4f16_1", 2, 64, 64)
    few, many = normal((3, 64), BF16), normal((70, 64), BF16)
    rest = w, experts, jnp.asarray([0, 1, 1], jnp.int32), q, k, mask
    assert calls(few, *rest) == [3, 0]
    assert calls(few, *rest[:3], q.astype(F32), k.astype(F32), mask) == [2, 1]
    assert calls(many, w, experts, jnp.zeros(70, jnp.int32), q, k, mask) == [2, 1]
    monkeypatch.setattr(kernels, "_has_triton", lambda: False)
    assert calls(many, w, experts, jnp.zeros(70, jnp.int32), q, k, mask) == [2, 0]
    monkeypatch.setattr(kernels, "_has_mosaic", lambda: False)
    assert calls(few, *rest) == [0, 0]


def test_the_body_is_chosen_by_the_gpu_at_hand(monkeypatch):
    gpu = lambda capability: SimpleNamespace(
        platform="gpu",
        client=SimpleNamespace(platform_version="cuda"),
        compute_capability=capability,
        device_kind="G",
    )
    for capability, names in (("8.9", ("cuda",)), ("9.0", ("hopper", "cuda")), ("10.0", ("cuda",))):
        monkeypatch.setattr(jax, "devices", lambda capability=capability: [gpu(capability)])
        assert kernels.bodies() == names
        assert kernels._absent.__wrapped__() is None
    monkeypatch.setattr(kernels, "_has_triton", lambda: False)
    assert "no Triton backend" in kernels._absent.__wrapped__()
    found = Tiles(8, 64, 64)
    monkeypatch.setattr(tiles, "stored", lambda: {"G": {tiles.name("matmul", "hopper", "k", 3): found}})
    assert tiles.chosen("matmul", "hopper", "k", 3) == found != tiles.chosen("matmul", "cuda", "k", 3)
