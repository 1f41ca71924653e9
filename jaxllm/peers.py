"""Other engines on the same work: each in an environment of its own, a process of its own, never imported here.

The scripts lie in benchmarks/peers of the source checkout. An environment variable names the Python that has the
engine; benchmarks/peers/README.md says how such an environment and the engine's model files are made.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxllm.errors import JaxllmError

SCRIPTS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "peers"


@dataclass(frozen=True)
class Peer:
    """How another engine is started."""

    script: str
    python: str  # environment variable: the Python that has it
    install: str  # what to install there


PEERS = {
    "llama.cpp": Peer("run_llama_cpp.py", "JAXLLM_PEER_LLAMA_CPP", "llama-cpp-python"),
    "openvino": Peer("run_openvino.py", "JAXLLM_PEER_OPENVINO", "openvino-genai"),
    "onnxruntime": Peer("run_onnxruntime.py", "JAXLLM_PEER_ONNXRUNTIME", "onnxruntime-genai"),
    "transformers": Peer("run_transformers.py", "JAXLLM_PEER_TRANSFORMERS", "torch transformers"),
    "transformers-compile": Peer("run_transformers.py", "JAXLLM_PEER_TRANSFORMERS", "torch transformers"),
}


def find(given: str) -> tuple[str, Callable[..., dict[str, Any]]]:
    """NAME=MODEL -> (name, a function that measures that peer with that model once).

    The function takes prompt, new and batch, and gives the object that the script prints. Raises JaxllmError
    for an unknown name, without a model, and where the engine is not installed."""
    name, _, model = given.partition("=")
    if name not in PEERS:
        raise JaxllmError(f"there is no peer {name[:80]!r}; there are {', '.join(PEERS)}")
    if not model:
        raise JaxllmError(f"name {name}'s own model files too: {name}=PATH; see benchmarks/peers/README.md")
    if not pathlib.Path(model).exists():
        raise JaxllmError(f"there is no {model} for {name}; benchmarks/peers/README.md says how it is made")
    return name, partial(_run, name, _python(name), model)


def _python(name: str) -> str:
    """The Python that has the peer."""
    peer = PEERS[name]
    python = os.environ.get(peer.python, "")
    if not (SCRIPTS / peer.script).is_file():
        raise JaxllmError(f"the peers' scripts are not at {SCRIPTS}; run jaxllm from its source checkout")
    if not python or not pathlib.Path(python).is_file():
        found = f"{python!r} is no file" if python else "is not set"
        raise JaxllmError(
            f"{name} is not installed where jaxllm may look for it ({peer.python} {found}): make an environment "
            f"of its own (python -m venv ENV; ENV/bin/pip install {peer.install}) and set "
            f"{peer.python}=ENV/bin/python"
        )
    return python


def _run(name: str, python: str, model: str, *, prompt: int, new: int, batch: int) -> dict[str, Any]:
    command = [python, str(SCRIPTS / PEERS[name].script), "--model", model, "--engine", name]
    command += ["--prompt", str(prompt), "--new", str(new), "--batch", str(batch)]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        done.check_returncode()
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (subprocess.CalledProcessError, ValueError, IndexError):
        said = (done.stderr.strip() or done.stdout.strip())[-500:]
        raise JaxllmError(f"{name} could not be measured (exit code {done.returncode}): {said}") from None
