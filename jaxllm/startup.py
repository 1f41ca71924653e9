"""What a start costs: `python -m jaxllm.startup MODEL` makes a first token and prints where the time went.

One JSON object: seconds (wall clock) from the start of the process to the first token, and of each part of them;
`cpu_s` of the whole process, `programs` compiled or found, and how many of them were `found` in the cache.
"""

from __future__ import annotations

import time

_BEGAN = time.time()

import argparse  # noqa: E402  the clock comes first
import json  # noqa: E402
import os  # noqa: E402
import pathlib  # noqa: E402
import sys  # noqa: E402
from collections import Counter  # noqa: E402

COMPILE = "/jax/core/compile/backend_compile_duration"  # looking into the cache included
EVENTS = {"trace_s": "/jax/core/compile/jaxpr_trace_duration", "compile_s": COMPILE}
EVENTS |= {"lower_s": "/jax/core/compile/jaxpr_to_mlir_module_duration"}
FOUND = "/jax/compilation_cache/cache_hits"


def process_began() -> float:
    """When this process was started, in seconds since 1970; this module, where the system does not say."""
    try:
        ticks = int(pathlib.Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        up = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return time.time() - up
    except (OSError, AttributeError, ValueError, IndexError):
        return _BEGAN


def peak_rss() -> int | None:
    """The most bytes of memory this process has held; None where the system does not say."""
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class Listener:
    """Adds up what JAX reports about its compilations from now on."""

    def __init__(self) -> None:
        import jax

        self.seconds: Counter[str] = Counter()
        self.count: Counter[str] = Counter()
        jax.monitoring.register_event_duration_secs_listener(self._duration)
        jax.monitoring.register_event_listener(self._event)

    def _duration(self, name: str, seconds: float, **more: object) -> None:
        self.seconds[name] += seconds
        self.count[name] += 1

    def _event(self, name: str, **more: object) -> None:
        self.count[name] += 1


def measure(model: str | None, prompt: int) -> dict[str, float]:
    """Load a model (as `jaxllm.load` takes it) and continue `prompt` tokens by one: the object printed.

    Raises as `load` and `generate` do."""
    began = process_began()
    heard = Listener()
    import jaxllm
    from jaxllm import decode
    from jaxllm.programs import keep_programs

    keep_programs()
    imported = time.time()
    loaded_model = jaxllm.load(model)
    loaded = time.time()
    ids = [1 + i * 7 % (loaded_model.config.vocab - 1) for i in range(prompt)]
    next(decode.stream(loaded_model, ids, max_new_tokens=2, eos=()))
    done = time.time()
    parts = {name: heard.seconds[event] for name, event in EVENTS.items()}
    parts["run_s"] = done - loaded - sum(parts.values())
    times = {"ttft_s": done - began, "import_s": imported - began, "load_s": loaded - imported} | parts
    counts = {"programs": heard.count[COMPILE], "found": heard.count[FOUND]}
    return times | {"cpu_s": time.process_time()} | counts | {"peak_rss": peak_rss()}


def main(argv: list[str] | None = None) -> int:
    """The command line; errors are one sentence on stderr and exit code 1."""
    from jaxllm.errors import JaxllmError

    parser = argparse.ArgumentParser(prog="python -m jaxllm.startup", description="What one start costs.")
    parser.add_argument("model", nargs="?", help="checkpoint folder or hub id (default: bundled)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens before the first (default: 32)")
    args = parser.parse_args(argv)
    try:
        print(json.dumps(measure(args.model, args.prompt)))
    except JaxllmError as error:
        print(f"jaxllm: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
