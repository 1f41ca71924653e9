"""Calibrated quantization: a model and text to a model in few bits, one block after the other.

Each block sees what the quantized blocks before it make of the text, and within a block each linear sees what the
quantized linears before it make. Scales are folded first, while the block is still in floats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import numpy as np

from jaxllm.arena import Arena
from jaxllm.calibration import awq, smooth
from jaxllm.calibration.clip import clipped
from jaxllm.calibration.fold import Block, fold, get, put
from jaxllm.calibration.gptq import gptq
from jaxllm.calibration.grid import of_columns, recoded
from jaxllm.calibration.moments import Batches, Moments, block_config, embedded, observe, through
from jaxllm.calibration.reads import Read, last, reads
from jaxllm.calibration.text import check
from jaxllm.checkpoint.canonical import flatten, nest
from jaxllm.config import ModelConfig, params_shape
from jaxllm.errors import ConfigError
from jaxllm.model import Model
from jaxllm.progress import progress
from jaxllm.quant import QTensor, Recipe, dequantize, encode
from jaxllm.quant.formats import UNQUANTIZED, Format
from jaxllm.quant.recipe import converted

LOOKUP = 0.1  # weight of a tied embedding's lookups beside its products, both of mean second moment one
AT_ONCE = 2**24  # values rounded together
Rounding = Callable[[np.ndarray, np.ndarray, Format], QTensor]  # (w [N, K], second moments [K, K], format)


def plain(w: np.ndarray, hessian: np.ndarray, f: Format) -> QTensor:
    """Plain rounding, whatever the inputs are."""
    return encode(w, f)


def compensated(w: np.ndarray, hessian: np.ndarray, f: Format) -> QTensor:
    """GPTQ on scales that clipping chose."""
    grid = clipped(w, hessian, f)
    return recoded(gptq(w, hessian, of_columns(grid)), grid)


@dataclass(frozen=True)
class Method:
    """How scales are folded before rounding, if at all, and how weights are rounded."""

    search: Callable[..., np.ndarray] | None
    rounding: Rounding


METHODS = {
    "clip": Method(None, clipped),
    "gptq": Method(None, compensated),
    "awq": Method(awq.search, clipped),
    "awq+gptq": Method(awq.search, compensated),
    "smooth": Method(smooth.search, plain),
    "smooth+gptq": Method(smooth.search, compensated),
}


def calibrate(model: Model, recipe: Recipe, tokens: np.ndarray, *, method: str = "gptq") -> Model:
    """The model with its weights in the recipe's formats, rounded so that it changes least on text like `tokens`.

    tokens: i32 [W, T], windows of text. method: a name of METHODS. Weights whose inputs have no tap (see
    `unobserved`) are rounded plainly. Besides the result, memory holds the text's residual stream f32 [W * T, D]
    and one block in f32 with its second moments.

    Raises ConfigError for an unknown method, a rule without a weight or weights that are packed already;
    JaxllmError for tokens that are no windows of text.
    """
    if method not in METHODS:
        raise ConfigError(f"calibration methods are {', '.join(METHODS)}; got {method!r}")
    check(model, tokens)
    formats = recipe.assign(params_shape(model.config))
    work = _Work(model.config, formats, METHODS[method])
    params = model.params | {"layers": []}
    with progress(f"calibrating ({method})", len(model.config.blocks) + 2) as advance:
        params["embed"] = work.embedding(model, tokens)
        advance()
        batches = embedded(model.config, model.params | {"embed": _values(params["embed"])}, tokens)
        for i, p in enumerate(model.params["layers"]):
            p = work.block(i, p, batches)
            batches = through(block_config(model.config, i), _values(p), batches)
            params["layers"].append(p)
            advance()
        params |= work.head(model, batches)
        advance()
    config = replace(model.config, dtype=recipe.dtype or model.config.dtype)
    return replace(model, config=config, params=_stored(params, model.params, formats, recipe.dtype))


def unobserved(config: ModelConfig, formats: dict[str, Format | None]) -> list[str]:
    """Paths of the weights to quantize whose inputs have no tap: they are rounded plainly."""
    seen = {f"{name}.w" for name in last(config).linears} | {"embed.w"}
    for i, b in enumerate(config.blocks):
        seen |= {f"layers.{i}.{name}.w" for read in reads(b) for name in read.linears}
    return [path for path, f in formats.items() if f is not None and path not in seen]


@dataclass(frozen=True)
class _Work:
    """One calibration: what each part of the model becomes, as numpy arrays and packed weights."""

    config: ModelConfig
    formats: dict[str, Format | None]
    method: Method

    def format(self, path: str) -> Format | None:
        """The format that codes are made for; None for what stays or is only cast."""
        f = self.formats.get(path)
        return None if f is None or f.name in UNQUANTIZED else f

    def embedding(self, model: Model, tokens: np.ndarray) -> Block:
        part, f = model.params["embed"], self.format("embed.w")
        if f is None:
            return part
        w = np.asarray(part["w"], np.float32)
        hessian = self.both_uses(model, tokens) if self.config.tied else np.eye(w.shape[1])
        return {**part, "w": self.rounded(w, hessian, f)}

    def both_uses(self, model: Model, tokens: np.ndarray) -> np.ndarray:
        """Second moments for a tied embedding: what the float model's head sees, and equal ones for lookups."""
        batches = embedded(self.config, model.params, tokens)
        for i, p in enumerate(model.params["layers"]):
            batches = through(block_config(self.config, i), _values(p), batches)
        hessian = self.seen_by_head(model.params["norm"], batches).hessian
        return hessian / np.diag(hessian).mean() + LOOKUP * np.eye(len(hessian))

    def seen_by_head(self, norm: Block, batches: Batches) -> Moments:
        read = last(self.config)
        return observe(block_config(self.config, len(self.config.blocks)), norm, batches, (read,))[read]

    def head(self, model: Model, batches: Batches) -> Block:
        """The final norm and the head, where the model has one of its own."""
        read, f = last(self.config), self.format("head.w")
        if f is None:
            return {}
        p = _values({name: model.params[name] for name in ("norm", "head")})
        moments = self.seen_by_head(p["norm"], batches)
        if self.method.search:
            s = self.method.search([(p["head"]["w"], f)], moments, read)
            p, moments = fold(p, read, s), moments.scaled(s)
        return put(p, "head.w", self.rounded(p["head"]["w"], moments.hessian, f))

    def block(self, i: int, p: Block, batches: Batches) -> Block:
        """Block i with its weights packed."""
        config, wanted = block_config(self.config, i), reads(self.config.blocks[i])
        p = self.folded(i, _values(p), batches) if self.method.search else _values(p)
        for read in wanted:
            formats = {name: f for name in read.linears if (f := self.format(f"layers.{i}.{name}.w"))}
            moments = observe(config, _values(p), batches, (read,))[read] if formats else None
            for name, f in formats.items():
                p = put(p, f"{name}.w", self.packed(get(p, f"{name}.w"), moments, f))
        rest = [name for name, f in self.formats.items() if f and name.startswith(f"layers.{i}.")]
        for path in (name.removeprefix(f"layers.{i}.") for name in rest):
            if self.format(f"layers.{i}.{path}") and not isinstance(get(p, path), QTensor):
                p = put(p, path, encode(get(p, path), self.format(f"layers.{i}.{path}")))
        return p

    def folded(self, i: int, p: Block, batches: Batches) -> Block:
        """Block i in f32 with the scales that its rounding likes best; its results are the same."""
        able = tuple(r for r in reads(self.config.blocks[i]) if r.maker and self.formats_of(i, p, r))
        moments = observe(block_config(self.config, i), p, batches, able) if able else {}
        for read in able:
            p = fold(p, read, self.method.search(self.formats_of(i, p, read), moments[read], read))
        return p

    def formats_of(self, i: int, p: Block, read: Read) -> list[tuple[np.ndarray, Format]]:
        """The readers that will be packed, with their formats."""
        paths = [f"{name}.w" for name in read.linears]
        return [(get(p, path), f) for path in paths if (f := self.format(f"layers.{i}.{path}"))]

    def packed(self, w: np.ndarray, moments: Moments, f: Format) -> QTensor:
        """w [N, K], or [E, N, K] with moments of each expert."""
        if w.ndim == 2:
            return self.rounded(w, moments.hessian, f)
        made = [self.rounded(w[e], moments.expert(e).hessian, f) for e in range(len(w))]
        return jax.tree.map(lambda *parts: np.stack(parts), *made)

    def rounded(self, w: np.ndarray, hessian: np.ndarray, f: Format) -> QTensor:
        """w [N, K], some rows at a time where each has scales of its own: it takes several times their memory."""
        if f.rows != 1 or f.global_scale:
            return self.method.rounding(w, hessian, f)
        rows = max(1, AT_ONCE // w.shape[1])
        made = [self.method.rounding(w[i : i + rows], hessian, f) for i in range(0, len(w), rows)]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *made)


def _is_packed(x: object) -> bool:
    return isinstance(x, QTensor)


def _values(p: Block) -> Block:
    """Parameters in f32 on the host, packed ones expanded."""

    def one(x):
        return dequantize(x, np.float32) if _is_packed(x) else np.asarray(x, np.float32)

    return jax.tree.map(one, p, is_leaf=_is_packed)


def _stored(new: dict, old: dict, formats: dict[str, Format | None], dtype: str | None) -> dict:
    """The parameters on the device, each in the dtype it had or the recipe gives; scaled vectors in f32."""
    before = flatten(old)

    def one(path, x):
        was = before[path]
        if _is_packed(x):
            return x.astype(dtype or was.dtype)
        if x.ndim < 2:
            return was if np.array_equal(np.asarray(was, np.float32), x) else x
        return converted(np.asarray(x).astype(was.dtype), formats.get(path), dtype)

    arena = Arena()
    return nest({path: arena.put(one(path, x)) for path, x in flatten(new).items()})
