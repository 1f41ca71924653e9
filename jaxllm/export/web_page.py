"""The page of a web export: one file with everything in it for a small model, a folder for a large one."""

from __future__ import annotations

import base64
import gzip
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.export import shipped, web_assets
from jaxllm.export.manifest import TEMPLATE, formats_of
from jaxllm.export.program import Program
from jaxllm.export.target import Job

SOURCE = pathlib.Path(shipped.__file__).with_name("web")
WHOLE = 64 * 2**20  # bytes of models up to which they are part of the page, which then opens from a disk
PAGE = "page.json"
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


def write(job: Job, program: Program, prefix: str, models: Mapping[str, Sequence[str]]) -> None:
    """Write index.html and what it needs into job.folder.

    program: whose ports say what the state is; prefix: of its outputs' names; models: engine ("webgpu", "wasm") ->
    the model's file and those of its tensors, which are there already. Raises MissingExtraError where packages of
    npm's are not to be had."""
    assets = web_assets.files()
    needed = {name for names in models.values() for name in names}
    whole = sum((job.folder / name).stat().st_size for name in needed) <= WHOLE
    page = described(job, program, prefix, models, whole)
    if whole:
        (job.folder / "index.html").write_text(_single(job.folder, page, assets, needed), encoding="utf-8")
    else:
        _folder(job.folder, page, assets)
    shutil.copyfile(SOURCE / "serve.py", job.folder / "serve.py")
    (job.folder / "licenses.txt").write_bytes(assets["licenses.txt"])


def described(job: Job, program: Program, prefix: str, models: Mapping, whole: bool) -> dict[str, Any]:
    """page.json: what the page knows of its model."""
    model, folder, options = job.model, job.folder, job.options
    formats = sorted({f.name for f in formats_of(model).values()}) or [model.config.dtype]
    tokenizer = model.tokenizer
    template = folder / TEMPLATE
    sampling = ("temperature", "top_k", "top_p", "min_p")
    sampler = {k: v for k, v in model.defaults.items() if k in sampling and v is not None}
    sampler |= {"temperature": 0} if model.defaults.get("do_sample") is False else {}
    engines = {engine: _engine(engine, names, whole) for engine, names in models.items()}
    needed = sorted({name for names in models.values() for name in names})
    inline = needed + sorted({e[k] for e in engines.values() for k in ("runtime", "wasm")}) if whole else []
    return {
        "name": model.name or "model",
        "weights": model.size,
        "format": ", ".join(formats),
        "context": options.context,
        "window": options.window,
        "chunk": options.chunk,
        "state": [
            {"name": p.name, "shape": list(p.shape), "dtype": p.dtype, "initial": p.initial}
            for p in program.inputs
            if p.role == "state"
        ],
        "prefix": prefix,
        "engines": engines,
        "files": {name: (folder / name).stat().st_size for name in needed},
        "inline": inline,
        "tokenizer": tokenizer is not None,
        "begin": _begin(tokenizer),
        "template": template.read_text(encoding="utf-8") if template.is_file() else None,
        "special": _special(folder),
        "eos": sorted(model.eos_ids),
        "sampler": sampler,
    }


def _engine(engine: str, names: Sequence[str], whole: bool) -> dict[str, Any]:
    """A page of one file has one runtime for both."""
    gpu = whole or engine == "webgpu"
    runtime, wasm = (
        ("ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm")
        if gpu
        else ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
    )
    return {"runtime": runtime, "wasm": wasm, "model": names[0], "weights": list(names[1:])}


def _begin(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text."""
    if tokenizer is None:
        return []
    text = "a"
    with_special, plain = tokenizer.encode(text), tokenizer.encode(text, add_special=False)
    at = next((i for i in range(len(with_special)) if with_special[i : i + len(plain)] == plain), 0)
    return with_special[:at]


def _special(folder: pathlib.Path) -> dict[str, str]:
    """The special tokens that a chat template may name."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = {name: config.get(name) for name in SPECIAL}
    found = {name: token["content"] if isinstance(token, dict) else token for name, token in found.items()}
    return {name: token for name, token in found.items() if isinstance(token, str)}


# ---- a folder -------------------------------------------------------------------------------------------


def _folder(folder: pathlib.Path, page: Mapping[str, Any], assets: Mapping[str, bytes]) -> None:
    for name in web_assets.WANTED:
        (folder / name).write_bytes(assets[name])
    for name in ("page.css", "page.js", "engine.js"):
        shutil.copyfile(SOURCE / name, folder / name)
    (folder / PAGE).write_text(json.dumps(page, ensure_ascii=False), encoding="utf-8")
    style, script = '<link rel="stylesheet" href="page.css">', '<script type="module" src="page.js"></script>'
    (folder / "index.html").write_text(_filled(style, "", script), encoding="utf-8")


def _filled(style: str, files: str, script: str) -> str:
    html = (SOURCE / "index.html").read_text(encoding="utf-8")
    for mark, text in (("style", style), ("files", files), ("script", script)):
        html = html.replace(f"<!-- {mark} -->", text, 1)
    return html


# ---- a file ---------------------------------------------------------------------------------------------


def _single(folder: pathlib.Path, page: Mapping[str, Any], assets: Mapping[str, bytes], needed: set[str]) -> str:
    held = {name: (folder / name).read_bytes() for name in sorted(needed)}
    held |= {name: assets[name] for name in page["inline"] if name in assets}
    held |= {"engine.js": (SOURCE / "engine.js").read_bytes(), PAGE: json.dumps(page).encode()}
    if page["tokenizer"]:
        held |= {name: assets[name] for name in ("tokenizers.min.mjs", "jinja.js")}
        held |= {name: (folder / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    style = f"<style>\n{(SOURCE / 'page.css').read_text(encoding='utf-8')}</style>"
    script = f'<script type="module">\n{(SOURCE / "page.js").read_text(encoding="utf-8")}</script>'
    elements = [_element(name, data, name not in page["files"]) for name, data in held.items()]
    return _filled(style, "\n".join(elements), script)


def _element(name: str, data: bytes, pack: bool) -> str:
    """A file as an element that no browser runs; numbers of models are not worth packing."""
    kind, data = (' data-packed="gzip"', gzip.compress(data, mtime=0)) if pack else ("", data)
    return f'<script type="text/plain" id="file:{name}"{kind}>{base64.b64encode(data).decode()}</script>'
