"""Files are written whole or not at all; an object of JSON is read, or a sentence says why not."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any


def write_whole(path: str | os.PathLike, data: bytes) -> None:
    """Write `data` under a temporary name beside `path`, then move it into place."""
    path = pathlib.Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_object(
    path: pathlib.Path, error: type[Exception], then: str, *, missing: str | None = None
) -> dict[str, Any]:
    """The JSON object in a UTF-8 file.

    Raises `error` where it cannot be read or holds something else: a sentence that ends with `then`, what to do,
    or `missing` where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        absent = missing if isinstance(fault, FileNotFoundError) else None
        raise error(absent or f"{path} cannot be read ({fault}); {then}") from fault
    except (ValueError, RecursionError) as fault:
        raise error(f"{path} is not valid JSON ({fault}); {then}") from fault
    if not isinstance(value, dict):
        raise error(f"{path} should hold an object, got {type(value).__name__}; {then}")
    return value
