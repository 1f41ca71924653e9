"""What the stablehlo target has beside its usual programs: they run in C++, under PJRT's C API."""

import functools
import importlib.util
import pathlib
import shutil
import subprocess
from dataclasses import replace

import pytest

from jaxllm.export import shipped
from jaxllm.export.options import Options
from jaxllm.export.targets import stablehlo
from tests import random_model
from tests.test_export import SMALL, first, made, model_of

EXAMPLE = pathlib.Path(shipped.__file__).with_name(stablehlo.EXAMPLE)
PACKAGE = "xla_plugins.xla_cpu_pjrt"  # of xla-cpu-pjrt: the header, and a plugin for CPUs


@functools.cache
def package() -> pathlib.Path:
    """Where the header and the plugin are; skips where they are not installed, or no compiler is."""
    if not importlib.util.find_spec(PACKAGE.split(".")[0]) or not importlib.util.find_spec(PACKAGE):
        pytest.skip("xla-cpu-pjrt, which has the header of PJRT's C API and a plugin for CPUs, is not installed")
    if not shutil.which("c++"):
        pytest.skip("there is no C++ compiler")
    return pathlib.Path(importlib.util.find_spec(PACKAGE).origin).parent


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A function (folder, count, ids) -> the finished process of the compiled example."""
    program = tmp_path_factory.mktemp("example") / "run_pjrt"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{package() / 'include'}"]
    subprocess.run(["c++", *flags, str(EXAMPLE), "-o", str(program), "-ldl"], check=True)

    def run(folder, count, ids, plugin=package() / "xla_cpu_pjrt.so"):
        return subprocess.run(
            [program, plugin, folder, str(count), *map(str, ids)], capture_output=True, text=True, timeout=600
        )

    return run


KINDS = {  # every kind of input, result and parameter
    "dense": ("full", None, SMALL),
    "moe, packed": ("moe", "q4f16_1", SMALL),
    "evicting, drawn, rows": ("full", None, Options(window=20, sinks=3, chunk=8, batch=2, sampler="in-graph")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_example_in_cpp_says_what_the_loader_does(example, kind, tmp_path):
    name, format, options = KINDS[kind]
    export, artifact = made(model_of(name, format), tmp_path / "out", options)
    prompt = random_model.tokens(19, seed=5).tolist()
    run = example(export.folder, 30, prompt)
    assert run.returncode == 0, run.stderr
    assert [int(i) for i in run.stdout.split()] == first(artifact.generate(prompt), 30)


def test_the_example_ends_where_the_room_does_and_says_what_is_wrong(example, tmp_path):
    export, artifact = made(model_of(), tmp_path / "out", replace(SMALL, context=40))
    prompt = random_model.tokens(38).tolist()
    run = example(export.folder, 30, prompt)
    assert [int(i) for i in run.stdout.split()] == list(artifact.generate(prompt))
    assert "the prompt has 41 tokens; this export takes 1 to 40" in example(export.folder, 1, [1] * 41).stderr
    assert "cannot be read: give a folder" in example(tmp_path, 1, [1]).stderr
    assert "exports no GetPjrtApi" in example(export.folder, 1, [1], "libm.so.6").stderr
    for file, words in {
        "params.safetensors": "has another size than the manifest says",
        "decode.stablehlo": f"are StableHLO {stablehlo.versions()['stablehlo']}, and the plugin reads up to 1.13.3",
    }.items():
        (export.folder / file).write_bytes((export.folder / file).read_bytes()[:-4])
        refused = example(export.folder, 1, [1])
        assert refused.returncode == 1
        assert words in refused.stderr
