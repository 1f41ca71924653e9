"""A saved Core ML package, run operator by operator in numpy: what a machine that is no Mac can say of it.

Everything comes from the package's files; what each operator gives is held against the dtype and shape that the
package declares for it.
"""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.errors import CheckpointError
from jaxllm.export import mil_file
from jaxllm.export.mil_file import Block, Kind, Name, Operation
from jaxllm.export.mil_ops import OPERATORS

CONSTANT = ("const", "constexpr_blockwise_shift_scale")
CONTROL = ("while_loop", "cond", "read_state", "write_state")
Arrays = dict[str, np.ndarray]


class Package:
    """Functions of a package. Constants are expanded once."""

    def __init__(self, path: pathlib.Path):
        self.functions = mil_file.read(path)
        for name, f in self.functions.items():
            _check_names(name, f.block)
        unknown = {op.type for f in self.functions.values() for op in operations(f.block)}
        if unknown := unknown - OPERATORS.keys() - set(CONTROL):
            names = ", ".join(sorted(unknown))
            raise CheckpointError(f"{path.name} has operators that are not known here: {names}")
        self._expanded: dict[tuple[int, ...], np.ndarray] = {}

    def empty(self, function: str) -> Arrays:
        """The states of a function as Core ML makes them: zeros."""
        return {name: np.zeros(kind.shape, kind.dtype) for name, kind in self.functions[function].states.items()}

    def run(self, function: str, inputs: Mapping[str, np.ndarray], states: Arrays) -> tuple[Arrays, Arrays]:
        """(outputs by name, new states). Raises CheckpointError for arrays that are not the function's."""
        f = self.functions[function]
        for name, kind in (f.inputs | f.states).items():
            given = (states if name in f.states else inputs).get(name)
            if given is None or Kind(given.dtype.name, given.shape) != kind:
                raise CheckpointError(f"{function} takes {name} as {kind.dtype}{list(kind.shape)}, got {given}")
        run = _Run(dict(states), self._expanded)
        with np.errstate(all="ignore"):
            found = run.block(f.block, {name: np.asarray(inputs[name]) for name in f.inputs})
        return dict(zip(f.block.outputs, found, strict=True)), run.states


def operations(block: Block) -> list[Operation]:
    """All of a block and of those within."""
    return [each for op in block.operations for each in (op, *(x for b in op.blocks for x in operations(b)))]


def _check_names(function: str, block: Block) -> None:
    """Raise CheckpointError where two values of a function have one name, so that nobody knows which is meant."""
    names = Counter(name for op in operations(block) for name, _ in op.outputs)
    if twice := [name for name, count in names.items() if count > 1]:
        raise CheckpointError(f"{function} has several values called {twice[0]}; export it again")


class _Run:
    """One call of a function."""

    def __init__(self, states: Arrays, expanded: dict[tuple[int, ...], np.ndarray]):
        self.states = states
        self._expanded = expanded

    def block(self, block: Block, values: Arrays) -> list[np.ndarray]:
        """The outputs of a block in which `values` are known."""
        values = dict(values)
        for op in block.operations:
            found = self._operation(op, values)
            for (name, kind), x in zip(op.outputs, found, strict=True):
                values[name] = _declared(op, kind, x)
        return [values[name] for name in block.outputs]

    def _operation(self, op: Operation, values: Arrays) -> list[Any]:
        if op.type == "write_state":
            self.states[op.inputs["input"].name] = _read(op.inputs["data"], values)
            return []
        if op.type == "read_state":
            return [self.states[op.inputs["input"].name]]
        if op.type == "while_loop":
            return self._loop(op, values)
        if op.type == "cond":
            chosen = op.blocks[0 if _read(op.inputs["pred"], values) else 1]
            return self.block(chosen, values)
        if op.type in CONSTANT and op.stored:
            return [self._constant(op, values)]
        found = OPERATORS[op.type]({key: _read(x, values) for key, x in op.inputs.items()})
        return found if isinstance(found, list) else [found]

    def _constant(self, op: Operation, values: Arrays) -> np.ndarray:
        if op.stored not in self._expanded:
            self._expanded[op.stored] = OPERATORS[op.type]({k: _read(x, values) for k, x in op.inputs.items()})
        return self._expanded[op.stored]

    def _loop(self, op: Operation, values: Arrays) -> list[np.ndarray]:
        test, body = op.blocks
        now = op.inputs["loop_vars"]
        now = [_read(x, values) for x in (now if isinstance(now, tuple) else (now,))]
        while self.block(test, values | dict(zip(test.inputs, now, strict=True)))[0]:
            now = self.block(body, values | dict(zip(body.inputs, now, strict=True)))
        return now


def _read(x: Any, values: Arrays) -> Any:
    if isinstance(x, tuple):
        return [_read(each, values) for each in x]
    return values[x.name] if isinstance(x, Name) else x


def _declared(op: Operation, kind: Kind, x: Any) -> Any:
    if kind.dtype in ("string", "other"):
        return x
    if Kind(x.dtype.name, x.shape) != kind:
        raise CheckpointError(
            f"{op.type} is declared to give {kind.dtype}{list(kind.shape)} and gives {x.dtype}{list(x.shape)}"
        )
    return x
