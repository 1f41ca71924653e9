"""Folders of safetensors files, one or many with an index; read lazily, tensor by tensor."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable

import numpy as np

from jaxllm.errors import CheckpointError

Readers = dict[str, Callable[[], np.ndarray]]

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_folder(folder: pathlib.Path) -> Readers:
    """Name -> reader of every tensor in a checkpoint folder. Nothing but headers is read here.

    Raises CheckpointError for a folder without safetensors (with the way to convert pickles), a malformed index,
    a missing, truncated or malformed file, and a tensor that two files hold.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _indexed(folder, index)
    files = sorted(folder.glob("*.safetensors"))
    single = folder / "model.safetensors"
    if single in files:
        files = [single]
    if not files:
        raise CheckpointError(_nothing(folder))
    readers: Readers = {}
    for file in files:
        found = open_file(file)
        if twice := sorted(readers.keys() & found.keys()):
            raise CheckpointError(
                f"{file} repeats tensors of another file, {twice[0]!r} for one; keep one of them"
            )
        readers |= found
    return readers


def open_file(path: pathlib.Path) -> Readers:
    """Name -> reader of every tensor in one safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(str(path), framework="numpy").__enter__()
        names = list(handle.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); download it again") from error

    def reader(name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            try:
                return handle.get_tensor(name)
            except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
                raise CheckpointError(f"{path}: {name} cannot be read ({error})") from error

        return read

    return {name: reader(name) for name in names}


def _indexed(folder: pathlib.Path, index: pathlib.Path) -> Readers:
    wanted = _weight_map(index)
    opened = {}
    for name in sorted(set(wanted.values())):
        if pathlib.PurePath(name).name != name:
            raise CheckpointError(f"{index} names {name!r}; it may only name files in its own folder")
        if not (folder / name).is_file():
            raise CheckpointError(f"{index} names {name!r}, which is not in {folder}; download the missing file")
        opened[name] = open_file(folder / name)
    absent = [t for t, file in wanted.items() if t not in opened[file]]
    if absent:
        raise CheckpointError(
            f"{wanted[absent[0]]} lacks {len(absent)} tensors that {index} promises: {absent[:5]}"
        )
    return {tensor: opened[file][tensor] for tensor, file in wanted.items()}


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    try:
        wanted = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(wanted, dict) or not all(isinstance(f, str) and f for f in wanted.values()):
            raise TypeError("weight_map should map tensor names to file names")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is not an index of safetensors files ({error}); download it again"
        ) from error
    return wanted


def _nothing(folder: pathlib.Path) -> str:
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if not pickles:
        return f"{folder} has no .safetensors file; a checkpoint folder needs its weights beside config.json"
    return (
        f"{folder} holds PyTorch pickles ({pickles[0]}), which can run code when read, so jaxllm never reads them; "
        "convert once where you trust the file: load it with transformers and call "
        "save_pretrained(folder, safe_serialization=True)"
    )
