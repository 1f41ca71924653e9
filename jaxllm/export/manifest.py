"""manifest.json: what an exported directory is, and whether its files are those it was verified with."""

from __future__ import annotations

import datetime
import hashlib
import json
import pathlib
from typing import Any

from jaxllm import __version__, config_json
from jaxllm.checkpoint.canonical import flatten
from jaxllm.errors import CheckpointError
from jaxllm.export.options import SIZES
from jaxllm.export.program import symbols
from jaxllm.export.schema import problems, schema
from jaxllm.export.target import Built, Formats, Job, Target
from jaxllm.files import read_object
from jaxllm.quant import QTensor
from jaxllm.quant.describe import head
from jaxllm.quant.formats import as_json

NAME = "manifest.json"
UNVERIFIED = "manifest.unverified.json"  # what it is called until the artifact has been run
TEMPLATE = "chat_template.jinja"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def now() -> str:
    """The time, in UTC, as ISO 8601 has it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def described(target: Target, job: Job, built: Built) -> dict[str, Any]:
    """The manifest of what was built, its files included, without the verification."""
    model, options = job.model, job.options
    return {
        "format": "jaxllm-export",
        "version": 1,
        "created": now(),
        "name": model.name,
        "target": {
            "name": target.name,
            "platform": options.platform,
            "versions": {"jaxllm": __version__} | dict(built.versions),
            "limits": dict(built.limits),
        },
        "model": {
            "config": config_json.to_json(model.config),
            "values": dict(model.values),
            "weights": model.size,
        },
        "recipe": _recipe(model),
        "tokenizer": _tokenizer(model, job.folder),
        "sampler": {"place": options.sampler, "penalties": options.penalties, "defaults": dict(model.defaults)},
        **{name: getattr(options, name) for name in SIZES},
        **({"symbols": symbols(options)} if options.symbolic else {}),
        "parameters": list(built.parameters),
        "programs": {
            program.name: {
                "files": dict(built.files[program.name]),
                "inputs": [port.as_json() for port in program.inputs],
                "outputs": [port.as_json() for port in program.outputs],
            }
            for program in built.programs
        },
        "files": {str(path.relative_to(job.folder)): _entry(path) for path in _files(job.folder)},
    }


def formats_of(model) -> Formats:
    """Path -> format of every packed parameter."""
    return {path: leaf.format for path, leaf in flatten(model.params).items() if isinstance(leaf, QTensor)}


def _recipe(model) -> dict[str, Any]:
    """As the quantization_config of jaxllm's own folders has it."""
    formats, tensors = {}, {}
    for path, leaf in flatten(model.params).items():
        if isinstance(leaf, QTensor):
            key = leaf.format.name
            while formats.setdefault(key, as_json(leaf.format)) != as_json(leaf.format):
                key += "'"
            tensors[path] = head(leaf, key)
    return {"dtype": model.config.dtype, "formats": formats, "tensors": tensors}


def write_tokenizer(model, folder: pathlib.Path) -> None:
    """tokenizer.json, tokenizer_config.json and, where there is one, the chat template by itself."""
    if model.tokenizer is None:
        return
    files = model.tokenizer.files()
    template = model.tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if template is not None:
        files |= {TEMPLATE: template.encode()}
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _tokenizer(model, folder: pathlib.Path) -> dict[str, Any] | None:
    if model.tokenizer is None:
        return None
    return {
        "files": [name for name in TOKENIZER if (folder / name).is_file()],
        "template": TEMPLATE if (folder / TEMPLATE).is_file() else None,
        "bos_id": model.tokenizer.bos_id,
        "eos_ids": sorted(model.eos_ids),
    }


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (NAME, UNVERIFIED))


def _entry(path: pathlib.Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def write(folder: pathlib.Path, manifest: dict[str, Any], name: str = NAME) -> None:
    """As JSON; numbers are finite."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / name).write_text(text + "\n", encoding="utf-8")


def opened(folder: pathlib.Path, name: str = NAME) -> dict[str, Any]:
    """The manifest of a directory, once every file is found to be the one it describes.

    Raises CheckpointError, with everything wrong, for a directory that is no finished export, a manifest that does
    not follow its schema, and files that are missing, of another size or of other contents."""
    manifest = read_object(
        folder / name,
        CheckpointError,
        "export it again",
        missing=f"{folder} has no {name}: it is no finished export",
    )
    rule = schema()
    if name == UNVERIFIED:
        rule = rule | {"required": [field for field in rule["required"] if field != "verification"]}
    found = list(problems(manifest, rule)) or [
        wrong for file, entry in manifest["files"].items() if (wrong := _differs(folder / file, entry))
    ]
    if not found:
        found = _unlisted(manifest)
    if found:
        raise CheckpointError("\n  ".join([f"{folder} is not what was exported; export it again:", *found[:20]]))
    return manifest


def _differs(path: pathlib.Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
    return None if _entry(path) == entry else f"{path.name} has other contents than when it was verified"


def _unlisted(manifest: dict[str, Any]) -> list[str]:
    """Files that some part of the manifest names and the list does not have."""
    tokenizer = manifest["tokenizer"] or {"files": [], "template": None}
    used = [*manifest["parameters"], *tokenizer["files"], *filter(None, [tokenizer["template"]])]
    used += [file for program in manifest["programs"].values() for file in program["files"].values()]
    return [f"{file} is not among the manifest's files" for file in used if file not in manifest["files"]]
