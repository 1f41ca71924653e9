"""Medusa heads (arXiv 2401.10774) in the layouts they are published in, read and written.

| by | block j of head i, the head's projection | the target's projection |
|---|---|---|
| FasterDecoding | `i.j.linear.weight`, `.bias`; behind J blocks `i.J.weight` | |
| TGI | the same | where there is no `i.J.weight` |
| MLC-LLM, whole checkpoints | the same behind `medusa_head.`; MLC-LLM's in shards | |
| vLLM | `blocks.i.layers.j.weight`, `.bias`; `lm_heads.i.weight`, `token_map` | with `original_lm_head` |

Sources: github.com/FasterDecoding/Medusa, medusa/model/medusa_model.py; github.com/huggingface/
text-generation-inference, server/.../layers/medusa.py; github.com/mlc-ai/mlc-llm, model/medusa; vllm-project/vllm,
model_executor/models/medusa.py.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxllm.checkpoint import mlc_index
from jaxllm.checkpoint.safetensors import read_folder
from jaxllm.errors import CheckpointError
from jaxllm.files import read_object, write_whole

WEIGHTS = "medusa_lm_head.safetensors"
_START = r"(?:medusa_heads?\.|heads\.)?"
NAMES = (
    (_START + r"(\d+)\.(\d+)\.linear\.weight", "heads.{}.blocks.{}.w"),
    (_START + r"(\d+)\.(\d+)\.linear\.bias", "heads.{}.blocks.{}.b"),
    (_START + r"(\d+)\.(\d+)\.weight", "heads.{}.out.{}"),
    (_START + r"blocks\.(\d+)\.layers\.(\d+)\.weight", "heads.{}.blocks.{}.w"),
    (_START + r"blocks\.(\d+)\.layers\.(\d+)\.bias", "heads.{}.blocks.{}.b"),
    (_START + r"lm_heads\.(\d+)\.weight", "heads.{}.out"),
    (_START + r"token_map", "tokens"),
)
OTHERS = re.compile(r"(model|lm_head)\..*")  # of the target itself, where a file holds both
FLOATS = ("float32", "float16", "bfloat16")
Heads = dict[str, Any]


def read_heads(folder: pathlib.Path) -> tuple[Heads, dict[str, Any]]:
    """({"heads": [{"blocks": [{"w": [D, D], "b": [D]}], "out": {"w": [V, D]}}], "tokens": i32 [V]}, config.json).

    Arrays are numpy's, as stored. "b" is missing where there are no biases, "out" where the target's own
    projection is meant, "tokens" unless projections have rows for these tokens alone. The number of heads is that
    of the file: published configs differ from it.

    Raises CheckpointError for a pickle and for tensors that make no heads.
    """
    folder = pathlib.Path(folder)
    values = _values(folder)
    readers = _readers(folder)
    flat: dict[str, np.ndarray] = {}
    for name, read in readers.items():
        if (path := _destination(name)) is not None:
            flat[path] = read()
        elif not OTHERS.fullmatch(name):
            raise CheckpointError(f"{folder} has {name!r}, which is no part of Medusa heads; see the layouts read")
    if values.get("original_lm_head"):
        flat = {path: x for path, x in flat.items() if ".out" not in path}
    return _checked(folder, flat), values


def _values(folder: pathlib.Path) -> dict[str, Any]:
    name = next((n for n in ("config.json", "mlc-chat-config.json") if (folder / n).is_file()), "config.json")
    missing = f"{folder} has no config.json; give the folder of published Medusa heads"
    return read_object(folder / name, CheckpointError, "download it again", missing=missing)


def _readers(folder: pathlib.Path) -> Mapping[str, Callable[[], np.ndarray]]:
    if (index := mlc_index.index_file(folder)) is not None:
        return {t.name: lambda t=t: mlc_index.read(t) for t in mlc_index.read_index(index).tensors}
    if not list(folder.glob("*.safetensors")) and (pickles := sorted(folder.glob("*.pt"))):
        raise CheckpointError(
            f"{pickles[0]} is a pickle, which can run code when it is read, so jaxllm never reads it; where you "
            f"trust it, convert it once: safetensors.torch.save_file(torch.load('{pickles[0].name}', "
            f"weights_only=True), '{WEIGHTS}')"
        )
    return read_folder(folder)


def _destination(name: str) -> str | None:
    return next((path.format(*m.groups()) for pattern, path in NAMES if (m := re.fullmatch(pattern, name))), None)


def _checked(folder: pathlib.Path, flat: dict[str, np.ndarray]) -> Heads:
    """The flat tree nested, where it is one of heads that are all alike."""
    numbers = sorted({int(path.split(".")[1]) for path in flat if path.startswith("heads.")})
    heads = [_head(flat, i) for i in numbers]
    shapes = [_shapes(head) for head in heads]
    if not heads or numbers != list(range(len(heads))) or any(s != shapes[0] for s in shapes):
        raise CheckpointError(
            f"{folder} should hold heads 0, 1, ... of the same blocks and projections; got heads {numbers} of "
            f"{len(set(map(str, shapes)))} shapes; get the files again"
        )
    if wrong := [path for path, x in flat.items() if x.dtype.name not in FLOATS and path != "tokens"]:
        raise CheckpointError(f"{folder}: {wrong[0]} should be of floats, got {flat[wrong[0]].dtype.name}")
    tokens = {"tokens": flat["tokens"].astype(np.int32)} if "tokens" in flat else {}
    return {"heads": heads, **tokens}


def _head(flat: dict[str, np.ndarray], i: int) -> Heads:
    start = f"heads.{i}."
    own = {path.removeprefix(start): x for path, x in flat.items() if path.startswith(start)}
    blocks = sorted({int(path.split(".")[1]) for path in own if path.startswith("blocks.")})
    head: Heads = {"blocks": [_block(own, j) for j in blocks]}
    if blocks != list(range(len(blocks))):
        raise CheckpointError(f"head {i} should have blocks 0, 1, ..., got {blocks}; get the files again")
    if projections := [path for path in own if path.startswith("out")]:
        if len(projections) > 1 or projections[0] not in ("out", f"out.{len(blocks)}"):
            raise CheckpointError(f"head {i} should end in one projection after {len(blocks)} blocks")
        head["out"] = {"w": own[projections[0]]}
    return head


def _block(own: dict[str, np.ndarray], j: int) -> dict[str, np.ndarray]:
    return {leaf: own[path] for leaf in "wb" if (path := f"blocks.{j}.{leaf}") in own}


def _shapes(head: Heads) -> list[tuple[str, tuple[int, ...]]]:
    """Of every array; raises CheckpointError where they do not go together."""
    found = [(f"blocks.{j}.{k}", x.shape) for j, b in enumerate(head["blocks"]) for k, x in b.items()]
    found += [("out.w", head["out"]["w"].shape)] if "out" in head else []
    widths = {shape[-1] for _, shape in found}
    square = all(len(s) == (1 if n.endswith("b") else 2) and (n == "out.w" or len({*s}) == 1) for n, s in found)
    if len(widths) != 1 or not square or any("w" not in b for b in head["blocks"]):
        raise CheckpointError(f"blocks are [D, D] with biases [D] and projections [V, D], got {found}")
    return found


def write_heads(folder: pathlib.Path, heads: Heads, values: Mapping[str, Any]) -> None:
    """Write what `read_heads` reads, in FasterDecoding's layout; values: of config.json besides the two counts.

    Each file appears whole or not at all."""
    from safetensors.numpy import save

    names, flat = {"w": "weight", "b": "bias"}, {}
    for i, head in enumerate(heads["heads"]):
        for j, block in enumerate(head["blocks"]):
            flat |= {f"{i}.{j}.linear.{names[k]}": x for k, x in block.items()}
        flat |= {f"{i}.{len(head['blocks'])}.weight": head["out"]["w"]} if "out" in head else {}
    blocks = len(heads["heads"][0]["blocks"])
    counts = dict(medusa_num_heads=len(heads["heads"]), medusa_num_layers=blocks, model_type="medusa")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / WEIGHTS, save({name: np.ascontiguousarray(x) for name, x in flat.items()}))
    write_whole(folder / "config.json", json.dumps({**counts, **values}, indent=1).encode() + b"\n")
