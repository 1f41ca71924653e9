"""A headless Chromium, driven over a pipe (chromedevtools.github.io/devtools-protocol)."""

from __future__ import annotations

import base64
import itertools
import json
import os
import pathlib
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# WebGPU without a GPU: SwiftShader computes it on the CPU.
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan",
    "--no-first-run",
    "--disable-background-networking",
    "--remote-debugging-pipe",
)
# Chromium reads what it is told from 3 and writes what it says to 4.
MOVED = """
import fcntl, os, sys
taken, given = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3])
os.closerange(3, 10)
os.dup2(taken, 3)
os.dup2(given, 4)
os.closerange(5, max(taken, given) + 1)
os.execvp(sys.argv[3], sys.argv[3:])
"""
ENTER = dict(key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")


def found() -> str | None:
    """Where a Chromium is."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """A browser with one page."""

    def __init__(self, width: int = 1280, height: int = 800, patience: float = 120):
        self.patience, self._ids, self._events, self._read = patience, itertools.count(1), [], b""
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        taken, self._out = os.pipe()
        self._in, given = os.pipe()
        command = [found(), *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        shell = [sys.executable, "-c", MOVED, str(taken), str(given), *command]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        self._process = subprocess.Popen(shell, pass_fds=(taken, given), start_new_session=True, **quiet)
        os.close(taken)
        os.close(given)
        self._session = None
        try:
            self._begin(width, height)
        except BaseException:
            self.__exit__()
            raise

    def _begin(self, width: int, height: int) -> None:
        pages = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = attached["sessionId"]
        self.call("Page.enable")
        self.call("Runtime.enable")
        self.call("Network.enable")
        self.size(width, height)

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *error: Any) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a method of the protocol."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._events.append(answer)

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + self.patience
        while b"\0" not in self._read:
            if not select.select([self._in], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer")
            part = os.read(self._in, 2**20)
            if not part:
                raise RuntimeError("Chromium is gone")
            self._read += part
        line, _, self._read = self._read.partition(b"\0")
        return json.loads(line)

    def events(self, method: str) -> list[dict[str, Any]]:
        """Parameters of what was told so far."""
        return [event["params"] for event in self._events if event.get("method") == method]

    def size(self, width: int, height: int, *, phone: bool = False, dark: bool = False) -> None:
        """The window, in CSS pixels."""
        metrics = dict(width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone)
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = dict(name="prefers-color-scheme", value="dark" if dark else "light")
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        """Go to an address."""
        self.call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description"))
        return answer["result"].get("value")

    def wait(self, expression: str, stop: str = "false") -> Any:
        """Until an expression is true. Raises RuntimeError where `stop` is first, with what it says."""
        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            if value := self.evaluate(expression):
                return value
            if reason := self.evaluate(stop):
                raise RuntimeError(str(reason))
            time.sleep(0.1)
        raise TimeoutError(f"{expression} did not come true")

    def type(self, text: str) -> None:
        """Into what has the focus, as a keyboard would."""
        self.call("Input.insertText", text=text)

    def enter(self) -> None:
        """Press the key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **ENTER)

    def picture(self, path: pathlib.Path) -> None:
        """Write what is seen as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
