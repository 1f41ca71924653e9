"""Orbax as jaxllm's own format: any parameters, packed ones included, straight onto a mesh.

A folder holds `jaxllm_orbax.json` (the config, what each parameter is, and the name of a folder below), and that
folder, with the arrays as Orbax writes them (orbax.readthedocs.io, one flat tree of path -> array, a packed
weight's parts below its path) and the tokenizer's files. A save writes a new folder and then replaces the small
file, which is one step: killed at any time, it leaves what was there before.
"""

from __future__ import annotations

import json
import pathlib
import re
import reprlib
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoint.canonical import flatten, nest
from jaxllm.config import ModelConfig, params_shape
from jaxllm.config_json import from_json, to_json
from jaxllm.errors import CheckpointError, ConfigError, MissingExtraError
from jaxllm.files import read_object, write_whole
from jaxllm.quant import QTensor, Recipe
from jaxllm.quant.describe import abstract, describe, nbytes

POINTER = "jaxllm_orbax.json"
FOLDER = re.compile(r"save-[0-9a-f]{16}")
ARRAYS = "params"
FIELDS = {"format", "arrays", "config", "leaves", "recipe", "eos_ids", "defaults", "values"}
FORMAT = "jaxllm orbax 1"
COMPRESSION = 256  # no more than so many times smaller are arrays on disk ...
SPARE = 2**24  # ... but for these bytes: a small model may be all zeros

Struct = jax.ShapeDtypeStruct
Sharding = jax.sharding.Sharding | Callable[[str, Struct], jax.sharding.Sharding]


@dataclass(frozen=True)
class Saved:
    """What a folder holds; nothing of the arrays has been read."""

    folder: pathlib.Path  # of the arrays and the tokenizer's files; the next save has another
    config: ModelConfig
    leaves: dict[str, Struct | QTensor]
    recipe: Recipe | None
    eos_ids: frozenset[int]
    defaults: dict[str, Any]
    values: dict[str, Any]  # the config that ours was made from, where there was one


# ---- saving ------------------------------------------------------------------------------------------------


def save_orbax(
    model: Any, folder: str | pathlib.Path, *, recipe: Recipe | None = None, wait: bool = True
) -> Future:
    """Save a jaxllm.Model, whatever it was loaded from, into a folder that is new, empty, or an earlier save.

    recipe: what the parameters were quantized by, kept beside them. wait: False returns as soon as the values
    are out of the devices' memory; the rest is written by another thread. The Future that is returned is done
    when the folder holds the new model; its result() is the folder, or raises what went wrong. Ask for it before
    the process ends: a save that is not done by then is lost.

    Until then the folder holds what it held before, also where the process is killed. One process may save into
    a folder at a time. Raises CheckpointError for another folder and for parameters that are not those of the
    config; MissingExtraError without orbax-checkpoint.
    """
    library, folder = _orbax(), pathlib.Path(folder)
    _check_target(folder)
    about = json.dumps(_about(model, recipe) | {"arrays": (name := f"save-{secrets.token_hex(8)}")}, indent=1)
    fresh = folder / name
    writer = library.AsyncCheckpointer(library.PyTreeCheckpointHandler())
    try:
        fresh.mkdir(parents=True)
        if model.tokenizer is not None:
            for name, data in model.tokenizer.files().items():
                (fresh / name).write_bytes(data)
        writer.save((fresh / ARRAYS).absolute(), args=library.args.PyTreeSave(_flat(flatten(model.params))))
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        writer.close()
        raise
    pool = ThreadPoolExecutor(1)
    done = pool.submit(_finish, writer, fresh, about)
    pool.shutdown(wait=False)
    if wait:
        done.result()
    return done


def _finish(writer: Any, fresh: pathlib.Path, about: str) -> pathlib.Path:
    """Wait for the arrays, then make the folder point to them."""
    try:
        writer.wait_until_finished()
        write_whole(fresh.parent / POINTER, about.encode())
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    finally:
        writer.close()
    for other in fresh.parent.iterdir():
        if FOLDER.fullmatch(other.name) and other.name != fresh.name:
            shutil.rmtree(other, ignore_errors=True)
    return fresh.parent


def _check_target(folder: pathlib.Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give a folder to save into")
    strange = folder.is_dir() and [p.name for p in folder.iterdir() if not FOLDER.fullmatch(p.name)]
    if strange and POINTER not in strange:
        raise CheckpointError(f"{folder} holds other files ({strange[0]}, ...); give a new or an empty folder")


def _about(model: Any, recipe: Recipe | None) -> dict[str, Any]:
    leaves = {path: describe(leaf) for path, leaf in flatten(model.params).items()}
    _check_leaves({path: abstract(leaf) for path, leaf in leaves.items()}, model.config, "the model")
    about = dict(
        format=FORMAT,
        config=to_json(model.config),
        leaves=leaves,
        recipe=recipe and recipe.as_json(),
        eos_ids=sorted(model.eos_ids),
        defaults=dict(model.defaults),
        values=dict(model.values),
    )
    try:
        return json.loads(json.dumps(about))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the model's defaults cannot be written as JSON ({error})") from error


def _flat(leaves: dict[str, Any]) -> dict[str, Any]:
    """Every array by itself: a packed weight's parts as path.part."""
    flat = {}
    for path, leaf in leaves.items():
        parts = leaf.parts() if isinstance(leaf, QTensor) else None
        flat |= {f"{path}.{name}": part for name, part in parts.items()} if parts else {path: leaf}
    return flat


# ---- loading -----------------------------------------------------------------------------------------------


def recognised(path: pathlib.Path) -> bool:
    """Whether a folder is one that `save_orbax` wrote."""
    return (path / POINTER).is_file()


def open_folder(path: pathlib.Path) -> Saved:
    """What a folder holds, without reading the arrays.

    Raises CheckpointError or ConfigError where its description is malformed, or is not that of its config."""
    where = path / POINTER
    about = read_object(where, CheckpointError, "save the model again")
    if about.keys() != FIELDS or about["format"] != FORMAT:
        raise CheckpointError(f"{where} should be of the form {FORMAT!r} with {', '.join(sorted(FIELDS))}")
    try:
        return _saved(path, about)
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"{where}: {error}") from None


def no_readers(path: pathlib.Path) -> NoReturn:
    """CheckpointError: what reads a checkpoint tensor by tensor cannot read this one."""
    raise CheckpointError(f"{path} is an Orbax folder, which is read whole: load it, then save the model anew")


def _saved(path: pathlib.Path, about: dict[str, Any]) -> Saved:
    name, eos, leaves = about["arrays"], about["eos_ids"], about["leaves"]
    if not isinstance(name, str) or not FOLDER.fullmatch(name) or not (path / name / ARRAYS).is_dir():
        raise CheckpointError(f"its arrays should be in a folder beside it, got {reprlib.repr(name)}")
    if not isinstance(eos, list) or not all(type(i) is int for i in eos):
        raise CheckpointError(f"eos_ids should be a list of token ids, got {reprlib.repr(eos)}")
    defaults, values = about["defaults"], about["values"]
    if not all(isinstance(part, dict) for part in (leaves, defaults, values)):
        raise CheckpointError("leaves, defaults and values should be objects")
    config = from_json(about["config"])
    leaves = {key: abstract(leaf) for key, leaf in leaves.items()}
    _check_leaves(leaves, config, "it")
    return Saved(path / name, config, leaves, _recipe(about["recipe"]), frozenset(eos), defaults, values)


def _recipe(values: Any) -> Recipe | None:
    if values is None:
        return None
    if not isinstance(values, dict) or values.keys() != {"rules", "dtype"}:
        raise CheckpointError(f"the recipe should have rules and dtype, got {reprlib.repr(values)}")
    return Recipe(values["rules"], values["dtype"])


def _check_leaves(leaves: dict[str, Struct | QTensor], config: ModelConfig, whose: str) -> None:
    shapes = params_shape(config)
    problems = [f"{path} is missing" for path in shapes.keys() - leaves.keys()]
    problems += [f"{path} has no place" for path in leaves.keys() - shapes.keys()]
    problems += [
        f"{path} should have shape {list(shapes[path])}, got {list(leaf.shape)}"
        for path, leaf in leaves.items()
        if path in shapes and tuple(leaf.shape) != shapes[path]
    ]
    if problems:
        listed = "; ".join(sorted(problems)[:20])
        raise CheckpointError(f"the parameters of {whose} are not those of the config: {listed}")


def restore(saved: Saved, *, sharding: Sharding | None = None, dtype: str | None = None) -> dict:
    """The parameters of a folder, each array placed by `sharding` as it is read.

    sharding: one for all, or a function of (path, what the array is) for each, in which the parts of a packed
    weight are "layers.0.mixer.q.w.codes", ".scale" and so on; the default device where it is None.
    dtype: of matrices, as in `load`. Raises CheckpointError where the arrays cannot be read or are not those
    that the folder describes; MissingExtraError without orbax-checkpoint.
    """
    library = _orbax()
    leaves = {path: _computed_in(leaf, dtype) for path, leaf in saved.leaves.items()}
    where = (saved.folder / ARRAYS).absolute()
    try:
        with library.Checkpointer(library.PyTreeCheckpointHandler()) as reader:
            _check_stored(reader.metadata(where).item_metadata.tree, saved, where)
            wanted = {path: _placed(path, struct, sharding) for path, struct in _flat(leaves).items()}
            how = library.checkpoint_utils.construct_restore_args(wanted)
            flat = reader.restore(where, args=library.args.PyTreeRestore(item=wanted, restore_args=how))
    except CheckpointError:
        raise
    except Exception as error:  # which errors the library raises depends on its version and on the file
        raise CheckpointError(f"{where} cannot be read ({type(error).__name__}: {str(error)[:500]})") from error
    return nest({path: _filled(path, leaf, flat) for path, leaf in leaves.items()})


def _computed_in(leaf: Struct | QTensor, dtype: str | None) -> Struct | QTensor:
    if dtype is None or leaf.ndim < 2:
        return leaf
    return leaf.astype(dtype) if isinstance(leaf, QTensor) else Struct(leaf.shape, jnp.dtype(dtype))


def _placed(path: str, struct: Struct, sharding: Sharding | None) -> Struct:
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    where = sharding if isinstance(sharding, jax.sharding.Sharding) else sharding(path, struct)
    return Struct(struct.shape, struct.dtype, sharding=where)


def _filled(path: str, leaf: Struct | QTensor, flat: dict[str, jax.Array]) -> jax.Array | QTensor:
    if not isinstance(leaf, QTensor):
        return flat[path]
    return replace(leaf, **{name: flat[f"{path}.{name}"] for name in leaf.parts()})


def _check_stored(stored: Any, saved: Saved, where: pathlib.Path) -> None:
    """CheckpointError unless the arrays on disk are those described, and the disk holds enough to be them."""
    wanted = {path: (tuple(s.shape), np.dtype(s.dtype)) for path, s in _flat(saved.leaves).items()}
    found = {path: (tuple(m.shape), np.dtype(m.dtype)) for path, m in dict(stored).items()}
    if wrong := sorted(path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path)):
        raise CheckpointError(
            f"{where} should hold {wrong[0]} as {wanted.get(wrong[0])}, and has {found.get(wrong[0])} "
            f"({len(wrong)} such differences); save the model again"
        )
    described = sum(nbytes(leaf) for leaf in saved.leaves.values())
    on_disk = sum(file.stat().st_size for file in where.rglob("*") if file.is_file())
    if described > COMPRESSION * on_disk + SPARE:
        raise CheckpointError(f"{where} has {on_disk} bytes, which cannot be the {described} it describes")


def _orbax() -> Any:
    try:
        import orbax.checkpoint as library
    except ImportError as error:
        raise MissingExtraError(
            "saving and loading in the Orbax format needs orbax-checkpoint: pip install 'jaxllm[orbax]'"
        ) from error
    return library
