"""The bundled models with every drafter: greedy text is the target's token for token, sampled text has its law.

The tests marked `long` are the same in number: 1,000 prompts at batch 1 and 8, 100,000 samples. Each runs alone,
and all of them are faster with what XLA can do:

    JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest -m long -rP tests/test_spec_bundled.py
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import decode, layers, quant, sampling, spec_verify
from jaxllm.draft_head import DraftHead
from jaxllm.draft_lookahead import Lookahead
from jaxllm.draft_medusa import load_medusa
from jaxllm.draft_model import DraftModel, early_exit
from jaxllm.draft_ngram import NGram
from jaxllm.head_files import load_eagle
from jaxllm.model import Model, bundled
from jaxllm.spec_decode import Speculative

KINDS = {
    "ngram": lambda target, draft: NGram(6),
    "lookahead": lambda target, draft: Lookahead(),
    "draft": lambda target, draft: DraftModel(draft, (1,) * 4),
    "tree": lambda target, draft: DraftModel(draft, (2, 2, 1)),
    "copy": lambda target, draft: DraftModel(quant.quantize_model(target, "q4bf16_1"), (1,) * 3),
    "exit": lambda target, draft: DraftModel(early_exit(target, 4), (1, 1)),
    "medusa": lambda target, draft: load_medusa(bundled("medusa"), target),
    "eagle": lambda target, draft: DraftHead(load_eagle(bundled("eagle"), target)),
}
GREEDY = dict(max_new_tokens=32, eos=(), max_len=96)


@pytest.fixture(scope="module")
def pair() -> tuple[Model, Model]:
    return jaxllm.load(), jaxllm.load(bundled("draft"))


def tokens(made) -> list[tuple[int, ...]]:
    return [c.tokens for c in made]


# ---- greedy ---------------------------------------------------------------------------------------------


@functools.cache
def prompts(count: int) -> list[list[int]]:
    """Pieces of Python of 8 to 40 tokens."""
    ids = jaxllm.load().tokenizer.encode(pathlib.Path(json.decoder.__file__).read_text())
    rng = np.random.default_rng(5)
    return [ids[at : at + rng.integers(8, 40)] for at in rng.integers(0, len(ids) - 40, count)]


@functools.cache
def plainly(count: int, batch: int) -> list[tuple[int, ...]]:
    """What plain decoding says behind each prompt."""
    target, rows = jaxllm.load(), prompts(count)
    return [
        t for i in range(0, count, batch) for t in tokens(decode.generate(target, rows[i : i + batch], **GREEDY))
    ]


def agrees(pair, kind: str, count: int, batch: int) -> None:
    drafter, want = KINDS[kind](*pair), plainly(count, 8)
    speculative = Speculative(drafter, drafter.lengths[-1])
    for i in range(0, count, batch):
        got = decode.generate(pair[0], prompts(count)[i : i + batch], **GREEDY, speculative=speculative)
        assert tokens(got) == want[i : i + batch]


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy(built, pair, kind, batch):
    agrees(pair, kind, 8 if batch == 1 else 16, batch)


@pytest.mark.long
def test_a_thousand_alone(built):
    """Plain decoding says the same of a prompt in any batch, so what it says at batch 8 serves for both below."""
    assert plainly(1000, 1) == plainly(1000, 8)


@pytest.mark.long
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_of_a_thousand(built, pair, kind, batch):
    agrees(pair, kind, 1000, batch)


# ---- sampled --------------------------------------------------------------------------------------------

HOT = sampling.sampler(temperature=1.5, min_p=0.1, frequency_penalty=0.3)  # nothing that sorts: that is slow
HORIZON = 3
SAMPLED = {
    "chain": lambda target, draft: DraftModel(draft, (1, 1)),
    "tree-3-1": lambda target, draft: DraftModel(draft, (3, 1)),
    "tree-2-2": lambda target, draft: DraftModel(draft, (2, 2)),
    "most-probable": lambda target, draft: DraftModel(draft, (2, 1), "top"),
    "coupled": lambda target, draft: DraftModel(draft, (1, 1), "couple"),
    "copy": lambda target, draft: DraftModel(quant.quantize_model(target, "q4bf16_1"), (1, 1)),
    "exit": lambda target, draft: DraftModel(early_exit(target, 4), (2, 1)),
    "ngram": lambda target, draft: NGram(2, shortest=1),
    "lookahead": lambda target, draft: Lookahead(2, 2, 3),
}


@functools.cache
def law(prompt: tuple[int, ...]) -> dict[tuple[int, ...], float]:
    """The probability of every continuation, from plain forwards."""
    target, found = jaxllm.load(), {(): 1.0}
    for n in range(HORIZON):
        before = list(found)
        lines = jnp.array([[*prompt, *c] for c in before])
        logits = jax.jit(layers.forward, static_argnums=0)(target.config, target.params, lines)[0][:, -1]
        context = sampling.init_context(HOT, target.config.vocab, [prompt] * len(before))
        for i in range(n):
            context = sampling.observe(context, jnp.array([c[i] for c in before]), jnp.ones(len(before), bool))
        probs = np.exp(np.asarray(HOT.distribution(logits, context), np.float64))
        found = {
            (*c, int(v)): found[c] * p[v] for c, p in zip(before, probs, strict=True) for v in np.flatnonzero(p)
        }
    return found


def chi_square(pair, kind: str, times: int, rows: int) -> tuple[float, int, float]:
    """(statistic, degrees of freedom, p) of times * rows sampled continuations against their law.

    Continuations that are expected fewer than five times are one cell.
    """
    from scipy.stats import chi2

    prompt = tuple(pair[0].tokenizer.encode("def add(a, b):\n    return a"))
    drafter, want = SAMPLED[kind](*pair), law(prompt)
    options = dict(max_new_tokens=HORIZON, eos=(), n=rows, sampler=HOT)
    options |= dict(speculative=Speculative(drafter, drafter.lengths[-1]))
    counts = dict.fromkeys(want, 0)
    for time in range(times):
        for c in decode.generate(pair[0], list(prompt), key=jax.random.key(time), **options):
            counts[c.tokens] += 1  # a KeyError is a token that cannot be
    expected, seen = times * rows * np.array(list(want.values())), np.array(list(counts.values()))
    cells = np.where(expected >= 5, np.arange(len(seen)), len(seen))
    seen, expected = (np.bincount(cells, a) for a in (seen, expected))
    square, free = (
        float(np.sum((seen - expected)[expected > 0] ** 2 / expected[expected > 0])),
        sum(expected > 0) - 1,
    )
    return square, int(free), float(chi2.sf(square, free))


def fits(pair, kind: str, times: int, rows: int) -> None:
    square, free, p = chi_square(pair, kind, times, rows)
    print(f"{kind}: {times * rows} samples, chi-square {square:.1f}, {free} degrees of freedom, p = {p:.3f}")
    assert 1e-4 < p < 1 - 1e-4


@pytest.mark.parametrize("kind", ["chain", "tree-3-1"])
def test_sampled_continuations(pair, kind):
    fits(pair, kind, 2, 300)


@pytest.mark.long
@pytest.mark.parametrize("kind", SAMPLED)
def test_a_hundred_thousand_continuations(pair, kind):
    fits(pair, kind, 200, 500)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["chain", "tree-2-2"])
def test_a_wrong_residual_is_seen(pair, kind, monkeypatch):
    """The target's own distribution after a rejection, in place of what the drafts left of it."""
    monkeypatch.setattr(spec_verify, "residual", lambda p, q: p)
    jax.clear_caches()
    p = chi_square(pair, kind, 20, 500)[2]
    jax.clear_caches()
    assert p < 1e-9
