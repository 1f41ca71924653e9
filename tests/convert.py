"""Turn a folder that transformers saved into the config and names of a model that only exists with remote code."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable

import numpy as np

Tensors = dict[str, np.ndarray]


def convert(
    config: Callable[[dict], dict],
    names: tuple[tuple[str, str], ...] = (),
    tensors: Callable[[Tensors], Tensors] = lambda t: t,
) -> Callable[[pathlib.Path], None]:
    """A Case.convert: config.json becomes config(old); `tensors` rearranges, then each pattern renames."""

    def run(folder: pathlib.Path) -> None:
        from safetensors.numpy import load_file, save_file

        path = folder / "config.json"
        path.write_text(json.dumps(config(json.loads(path.read_text()))))
        weights = tensors(load_file(folder / "model.safetensors"))
        renamed = {rename(name, names): np.ascontiguousarray(x) for name, x in weights.items()}
        save_file(renamed, folder / "model.safetensors")

    return run


def rename(name: str, names: tuple[tuple[str, str], ...]) -> str:
    for pattern, to in names:
        name = re.sub(pattern, to, name)
    return name


def changed(model_type: str, drop: tuple[str, ...] = (), rope: bool = True, **values) -> Callable[[dict], dict]:
    """The config with model_type and values set; rope says it the old way, with rope_theta at the top."""

    def config(old: dict) -> dict:
        kept = {
            k: v for k, v in old.items() if k not in (*drop, "architectures", "rope_parameters", "layer_types")
        }
        theta = {"rope_theta": old["rope_parameters"]["rope_theta"]} if rope else {}
        return kept | theta | {"model_type": model_type} | values

    return config


def old_spelling(extra: Callable[[dict], dict] = lambda old: {}) -> Callable[[pathlib.Path], None]:
    """rope_theta and rope_scaling in place of rope_parameters, torch_dtype in place of dtype, no layer_types."""

    def config(old: dict) -> dict:
        r = dict(old["rope_parameters"])
        values = {k: v for k, v in old.items() if k not in ("rope_parameters", "dtype", "layer_types")}
        values |= {"torch_dtype": old.get("dtype", "float32"), "rope_theta": r.pop("rope_theta")}
        partial = r.pop("partial_rotary_factor", None)
        values |= {} if partial is None else {"partial_rotary_factor": partial}
        r["type"] = r.pop("rope_type")
        return values | {"rope_scaling": None if r == {"type": "default"} else r} | extra(old)

    return convert(config)


def fuse(
    tensors: Tensors, into: str, parts: tuple[str, ...], join: Callable[..., np.ndarray] | None = None
) -> Tensors:
    """Join the tensors layer.{part} of every layer, weights and biases alike, into layer.{into}."""
    out = dict(tensors)
    first = re.compile(rf"(.*\.){re.escape(parts[0])}\.(weight|bias)")
    for name in tensors:
        if found := first.fullmatch(name):
            pieces = [out.pop(f"{found[1]}{part}.{found[2]}") for part in parts]
            out[f"{found[1]}{into}.{found[2]}"] = join(*pieces) if join else np.concatenate(pieces)
    return out
