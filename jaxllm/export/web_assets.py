"""What a page needs of others: ONNX Runtime for browsers, a tokenizer and a template engine, from npm's registry.

They are fetched once, when a page is made, by version, and held against the registry's own checksum. Without a
network JAXLLM_WEB_ASSETS names a folder with the same archives, as `npm pack` writes them.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import pathlib
import tarfile
import urllib.error
import urllib.request
from dataclasses import dataclass

from jaxllm.errors import MissingExtraError
from jaxllm.files import write_whole
from jaxllm.progress import progress

FOLDER = "JAXLLM_WEB_ASSETS"
REGISTRY = "https://registry.npmjs.org"  # NPM_CONFIG_REGISTRY says another, as for npm
LICENSE = "package/LICENSE"
LIMIT = 120  # seconds that the registry may be silent


@dataclass(frozen=True)
class Package:
    """An archive of npm's."""

    name: str
    version: str
    sha512: str  # base64, as package-lock.json has it
    license: str

    @property
    def archive(self) -> str:
        """As `npm pack` names it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


ORT = Package(
    "onnxruntime-web",
    "1.30.0",
    "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
    "MIT",
)
TOKENIZERS = Package(
    "@huggingface/tokenizers",
    "0.2.0",
    "LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
    "Apache-2.0",
)
JINJA = Package(
    "@huggingface/jinja",
    "0.5.11",
    "YzEzwM5oQf4r0vs7ifWQ+yuVR1YkAHrjERQ+a8WRsStHHp4NRBg+NesjiFc+X2AFUpRvvrIeHDS1xFy9jY/IjQ==",
    "MIT",
)
PACKAGES = (ORT, TOKENIZERS, JINJA)
# What a page is served -> where it lies
WANTED = {
    "ort.webgpu.bundle.min.mjs": (ORT, "dist/ort.webgpu.bundle.min.mjs"),
    "ort-wasm-simd-threaded.asyncify.wasm": (ORT, "dist/ort-wasm-simd-threaded.asyncify.wasm"),
    "ort.wasm.bundle.min.mjs": (ORT, "dist/ort.wasm.bundle.min.mjs"),
    "ort-wasm-simd-threaded.wasm": (ORT, "dist/ort-wasm-simd-threaded.wasm"),
    "tokenizers.min.mjs": (TOKENIZERS, "dist/tokenizers.min.mjs"),
    "jinja.js": (JINJA, "dist/index.js"),
}


def versions() -> dict[str, str]:
    """Of every package."""
    return {package.name: package.version for package in PACKAGES}


def files() -> dict[str, bytes]:
    """Name -> contents of everything in WANTED, and of "licenses.txt".

    Raises MissingExtraError where an archive is not to be had, or is not the one that was pinned."""
    with progress("packages of the page", len(PACKAGES)) as advance:
        found, texts = {}, []
        for package in PACKAGES:
            wanted = {f"package/{path}": name for name, (own, path) in WANTED.items() if own == package}
            held = _opened(_archive(package), {*wanted, LICENSE})
            found |= {name: held[path] for path, name in wanted.items()}
            text = held.get(LICENSE, b"").decode()
            texts.append(f"{package.name} {package.version}: {package.license}\n\n{text}")
            advance()
    return found | {"licenses.txt": "\n\n".join(texts).encode()}


def _opened(data: bytes, wanted: set[str]) -> dict[str, bytes]:
    """Those of an archive's files that are wanted and there."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        return {m.name: archive.extractfile(m).read() for m in archive if m.isfile() and m.name in wanted}


def _archive(package: Package) -> bytes:
    given = os.environ.get(FOLDER)
    path = pathlib.Path(given, package.archive) if given else _cache() / package.archive
    if path.is_file():
        data = path.read_bytes()
        if _is(package, data):
            return data
        if given:
            raise MissingExtraError(
                f"{path} is not {package.name} {package.version}: its checksum differs; "
                f"make it again with npm pack {package.name}@{package.version}"
            )
    elif given:
        raise MissingExtraError(
            f"{FOLDER} has no {package.archive}; make it with npm pack {package.name}@{package.version}"
        )
    return _fetched(package, path)


def _fetched(package: Package, path: pathlib.Path) -> bytes:
    registry = os.environ.get("NPM_CONFIG_REGISTRY", REGISTRY).rstrip("/")
    url = f"{registry}/{package.name}/-/{package.name.rpartition('/')[2]}-{package.version}.tgz"
    try:
        with urllib.request.urlopen(url, timeout=LIMIT) as answer:
            data = answer.read()
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise MissingExtraError(
            f"the page needs {package.name} {package.version}, and {url} cannot be read ({error}); where there is "
            f"no network, set {FOLDER} to a folder with {package.archive}, as "
            f"npm pack {package.name}@{package.version} makes it"
        ) from error
    if not _is(package, data):
        raise MissingExtraError(f"{url} is not the {package.name} {package.version} that was pinned; try again")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data)
    return data


def _is(package: Package, data: bytes) -> bool:
    return base64.b64encode(hashlib.sha512(data).digest()).decode() == package.sha512


def _cache() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxllm" / "web"
