"""The command line: a thin layer over the functions of the same names. See `jaxllm --help`.

Exit codes: 0 done, 1 an error in the input (one sentence on stderr), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from jaxllm import __version__
from jaxllm.commands import (
    bench,
    chat,
    compare,
    export,
    generate,
    info,
    logits,
    quantize,
    score,
    train_heads,
    tune,
    warm,
)
from jaxllm.commands.common import formatter
from jaxllm.errors import JaxllmError
from jaxllm.programs import keep_programs

COMMANDS = {
    "generate": generate,
    "chat": chat,
    "score": score,
    "logits": logits,
    "info": info,
    "compare": compare,
    "quantize": quantize,
    "export": export,
    "bench": bench,
    "warm": warm,
    "tune": tune,
    "train-heads": train_heads,
}


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; parsed arguments carry `run`, the command, and `fail`, its usage error."""
    top = argparse.ArgumentParser(
        prog="jaxllm",
        usage="jaxllm COMMAND ...",
        description="Large language models in JAX. Without --model, a small bundled one.",
        epilog="jaxllm COMMAND --help says what a command takes.",
        formatter_class=formatter,
        allow_abbrev=False,
        add_help=False,
    )
    # Whoever reads this line in the help has found it.
    top.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    top.add_argument("--version", action="version", version=f"jaxllm {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", prog="jaxllm", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            usage=f"jaxllm {name} {module.USAGE}",
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            formatter_class=formatter,
            allow_abbrev=False,
            add_help=False,
        )
        command.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
        module.arguments(command)
        command.set_defaults(run=module.run, fail=command.error)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; wrong usage raises SystemExit(2) as argparse does."""
    args = parser().parse_args(argv)
    keep_programs()
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough
        _discard_output()
    except JaxllmError as error:
        print(f"jaxllm: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def _discard_output() -> None:
    """Let the interpreter's last flush go nowhere instead of failing again."""
    with contextlib.suppress(OSError, ValueError):  # a stdout that is no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
