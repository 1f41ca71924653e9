"""Which weight gets which format: ordered rules over the paths of the parameter tree, and what applies them."""

from __future__ import annotations

import pathlib
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import ml_dtypes
import numpy as np

from jaxllm.arena import Arena
from jaxllm.config import ModelConfig, params_shape
from jaxllm.errors import ConfigError
from jaxllm.files import read_object
from jaxllm.quant.adapted import LoRA
from jaxllm.quant.encode import encode
from jaxllm.quant.formats import UNQUANTIZED, Format, as_json, from_json, named
from jaxllm.quant.qtensor import QTensor, dequantize
from jaxllm.taps import fits

Leaf = np.ndarray | jax.Array | QTensor
Rule = tuple[str, Format | None]
M = TypeVar("M")

DTYPES = ("float16", "bfloat16", "float32")
# Matrices that no product reads: tables, convolutions, norms of several heads.
NOT_PACKED = ("positions", "conv", "q_norm", "k_norm")
FACTORS = ("k_b", "v_b")  # of latent attention; packed only where a rule names them
ROUTER_ROWS = 256  # smaller routers stay as they are, which is MLC-LLM's rule


@dataclass(frozen=True)
class Recipe:
    """Ordered rules (path pattern, format): the first that matches a weight decides; None leaves it as it is.

    Patterns are over canonical paths such as "layers.0.mixer.q.w": `*`, `?` and `[..]` match within one part of
    a path, a part `**` any number of parts. A format may be given by its name. Only matrices that a product or
    the embedding reads take part, whatever a pattern says: no norm, bias, convolution or table of positions.
    `dtype` is that of every other matrix and of the activations; None: as they are.

    Raises ConfigError for what is no rule or no dtype.
    """

    rules: tuple[Rule, ...]
    dtype: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rules, str | Mapping) or not isinstance(self.rules, Sequence):
            raise ConfigError(f"a recipe is a list of (pattern, format), got {reprlib.repr(self.rules)}")
        object.__setattr__(self, "rules", tuple(map(_rule, self.rules)))
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype of a recipe should be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    def assign(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Format | None]:
        """Path -> the format of every weight that a rule decides about, None where it is to stay as it is.

        shapes: path -> shape of every parameter. Raises ConfigError for a rule that decides about none."""
        decided, used = {}, set()
        for path in (p for p in shapes if packable(p, shapes[p])):
            first = next((i for i, (pattern, _) in enumerate(self.rules) if fits(path, pattern)), None)
            if first is not None:
                used.add(first)
                decided[path] = self.rules[first][1]
        if idle := [pattern for i, (pattern, _) in enumerate(self.rules) if i not in used]:
            raise ConfigError(_idle(idle, shapes))
        return decided

    def as_json(self) -> dict[str, Any]:
        """What `read_recipe` reads: {"dtype": .., "rules": [[pattern, name, fields or null], ..]}."""
        return {"dtype": self.dtype, "rules": [[pattern, _format_json(f)] for pattern, f in self.rules]}


def _rule(rule: Any) -> Rule:
    if isinstance(rule, str) or not isinstance(rule, Sequence) or len(rule) != 2 or not isinstance(rule[0], str):
        raise ConfigError(f"a rule of a recipe is (path pattern, format or None), got {reprlib.repr(rule)}")
    pattern, format = rule
    if format is None or isinstance(format, Format):
        return pattern, format
    return pattern, named(format) if isinstance(format, str) else from_json(format)


def _format_json(f: Format | None) -> Any:
    return None if f is None else f.name if f == _known(f.name) else as_json(f)


def _known(name: str) -> Format | None:
    try:
        return named(name)
    except ConfigError:
        return None


def _idle(idle: list[str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    names = sorted({re.sub(r"^layers\.\d+\.", "", p) for p in shapes if packable(p, shapes[p])})
    return (
        f"these rules of the recipe decide about no weight: {', '.join(idle)}; a rule needs a weight that no "
        f"earlier one has. Weights that can be quantized are (below layers.<i>) {', '.join(names)}"
    )


def packable(path: str, shape: tuple[int, ...]) -> bool:
    """Whether the parameter at `path` is a matrix that a product or the embedding reads."""
    *above, last = path.split(".")
    if last in FACTORS:
        return True
    return last == "w" and len(shape) >= 2 and above[-1] not in NOT_PACKED


def recipe(format: str | Format, config: ModelConfig, *, first: Sequence[Rule] = ()) -> Recipe:
    """A format's default rules for a model: every matrix of mixers, feed-forwards and experts, and the
    embedding and the head where the format's `ends` says so; no router of up to 256 experts, no single-row
    gate, no factor of latent attention.

    first: rules that come before them; default rules to which these leave nothing are dropped. Raises
    ConfigError for an unknown name."""
    f = named(format) if isinstance(format, str) else format
    shapes = params_shape(config)
    rules = [(path, f if f.ends else None) for path in ("embed.w", "head.w")]
    if f.name not in UNQUANTIZED:
        kept = {_any_layer(p) for p, shape in shapes.items() if packable(p, shape) and _stays(p, shape)}
        rules += [(pattern, None) for pattern in sorted(kept)]
    given = tuple(map(_rule, first))
    left = [p for p in shapes if packable(p, shapes[p]) and not any(fits(p, pattern) for pattern, _ in given)]
    useful = []
    for pattern, kind in (*rules, ("layers.**", f)):
        if any(fits(p, pattern) for p in left):
            useful.append((pattern, kind))
        left = [p for p in left if not fits(p, pattern)]
    return Recipe((*given, *useful), f.dtype)


def _any_layer(path: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))


def _stays(path: str, shape: tuple[int, ...]) -> bool:
    name = path.split(".")[-2]
    few = name in ("router", "shared_gate") and shape[0] <= ROUTER_ROWS
    return few or path.split(".")[-1] in FACTORS


def read_recipe(path: pathlib.Path) -> Recipe:
    """A recipe from a JSON file: {"dtype": "float16", "rules": [["layers.*.ffn.down.w", "q8f16_1"], ...]}.

    A format is a name, null, or an object of fields ({"base": "int4_g32", "group": 16}). Raises ConfigError
    where the file cannot be read or does not hold a recipe."""
    form = 'it should hold {"dtype": .., "rules": [[pattern, format], ..]}'
    values = read_object(path, ConfigError, form, missing=f"there is no recipe {path}; give the path of one")
    if not values.keys() <= {"dtype", "rules"} or "rules" not in values:
        raise ConfigError(f"{path} is no recipe; {form}")
    try:
        return Recipe(values["rules"], values.get("dtype"))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def converted(x: Leaf, format: Format | None, dtype: str | None = None) -> np.ndarray | QTensor:
    """One parameter in its format, on the host; None leaves its values as they are.

    dtype: of what is not quantized, as `load` has it: vectors stay. A packed leaf is expanded and rounded
    again where another format is asked for. Raises as `encode` does.
    """
    if isinstance(x, QTensor):
        x = jax.tree.map(np.asarray, x)
        if format is None or format == x.format:
            return x.astype(dtype) if dtype else x
        x = dequantize(x, np.float32)
    x = np.asarray(x)
    x = x.astype(np.float32) if x.dtype == np.float64 else x
    if format is None:
        return x.astype(_numpy(dtype)) if dtype and x.ndim >= 2 else x
    if format.name in UNQUANTIZED:
        return x.astype(_numpy(format.levels))
    q = encode(x, format)
    return q.astype(dtype) if dtype else q


def _numpy(dtype: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def quantize(params: dict, recipe: Recipe, *, on_tensor: Callable[[str], None] | None = None) -> dict:
    """The parameters with every weight in the format that the recipe gives it, on the default device.

    on_tensor is called with each path when it is done. The peak is both trees and one tensor in f32 blocks;
    `checkpoint.native.convert` quantizes files without holding either. Adapters stay beside the weights they
    adapt. Raises ConfigError for a rule that decides about no weight, and as `encode` does.
    """
    formats = recipe.assign({path: tuple(leaf.shape) for path, leaf in _leaves(params)})
    arena = Arena()

    def one(keys, leaf):
        path = _path(keys)
        if isinstance(leaf, LoRA):
            return replace(leaf, w=one(keys, leaf.w))
        made = arena.put(converted(leaf, formats.get(path), recipe.dtype))
        if on_tensor:
            on_tensor(path)
        return made

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=_is_packed)


def quantize_model(model: M, recipe_or_format: Recipe | Format | str) -> M:
    """A jaxllm.Model with its parameters quantized by a recipe, or by a format's default one.

    Its activations get the recipe's dtype. Raises ConfigError for an unknown format or an unused rule."""
    given = recipe_or_format
    rules = given if isinstance(given, Recipe) else recipe(given, model.config)
    config = replace(model.config, dtype=rules.dtype or model.config.dtype)
    return replace(model, config=config, params=quantize(model.params, rules))


def _is_packed(x: Any) -> bool:
    return isinstance(x, QTensor | LoRA)


def _leaves(params: dict) -> list[tuple[str, Leaf]]:
    found, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_packed)
    return [(_path(keys), leaf) for keys, leaf in found]


def _path(keys: tuple) -> str:
    return ".".join(str(k.key if isinstance(k, jax.tree_util.DictKey) else k.idx) for k in keys)
