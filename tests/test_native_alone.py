"""The native kernels without XLA: on this processor, and on aarch64 in an emulator if a cross compiler is there.

On Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static
"""

import pathlib
import platform
import re
import shutil
import subprocess

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm import native
from jaxllm.native import build
from tests.test_native import bound, case, definition, normal, products

ALONE = pathlib.Path(__file__).parent / "native_alone"
NEEDED = re.compile("(attention|cpu|matmul|panels)(_simd|_amx)?")  # by main.cc
F32, BF16 = jnp.float32, jnp.bfloat16


@pytest.fixture(scope="module", params=["here", "aarch64"])
def run(request, tmp_path_factory):
    """Runs native_alone/main.cc on arrays -> the bytes it gives."""
    if request.param == "here":
        machine, front = platform.machine(), []
        try:
            compiler = build.compiler()
        except RuntimeError as error:
            pytest.skip(str(error))
    else:
        machine, compiler, front = "aarch64", ["aarch64-linux-gnu-g++"], ["qemu-aarch64-static"]
        if missing := [name for name in (*compiler, *front) if not shutil.which(name)]:
            pytest.skip(f"{' and '.join(missing)} not found")
    program = compiled([*compiler, *build.FLAGS], machine, tmp_path_factory.mktemp(machine))

    def go(*words, arrays):
        data = b"".join(np.asarray(a).tobytes() for a in arrays)
        command = [*front, program, *(str(word) for word in words)]
        done = subprocess.run(command, input=data, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return go


def compiled(command, machine, folder):
    objects = []
    units = [unit for unit in build.units(machine) if NEEDED.fullmatch(unit[0].stem)]
    for source, level, flags in [*units, (ALONE / "main.cc", "", [])]:
        objects.append(f"{folder}/{source.stem}-{level}.o")
        define = [f"-DJAXLLM_LEVEL={level}"] if level else []
        include = [f"-I{ALONE}", f"-I{build.HERE}"]
        subprocess.run([*command, *flags, *define, *include, "-c", source, "-o", objects[-1]], check=True)
    subprocess.run([*command, "-static", *objects, "-o", folder / "alone", "-pthread"], check=True)
    return folder / "alone"


LEVELS = range(len(native.LEVELS))  # above what a processor has it takes its best


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 576, 576), (2, 40, 33), (7, 1601, 130), (33, 37, 65), (130, 64, 70)]
)
def test_products(run, level, m, k, n):
    for types in [(BF16, BF16), (F32, F32), (F32, BF16)]:
        x, w = normal((m, k), types[0]), normal((n, k), types[1], 1)
        got = run(level, "matmul", m, n, k, *(int(t == BF16) for t in types), arrays=(x, w))
        error = np.abs(np.frombuffer(got, np.float32).reshape(m, n) - products(x, w)).max()
        assert error < bound(k)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(
    ("shape", "kind"),
    [((2, 5, 2, 1, 32, 33), "causal"), ((1, 33, 1, 7, 40, 100), "random"), ((1, 1, 1, 1, 5, 1), "causal")],
)
def test_attention(run, level, shape, kind, dtype):
    (B, T, K, G, h, S), (q, k, v, mask) = shape, case(*shape, kind, dtype)
    sinks, scale = normal((K, G)), 2 * h**-0.5
    for softcap in (0.0, 3.0):
        numbers = (B, T, K, G, S, h, int(dtype == BF16), scale, softcap)
        got = run(level, "attend", *numbers, arrays=(q, k, v, sinks, mask))
        got = np.frombuffer(got, ml_dtypes.bfloat16 if dtype == BF16 else np.float32).reshape(q.shape)
        want = definition(q, k, v, mask, sinks, scale, softcap)
        assert np.abs(got.astype(np.float64) - want).max() < (2e-2 if dtype == BF16 else 2e-5)
