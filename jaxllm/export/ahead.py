"""Exported functions compiled for a TPU by libtpu, on a machine that has none."""

from __future__ import annotations

import importlib.util
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.errors import MissingExtraError

MACHINE = "v5e:2x2"  # its compiler is that of v4 and v6e, too


def unavailable() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    return (
        None
        if importlib.util.find_spec("libtpu")
        else "there is neither a TPU here nor its compiler: pip install libtpu"
    )


def compiled(folder: pathlib.Path, manifest: Mapping[str, Any]) -> str:
    """Compile both functions of a directory -> for which machine. Raises what the compiler does, and
    MissingExtraError where there is none."""
    from jax.experimental import topologies

    if reason := unavailable():
        raise MissingExtraError(reason)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # asks no server which machine this is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is taken from another process
    devices = topologies.get_topology_desc(MACHINE, "tpu").devices
    place = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
    for program in manifest["programs"].values():
        made = export.deserialize(bytearray((folder / program["files"]["jax_export"]).read_bytes()))
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in made.in_avals]
        args, _ = jax.tree.unflatten(made.in_tree, shapes)
        jax.jit(made.call, donate_argnums=1).lower(*args).compile()
    return devices[0].device_kind
