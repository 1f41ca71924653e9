"""What one model loses against another: perplexity, divergence of predictions, and the error layer by layer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import layers
from jaxllm.config import ModelConfig
from jaxllm.errors import ContextError, JaxllmError, MissingExtraError
from jaxllm.model import Model, find
from jaxllm.progress import progress
from jaxllm.prompts import Prompt, as_prompts, is_item
from jaxllm.state import init_state
from jaxllm.taps import Taps

Array = jax.Array

CONTEXT = 512  # tokens of a window, where both models take as many
LOGITS = 2**23  # of one model at a time: 32 MB


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens and two standard errors of it.

    Tokens of one text are not independent, so `token_error` is too small; `window_error` takes only the windows as
    independent (clusters, arXiv 2411.00640) and is nan for a single one.
    """

    mean: float
    token_error: float
    window_error: float


@dataclass(frozen=True)
class Side:
    """One of the two models, and how well it predicts the text."""

    name: str
    parameters: int
    nbytes: int
    nll: Estimate  # nats per token

    @property
    def bits_per_weight(self) -> float:
        """Of all parameters, scales and unquantized ones included."""
        return 8 * self.nbytes / self.parameters

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll.mean)

    @property
    def perplexity_error(self) -> float:
        """Standard error to first order, from windows where there are several."""
        error = self.nll.window_error
        return self.perplexity * (self.nll.token_error if math.isnan(error) else error)


@dataclass(frozen=True)
class LayerError:
    """Relative errors ||xa - xb|| / ||xa|| of one layer's output, the mean of all tokens'."""

    drift: float  # the residual stream after it, each model on its own inputs: what has added up so far
    own: float  # what it adds to the stream, both models given A's input: its own share


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns. Figures are over every predicted token; kl is in nats."""

    a: Side
    b: Side
    context: int  # tokens of the longest window
    windows: int
    tokens: int  # predicted ones
    difference: Estimate  # of nll, b's minus a's, paired token by token
    kl: np.ndarray = field(repr=False)  # f32 [tokens]: KL(a || b) of each prediction
    agreement: float  # share of tokens where both find the same one most likely
    largest_logit_difference: float
    layers: tuple[LayerError, ...]  # empty where layers cannot be set side by side

    @property
    def kl_mean(self) -> float:
        return float(self.kl.mean(dtype=np.float64))

    def kl_quantile(self, q: float) -> float:
        """The q-quantile of the tokens' divergences: 0.5 is the median, 1 the largest."""
        return float(np.quantile(self.kl, q))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `jaxllm compare --json` prints them."""
        return {
            **{side: _side(getattr(self, side)) for side in "ab"},
            **{name: getattr(self, name) for name in ("context", "windows", "tokens")},
            "nll_difference": vars(self.difference),
            "kl": {"mean": self.kl_mean, "median": self.kl_quantile(0.5)}
            | {"p99.9": self.kl_quantile(0.999), "max": self.kl_quantile(1.0)},
            "top1_agreement": self.agreement,
            "largest_logit_difference": self.largest_logit_difference,
            "layers": [vars(layer) for layer in self.layers],
        }


def _side(side: Side) -> dict[str, Any]:
    plain = {name: getattr(side, name) for name in ("name", "parameters", "nbytes", "bits_per_weight")}
    return plain | {
        "nll": vars(side.nll),
        "perplexity": side.perplexity,
        "perplexity_error": side.perplexity_error,
    }


@dataclass(frozen=True)
class Outside:
    """A model run by something else than jaxllm, as the reference of `compare`."""

    name: str
    vocab: int
    max_len: int
    size: int  # parameters
    nbytes: int
    logits: Callable[[np.ndarray], np.ndarray]  # tokens i32 [T] -> f32 [T, V]


def from_transformers(path_or_hub_id: str | os.PathLike, *, dtype: str = "float32") -> Outside:
    """The checkpoint as transformers itself runs it, on the CPU.

    Raises MissingExtraError without torch and transformers, CheckpointError where there is no such folder."""
    folder = find(path_or_hub_id)
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtraError(
            "comparing with transformers needs torch and transformers: pip install torch transformers"
        ) from error
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def logits(tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            out = model(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False).logits
        return out[0].float().numpy()

    parameters = list(model.parameters())
    nbytes = sum(p.numel() * p.element_size() for p in parameters)
    config, size = model.config, sum(p.numel() for p in parameters)
    name = f"{folder.name} (transformers)"
    return Outside(name, config.vocab_size, config.max_position_embeddings, size, nbytes, logits)


def compare(
    a: Model | Outside,
    b: Model,
    text_or_tokens: Prompt | Sequence[Prompt],
    *,
    context: int | None = None,
    windows: int | None = None,
    by_layer: bool = True,
) -> Comparison:
    """How b predicts a text (or several, or token ids) against the reference a.

    context: tokens of a window (default 512, or what both models take). Texts are cut into windows, each of which
    begins anew: with the tokenizer's first token (<s>) where it puts one, else with the last token of the window
    before; so every token is predicted once. windows: the most of them to read. by_layer: also the error of
    every layer, for half as much work again.

    One window is in memory at a time, and LOGITS logits of it. Both models run the same compiled programs where
    their configs are equal, so a model compared with itself differs by exactly nothing.

    Raises JaxllmError where the vocabularies differ, ContextError for a context beyond a model's.
    """
    context = _check(a, b, context)
    pieces = _cut(_rows(a, b, text_or_tokens), context, _first(a, b))[:windows]
    if not pieces:
        raise JaxllmError("a comparison needs a text of at least two tokens, and one window of it or more")
    width = max(map(len, pieces))
    seen = []
    with progress(f"comparing {a.name} and {b.name}", len(pieces)) as advance:
        for piece in pieces:
            seen.append(_window(a, b, piece, width, by_layer))
            advance()
    return _summary(a, b, width, seen)


def _check(a: Model | Outside, b: Model, context: int | None) -> int:
    """The context to use."""
    if (va := _vocab(a)) != (vb := b.config.vocab):
        raise JaxllmError(
            f"{a.name} predicts {va} tokens and {b.name} {vb}; only models of one vocabulary can be compared"
        )
    limit = min(a.max_len if isinstance(a, Outside) else a.config.max_len, b.config.max_len)
    if context is not None and not 2 <= context <= limit:
        raise ContextError(f"a window has 2 to {limit} tokens, the most that both models take; got {context}")
    return min(CONTEXT, limit) if context is None else context


def _vocab(a: Model | Outside) -> int:
    return a.vocab if isinstance(a, Outside) else a.config.vocab


# ---- text to windows ------------------------------------------------------------------------------------


def _rows(a: Model | Outside, b: Model, texts: Prompt | Sequence[Prompt]) -> list[tuple[list[int], bool]]:
    """(tokens, whether they were text) of each text. Raises JaxllmError where the tokenizers do not agree."""
    readers = [m for m in (b, a) if getattr(m, "tokenizer", None)] or [b]
    rows, *others = [as_prompts(m, texts) for m in readers]
    if others and others[0] != rows:
        raise JaxllmError(
            f"the tokenizers of {a.name} and {b.name} read the text differently, so their tokens stand for other "
            "things; compare models of one tokenizer, or give token ids"
        )
    single = isinstance(texts, str) or is_item(texts[0])
    given = [texts] if single else texts
    return [(row, isinstance(text, str)) for row, text in zip(rows, given, strict=True)]


def _first(a: Model | Outside, b: Model) -> int | None:
    tokenizer = b.tokenizer or getattr(a, "tokenizer", None)
    return tokenizer.bos_id if tokenizer else None


def _cut(rows: list[tuple[list[int], bool]], context: int, first: int | None) -> list[np.ndarray]:
    """Windows i32 [n] of 2 to `context` tokens. `first`: the token that a tokenizer begins with."""
    cut = []
    for row, is_text in rows:
        begins = is_text and row[0] == first
        new = row[1:] if begins else row
        for start in range(0, len(new) - (not begins), context - 1):
            piece = [first, *new[start : start + context - 1]] if begins else new[start : start + context]
            cut.append(np.array(piece, np.int32))
    return cut


# ---- one window -----------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="config")
def trunk(config: ModelConfig, params: dict, tokens: Array, given: Array | None, isolated: Array):
    """All layers on tokens i32 [T]: x [T, D] after the final norm, and [L, T, D] each of what enters every layer,
    leaves it, and what it adds (f32).

    isolated: every layer reads given [L, T, D] instead of what the one before it gave. The same program serves
    both, so equal inputs give equal outputs.
    """
    numbers = range(len(config.blocks))
    points = ("in", "out", "mixer.out", *["ffn.out"] * any(b.ffn is not None for b in config.blocks))
    edits = {f"layers.{i}.in": partial(_instead, isolated, given, i) for i in numbers}
    taps = Taps(keep=[f"layers.*.{point}" for point in points], edit=edits)
    x, _, kept = layers.hidden(config, params, tokens[None], init_state(config, 1, len(tokens)), taps=taps)
    got = [[kept.get(f"layers.{i}.{point}") for i in numbers] for point in points]
    entered, left, *parts = [[part if part is None else part[0] for part in each] for each in got]
    added = [
        sum(part.astype(jnp.float32) for part in each if part is not None) for each in zip(*parts, strict=True)
    ]
    return x[0], jnp.stack(entered), jnp.stack(left), jnp.stack(added)


def _instead(isolated: Array, given: Array, i: int, x: Array) -> Array:
    return jnp.where(isolated, given[i][None].astype(x.dtype), x)


@jax.jit
def _relative(a: Array, b: Array) -> Array:
    """||a - b|| / ||a|| of [L, T, D] over the last axis -> f32 [L, T]; 0 where both are 0."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    far, size = jnp.linalg.norm(a - b, axis=-1), jnp.linalg.norm(a, axis=-1)
    return jnp.where(far == 0, 0.0, far / size)


@partial(jax.jit, static_argnames="configs")
def predictions(configs: tuple, params: tuple, rows: tuple, targets: Array) -> dict[str, Array]:
    """What both models' last layers say of T tokens: nll_a, nll_b, kl, gap (the largest difference of two logits),
    all f32 [T], and same (top 1), bool [T].

    configs, params, rows: of a and b. A row is x [D] of `trunk`, or logits [V] where the config is None.
    """
    T, V = len(targets), next(c.vocab for c in configs if c is not None)
    size = max(1, min(T, LOGITS // V))
    count = -(-T // size)
    parts = [jnp.pad(r, ((0, count * size - T), (0, 0))).reshape(count, size, -1) for r in rows]
    wanted = jnp.pad(targets, (0, count * size - T)).reshape(count, size)

    def one(part):
        *rows, target = part
        return _pair(*(_logits(c, p, r) for c, p, r in zip(configs, params, rows, strict=True)), target)

    found = jax.lax.map(one, (*parts, wanted))
    return {name: values.reshape(-1)[:T] for name, values in found.items()}


def _logits(config: ModelConfig | None, params: dict | None, rows: Array) -> Array:
    return rows if config is None else layers.logits(config, params, rows)


def _pair(a: Array, b: Array, target: Array) -> dict[str, Array]:
    """Logits f32 [C, V] of both and targets i32 [C] -> figures [C]."""
    log_a, log_b = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
    nll_a, nll_b = (-jnp.take_along_axis(log, target[:, None], 1)[:, 0] for log in (log_a, log_b))
    gap = jnp.where(a == b, 0.0, jnp.abs(a - b)).max(-1)  # equal infinities do not differ
    kl = _divergence(log_a, log_b).sum(-1)
    return dict(nll_a=nll_a, nll_b=nll_b, kl=kl, same=a.argmax(-1) == b.argmax(-1), gap=gap)


def _divergence(log_p: Array, log_q: Array) -> Array:
    """p log(p / q) + q - p, whose sum is KL(p || q), from logarithms.

    Every term is at least 0, and of second order in the difference: so the sum is exact to about 1e-12, where
    that of p log(p / q) alone has rounding errors of 1e-7 in f32.
    """
    p, q, d = jnp.exp(log_p), jnp.exp(log_q), log_p - log_q
    near = p * d * d * (1 / 2 - d / 6 + d * d / 24 - d**3 / 120)
    far = jnp.where(p > 0, p * d, 0.0) + q - p
    return jnp.where(jnp.abs(d) < 0.1, near, jnp.maximum(far, 0.0))


def _window(a: Model | Outside, b: Model, piece: np.ndarray, width: int, by_layer: bool) -> dict[str, np.ndarray]:
    """Figures [n - 1] of a window of n tokens, with drift and own [L, n] where layers can be compared."""
    n = len(piece)
    tokens = np.pad(piece, (0, width - n))  # to the right, where causal models do not look
    targets = np.append(tokens[1:], np.int32(0))
    if isinstance(a, Outside):
        x, *_ = trunk(b.config, b.params, tokens, *_nothing(b, width))
        rows = (np.pad(a.logits(piece), ((0, width - n), (0, 0))), x)
        found = predictions((None, b.config), (None, b.params), rows, targets)
        return {name: values[: n - 1] for name, values in jax.device_get(found).items()}
    ran = [trunk(m.config, m.params, tokens, *_nothing(m, width)) for m in (a, b)]
    found = predictions((a.config, b.config), (a.params, b.params), tuple(r[0] for r in ran), targets)
    errors = _layer_errors(b, tokens, *ran) if by_layer and _side_by_side(a, b) else {}
    found = {name: values[: n - 1] for name, values in jax.device_get(found).items()}
    return found | {name: values[:, :n] for name, values in jax.device_get(errors).items()}


def _nothing(model: Model, width: int) -> tuple[Array, bool]:
    """Inputs that no layer reads."""
    config = model.config
    return jnp.zeros((len(config.blocks), width, config.width), config.dtype), False


def _side_by_side(a: Model, b: Model) -> bool:
    return (len(a.config.blocks), a.config.width) == (len(b.config.blocks), b.config.width)


def _layer_errors(b: Model, tokens: np.ndarray, ran_a: tuple, ran_b: tuple) -> dict[str, Array]:
    (_, entered, left, added), (_, _, left_b, _) = ran_a, ran_b
    given = entered.astype(b.config.dtype)
    own = trunk(b.config, b.params, tokens, given, True)[3]
    return {"drift": _relative(left, left_b), "own": _relative(added, own)}


# ---- all windows ----------------------------------------------------------------------------------------


def _summary(a: Model | Outside, b: Model, width: int, seen: list[dict[str, np.ndarray]]) -> Comparison:
    nll_a, nll_b = ([each[name].astype(np.float64) for each in seen] for name in ("nll_a", "nll_b"))
    kl = np.concatenate([each["kl"] for each in seen])
    errors = []
    if "own" in seen[0]:
        drift, own = (np.concatenate([each[name] for each in seen], 1).mean(1) for name in ("drift", "own"))
        errors = [LayerError(float(d), float(o)) for d, o in zip(drift, own, strict=True)]
    return Comparison(
        a=Side(a.name, a.size, a.nbytes, estimate(nll_a)),
        b=Side(b.name, b.size, b.nbytes, estimate(nll_b)),
        context=width,
        windows=len(seen),
        tokens=len(kl),
        difference=estimate([y - x for x, y in zip(nll_a, nll_b, strict=True)]),
        kl=kl,
        agreement=float(np.mean(np.concatenate([each["same"] for each in seen]))),
        largest_logit_difference=float(max(each["gap"].max() for each in seen)),
        layers=tuple(errors),
    )


def estimate(windows: Sequence[np.ndarray]) -> Estimate:
    """Mean over all tokens of windows f64 [n], and its standard errors."""
    values = np.concatenate(windows)
    mean, count, many = values.mean(), len(values), len(windows)
    token = values.std(ddof=1) / math.sqrt(count) if count > 1 else math.nan
    sums = np.array([(window - mean).sum() for window in windows])
    window = math.sqrt((sums**2).sum() * many / (many - 1)) / count if many > 1 else math.nan
    return Estimate(float(mean), float(token), float(window))


# ---- pictures -------------------------------------------------------------------------------------------


def draw_layers(comparison: Comparison, axes: Any) -> None:
    """Per-layer errors on matplotlib axes."""
    numbers = range(len(comparison.layers))
    axes.plot(numbers, [x.drift for x in comparison.layers], "o-", label="stream after the layer, own inputs")
    axes.plot(numbers, [x.own for x in comparison.layers], "s--", label="what the layer adds, A's inputs")
    axes.set(xlabel="layer", ylabel="relative error", ylim=(0, None), title="Error layer by layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if comparison.layers:
        axes.legend(frameon=False)


def draw_kl(comparison: Comparison, axes: Any) -> None:
    """A histogram of the tokens' divergences on matplotlib axes, with mean and 99.9th percentile."""
    smallest = 1e-9
    axes.hist(np.log10(np.maximum(comparison.kl, smallest)), bins=60)
    marks = {"mean": comparison.kl_mean, "99.9 %": comparison.kl_quantile(0.999)}
    for style, (name, value) in zip(("-", "--"), marks.items(), strict=True):
        axes.axvline(math.log10(max(value, smallest)), color="black", linestyle=style, label=f"{name} {value:.2g}")
    axes.set(xlabel="log10 KL(A || B), nats", ylabel="tokens", title="Divergence of the predictions")
    axes.legend(frameon=False)


def picture(comparison: Comparison, path: str | os.PathLike) -> None:
    """Both drawings into one file, its kind told by the ending (.png, .pdf, .svg).

    Raises MissingExtraError without matplotlib, JaxllmError where the file cannot be written."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("a picture needs matplotlib: pip install 'jaxllm[notebook]'") from error
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_layers(comparison, left)
    draw_kl(comparison, right)
    figure.suptitle(f"A: {comparison.a.name}, B: {comparison.b.name}, {comparison.tokens:,} tokens")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise JaxllmError(
            f"the picture cannot be written to {path} ({error}); give a .png, .pdf or .svg"
        ) from error
