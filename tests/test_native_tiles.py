"""AMX's tiles: what they compute, in software and in the processor, and every kernel on tiles in software."""

import os
import pathlib
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from jaxllm import native
from jaxllm.native import build

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def compiler():
    try:
        return build.compiler()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["software", "processor"])
def product(request, compiler, tmp_path_factory):
    """One product of tiles by native_tiles.cc: (kind, sum, left, right) -> the stored memory."""
    program = tmp_path_factory.mktemp("tiles") / "native_tiles"
    soft = build.SOFT_TILES if request.param == "software" else []
    flags = [*build.FLAGS, *build.LEVELS["amx"], *soft, f"-I{build.HERE}"]
    sources = [str(HERE / "native_tiles.cc"), str(build.HERE / "cpu.cc")]
    subprocess.run([*compiler, *flags, *sources, "-o", str(program)], check=True)

    def run(kind, *operands):
        data = b"".join(a.tobytes() for a in operands)
        sizes = [str(size) for size in (operands[0].shape[1], len(operands[0]), 4 * len(operands[2]))]
        done = subprocess.run([program, kind, *sizes], input=data, capture_output=True)
        if done.returncode == 77:
            pytest.skip("this processor has no AVX-512 with BF16" if soft else "this processor has no AMX")
        assert done.returncode == 0, done.stderr
        return np.frombuffer(done.stdout, np.uint32).reshape(16, 20)

    return run


def flushed(x):
    """Without denormal numbers, f32."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def by_the_manual(total, left, right):
    """TDPBF16PS: total [16, n], left [16, 32] and right [16, n, 2] in f32, where products of bf16 are exact."""
    parts = np.zeros((2, *total.shape), np.float32)
    for k in range(16):
        for odd in range(2):
            x, y = flushed(left[:, 2 * k + odd, None]), flushed(right[k, :, odd])
            parts[odd] = flushed(x * y + parts[odd])
    return flushed(flushed(total) + flushed(parts[0] + parts[1]))


@pytest.mark.parametrize("width", [1, 5, 16])
@pytest.mark.parametrize("size", [1.0, 2.0**-64, 2.0**-130])
def test_tiles_of_bf16(product, width, size):
    """Some products, and some of the numbers themselves, are denormal at the lower sizes."""
    rng = np.random.default_rng(width)
    left, right = rng.standard_normal((16, 32)) * size, rng.standard_normal((16, width, 2)) * min(size, 1)
    left, right = left.astype(ml_dtypes.bfloat16), right.astype(ml_dtypes.bfloat16)
    right[3] *= 2.0**100  # sums in another order have other bits
    total = (rng.standard_normal((16, width)) * size**2).astype(np.float32)
    got = product("bf16", total, left, right)
    want = by_the_manual(total, left.astype(np.float32), right.astype(np.float32))
    assert np.isfinite(want).all()
    assert (got[:, width:] == 0xABABABAB).all()
    np.testing.assert_array_equal(got[:, :width], want.view(np.uint32))


@pytest.mark.parametrize(
    ("width", "rows", "depth"), [(1, 16, 64), (5, 16, 64), (16, 16, 64), (16, 12, 32), (16, 8, 16)]
)
@pytest.mark.parametrize(("kind", "low", "high"), [("u8s8", 0, 256), ("s8s8", -128, 128)])
def test_tiles_of_bytes(product, kind, low, high, width, rows, depth):
    rng = np.random.default_rng(width)
    left, right = rng.integers(low, high, (rows, depth)), rng.integers(-128, 128, (depth // 4, width, 4))
    total = rng.integers(-(2**31), 2**31, (rows, width))
    got = product(kind, total.astype(np.int32), left.astype(np.uint8), right.astype(np.int8))
    want = total + np.einsum("mkb,knb->mn", left.reshape(rows, depth // 4, 4), right)
    assert (got[:rows, width:] == 0xABABABAB).all()
    assert (got[rows:] == 0xABABABAB).all()
    np.testing.assert_array_equal(got[:rows, :width], (want % 2**32).astype(np.uint32))


@pytest.mark.long
def test_the_kernels_on_tiles_in_software(compiler, tmp_path):
    """The tests of the kernels that need AMX, on a library that has it in software.

    tools/check_kernels.sh, a part of CI, runs the same on a library that checks its memory as well.
    """
    if native.unavailable() or native.LEVELS.index(native.level()) < native.LEVELS.index("avx512"):
        pytest.skip("tiles in software go with AVX-512 and BF16")
    library = build.build(tmp_path / "soft.so", soft_tiles=True)
    files = [str(path) for path in sorted(HERE.glob("test_native*.py")) if path != pathlib.Path(__file__)]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "amx or gated", *files]
    env = {**os.environ, "JAXLLM_NATIVE_LIBRARY": str(library), "JAXLLM_NATIVE": "amx"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d+ passed", done.stdout.splitlines()[-1]), done.stdout  # none skipped
