"""An exported IREE program in another Python, one for another processor under an emulator, say.

`python iree_remote.py LOADER FOLDER MANIFEST` imports nothing of jaxllm. Messages are numpy's .npz archives with
their length before them: asked for {"program", inputs...} it gives the results; {} empties the state.
"""

from __future__ import annotations

import importlib.util
import io
import pathlib
import platform
import subprocess
import sys
import weakref
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

PROGRAM = "program"  # key of its name among the arrays of a message


class Remote:
    """The `Artifact` of run_iree.py, in a process that `command` starts: an interpreter with IREE's runtime."""

    def __init__(self, command: Sequence[str], folder: pathlib.Path, manifest: str):
        arguments = [__file__, str(folder / "run_iree.py"), str(folder), manifest]
        self._command, pipe = " ".join(command), subprocess.PIPE
        self._process = subprocess.Popen([*command, *arguments], stdin=pipe, stdout=pipe)
        self.close = weakref.finalize(self, self._process.communicate)  # it ends with its input
        self.where = str(self._heard()["where"])

    def reset(self) -> None:
        """Forget every token."""
        self._asked({})

    def step(self, program: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Results of "prefill" or "decode"."""
        return self._asked({PROGRAM: np.array(program), **inputs})

    def _asked(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        _send(self._process.stdin, arrays)
        return self._heard()

    def _heard(self) -> dict[str, np.ndarray]:
        if (found := _received(self._process.stdout)) is None:
            from jaxllm.errors import CheckpointError

            self.close()
            raise CheckpointError(
                f"{self._command} cannot run the program; it should start a Python with iree.runtime"
            )
        return found


def _send(stream: BinaryIO, arrays: dict[str, np.ndarray]) -> None:
    data = io.BytesIO()
    np.savez(data, **arrays)
    stream.write(len(data.getvalue()).to_bytes(8, "little") + data.getvalue())
    stream.flush()


def _received(stream: BinaryIO) -> dict[str, np.ndarray] | None:
    """None at the end of the stream."""
    if not (size := stream.read(8)):
        return None
    with np.load(io.BytesIO(stream.read(int.from_bytes(size, "little"))), allow_pickle=False) as found:
        return dict(found)


def serve(artifact: Any, asked: BinaryIO, answers: BinaryIO) -> None:
    """Answer until there are no more questions."""
    _send(answers, {"where": np.array(f"{artifact.where} of {platform.machine()}")})
    while (arrays := _received(asked)) is not None:
        if PROGRAM in arrays:
            _send(answers, artifact.step(str(arrays.pop(PROGRAM)), arrays))
        else:
            artifact.reset()
            _send(answers, {})


def main(loader: str, folder: str, manifest: str) -> None:
    """Serve an artifact on the standard streams."""
    spec = importlib.util.spec_from_file_location("run_iree", loader)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    serve(module.Artifact(folder, manifest), sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main(*sys.argv[1:])
