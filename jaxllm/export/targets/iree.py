"""IREE: one program for a CPU or GPU, parameters beside it, the state inside; for C programs, phones and Python.

github.com/iree-org/iree. Its compiler makes a program for a platform that need not be here. Where it is not, the
same module is compiled for this machine, and that is run.
"""

from __future__ import annotations

import os
import pathlib
import platform as machine
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxllm.checkpoint.canonical import flatten
from jaxllm.config import ModelConfig
from jaxllm.errors import JaxllmError
from jaxllm.export import iree_remote, shipped
from jaxllm.export.iree_module import module
from jaxllm.export.options import Options
from jaxllm.export.parameters import named
from jaxllm.export.target import Built, Formats, Job, Target, Values
from jaxllm.export.targets.stablehlo import exported, portable

SOURCE, PROGRAM, PARAMETERS = "model.mlir", "model.vmfb", "model.irpa"
RUNNER, EXAMPLE = "run_iree.py", "run_iree.c"
SIMULATOR = "JAXLLM_IREE_AARCH64"  # a command that runs Python with IREE's runtime for aarch64
CPU = ("--iree-opt-level=O2", "--iree-hal-target-backends=llvm-cpu")
# With indirect ones, a program on Vulkan goes on using the buffers of its first call (IREE 3.13). O2 joins what
# then needs more shared memory than the GPU of a phone has.
GPU = ("--iree-opt-level=O1", "--iree-hal-indirect-command-buffers=false")
HERE = (*CPU, "--iree-llvmcpu-target-cpu=host")
FLAGS = {  # of iree-compile. Programs for CPUs are of no operating system
    "x86_64": (
        *CPU,
        "--iree-llvmcpu-target-triple=x86_64-unknown-linux-gnu",
        "--iree-llvmcpu-target-cpu=x86-64-v3",
    ),
    "aarch64": (
        *CPU,
        "--iree-llvmcpu-target-triple=aarch64-unknown-linux-gnu",
        "--iree-llvmcpu-target-cpu=generic",
        "--iree-llvmcpu-target-cpu-features=+neon,+dotprod,+fullfp16",
    ),
    "vulkan": (*GPU, "--iree-hal-target-backends=vulkan-spirv", "--iree-vulkan-target=vp_android_baseline_2022"),
    "cuda": (*GPU, "--iree-hal-target-backends=cuda", "--iree-cuda-target=sm_80"),
    "rocm": (*GPU, "--iree-hal-target-backends=rocm", "--iree-rocm-target=gfx942"),
    "metal": (*GPU, "--iree-hal-target-backends=metal-spirv"),
    "host": HERE,
}
NATIVE = {"x86_64": ("x86_64", "AMD64"), "aarch64": ("aarch64", "arm64")}  # platform -> names of such machines


def refuses(config: ModelConfig, values: Values, formats: Formats, options: Options) -> str | None:
    """What IREE's compiler cannot take."""
    if options.platform != "vulkan":
        return None
    if formats:
        return (
            f"{min(formats)} is packed, and IREE 3.13 computes something else with bytes on Vulkan's baseline; "
            "export it unpacked"
        )
    if config.dtype != "float32":
        return (
            f"on Vulkan's baseline IREE computes in 32 bits, and these activations are {config.dtype}; give "
            "--dtype float32"
        )
    return None


def build(job: Job) -> Built:
    """model.vmfb, what it was compiled from, its parameters, and the loaders."""
    programs = [(program, portable(exported(program, "cpu"))) for program in job.programs]
    (job.folder / SOURCE).write_text(module(programs), encoding="utf-8")
    flags = compile_within_stack(job.folder / SOURCE, job.folder / PROGRAM, FLAGS[job.options.platform])
    _write_parameters(job.folder / PARAMETERS, job.model.params)
    for name in (RUNNER, EXAMPLE):
        shutil.copyfile(pathlib.Path(shipped.__file__).with_name(name), job.folder / name)
    files = {program.name: {"vmfb": PROGRAM, "mlir": SOURCE} for program in job.programs}
    limits = {"flags": list(flags)}
    return Built(job.programs, files, (PARAMETERS,), versions(), limits)


def versions() -> dict[str, str]:
    """Of what compiles, and of what runs it here."""
    from iree.compiler import version as compiler
    from iree.runtime import version as runtime

    return {"iree-base-compiler": compiler.VERSION, "iree-base-runtime": runtime.VERSION}


def compile_within_stack(source: pathlib.Path, program: pathlib.Path, flags: Sequence[str]) -> Sequence[str]:
    """`compile_to` -> the flags that did it.

    For prefills of many tokens O2 fuses what then needs more stack than IREE allows a function; O1 does not."""
    try:
        compile_to(source, program, flags)
    except JaxllmError as error:
        plainer = [flag.replace("opt-level=O2", "opt-level=O1") for flag in flags]
        if "stack allocation limit" not in str(error) or plainer == list(flags):
            raise
        compile_to(source, program, plainer)
        return plainer
    return flags


def compile_to(source: pathlib.Path, program: pathlib.Path, flags: Sequence[str]) -> None:
    """Raises JaxllmError with the compiler's first words where it fails."""
    from iree.compiler import CompilerToolError, compile_file

    try:
        compile_file(str(source), output_file=str(program), input_type="stablehlo", extra_args=flags)
    except CompilerToolError as error:
        said = [line for line in str(error).splitlines() if "error:" in line][:2] or str(error).splitlines()[:2]
        raise JaxllmError("IREE's compiler cannot take this model:\n" + "\n".join(said)) from error


def _write_parameters(path: pathlib.Path, params: dict) -> None:
    """Under their names, as bytes: packed weights as they are."""
    from iree.runtime import ParameterIndex

    index = ParameterIndex()
    for name, x in named(flatten(params)).items():
        index.add_buffer(name, np.ascontiguousarray(x).reshape(-1).view(np.uint8))
    index.create_archive_file(str(path))


# ---- running it -----------------------------------------------------------------------------------------


class Runner:
    """The loader that lies in the directory, on the platform if it is here."""

    def __init__(self, folder: pathlib.Path, manifest: Mapping[str, Any]):
        name = "manifest.json" if "verification" in manifest else "manifest.unverified.json"
        platform = manifest["target"]["platform"]
        with tempfile.TemporaryDirectory() as aside:
            self._artifact, self.how, self.where = _opened(folder, name, platform, pathlib.Path(aside))

    def start(self) -> None:
        """Forget what was said; the state is the module's."""
        self._artifact.reset()

    def step(self, program: str, state: None, inputs: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], None]:
        """See `jaxllm.export.target.Runner`."""
        return self._artifact.step(program, inputs), None


def _opened(folder: pathlib.Path, name: str, platform: str, aside: pathlib.Path) -> tuple[Any, str, str]:
    """(the artifact, how it runs, by what)."""
    loader = shipped.imported(folder / RUNNER)
    by = f"iree-base-runtime {versions()['iree-base-runtime']}"
    if _native(platform) and (device := loader.device_of(platform)):
        artifact = loader.Artifact(folder, name, device=device)
        return artifact, "executed", f"{artifact.where}, {by}"
    if platform == "aarch64" and (command := os.environ.get(SIMULATOR)):
        remote = iree_remote.Remote(shlex.split(command), folder, name)
        return remote, "simulated", f"{remote.where}, by {shlex.split(command)[0]}, {by}"
    compile_to(folder / SOURCE, aside / PROGRAM, HERE)
    artifact = loader.Artifact(folder, name, device=loader.device_of("host"), program=aside / PROGRAM)
    return artifact, "compiled", f"the same module compiled for this machine and run on {artifact.where}, {by}"


def _native(platform: str) -> bool:
    """Whether a program for a CPU is for this one; those for GPUs are asked for a device."""
    return platform not in NATIVE or machine.machine() in NATIVE[platform]


TARGET = Target(
    name="iree",
    summary="one program for a CPU or GPU and its parameters, for C programs, phones and Python",
    platforms=tuple(FLAGS),
    needs=("iree.compiler", "iree.runtime"),
    extra="export-iree",
    refuses=refuses,
    build=build,
    run=Runner,
)
