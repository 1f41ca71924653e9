"""Operations split over a mesh: on one device nothing is left of it; on several, see mesh_cases.py."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import ops, partition
from tests.mesh_cases import normal, packed

ROOT = pathlib.Path(__file__).parents[1]


def test_over_four_devices():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/mesh_cases.py"]
    env = os.environ | dict(XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:]
    assert "[100%]" in run.stdout


def several(x, w, q, experts, expert):
    made = ops.matmul(x, w), ops.matmul(x, q), ops.norm(x, w[0], eps=1e-5), ops.once(x)
    return *made, ops.grouped_matmul(x, experts, expert), ops.embed(w.astype(jnp.bfloat16), expert)


def arguments():
    return normal(4, 64), normal(32, 64), packed("nf4", 32, 64), normal(3, 16, 64), jnp.zeros(4, jnp.int32)


def test_a_program_for_one_device_has_nothing_of_it():
    if jax.device_count() > 1:
        pytest.skip("this process has several devices")
    usual = jax.jit(several).lower(*arguments())
    assert "custom_partitioning" not in str(jax.make_jaxpr(several)(*arguments()))
    with partition.meshes():
        assert "custom_partitioning" in str(jax.make_jaxpr(several)(*arguments()))
        split = jax.jit(several).lower(*arguments())
    # Choosing by platform is nested once more, and nobody reads the numbers of experts and rows.
    names = lambda program: sorted(re.findall(r"stablehlo\.(\w+)", program.as_text()))
    plain = lambda program: [name for name in names(program) if name not in ("case", "return", "constant", "iota")]
    assert plain(split) == plain(usual)
    jax.tree.map(np.testing.assert_array_equal, split.compile()(*arguments()), usual.compile()(*arguments()))


def test_a_portable_program_is_never_split():
    with partition.meshes(), ops.portable():
        assert "custom_partitioning" not in str(jax.make_jaxpr(several)(*arguments()))
