"""Files are written whole or not at all."""

from __future__ import annotations

import os
import pathlib


def write_whole(path: str | os.PathLike, data: bytes) -> None:
    """Write `data` under a temporary name beside `path`, then move it into place."""
    path = pathlib.Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
