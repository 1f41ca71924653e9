"""Where parameters lie on a CPU: in few blocks, once, in large pages, and no longer than somebody needs them."""

import gc
import pathlib
import subprocess
import sys
import textwrap
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxllm import arena as arenas
from jaxllm.arena import ASKED, LINE, PAGE, Arena, aligned
from jaxllm.quant import encode, named

SHAPES = [(64, 128), (3,), (), (0, 4), (33, 7), (16, 2, 8)]
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8, np.uint8, np.int32]


def addresses(tree) -> list[int]:
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_stay(shape, dtype):
    arena = Arena()
    x = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    turned = np.asfortranarray(x)  # not in the order that JAX takes over
    for given, got in ((x, arena.put(x)), (turned, arena.put(turned))):
        assert isinstance(got, jax.Array)
        assert got.dtype == given.dtype
        assert got.shape == given.shape
        assert np.array_equal(np.asarray(got), given)


def test_a_packed_weight_keeps_its_parts():
    q = encode(np.random.default_rng(0).standard_normal((32, 128), np.float32), named("q4f16_1"))
    got = Arena().put({"w": q})["w"]
    assert (got.format, got.columns, got.dtype_name) == (q.format, q.columns, q.dtype_name)
    assert all(np.array_equal(np.asarray(part), q.parts()[name]) for name, part in got.parts().items())


def test_small_arrays_lie_together_and_are_not_copied_again():
    arena = Arena()
    got = [arena.put(np.full(1000 + i, i, np.float32)) for i in range(50)]
    block = arena._block.ctypes.data
    assert block % PAGE == 0
    assert len(arena._block) == ASKED
    where = addresses(got)
    assert all(at % LINE == 0 and block <= at < block + ASKED for at in where)
    assert where == sorted(where)
    assert where[-1] + got[-1].nbytes - where[0] < 50 * (got[-1].nbytes + LINE)


def test_blocks_grow_and_none_is_left_out():
    arena, size = Arena(), ASKED // 2 - LINE
    got = [arena.put(np.full(size, i, np.uint8)) for i in range(40)]  # 80 MiB: blocks of 4, 4, 8, 16, 32 and 64
    assert arena._given == 2**27
    assert [int(x[0]) for x in got] == [int(x[-1]) for x in got] == list(range(40))


def test_large_arrays_are_taken_over_where_they_lie():
    arena, x = Arena(), aligned(2 * ASKED)
    x[:] = 7
    got = arena.put(x)
    assert addresses(got) == [x.ctypes.data]
    crooked = aligned(2 * ASKED + 1)[1:]
    crooked[:] = 9
    got = arena.put(crooked)
    assert addresses(got)[0] % PAGE == 0
    assert int(got[-1]) == 9


def test_a_block_is_freed_with_its_last_array():
    arena = Arena()
    first, second = arena.put(np.ones(1000, np.float32)), arena.put(np.ones(1000, np.float32))
    block = weakref.ref(arena._block.base)
    del arena
    first.delete()
    gc.collect()
    assert block() is not None
    assert float(second.sum()) == 1000
    del second
    gc.collect()
    assert block() is None


def test_other_devices_get_arrays_as_they_are(monkeypatch):
    """No memory of the host is made for what a device copies anyway."""
    arena, x = Arena(), np.ones((8, 8), np.float32)
    arena._on_cpu = False
    monkeypatch.setattr(arenas, "_block", None)
    assert np.array_equal(arena.put(x), x)


# ---- large pages ---------------------------------------------------------------------------------------------


PAGES = """
    import pathlib
    import jaxllm
    from jaxllm.arena import PAGE, aligned
    from jaxllm.checkpoint.canonical import flatten
    
    def large():  # bytes of this process that lie in large pages
        lines = pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))

    began = large()
    x = aligned(4 * PAGE, PAGE)
    x[:] = 1
    given = large() - began  # what numpy gets for a large array
    model = jaxllm.load()
    largest = max(leaf.nbytes for leaf in flatten(model.params).values())
    print(given / x.nbytes, (large() - began - given) / model.nbytes, largest / model.nbytes)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/smaps_rollup").is_file(), reason="reads /proc/self/smaps_rollup")
def test_parameters_lie_in_large_pages():
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(PAGES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numpys, ours, largest = map(float, done.stdout.split())
    assert largest < 0.3
    if numpys < 0.9:
        pytest.skip("this system gives no large pages")
    assert ours > 0.8
