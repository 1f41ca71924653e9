"""A ModelConfig as JSON and back, exactly: every dataclass an object with its "type", every field written out."""

from __future__ import annotations

import math
import reprlib
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from jaxllm import config as parts
from jaxllm.config import ModelConfig, params_shape
from jaxllm.errors import ConfigError

TYPES = {name: part for name, part in vars(parts).items() if isinstance(part, type) and is_dataclass(part)}
MOST = 2**48  # of any size


def to_json(config: ModelConfig) -> dict[str, Any]:
    """The config as JSON values. Floats keep every bit; an infinity is {"type": "float", "value": "inf"}."""
    return _written(config)


def from_json(values: Any) -> ModelConfig:
    """The inverse of `to_json`.

    Raises ConfigError for an unknown type or field, one that is missing, and a value that is not of its field's
    type; and where the sizes give a parameter no sensible shape.
    """
    try:
        config = _read(values, ModelConfig, "config")
        sizes = [n for shape in params_shape(config).values() for n in shape]
    except RecursionError as error:
        raise ConfigError("the config is nested too deeply to be one") from error
    except (ArithmeticError, TypeError, AttributeError, LookupError) as error:
        raise ConfigError(f"the config's parts do not go together ({type(error).__name__}: {error})") from error
    if not all(0 < n < MOST for n in sizes):
        raise ConfigError("the config gives a parameter a size that is not positive, or absurd")
    return config


def _written(value: Any) -> Any:
    if is_dataclass(value):
        return {"type": type(value).__name__} | {f.name: _written(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [_written(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"type": "float", "value": str(float(value))}
    return value


def _read(value: Any, hint: Any, where: str) -> Any:
    """`value` as what `hint` says. ConfigError, naming the place, where it is not."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for choice in choices:
        if _suits(value, choice):
            return _made(value, choice, where)
    names = " or ".join(getattr(c, "__name__", str(c)) for c in choices)
    raise ConfigError(f"{where} should be {names}, got {reprlib.repr(value)}")


def _suits(value: Any, hint: Any) -> bool:
    """Whether the value is of this kind, its own parts aside."""
    if is_dataclass(hint):
        return isinstance(value, Mapping) and value.get("type") == hint.__name__
    if hint is float:
        infinite = isinstance(value, Mapping) and value in ({"type": "float", "value": v} for v in ("inf", "-inf"))
        return infinite or (type(value) in (int, float) and math.isfinite(value))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list)
    if typing.get_origin(hint) is typing.Literal:
        return type(value) is str and value in typing.get_args(hint)
    return type(value) is hint


def _made(value: Any, hint: Any, where: str) -> Any:
    if is_dataclass(hint):
        return _object(value, hint, where)
    if typing.get_origin(hint) is tuple:
        return _tuple(value, typing.get_args(hint), where)
    return float(value["value"]) if isinstance(value, Mapping) else value


def _object(value: Mapping[str, Any], kind: type, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    names = {f.name for f in fields(kind)}
    if wrong := sorted(names ^ (set(value) - {"type"})):
        raise ConfigError(f"{where} should be a {kind.__name__} with the fields {sorted(names)}; see {wrong}")
    return kind(**{name: _read(value[name], hints[name], f"{where}.{name}") for name in names})


def _tuple(value: list, hints: tuple, where: str) -> tuple:
    kinds = [hints[0]] * len(value) if hints[-1] is Ellipsis else hints
    if len(kinds) != len(value):
        raise ConfigError(f"{where} should have {len(kinds)} values, got {len(value)}")
    return tuple(_read(v, kind, f"{where}[{i}]") for i, (v, kind) in enumerate(zip(value, kinds, strict=True)))
