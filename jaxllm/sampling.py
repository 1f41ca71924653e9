"""From logits to tokens: a Sampler is a tuple of steps, each a pure function of logits [B, V].

The structure (which steps, in which order) is static, every number is an array: a new temperature
never compiles again, and one batch may hold rows with different values (see `merge`).
B rows, V vocabulary, N remembered tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.errors import SamplerError
from jaxllm.sampling_penalties import Dry, FrequencyPenalty, PresencePenalty, RepetitionPenalty
from jaxllm.sampling_steps import (
    XTC,
    Ban,
    Context,
    DynamicTemperature,
    Greedy,
    LogitBias,
    Mask,
    MinP,
    Step,
    Temperature,
    TopK,
    TopNSigma,
    TopP,
    Typical,
    log_softmax,
)

MaskCallback = Callable[[Sequence[Sequence[int]]], np.ndarray]
"""What constrains decoding, such as a grammar: each row's tokens so far -> bool [B, V], True = allowed.

Called on the host before each step; its answer enters the sampler as a `Mask`.
"""

_ORDER = (
    *(Mask, LogitBias, Ban, RepetitionPenalty, FrequencyPenalty, PresencePenalty, Dry),
    *(Greedy, DynamicTemperature, Temperature, TopNSigma, TopK, TopP, MinP, Typical, XTC),
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Sampler:
    """Steps applied in order to logits. Make one with `sampler`, or write the tuple of steps yourself."""

    steps: tuple[Step, ...]

    @property
    def greedy(self) -> bool:
        """Whether the last step is Greedy: nothing is drawn then, and no key is needed for it."""
        return bool(self.steps) and isinstance(self.steps[-1], Greedy)

    @property
    def reads(self) -> frozenset[str]:
        """The fields of `Context` that some step reads."""
        return frozenset(name for step in self.steps for name in step.reads)

    @property
    def needs_context(self) -> bool:
        """Whether any step reads earlier tokens."""
        return bool(self.reads)

    def distribution(
        self, logits: jax.Array, context: Context | None = None, key: jax.Array | None = None
    ) -> jax.Array:
        """Log-probabilities f32 [B, V] of the processed distribution, -inf where a token was removed.

        `sample` draws from exactly this. logits [B, V]; key: one typed key per row [B], needed only
        with a random step (XTC). A row with no token left is -inf throughout.
        Raises SamplerError for wrong shapes, a missing context or missing keys.
        """
        logits = _apply(self.steps, logits, context, key)
        return logits if self.greedy else log_softmax(logits)


GREEDY = Sampler((Greedy(),))


def sample(
    sampler: Sampler, logits: jax.Array, keys: jax.Array | None, context: Context | None = None
) -> tuple[jax.Array, jax.Array]:
    """Draw one token per row: tokens i32 [B], and f32 [B, V] from `Sampler.distribution`.

    logits [B, V]; keys: one typed key per row [B] (None will do for a greedy sampler). A row's draw
    depends on its own key only (Gumbel-max). A row with no token left, or with NaN, gives -1.
    Pure: what a grammar allows comes in as a `Mask`. Raises SamplerError as `Sampler.distribution` does.
    """
    if sampler.greedy:
        logits = _apply(sampler.steps[:-1], logits, context, keys)
        logprobs, tokens = sampler.steps[-1](logits), jnp.argmax(logits, -1)
    else:
        _check_keys(keys, logits)
        logprobs = sampler.distribution(logits, context, keys)
        tokens = jnp.argmax(logprobs + noise(keys, logprobs.shape[-1]), -1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], -1)[:, 0]
    return jnp.where(chosen > -jnp.inf, tokens.astype(jnp.int32), -1), logprobs


def noise(keys: jax.Array, vocab: int) -> jax.Array:
    """What `sample` adds to log-probabilities before it takes the largest: f32 [B, V] of typed keys [B]."""
    return jax.vmap(lambda key: jax.random.gumbel(key, (vocab,)))(_derive(keys, 0))


def _apply(steps: Sequence[Step], logits: jax.Array, context: Context | None, keys) -> jax.Array:
    if logits.ndim != 2:
        raise SamplerError(f"logits must be [rows, vocabulary], found shape {logits.shape}.")
    logits, draws = logits.astype(jnp.float32), 0
    for step in steps:
        key = None
        if step.random:  # numbered among random steps: merging in other steps changes no draw
            _check_keys(keys, logits)
            draws += 1
            key = _derive(keys, draws)
        logits = step(logits, context, key)
    return logits


def _derive(keys: jax.Array, use: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, use)


def _check_keys(keys: jax.Array | None, logits: jax.Array) -> None:
    typed = keys is not None and jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    if not typed or keys.shape != logits.shape[:1]:
        found = "none" if keys is None else f"{keys.dtype} of shape {keys.shape}"
        raise SamplerError(
            f"sampling {logits.shape[0]} rows needs one typed key per row, found {found}: "
            "pass jax.random.split(jax.random.key(seed), rows)."
        )


def top_logprobs(logprobs: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k most probable tokens: ids i32 [..., k] and their values f32 [..., k], best first.

    logprobs f32 [..., V]; raises SamplerError unless 0 <= k <= V.
    """
    if not 0 <= k <= logprobs.shape[-1]:
        raise SamplerError(f"top_logprobs k must be 0 to {logprobs.shape[-1]}, found {k}.")
    values, ids = lax.top_k(logprobs, k)
    return ids.astype(jnp.int32), values


# --- what penalties remember --------------------------------------------------------------------


def init_context(sampler: Sampler, vocab: int, prompts: Sequence[Sequence[int]]) -> Context | None:
    """The context of rows whose prompts are these token ids, with only the fields the sampler reads.

    None where it reads nothing. Raises SamplerError for an id outside 0..vocab-1.
    """
    if not sampler.needs_context:
        return None
    rows = [_token_ids("a prompt", prompt, vocab) for prompt in prompts]
    windows = [step.window for step in sampler.steps if isinstance(step, Dry)]
    make = {
        "prompt": lambda: _occurs(rows, vocab),
        "counts": lambda: jnp.zeros((len(rows), vocab), jnp.int32),
        "recent": lambda: _newest(rows, max(windows)),
    }
    return Context(**{name: f() if name in sampler.reads else None for name, f in make.items()})


def _occurs(rows: Sequence[np.ndarray], vocab: int) -> jax.Array:
    seen = np.zeros((len(rows), vocab), bool)
    for row, ids in zip(seen, rows, strict=True):
        row[ids] = True
    return jnp.asarray(seen)


def _newest(rows: Sequence[np.ndarray], window: int) -> jax.Array:
    recent = np.full((len(rows), window), -1, np.int32)
    for row, ids in zip(recent, rows, strict=True):
        row[window - len(ids[-window:]) :] = ids[-window:]
    return jnp.asarray(recent)


def observe(context: Context | None, tokens: jax.Array, live: jax.Array) -> Context | None:
    """The context after tokens i32 [B] were emitted in rows where live bool [B]; a token of -1 is skipped."""
    if context is None:
        return None
    live = live & (tokens >= 0)
    counts, recent = context.counts, context.recent
    if counts is not None:
        counts = counts.at[jnp.arange(len(tokens)), jnp.where(live, tokens, 0)].add(live)
    if recent is not None:
        moved = jnp.concatenate([recent[:, 1:], tokens[:, None].astype(recent.dtype)], 1)
        recent = jnp.where(live[:, None], moved, recent)
    return replace(context, counts=counts, recent=recent)


# --- different samplers in one batch ------------------------------------------------------------


def merge(samplers: Sequence[Sampler]) -> Sampler:
    """One sampler for a batch whose row i uses samplers[i]: values per row, what a row lacks is neutral.

    A greedy row becomes a temperature of 0, unless all rows are greedy. The structure depends on which
    steps occur, not on their values. Runs on the host. Raises SamplerError where a sampler holds values
    for several rows, or where two samplers want the same steps in opposite orders.
    """
    if not samplers:
        raise SamplerError("merge needs at least one sampler, found none.")
    chains = [s.steps for s in jax.device_get(list(samplers))]
    if not all(s.greedy for s in samplers):
        cold = Temperature(np.float32(0))
        chains = [tuple(cold if isinstance(s, Greedy) else s for s in c) for c in chains]
    rows = [_labelled(chain) for chain in chains]
    merged = (kind.stack([row.get((kind, n)) for row in rows]) for kind, n in _common_order(rows))
    return jax.tree.map(jnp.asarray, Sampler(tuple(merged)))


def _labelled(steps: Sequence[Step]) -> dict[tuple[type, int], Step]:
    """Steps by (type, how many of this type came before), in order."""
    labelled: dict[tuple[type, int], Step] = {}
    for step in steps:
        labelled[type(step), sum(kind is type(step) for kind, _ in labelled)] = step
    return labelled


def _common_order(rows: Sequence[Mapping[tuple[type, int], Step]]) -> list[tuple[type, int]]:
    """An order that agrees with every row's; free choices follow _ORDER."""
    graph = TopologicalSorter({label: () for row in rows for label in row})
    for row in rows:
        for before, after in pairwise(row):
            graph.add(after, before)
    try:
        graph.prepare()
    except CycleError as error:
        names = " and ".join(sorted({kind.__name__ for kind, _ in error.args[1]}))
        raise SamplerError(
            f"merge cannot put {names} in one order, because the samplers order them differently: "
            "give all samplers of a batch one order of steps."
        ) from None
    order, ready = [], []
    while graph.is_active():
        ready = sorted([*ready, *graph.get_ready()], key=_rank)
        order.append(ready.pop(0))
        graph.done(order[-1])
    return order


def _rank(label: tuple[type, int]) -> tuple[int, str, int]:
    kind, n = label
    return (_ORDER.index(kind) if kind in _ORDER else len(_ORDER), kind.__name__, n)


# --- the usual knobs ----------------------------------------------------------------------------


class _Range(NamedTuple):
    low: float = -np.inf
    high: float = np.inf
    text: str = "a finite number"
    above: bool = False  # low itself is refused
    integer: bool = False


_RANGES = {
    "temperature": _Range(0, text="a finite number >= 0"),
    "dynatemp_delta": _Range(0, text="a finite number >= 0"),
    "dynatemp_exponent": _Range(0, text="a finite number > 0", above=True),
    "top_n_sigma": _Range(0, text="a finite number >= 0 (0 = off)"),
    "top_k": _Range(0, text="an integer >= 0 (0 = off)", integer=True),
    "top_p": _Range(0, 1, "a number above 0 and at most 1", above=True),
    "min_p": _Range(0, 1, "a number from 0 to 1"),
    "typical_p": _Range(0, 1, "a number above 0 and at most 1", above=True),
    "xtc_probability": _Range(0, 1, "a number from 0 to 1"),
    "xtc_threshold": _Range(0, 0.5, "a number from 0 to 0.5"),
    "repetition_penalty": _Range(0, text="a finite number > 0", above=True),
    "frequency_penalty": _Range(),
    "presence_penalty": _Range(),
    "dry_multiplier": _Range(0, text="a finite number >= 0"),
    "dry_base": _Range(1, text="a finite number >= 1"),
    "dry_allowed_length": _Range(1, text="an integer >= 1", integer=True),
}

Value = float | Sequence[float] | np.ndarray | jax.Array


def sampler(
    *,
    temperature: Value = 1.0,
    dynatemp_delta: Value | None = None,
    dynatemp_exponent: Value | None = None,
    top_n_sigma: Value | None = None,
    top_k: Value | None = None,
    top_p: Value | None = None,
    min_p: Value | None = None,
    typical_p: Value | None = None,
    xtc_probability: Value | None = None,
    xtc_threshold: Value | None = None,
    repetition_penalty: Value | None = None,
    frequency_penalty: Value | None = None,
    presence_penalty: Value | None = None,
    dry_multiplier: Value | None = None,
    dry_base: Value | None = None,
    dry_allowed_length: Value | None = None,
    dry_breakers: Sequence[int | Sequence[int]] | None = None,
    dry_window: int | None = None,
    logit_bias: Mapping[int, float] | np.ndarray | jax.Array | None = None,
    banned: Sequence[int] | np.ndarray | jax.Array | None = None,
    vocab: int | None = None,
) -> Sampler:
    """A Sampler from the usual knobs, in this order whatever the order they are written in:

    logit_bias, banned, repetition, frequency and presence penalty, DRY, temperature, top_n_sigma,
    top_k, top_p, min_p, typical_p, XTC (transformers' order, the others fitted in).

    A number is one value, or one per row [B]. None leaves a step out. `temperature=0` is greedy: the
    truncations, which cannot change its answer, are left out, and with nothing else it is GREEDY.
    logit_bias: {id: bias}, or f32 [V] or [B, V]; -inf removes a token. banned: ids, or bool [V] or [B, V].
    dry_breakers: token ids, or sequences of them. vocab: how many tokens there are, to check ids.
    Defaults: dry_base 1.75, dry_allowed_length 2, dry_window 1024 tokens, xtc_threshold 0.1,
    dynatemp_exponent 1. Raises SamplerError naming every value that is out of its range.
    """
    knobs = locals()
    numbers = _numbers({n: knobs[n] for n in _RANGES if knobs[n] is not None})
    _need(knobs, "dynatemp_delta", ("dynatemp_exponent",))
    _need(knobs, "xtc_probability", ("xtc_threshold",))
    needs_dry = ("dry_base", "dry_allowed_length", "dry_breakers", "dry_window")
    _need(knobs, "dry_multiplier", needs_dry)
    before = [*_bias(logit_bias, vocab), *_ban(banned, vocab), *_plain(_PENALTIES, numbers)]
    if dry_multiplier is not None:
        before.append(_dry(numbers, dry_breakers, dry_window, vocab))
    return _finish(before, numbers)


_PENALTIES = {
    "repetition_penalty": RepetitionPenalty,
    "frequency_penalty": FrequencyPenalty,
    "presence_penalty": PresencePenalty,
}
_TRUNCATIONS = {
    "top_n_sigma": TopNSigma,
    "top_k": TopK,
    "top_p": TopP,
    "min_p": MinP,
    "typical_p": Typical,
}


def _plain(kinds: Mapping[str, type[Step]], numbers: Mapping[str, jax.Array]) -> list[Step]:
    return [kind(numbers[name]) for name, kind in kinds.items() if name in numbers]


def _finish(before: list[Step], numbers: Mapping[str, jax.Array]) -> Sampler:
    """Add temperature and what follows it."""
    temperature = numbers["temperature"]
    if "dynatemp_delta" in numbers:
        exponent = numbers.get("dynatemp_exponent", jnp.float32(1))
        before.append(DynamicTemperature(temperature, numbers["dynatemp_delta"], exponent))
    elif temperature.ndim == 0 and np.asarray(temperature) == 0:
        return Sampler((*before, *GREEDY.steps)) if before else GREEDY
    else:
        before.append(Temperature(temperature))
    after = _plain(_TRUNCATIONS, numbers)
    if "xtc_probability" in numbers:
        threshold = numbers.get("xtc_threshold", jnp.float32(0.1))
        after.append(XTC(numbers["xtc_probability"], threshold))
    return Sampler((*before, *after))


def _need(knobs: Mapping[str, Any], main: str, others: Sequence[str]) -> None:
    given = [name for name in others if knobs[name] is not None]
    if given and knobs[main] is None:
        raise SamplerError(f"{' and '.join(given)} change nothing without {main}: give {main} too.")


def _numbers(knobs: Mapping[str, Value]) -> dict[str, jax.Array]:
    """Checked values, [] or [B], f32 or i32; one error lists all problems."""
    problems, values = [], {}
    for name, value in knobs.items():
        values[name], problem = _number(value, _RANGES[name])
        problems += [f"{name} must be {problem}, found {_short(value)}"] if problem else []
    sizes = {name: v.size for name, v in values.items() if v is not None and v.ndim}
    if len(set(sizes.values())) > 1:
        problems.append(f"values per row must be equally many, found {sizes}")
    if problems:
        raise SamplerError("; ".join(problems) + ".")
    return {name: jnp.asarray(value) for name, value in values.items()}


def _number(value: Value, bounds: _Range) -> tuple[np.ndarray | None, str | None]:
    """The value as an array, or what it should have been."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, OverflowError):  # ragged lists, traced values
        return None, f"{bounds.text}, or one for each row"
    if array.dtype.kind not in ("iu" if bounds.integer else "iuf") or array.ndim > 1 or not array.size:
        return None, f"{bounds.text}, or one for each row"
    if bounds.integer:
        array = np.clip(array, -1, np.iinfo(np.int32).max).astype(np.int32)
    else:
        with np.errstate(over="ignore"):  # becomes inf, refused below
            array = array.astype(np.float32)
    inside = np.isfinite(array) & (array >= bounds.low) & (array <= bounds.high)
    if not np.all(inside & (array != bounds.low) if bounds.above else inside):
        return None, bounds.text
    return array, None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _token_ids(what: str, ids: Sequence[int], vocab: int | None) -> np.ndarray:
    """Token ids i32 [N], checked to be integers from 0 up to the vocabulary's end where it is known."""
    try:
        array = np.asarray(ids)
    except (TypeError, ValueError, OverflowError):
        array = np.empty((), object)
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise SamplerError(f"{what} must be a list of token ids, found {_short(ids)}.")
    end = np.iinfo(np.int32).max if vocab is None else vocab
    if array.min() < 0 or array.max() >= end:
        bad = array[(array < 0) | (array >= end)][:5].tolist()
        raise SamplerError(f"{what} holds {bad}, but token ids run from 0 to {end - 1}.")
    return array.astype(np.int32)


def _bias(given: Mapping[int, float] | np.ndarray | None, vocab: int | None) -> list[Step]:
    if given is None or (isinstance(given, Mapping) and not given):
        return []
    sparse = isinstance(given, Mapping)
    ids = _token_ids("logit_bias", list(given), vocab) if sparse else None
    try:
        bias = np.asarray(list(given.values()) if sparse else given, np.float32)
    except (TypeError, ValueError, OverflowError):
        bias = np.full(1, np.nan, np.float32)
    if np.any(np.isnan(bias)) or np.any(bias == np.inf):
        raise SamplerError(f"logit_bias values must be finite numbers or -inf, found {_short(given)}.")
    if not sparse:
        _check_dense("logit_bias", bias, vocab)
    return [LogitBias(jnp.asarray(bias), None if ids is None else jnp.asarray(ids))]


def _ban(given: Sequence[int] | np.ndarray | None, vocab: int | None) -> list[Step]:
    if given is None:
        return []
    if np.dtype(bool) == getattr(given, "dtype", None):
        _check_dense("banned", given, vocab)
        return [Ban(jnp.asarray(given))]
    ids = _token_ids("banned", given, vocab)
    return [Ban(jnp.asarray(ids))] if len(ids) else []


def _check_dense(name: str, array: np.ndarray, vocab: int | None) -> None:
    if array.ndim not in (1, 2) or (vocab is not None and array.shape[-1] != vocab):
        width = "V" if vocab is None else vocab
        raise SamplerError(f"{name} must be [{width}] or [rows, {width}], found shape {array.shape}.")


def _dry(numbers: Mapping[str, jax.Array], breakers, window: int | None, vocab: int | None) -> Dry:
    window = 1024 if window is None else window
    if not isinstance(window, int) or window < 2:
        raise SamplerError(f"dry_window must be an integer >= 2 (tokens), found {_short(window)}.")
    if not isinstance(breakers, Sequence | None) or isinstance(breakers, str):
        raise SamplerError(f"dry_breakers must be a list of token ids, found {_short(breakers)}.")
    rows = [_breaker(b, vocab) for b in breakers or ()]
    filled = np.full((max(len(rows), 1), max(map(len, rows), default=1)), -1, np.int32)
    for line, row in zip(filled, rows, strict=False):
        line[: len(row)] = row
    base = numbers.get("dry_base", jnp.float32(1.75))
    allowed = numbers.get("dry_allowed_length", jnp.int32(2))
    return Dry(numbers["dry_multiplier"], base, allowed, jnp.asarray(filled), window=window)


def _breaker(given: int | Sequence[int], vocab: int | None) -> np.ndarray:
    ids = _token_ids("a dry_breaker", [given] if isinstance(given, int) else given, vocab)
    if not len(ids):
        raise SamplerError("a dry_breaker must hold at least one token id, found an empty list.")
    return ids
