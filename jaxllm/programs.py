"""Compiled programs kept in a folder, so that a second start does not compile again.

The commands do this; the library by itself changes nothing in the user's JAX. Whoever wants it in Python calls
`keep_programs()` before the first computation.

JAX's persistent cache does the work. An entry's key names the program, the versions, XLA's flags and the
instruction set, so a folder that different machines share holds an entry for each. Programs that call native
kernels are kept like any other: a kernel goes by its name.
"""

from __future__ import annotations

import os
import pathlib

import jax

OFF = ("", "off", "0", "false", "no")  # values of JAXLLM_CACHE


def keep_programs() -> pathlib.Path | None:
    """Have JAX keep what it compiles in a folder -> the folder, or None where nothing is kept.

    JAXLLM_CACHE names the folder; empty or "off" keeps nothing. By default it is jaxllm/xla in XDG_CACHE_HOME or
    ~/.cache. Where JAX has a cache folder already (JAX_COMPILATION_CACHE_DIR), all of its settings stay.
    """
    if jax.config.jax_compilation_cache_dir:
        return pathlib.Path(jax.config.jax_compilation_cache_dir)
    where = os.environ.get("JAXLLM_CACHE")
    if where is not None and where.lower() in OFF:
        return None
    try:
        folder = pathlib.Path(where).expanduser() if where else _usual()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a read-only home, or none at all, is no reason not to run
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # A start runs a dozen small programs, which take as long to compile as a large one.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def _usual() -> pathlib.Path:
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "jaxllm" / "xla"


def size(folder: pathlib.Path) -> tuple[int, int]:
    """(programs kept in a folder, their bytes)."""
    entries = [path.stat().st_size for path in folder.glob("*-cache")]
    return len(entries), sum(entries)
