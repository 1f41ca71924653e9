"""Compare jaxllm with transformers on one tiny checkpoint, in five modes.

python -m tests.parity llama gpt2 ...      (all without names)
"""

from __future__ import annotations

import importlib
import pathlib
import pkgutil
import sys
import tempfile

import numpy as np

import tests.cases
from tests.cases.case import Case

TOLERANCE = 2e-5  # of max |difference| / max |logit| in f32
ROWS, LENGTH, CHUNK, ROOM = 2, 20, 7, 40
# Compiling is most of the time here, and the tolerance is the same.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def all_cases() -> dict[str, Case]:
    """Name -> case, over every module of tests.cases."""
    found: dict[str, Case] = {}
    for module in pkgutil.iter_modules(tests.cases.__path__):
        cases = getattr(importlib.import_module(f"tests.cases.{module.name}"), "CASES", {})
        assert not found.keys() & cases.keys()
        found |= cases
    return found


def compare(case: Case, folder: pathlib.Path) -> dict[str, float]:
    """Mode -> max |difference| / max |logit| against transformers in f32; "bf16" is our error over theirs."""
    import jax
    import torch

    import jaxllm.layers as layers
    from jaxllm.model import load
    from tests import tiny

    reference = tiny.build(case.model_type, case.values, attn=case.attn)
    if case.prepare:
        case.prepare(reference)
    tiny.save(reference, folder)
    if case.convert:
        case.convert(folder)
    model = load(folder, max_len=case.max_len)
    tokens = np.random.default_rng(0).integers(3, model.config.vocab, (ROWS, LENGTH))

    def theirs(ids, net=reference):
        with torch.no_grad():
            return net(torch.tensor(ids), use_cache=False).logits.float().numpy()

    f = jax.jit(layers.forward, static_argnums=0, compiler_options=QUICK)

    def run(tokens, state, *, n_new=None, depth=None, tree=None):
        """Three programs serve all modes: everything at once, one token, and chunks, padded to one size.

        Where trees apply, a chunk is the tree that is a line.
        """
        T = tokens.shape[1]
        if state is None:
            out, state = f(model.config, model.params, tokens)
            return np.asarray(out), state
        pad = 0 if T == 1 else CHUNK - T
        kw = dict(n_new=np.full(ROWS, T, np.int32) if n_new is None else n_new)
        if T > 1 and "tree" in case.modes:
            depth, tree = (np.arange(T, dtype=np.int32), np.tri(T, dtype=bool)) if tree is None else (depth, tree)
            kw |= dict(depth=np.pad(depth, (0, pad)), tree=np.pad(tree, (0, pad)))
        out, state = f(model.config, model.params, np.pad(tokens, ((0, 0), (0, pad))), state, **kw)
        return np.asarray(out)[:, :T], state

    want = theirs(tokens)
    size = np.abs(want).max()
    checks = {"full": _full, "incremental": _incremental, "ragged": _ragged, "rewind": _rewind, "tree": _tree}
    errors = {m: check(model, run, tokens, want, theirs) / size for m, check in checks.items() if m in case.modes}
    ours16 = load(folder, dtype="bfloat16", max_len=case.max_len)
    got16, _ = f(ours16.config, ours16.params, tokens)
    error = np.abs(np.asarray(got16) - want).mean()
    f.clear_cache()  # three programs a case and a fourth are too many to keep
    errors["bf16"] = error / max(np.abs(theirs(tokens, reference.bfloat16()) - want).mean(), 1e-9)
    return errors


def _error(a, b) -> float:
    assert np.shape(a) == np.shape(b)
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def _state(model):
    from jaxllm.state import init_state

    return init_state(model.config, ROWS, ROOM, chunk=CHUNK)


def _full(model, run, tokens, want, theirs):
    return _error(run(tokens, None)[0], want)


def _incremental(model, run, tokens, want, theirs):
    """A chunk, then token by token; sliding windows in rings of window + chunk slots."""
    out, state = run(tokens[:, :CHUNK], _state(model))
    outs = [out]
    for i in range(CHUNK, LENGTH):
        out, state = run(tokens[:, i : i + 1], state)
        outs.append(out)
    return _error(np.concatenate(outs, 1), want)


def _ragged(model, run, tokens, want, theirs):
    """Row 1 has only four tokens in the first chunk."""
    _, state = run(tokens[:, :CHUNK], _state(model), n_new=np.array([CHUNK, 4], np.int32))
    out, _ = run(np.stack([tokens[0, 7:10], tokens[1, 4:7]]), state)
    return max(_error(out[0], want[0, 7:10]), _error(out[1], want[1, 4:7]))


def _rewind(model, run, tokens, want, theirs):
    """Three tokens, two of them wrong; back to the first, then the right ones."""
    from jaxllm.state import rewind

    _, state = run(tokens[:, :CHUNK], _state(model))
    wrong = tokens[:, 7:10].copy()
    wrong[:, 1:] = 5
    _, after = run(wrong, state)
    out, _ = run(tokens[:, 8:11], rewind(after, state.length + 1))
    return _error(out, want[:, 8:11])


def _tree(model, run, tokens, want, theirs):
    """Root, two children, a grandchild of each; the second branch is wrong on purpose."""
    _, state = run(tokens[:, :CHUNK], _state(model))
    two = np.full(ROWS, 5), np.full(ROWS, 6)
    nodes = np.stack([tokens[:, 7], tokens[:, 8], two[0], tokens[:, 9], two[1]], 1)
    depth = np.array([0, 1, 1, 2, 2], np.int32)
    sees = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]], bool)
    out, _ = run(nodes, state, depth=depth, tree=sees)
    other = theirs(np.concatenate([tokens[:, :8], np.stack(two, 1)], 1))
    right = max(_error(out[:, [0, 1, 3]], want[:, 7:10]), _error(out[:, 2], other[:, 8]))
    return max(right, _error(out[:, 4], other[:, 9]))


def row(name: str, errors: dict[str, float]) -> str:
    modes = ("full", "incremental", "ragged", "rewind", "tree")
    cells = " ".join(f"{errors[m]:9.1e}" if m in errors else f"{'-':>9}" for m in modes)
    return f"{name:22s} {cells} {errors['bf16']:9.2f}"


HEAD = f"{'checkpoint':22s} " + " ".join(
    f"{m[:9]:>9}" for m in ("full", "increment", "ragged", "rewind", "tree", "bf16")
)


def main(names: list[str]) -> None:
    cases = all_cases()
    print(HEAD)
    for name in names or cases:
        with tempfile.TemporaryDirectory() as folder:
            print(row(name, compare(cases[name], pathlib.Path(folder))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
