"""XLA's programs for one platform: jax.export's serialized functions, and portable StableHLO beside them.

The functions carry JAX's promise (six months of newer versions). StableHLO is written in the version of twelve
weeks ago, for consumers as old as that (github.com/openxla/stablehlo, docs/compatibility.md). Kernels of jaxllm's
own are left out, so that nothing but XLA is needed, unless those of Pallas for TPU are asked for.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from jax import export

from jaxllm import kernels, ops
from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.export import ahead, shipped
from jaxllm.export.options import SYMBOLS, Options
from jaxllm.export.parameters import write
from jaxllm.export.program import Program
from jaxllm.export.shipped import imported as _imported
from jaxllm.export.target import Built, Formats, Job, Target, Values

RUNNER, EXAMPLE = "run_stablehlo.py", "run_pjrt.cc"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
KERNEL = "tpu_custom_call"  # of Pallas; JAX keeps it as stable as what it exports
WINDOW = "WEEK_12"  # the versions of StableHLO of so many weeks read it


def refuses(config: ModelConfig, values: Values, formats: Formats, options: Options) -> str | None:
    """Nothing of a model: XLA takes what JAX does. Kernels want to be compiled, and their sizes to be said."""
    if options.kernels == "portable":
        return None
    if options.symbolic:
        return (
            "a kernel of Pallas is made for sizes that are said; leave --symbolic out, or give --kernels portable"
        )
    if not _present(options.platform) and (reason := ahead.unavailable()):
        return f"kernels are verified where they are compiled, and {reason}; or give --kernels portable"
    return None


def build(job: Job) -> Built:
    """Both programs, each as prefill.jax_export and, where every size is said, prefill.stablehlo; the loaders of
    what there is."""
    parameters = write(job.folder, job.model.params)
    files = {program.name: _written(program, job) for program in job.programs}
    for name in (RUNNER,) if job.options.symbolic else (RUNNER, EXAMPLE):
        shutil.copyfile(pathlib.Path(shipped.__file__).with_name(name), job.folder / name)
    limits = {} if job.options.kernels == "portable" else {"kernels": KERNEL}
    return Built(job.programs, files, tuple(parameters), versions(), limits)


def versions() -> dict[str, str]:
    """Of what writes the programs."""
    return {
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "calling_convention": str(export.maximum_supported_calling_convention_version),
        "stablehlo": _stablehlo_version(),
    }


def _written(program: Program, job: Job) -> dict[str, str]:
    pallas = job.options.kernels == "pallas"
    made = exported(program, job.options.platform, pallas=pallas)
    forms = {"jax_export": made.serialize}
    if pallas:
        if KERNEL not in made.mlir_module():
            raise ConfigError(
                f"no kernel takes anything of this model's {program.name}: they are for packed weights, experts "
                "and attention in float32 and bfloat16; give --dtype bfloat16, or --kernels portable"
            )
        forms["interpreted"] = interpreted(program, job.options.platform).serialize
    if not job.options.symbolic:  # else its shapes are JAX's to work out, when the function is called
        forms["stablehlo"] = lambda: portable(made)
    names = {form: f"{program.name}.{form}" for form in forms}
    for form, data in forms.items():
        (job.folder / names[form]).write_bytes(data())
    return names


def exported(program: Program, platform: str, *, pallas: bool = False) -> export.Exported:
    """The program lowered for a platform, whether it is here or not; the state is donated.

    pallas: with jaxllm's kernels for it, where they take what they are given."""
    with ops.portable(pallas=pallas), kernels.compiled_for(*[platform] * pallas):
        return _exported(program, platform)


def interpreted(program: Program, platform: str) -> export.Exported:
    """The program with that platform's kernels, interpreted: for CPU."""
    with ops.portable(pallas=True), kernels.interpreted_for(platform):
        return _exported(program, "cpu")


def _exported(program: Program, platform: str) -> export.Exported:
    # Nothing unused is dropped: the arguments are those of the manifest.
    function = jax.jit(program.call, donate_argnums=1, keep_unused=True)
    return export.export(function, platforms=[platform])(*program.specs)


def portable(made: export.Exported) -> bytes:
    """Its StableHLO as bytecode of the version that WINDOW says."""
    from jax.extend.mlir.dialects import stablehlo

    return stablehlo.serialize_portable_artifact_str(made.mlir_module(), _stablehlo_version())


def _stablehlo_version() -> str:
    from jax.extend.mlir.dialects import stablehlo

    window = getattr(stablehlo.StablehloCompatibilityRequirement, WINDOW)
    return stablehlo.get_version_from_compatibility_requirement(window)


class Runner:
    """The loader that lies in the directory, as anybody would use it."""

    def __init__(self, folder: pathlib.Path, manifest: Mapping[str, Any]):
        name = "manifest.json" if "verification" in manifest else "manifest.unverified.json"
        module = _imported(folder / RUNNER)
        present = _present(manifest["target"]["platform"])
        self._artifact = module.Artifact(folder, name, anywhere=not present)
        self.how = "executed" if present else "simulated"
        device = self._artifact.device
        self.where = f"XLA on {device.platform} ({device.device_kind}), jax {jax.__version__}"
        if not present and manifest["target"].get("limits", {}).get("kernels"):
            self.how, machine = "compiled", ahead.compiled(folder, manifest)
            self.where = f"{machine}'s compiler; its kernels interpreted by {self.where}"
        self.start = self._artifact.start

    def step(self, program: str, state: Any, inputs: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Any]:
        """See `jaxllm.export.target.Runner`."""
        results, state = self._artifact.step(program, state, inputs)
        return {k: np.asarray(x) for k, x in results.items()}, state


def _present(platform: str) -> bool:
    try:
        return bool(jax.devices(platform))
    except RuntimeError:
        return False


TARGET = Target(
    name="stablehlo",
    summary="XLA programs for a server with JAX, or whatever reads StableHLO",
    platforms=PLATFORMS,
    needs=("flatbuffers",),
    extra="export-stablehlo",
    refuses=refuses,
    build=build,
    run=Runner,
    penalties=True,
    symbolic=tuple(SYMBOLS),
    pallas=("tpu",),
)
