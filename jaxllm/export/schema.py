"""The manifest's JSON schema, and the part of JSON Schema that it uses (json-schema.org, draft 2020-12)."""

from __future__ import annotations

import functools
import json
import pathlib
import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

FILE = pathlib.Path(__file__).with_name("manifest.schema.json")
TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}


@functools.cache
def schema() -> dict[str, Any]:
    """That of manifest.json."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def problems(value: Any, rule: Mapping[str, Any], where: str = "manifest") -> Iterator[str]:
    """What is wrong with a value, each as a part of a sentence that begins with its place.

    Knows $ref, type, const, enum, pattern, minimum, required, properties, additionalProperties and items.
    """
    if "$ref" in rule:
        rule = schema()["$defs"][rule["$ref"].rpartition("/")[2]]
    if "type" in rule and not _is(value, rule["type"]):
        yield f"{where} should be {_words(rule['type'])}, got {reprlib.repr(value)}"
        return
    if "const" in rule and value != rule["const"]:
        yield f"{where} should be {rule['const']!r}, got {reprlib.repr(value)}"
    if "enum" in rule and value not in rule["enum"]:
        yield f"{where} should be one of {', '.join(map(str, rule['enum']))}, got {reprlib.repr(value)}"
    if isinstance(value, str) and "pattern" in rule and not re.search(rule["pattern"], value):
        yield f"{where} should match {rule['pattern']}, got {reprlib.repr(value)}"
    if _is(value, "number") and value < rule.get("minimum", value):
        yield f"{where} should be at least {rule['minimum']}, got {value}"
    if isinstance(value, dict):
        yield from _of_object(value, rule, where)
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from problems(item, rule.get("items", {}), f"{where}[{i}]")


def _of_object(value: dict, rule: Mapping[str, Any], where: str) -> Iterator[str]:
    known, others = rule.get("properties", {}), rule.get("additionalProperties", {})
    for name in rule.get("required", ()):
        if name not in value:
            yield f"{where}.{name} is missing"
    for name, item in value.items():
        if name in known or isinstance(others, Mapping):
            yield from problems(item, known.get(name, others), f"{where}.{name}")
        elif not others:
            yield f"{where}.{name} is not known"


def _is(value: Any, types: str | list[str]) -> bool:
    names = [types] if isinstance(types, str) else types
    if isinstance(value, bool):  # which Python takes for a whole number
        return "boolean" in names
    return any(isinstance(value, TYPES[name]) for name in names)


def _words(types: str | list[str]) -> str:
    return types if isinstance(types, str) else " or ".join(types)
