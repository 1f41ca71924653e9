"""Programs that IREE compiles: they are the model, forget what they are told to, and hold packed weights."""

import contextlib
import functools
import os
import pathlib
import platform as machine
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import cli, decode, ops, slots
from jaxllm.errors import CheckpointError, JaxllmError, MissingExtraError
from jaxllm.export import build, iree_remote, manifest, parameters, replay, shipped, target, verification
from jaxllm.export.options import Options
from jaxllm.export.targets import iree
from tests.test_export import SMALL, model_of

installed = target.find("iree").missing() is None
engine = pytest.mark.skipif(not installed, reason="iree-base-compiler and iree-base-runtime are not installed")
HERE = replace(SMALL, platform="host")
# One of each kind; every compilation takes seconds
KINDS = {
    "evicting, rows": ("full", None, Options(window=20, sinks=3, chunk=8, batch=2, platform="host")),
    "moe, q4f16_1": ("moe", "q4f16_1", HERE),
    "latent": ("mla", None, HERE),
    "recurrent": ("recurrent", None, HERE),
    "tied, int8": ("tied", "int8", HERE),
    "in-graph": ("full", None, replace(HERE, sampler="in-graph", batch=2)),
}
ALL = {
    "dense": ("full", None, HERE),
    "rings": ("window", None, HERE),
    "moe": ("moe", None, HERE),
    "biased": ("parallel", None, HERE),
    "learned": ("learned", None, HERE),
    "int8": ("full", "int8", HERE),
}


@contextlib.contextmanager
def here():
    """Verification in this process instead of a fresh one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "_fresh", lambda module, *args: replay.main(*args))
        yield


def exported(kind, folder) -> build.Exported:
    name, format, options = kind
    with here():
        return build.export(model_of(name, format), "iree", folder, options=options)


def checked(export: build.Exported, how: str, format: str | None = None) -> None:
    """Every greedy token is the live model's, and logits differ by f32's own noise, or less than was allowed."""
    said = export.manifest["verification"]
    assert said["verified"] == how
    assert said["tokens_equal"] + said["near_ties"] == said["tokens"]
    assert said["near_ties"] <= 2 * (format == "q4f16_1")
    noise = said["allowed"] if format == "q4f16_1" else 1e-5 * said["largest_logit"]
    assert said["max_difference"] <= noise


# ---- caches are written inside their bounds ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_portable_writes_are_those_that_drop(tokens, dtype):
    """Slots of every kind: all dropped, none, the first, the last, out of order."""
    rng = np.random.default_rng(0)
    cache = jnp.asarray(rng.standard_normal((64, 2, 5, 3)), dtype)
    pos = jnp.asarray(rng.integers(-1, 9, (64, 5)), jnp.int32)
    x = jnp.asarray(rng.standard_normal((64, tokens, 2, 3)), dtype)
    slot = np.stack([rng.permutation(11)[:tokens] for _ in range(64)]).astype(np.int32)  # 5 and more are outside
    slot[0], slot[1, 0] = 5, 4
    expected = np.array(cache, np.float32), np.array(pos)
    for b, t in np.argwhere(slot < 5):
        expected[0][b, :, slot[b, t]] = np.asarray(x, np.float32)[b, t]
        expected[1][b, slot[b, t]] = t
    number = jnp.broadcast_to(jnp.arange(tokens), slot.shape)
    with ops.portable():
        found = jax.jit(ops.put)(cache, x, slot), jax.jit(ops.put_each)(pos, number, slot)
        inside = slots._inside(x, jnp.asarray(slot), 5, cache[:, :, 0][:, None])[1]
    assert int(inside.min()) >= 0
    assert int(inside.max()) < 5
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a, b.dtype), b)


# ---- the program is the model -----------------------------------------------------------------------------


@engine
@pytest.mark.parametrize("kind", KINDS)
def test_the_program_is_the_live_model(kind, tmp_path):
    checked(exported(KINDS[kind], tmp_path / "out"), "executed", KINDS[kind][1])


@engine
@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL)
def test_the_other_kinds_too(kind, tmp_path):
    checked(exported(ALL[kind], tmp_path / "out"), "executed")


@pytest.fixture(scope="module")
def bundled(tmp_path_factory) -> pathlib.Path:
    """The bundled model in float32, by the command."""
    folder = tmp_path_factory.mktemp("bundled") / "out"
    sizes = ["--dtype", "float32", "--context", "256", "--chunk", "32", "--platform", "host"]
    assert cli.main(["export", str(jaxllm.bundled()), "--target", "iree", "--out", str(folder), *sizes]) == 0
    return folder


@functools.cache
def live(prompt: str) -> str:
    return decode.generate(jaxllm.load(dtype="float32"), prompt, max_new_tokens=64, max_len=256).text


@engine
def test_the_bundled_model_speaks_without_jaxllm_and_jax(bundled):
    """By the loader in the folder: the same 64 greedy tokens."""
    prompt = "def read_lines(path):\n"
    code = "import sys, runpy; sys.modules['jaxllm'] = sys.modules['jax'] = None; "
    code += f"sys.argv[1:] = [{prompt!r}]; runpy.run_path({str(bundled / iree.RUNNER)!r}, run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert run.stdout == live(prompt) + "\n"


@engine
def test_conversations_begin_from_nothing(bundled):
    """One that was begun before changes nothing, nor does one that was left in the middle."""
    artifact = shipped.imported(bundled / iree.RUNNER).Artifact(bundled)
    prompts = [list(range(5, 45)), [7, 8, 9]]
    first = [list(zip(range(12), artifact.generate(ids), strict=False)) for ids in prompts]
    again = [list(zip(range(12), artifact.generate(ids), strict=False)) for ids in reversed(prompts)]
    assert first == again[::-1]
    assert first[0] != first[1]


@engine
def test_another_python_runs_it(bundled):
    remote = iree_remote.Remote([sys.executable], bundled, "manifest.json")
    artifact = shipped.imported(bundled / iree.RUNNER).Artifact(bundled)
    try:
        for _ in range(2):
            remote.reset(), artifact.reset()
            inputs = artifact.inputs([3, 4, 5], 32, 0, 0.0, 1.0, 0)
            assert (remote.step("prefill", inputs)["logits"] == artifact.step("prefill", inputs)["logits"]).all()
        assert machine.machine() in remote.where
    finally:
        remote.close()
    with pytest.raises(CheckpointError, match="cannot run the program"):
        iree_remote.Remote(["false"], bundled, "manifest.json")


@engine
def test_programs_are_small_and_hold_no_parameters(bundled):
    found = manifest.opened(bundled)
    assert found["files"]["model.vmfb"]["bytes"] + found["files"]["model.mlir"]["bytes"] < 1e6
    assert found["programs"]["prefill"]["files"] == found["programs"]["decode"]["files"]
    assert found["target"]["limits"]["flags"][-1] == "--iree-llvmcpu-target-cpu=host"
    text = (bundled / "model.mlir").read_text()
    states = re.findall(r'mutable @"state\.[\w.]+" = dense<(0x\w+)> : tensor<(?:\d+x)+(\w+)>', text)
    assert len(states) == len(set(states)) == 3 * len(found["model"]["config"]["blocks"]) + 1


@engine
def test_four_bits_stay_four(tmp_path):
    """The archive has the codes as they are, 4.5 bits a weight."""
    from iree.runtime import ParameterIndex

    model = jaxllm.quantize(jaxllm.load(jaxllm.bundled("draft")), "q4f16_1")
    iree._write_parameters(tmp_path / "p.irpa", model.params)
    assert 8 * (tmp_path / "p.irpa").stat().st_size / model.size < 4.51 + 8 * 2**16 / model.size
    index = ParameterIndex()
    index.load(str(tmp_path / "p.irpa"))
    found = dict(index.items())
    expected = parameters.named(parameters.flatten(model.params))
    assert found.keys() == expected.keys()
    assert all(bytes(found[name].file_view) == np.asarray(x).tobytes() for name, x in expected.items())


# ---- platforms that are not here --------------------------------------------------------------------------


@engine
@pytest.mark.parametrize("platform", ["cuda"])
def test_what_is_not_here_is_compiled_and_its_module_run(platform, tmp_path):
    if shutil.which("nvidia-smi"):
        pytest.skip("there may be such a device here, which would run it")
    export = exported(("full", None, replace(SMALL, platform=platform)), tmp_path / "out")
    checked(export, "compiled")
    assert "compiled for this machine" in export.manifest["verification"]["where"]
    with pytest.raises(
        SystemExit, match=f"this program is for {platform}, and IREE's runtime finds no such device"
    ):
        shipped.imported(export.folder / iree.RUNNER).Artifact(export.folder)


@engine
@pytest.mark.slow
@pytest.mark.parametrize("platform", ["rocm", "metal", "x86_64"])
def test_the_other_platforms_too(platform, tmp_path):
    export = exported(("full", None, replace(SMALL, platform=platform)), tmp_path / "out")
    said = export.manifest["verification"]
    assert said["tokens_equal"] == said["tokens"]


@engine
def test_vulkan(tmp_path):
    """Two conversations on whatever driver there is; with indirect command buffers the second was wrong."""
    if shipped.imported(pathlib.Path(shipped.__file__).with_name(iree.RUNNER)).device_of("vulkan") is None:
        pytest.skip("no Vulkan driver is installed; mesa-vulkan-drivers has one for CPUs")
    checked(exported(("full", None, replace(SMALL, platform="vulkan")), tmp_path / "out"), "executed")


@engine
def test_aarch64(tmp_path):
    if machine.machine() not in iree.NATIVE["aarch64"] and iree.SIMULATOR not in os.environ:
        pytest.skip(f"{iree.SIMULATOR} names no command that runs Python for aarch64")
    export = exported(("full", None, replace(SMALL, platform="aarch64")), tmp_path / "out")
    checked(export, "simulated" if iree.SIMULATOR in os.environ else "executed")


# ---- what goes wrong is said ------------------------------------------------------------------------------


@engine
def test_the_compilers_words_are_heard(tmp_path):
    (tmp_path / "bad.mlir").write_text("module { func.func public @f() { call @g() : () -> () return } }")
    with pytest.raises(
        JaxllmError, match=r"IREE's compiler cannot take this model:\n.*does not reference a valid"
    ):
        iree.compile_to(tmp_path / "bad.mlir", tmp_path / "out", iree.HERE)


def test_what_needs_too_much_stack_is_compiled_with_less_fusion(tmp_path, monkeypatch):
    """As the bundled model in float32 does with its usual chunk of 256 tokens; other errors stay errors."""
    tried = []

    def compiler(source, program, flags, words="'func.func' op exceeded stack allocation limit of 32768 bytes"):
        tried.append([flag for flag in flags if "opt-level" in flag])
        if "--iree-opt-level=O2" in flags:
            raise JaxllmError(words)

    monkeypatch.setattr(iree, "compile_to", compiler)
    assert "--iree-opt-level=O1" in iree.compile_within_stack(tmp_path, tmp_path, iree.HERE)
    assert tried == [["--iree-opt-level=O2"], ["--iree-opt-level=O1"]]
    monkeypatch.setattr(iree, "compile_to", functools.partial(compiler, words="no such operation"))
    with pytest.raises(JaxllmError, match="no such operation"):
        iree.compile_within_stack(tmp_path, tmp_path, iree.HERE)
    assert len(tried) == 3


def test_vulkan_computes_in_32_bits(tmp_path, monkeypatch):
    """What the model will be counts, not what the checkpoint is."""
    monkeypatch.setattr(build, "_loaded", lambda *a: pytest.fail("that is work"))
    monkeypatch.setattr(target.Target, "missing", lambda self: "nothing is installed")
    options, source = Options(platform="vulkan"), jaxllm.bundled()
    for more, error in (
        (dict(dtype="float16"), "these activations are float16; give --dtype float32"),
        (dict(dtype="bfloat16"), "these activations are bfloat16"),
        (dict(format="q4f16_1", dtype="float32"), r"w is packed, and IREE .* something else"),
        (dict(dtype="float32"), "nothing is installed"),
    ):
        with pytest.raises(JaxllmError, match=error):
            build.export(source, "iree", tmp_path / "out", options=options, **more)


def test_missing_packages_are_one_sentence(monkeypatch, tmp_path):
    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(target.importlib.util, "find_spec", absent)
    says = r"needs iree.compiler and iree.runtime: pip install 'jaxllm\[export-iree\]'"
    with pytest.raises(MissingExtraError, match=says):
        build.export(model_of(), "iree", tmp_path / "out", options=SMALL)
