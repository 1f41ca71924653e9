"""What every test may ask for."""

import importlib.metadata
import os
import pathlib
import shutil
import tempfile

import pytest

# JAX reads its settings as it is imported.
os.environ.setdefault("JAXLLM_CACHE", "off")  # tests neither read nor leave compiled programs in the user's cache

# Most of the time goes into compiling tiny programs, which these two halve; they change results by rounding alone.
# For what XLA makes by default: JAX_DISABLE_MOST_OPTIMIZATIONS=0 XLA_FLAGS=--xla_cpu_use_fusion_emitters=true
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA aborts at unknown flags, and later ones lack it
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jax

from jaxllm import native
from tests.parity import HEAD, row


def pytest_configure(config):
    """Tiny programs come again in other modules and processes: a run keeps what it compiles."""
    folder = os.environ.get("JAXLLM_TEST_PROGRAMS")  # of several runs, or of the process that started this one
    if not folder:
        folder = os.environ["JAXLLM_TEST_PROGRAMS"] = tempfile.mkdtemp(prefix="jaxllm-test-programs-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Compiled programs map memory, and a process may map only so much (65530 places on Linux)."""
    yield
    jax.clear_caches()


def pytest_terminal_summary(terminalreporter):
    """The parity table, from whichever process ran the cases."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    found = [
        (report.nodeid.split("[")[-1].rstrip("]"), value)
        for report in reports
        if report.when == "call"
        for name, value in report.user_properties
        if name == "parity"
    ]
    if found:
        terminalreporter.section(
            "parity with transformers: max |difference| / max |logit|; bf16: error over theirs"
        )
        terminalreporter.write_line(HEAD)
        for name, errors in sorted(found):
            terminalreporter.write_line(row(name, errors))


@pytest.fixture
def built():
    if reason := native.unavailable():
        pytest.skip(f"no native kernels: {reason}")


@pytest.fixture(params=native.LEVELS)
def level(built, request):
    """Each instruction set up to the best of this machine."""
    if native.LEVELS.index(request.param) > native.LEVELS.index(native.level()):
        pytest.skip(f"this machine has no {request.param}")
    return request.param


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """Reference checkpoints, tokenizers and outputs beside the repository; absent on most machines."""
    folder = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the reference data folder ../shared/data is not on this machine")
    return folder
