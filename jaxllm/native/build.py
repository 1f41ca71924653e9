"""Compile the native kernels: `python -m jaxllm.native.build`. Needs a C++17 compiler, nothing else.

`pip install` does the same where it finds a compiler. Two kinds are for tests: with --sanitize the library checks
every memory access and every undefined operation, with --soft-tiles the kernels of AMX run on any processor with
AVX-512 and BF16, their tiles in software. They go to a file of their own (--to), and JAXLLM_NATIVE_LIBRARY names
it; tools/check_kernels.sh runs the kernels' tests on one that is both.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
NAME = "_kernels.so"  # beside this file
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]
SANITIZE += ["-include", str(HERE / "checked.h")]
SOFT_TILES = ["-DJAXLLM_SOFT_TILES"]
LEVELS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-mavx2",
        "-mfma",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx512bf16",
        "-mavx512vnni",
    ],
}
LEVELS["amx"] = [*LEVELS["avx512"], "-mamx-tile", "-mamx-bf16", "-mamx-int8"]


def units(machine: str) -> list[tuple[pathlib.Path, str, list[str]]]:
    """What is compiled for a kind of processor: (source, level or "" for the common part, flags)."""
    x86 = machine in ("x86_64", "AMD64")
    found = []
    for source in sorted(HERE.glob("*.cc")):
        if source.stem.endswith("_simd"):  # one source, a namespace for each level
            found.append((source, "portable", []))
            found += [(source, level, LEVELS[level]) for level in ("avx2", "avx512") if x86]
        elif source.stem.endswith("_amx"):
            found += [(source, "amx", LEVELS["amx"])] if x86 else []
        else:
            found.append((source, "", []))
    return found


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX, or the first of c++, g++ and clang++ that is there.

    Raises RuntimeError where there is none.
    """
    if given := os.environ.get("CXX"):
        return shlex.split(given)
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise RuntimeError("no C++ compiler was found (c++, g++ or clang++); install one, or name it in $CXX")


def build(target: pathlib.Path = HERE / NAME, *, sanitize: bool = False, soft_tiles: bool = False) -> pathlib.Path:
    """Compile everything into one shared library at `target` and return it.

    Raises RuntimeError with the compiler's words where it fails.
    """
    command = [*compiler(), *FLAGS, *(SANITIZE if sanitize else []), *(SOFT_TILES if soft_tiles else [])]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = []
            for source, level, flags in units(platform.machine()):
                objects.append(f"{folder}/{source.stem}-{level}.o")
                define = [f"-DJAXLLM_LEVEL={level}"] if level else []
                include = [f"-I{HERE}", "-isystem", str(HERE / "third_party")]
                jobs.append([*command, *flags, *define, *include, "-c", str(source), "-o", objects[-1]])
            list(pool.map(_run, jobs))
        fresh = f"{folder}/{NAME}"
        _run([*command, "-shared", *objects, "-o", fresh, "-pthread"])
        # Put in place in one step: a process that has the old file open keeps it.
        beside = target.with_suffix(f".{os.getpid()}")
        shutil.copy(fresh, beside)
        os.replace(beside, target)
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the compiler failed:\n{shlex.join(command)}\n{done.stderr.strip()}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m jaxllm.native.build", description="Compile the kernels.")
    parser.add_argument("--sanitize", action="store_true", help="with address and undefined-behaviour checks")
    parser.add_argument("--soft-tiles", action="store_true", help="AMX in software, for tests without it")
    parser.add_argument("--to", type=pathlib.Path, metavar="FILE", help="where to (default: beside the sources)")
    args = parser.parse_args()
    if args.to is None and (args.sanitize or args.soft_tiles):
        parser.error("--sanitize and --soft-tiles make a library for tests; say where it goes with --to FILE")
    try:
        made = build(args.to or HERE / NAME, sanitize=args.sanitize, soft_tiles=args.soft_tiles)
        print(f"built {made}")
    except RuntimeError as error:
        print(f"not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
