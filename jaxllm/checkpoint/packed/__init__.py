"""Quantized Hugging Face checkpoints: the tensors of each packed module become one reader of a QTensor.

Codes are repacked bit for bit and scales keep their dtype; modules that a file has left alone pass through. One
short file for each quant_method of config.json's quantization_config.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.checkpoint.canonical import Values
from jaxllm.checkpoint.packed.awq import awq
from jaxllm.checkpoint.packed.bitnet import bitnet
from jaxllm.checkpoint.packed.bitsandbytes import bitsandbytes
from jaxllm.checkpoint.packed.compressed import compressed_tensors
from jaxllm.checkpoint.packed.float8 import fbgemm_fp8, fp8
from jaxllm.checkpoint.packed.gptq import gptq
from jaxllm.checkpoint.packed.hqq import hqq
from jaxllm.checkpoint.packed.modelopt import modelopt
from jaxllm.checkpoint.packed.mxfp4 import mxfp4
from jaxllm.checkpoint.packed.stored import COMPUTED_IN, Job, Method, Module, Scheme
from jaxllm.checkpoint.packed.torchao import torchao
from jaxllm.checkpoint.safetensors import Readers, Tensor
from jaxllm.errors import CheckpointError, ConfigError, Notice
from jaxllm.families.fields import Fields, shown

METHODS: dict[str, Method] = {
    "gptq": gptq,
    "awq": awq,
    "fp8": fp8,
    "fbgemm_fp8": fbgemm_fp8,
    "compressed-tensors": compressed_tensors,
    "mxfp4": mxfp4,
    "bitsandbytes": bitsandbytes,
    "hqq": hqq,
    "torchao": torchao,
    "bitnet": bitnet,
    "modelopt": modelopt,
}
MOST_SHOWN = 40  # problems listed in one error


def settings(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of a config.json; None where its weights are not packed.

    Raises ConfigError where it is no object."""
    found = values.get("quantization_config") or values.get("compression_config")
    if not found:
        return None
    if not isinstance(found, dict):
        raise ConfigError(f"quantization_config should be an object, got {shown(found)}")
    return found


def check(values: Mapping[str, Any]) -> bool:
    """Whether a config.json describes packed weights.

    Raises ConfigError that lists what makes them unreadable, as far as the config tells."""
    if settings(values) is None:
        return False
    _scheme(values, dict, Counter())
    return True


def packed(
    values: Mapping[str, Any], readers: Readers, *, metadata: Callable[[], dict[str, str]] = dict
) -> dict[str, Callable[[], Values]]:
    """The readers of a checkpoint whose config.json is `values`, with one for each packed weight.

    readers: of the tensors as they are stored; metadata: of the text in their files' headers. A reader gives a
    QTensor [N, K] (experts: [E, N, K]), or an array where a layout cannot stay packed; what was expanded and what
    of a file is not used is told in one Notice. Only settings are read here, no weights.

    Raises ConfigError for settings that are malformed or not read; CheckpointError that lists every module whose
    tensors are missing or of the wrong shape or dtype.
    """
    if settings(values) is None:
        return dict(readers)
    notes: Counter[str] = Counter()
    scheme = _scheme(values, metadata, notes)
    modules, out = _gathered(readers, scheme)
    problems = []
    for module in modules:
        try:
            name = scheme.target.format(module.name)
            if name in out:
                raise CheckpointError(f"{name} is there both packed and not")
            out[name] = scheme.reader(module)
        except CheckpointError as error:
            problems.append(f"{module.name}: {error}")
    if problems:
        raise CheckpointError(_listed(problems))
    _tell(notes)
    return out


def _scheme(values: Mapping[str, Any], metadata: Callable[[], dict[str, str]], notes: Counter[str]) -> Scheme:
    found = settings(values)
    method = _method(found)
    c = Fields(found)
    scheme = METHODS[method](Job(c, _dtype(values), metadata, notes))
    problems = c.problems
    if problems:
        raise ConfigError(f"quantization_config ({method}) cannot be used:\n  " + "\n  ".join(problems))
    return scheme


def _method(found: Mapping[str, Any]) -> str:
    """The quant_method, which old files of bitsandbytes and compressed-tensors lack."""
    method = found.get("quant_method")
    if method is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        return "bitsandbytes"
    if method is None and "config_groups" in found:
        return "compressed-tensors"
    if isinstance(method, str) and method in METHODS:
        return method
    raise ConfigError(
        f"weights quantized with {shown(method)} are not read; read are {', '.join(METHODS)}. "
        "Use a checkpoint in one of these, or the unquantized one"
    )


def _dtype(values: Mapping[str, Any]) -> str:
    stored = str(values.get("dtype") or values.get("torch_dtype")).removeprefix("torch.")
    return stored if stored in COMPUTED_IN else "bfloat16"


def _gathered(readers: Readers, scheme: Scheme) -> tuple[list[Module], dict[str, Callable[[], Values]]]:
    """The modules that are packed, and the readers of everything else."""
    modules: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Callable[[], Values]] = {}
    for name, tensor in readers.items():
        if scheme.drop(name):
            continue
        if found := scheme.split(name, tensor):
            modules.setdefault(found[0], {})[found[1]] = tensor
        else:
            rest[name] = tensor
    for module, tensors in modules.items():
        for leaf in scheme.also:
            if f"{module}.{leaf}" in rest:
                tensors[leaf] = rest.pop(f"{module}.{leaf}")
    return [Module(name, tensors) for name, tensors in modules.items()], rest


def _listed(problems: list[str]) -> str:
    more = [f"... and {len(problems) - MOST_SHOWN} more"] if len(problems) > MOST_SHOWN else []
    head = "packed weights that do not fit together; get the files again, or the right config:"
    return "\n  ".join([head, *problems[:MOST_SHOWN], *more])


def _tell(notes: Counter[str]) -> None:
    if notes:
        said = "; ".join(f"{text} ({n} {'time' if n == 1 else 'times'})" for text, n in notes.items())
        warnings.warn(f"packed weights: {said}", Notice, stacklevel=6)
