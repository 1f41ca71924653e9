"""Run an artifact on recorded prompts and tokens: the fresh process of a verification.

`python -m jaxllm.export.replay DIR MANIFEST QUESTIONS ANSWERS`, all four as `verification.answers` gives them.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxllm.export import manifest as manifests
from jaxllm.export import target
from jaxllm.export.program import NEUTRAL, PENALTIES, SAMPLING
from jaxllm.export.target import Runner
from jaxllm.export.verification import Round, read


def main(folder: str, name: str, questions: str, answers: str) -> None:
    """Write the results of every round, stacked, and how they came about."""
    from safetensors.numpy import save_file

    manifest = manifests.opened(pathlib.Path(folder), name)
    runner = target.find(manifest["target"]["name"]).run(pathlib.Path(folder), manifest)
    arrays = {}
    for i, asked in enumerate(read(pathlib.Path(questions)).rounds):
        results = list(said(runner, manifest, asked))
        arrays |= {f"{key}.{i}": np.stack([r[key] for r in results]) for key in results[0]}
    save_file(arrays, answers, metadata={"how": runner.how, "where": runner.where})


def said(runner: Runner, manifest: Mapping[str, Any], asked: Round) -> Iterator[dict[str, np.ndarray]]:
    """Results after the prompts, and after each of the round's tokens but the last."""
    chunk, B, newest = manifest["chunk"], len(asked.prompts), None
    symbols = manifest.get("symbols", {})
    state = runner.start(B) if "B" in symbols else runner.start()
    for start in range(0, int(asked.lengths.max()), chunk):
        part = asked.prompts[:, start : start + chunk]
        tokens = part if "T" in symbols else np.pad(part, ((0, 0), (0, chunk - part.shape[1])))
        n_new = np.clip(asked.lengths - start, 0, chunk).astype(np.int32)
        found, state = runner.step("prefill", state, _inputs(manifest, tokens, n_new, 0))
        newest = found if newest is None else _merged(n_new, found, newest)
    yield newest
    for i, token in enumerate(asked.tokens[:-1]):
        inputs = _inputs(manifest, token[:, None], np.ones(B, np.int32), i + 1)
        found, state = runner.step("decode", state, inputs)
        yield found


def _inputs(
    manifest: Mapping[str, Any], tokens: np.ndarray, n_new: np.ndarray, step: int
) -> dict[str, np.ndarray]:
    inputs = {"tokens": tokens, "n_new": n_new}
    if manifest["sampler"]["place"] == "in-graph":
        table = SAMPLING | (PENALTIES if manifest["sampler"].get("penalties") else {})
        greedy = NEUTRAL | {"step": step}
        inputs |= {k: np.full(len(n_new), greedy.get(k, 0), dtype) for k, (dtype, _, _) in table.items()}
    return inputs


def _merged(n_new: np.ndarray, new: dict[str, np.ndarray], old: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The new results of rows that had new tokens, the old ones of the others."""
    rows = n_new > 0
    return {k: np.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, old[k]) for k, x in new.items()}


if __name__ == "__main__":
    main(*sys.argv[1:])
