"""What the live model says to some prompts, and how far an artifact is from it.

A row is a prompt and what follows it greedily; every step is given the live model's tokens, so that one difference
does not become many. N steps (the prompt's own result first), B rows, V vocabulary, C columns kept.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

import jaxllm
from jaxllm import layers
from jaxllm.decode import prefill
from jaxllm.errors import CheckpointError, JaxllmError
from jaxllm.export.manifest import now
from jaxllm.export.options import STEPS, Options
from jaxllm.model import Model
from jaxllm.prompts import padded

NAME = "reference.safetensors"
AGAIN = 4  # decoding steps after shorter prompts, which begin from nothing again
COLUMNS = 4096  # logits of a step that are kept for later
LONGEST = 1024  # tokens of a prompt that shows how a window evicts
TEXT = "def main(argv):\n    # The rain in Spain stays mainly in the plain.\n    return len(argv) * 34 + 408\n\n"


@dataclass(frozen=True)
class Round:
    """B prompts at once, from an empty state."""

    prompts: np.ndarray  # i32 [B, L], padded on the right
    lengths: np.ndarray  # i32 [B]
    tokens: np.ndarray  # i32 [N, B]  the live model's greedy ones
    scores: np.ndarray  # f32 [N, B, C]  its logits, or [N, B, 1] the log-probabilities of its tokens
    margin: np.ndarray  # f32 [N, B]  by how much the best logit is above the next


@dataclass(frozen=True)
class Reference:
    """The live model's side."""

    rounds: tuple[Round, ...]
    columns: np.ndarray  # i32 [C]  which logits `scores` are; [0] where they are log-probabilities
    largest: float  # magnitude of any of its logits
    allowed: float  # difference of a score


# ---- the live model -------------------------------------------------------------------------------------


def reference(model: Model, options: Options, allowed: float) -> Reference:
    """What the live model says, with the kernels that it has here.

    options: settled; allowed: difference of a score, over the largest logit."""
    rounds, largest = [], 0.0
    for steps, rows in zip((STEPS, AGAIN), _prompts(model, options), strict=True):
        logits = _greedy(model, rows, options, steps)
        largest = max(largest, float(np.abs(logits).max()))
        rounds.append(_round(rows, logits, options.sampler == "in-graph"))
    if not np.isfinite(largest):
        raise JaxllmError("the live model's logits are not finite, so that nothing can be held against them")
    columns = (
        np.zeros(1, np.int32) if options.sampler == "in-graph" else np.arange(model.config.vocab, dtype=np.int32)
    )
    return Reference(tuple(rounds), columns, largest, allowed * largest)


def _prompts(model: Model, options: Options) -> list[list[list[int]]]:
    """Rows of each round: some longer than a chunk, or than a window, and some shorter; no two of one length. The
    second round has a row more where their number is symbolic."""
    room = (options.context or options.window + LONGEST) - STEPS
    wanted = options.chunk + options.chunk // 2 + 1
    if options.window:
        wanted = max(wanted, min(options.window + 8, LONGEST))
    long, short = min(wanted, room), min(5, room)
    more = "batch" in options.symbolic
    return [
        [_text(model, row, max(1, length - 3 * row)) for row in range(rows)]
        for length, rows in ((long, options.batch), (short, options.batch + more))
    ]


def _text(model: Model, row: int, length: int) -> list[int]:
    ids = [1 + i * 7 % (model.config.vocab - 1) for i in range(model.config.vocab)]
    if model.tokenizer is not None:
        known = [t for t in model.tokenizer.encode(TEXT, add_special=False) if t < model.config.vocab]
        ids = known or ids
    start = (row * 5) % len(ids)
    return [ids[(start + i) % len(ids)] for i in range(length)]


@partial(jax.jit, static_argnums=0)
def _logits(config, params, x):
    return layers.logits(config, params, x)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(config, params, state, tokens):
    x, state, _ = layers.hidden(config, params, tokens[:, None], state)
    return layers.logits(config, params, x[:, 0]), state


def _greedy(model: Model, rows: list[list[int]], options: Options, steps: int) -> np.ndarray:
    """f32 [N, B, V]: logits after the prompts, and after each of `steps` greedy tokens."""
    state, last = prefill(model, rows, replace(options, batch=len(rows)).state(model.config))
    found = [_logits(model.config, model.params, last)]
    for _ in range(steps):
        token = np.argmax(np.asarray(found[-1]), -1).astype(np.int32)
        logits, state = _step(model.config, model.params, state, token)
        found.append(logits)
    return np.stack([np.asarray(x) for x in found])


def _round(rows: list[list[int]], logits: np.ndarray, in_graph: bool) -> Round:
    tokens = np.argmax(logits, -1).astype(np.int32)
    best = np.sort(logits, -1)[..., -2:]
    scores = logits
    if in_graph:
        chosen = np.take_along_axis(logits, tokens[..., None], -1)
        most = logits.max(-1, keepdims=True)
        scores = chosen - most - np.log(np.exp(logits - most).sum(-1, keepdims=True))
    lengths = np.array([len(row) for row in rows], np.int32)
    return Round(padded(rows, int(lengths.max())), lengths, tokens, scores, best[..., 1] - best[..., 0])


# ---- the artifact ---------------------------------------------------------------------------------------


def answers(folder: pathlib.Path, name: str, asked: Reference) -> tuple[list[Mapping[str, np.ndarray]], str, str]:
    """Run an artifact in a fresh process -> (results [N, B, ...] by name for each round, how it ran, by what).

    name: of its manifest. Raises CheckpointError with what the process said where it failed."""
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as between:
        questions, found = pathlib.Path(between, "questions"), pathlib.Path(between, "answers")
        write(questions, replace(asked, rounds=tuple(replace(r, scores=r.scores[..., :0]) for r in asked.rounds)))
        _fresh("jaxllm.export.replay", str(folder), name, str(questions), str(found))
        with safe_open(found, framework="np") as file:
            said = file.metadata()
            results = [{} for _ in asked.rounds]
            for key in file.keys():  # noqa: SIM118  it is no dict
                result, _, i = key.rpartition(".")
                results[int(i)][result] = file.get_tensor(key)
    return results, said["how"], said["where"]


def _fresh(module: str, *args: str) -> None:
    """Run a module of this jaxllm in a process of its own."""
    where = str(pathlib.Path(jaxllm.__file__).parent.parent)
    paths = os.pathsep.join(filter(None, [where, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", module, *args]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    if run.returncode:
        said = "\n".join(run.stderr.strip().splitlines()[-5:]) or f"exit code {run.returncode}"
        raise CheckpointError(f"the artifact cannot be run; the process that tried says:\n{said}")


def compared(
    asked: Reference, results: Sequence[Mapping[str, np.ndarray]], how: str, where: str
) -> dict[str, Any]:
    """The manifest's verification record of `answers`. Raises JaxllmError where they are not the live model's."""
    in_graph = "token" in results[0]
    difference, equal, near, total = 0.0, 0, 0, 0
    for r, found in zip(asked.rounds, results, strict=True):
        tokens = found["token"] if in_graph else np.argmax(found["logits"], -1)
        other = tokens != r.tokens
        scores = found["logprob"][..., None] if in_graph else found["logits"][..., asked.columns]
        # another token's log-probability is not compared with that of the live one: the token is counted
        away = np.where(other[..., None] & in_graph, 0, np.abs(scores - r.scores))
        difference = float(np.maximum(difference, away.max(initial=0)))  # NaN stays NaN
        equal, total = equal + int((~other).sum()), total + other.size
        near += int((other & (r.margin <= 2 * asked.allowed)).sum())
    if not difference <= asked.allowed or equal + near < total:
        raise JaxllmError(
            f"the artifact is not the model it was made from: scores differ by up to {difference:.3g} where "
            f"{asked.allowed:.3g} is allowed, and {equal} of {total} greedy tokens are equal ({near} others are "
            "near ties); this is an error of the target or its compiler, please report it"
        )
    return {
        "verified": how,
        "where": where,
        "date": now(),
        "prompts": sum(r.prompts.shape[0] for r in asked.rounds),
        "steps": STEPS,
        "compared": "logprob" if in_graph else "logits",
        "max_difference": difference,
        "largest_logit": asked.largest,
        "allowed": asked.allowed,
        "tokens": total,
        "tokens_equal": equal,
        "near_ties": near,
    }


# ---- kept for later -------------------------------------------------------------------------------------


def thinned(asked: Reference) -> Reference:
    """With at most COLUMNS logits of each step, evenly spread."""
    kept = np.unique(np.linspace(0, asked.columns.size - 1, COLUMNS).astype(np.int32))
    rounds = tuple(replace(r, scores=r.scores[..., kept]) for r in asked.rounds)
    return replace(asked, rounds=rounds, columns=asked.columns[kept])


def write(path: pathlib.Path, asked: Reference) -> None:
    """Write a Reference as a safetensors file."""
    from safetensors.numpy import save

    arrays = {f"{k}.{i}": np.ascontiguousarray(v) for i, r in enumerate(asked.rounds) for k, v in vars(r).items()}
    numbers = {"largest": np.float64(asked.largest), "allowed": np.float64(asked.allowed)}
    arrays |= {"columns": asked.columns} | {k: np.asarray(v) for k, v in numbers.items()}
    path.write_bytes(save(arrays))


def read(path: pathlib.Path) -> Reference:
    """The inverse of `write`. Raises CheckpointError for another file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
        count = sum(name.startswith("prompts.") for name in arrays)
        rounds = [Round(**{k: arrays[f"{k}.{i}"] for k in Round.__dataclass_fields__}) for i in range(count)]
        return Reference(tuple(rounds), arrays["columns"], float(arrays["largest"]), float(arrays["allowed"]))
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"{path} holds no reference of an export ({error}); export it again") from error
