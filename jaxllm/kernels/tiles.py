"""Tile sizes as data: defaults for each platform and amount of rows, and what `jaxllm tune` found to be faster."""

from __future__ import annotations

import functools
import json
import os
import pathlib
from dataclasses import asdict, dataclass, fields, replace

import jax

from jaxllm.errors import JaxllmError
from jaxllm.files import write_whole

MOST = 10**9  # rows without an upper limit


@dataclass(frozen=True)
class Tiles:
    """What one program of a kernel works on. Attention has its slots in `columns`, and no `rows` and `out`."""

    rows: int  # rows of x
    out: int  # rows of the weight
    columns: int  # columns of both
    split: int = 1  # programs that share one tile's columns and are added up (GPU)
    warps: int = 4  # of 32 threads (GPU; on Hopper always 4)
    stages: int = 3  # loads in flight (GPU)


# (up to that many rows, tiles), in order. Chosen by arithmetic, not by measurements: tiles of a few hundred kB
# keep a TPU's DMA busy and fit its VMEM twice; a GPU's fit registers and shared memory.
DEFAULTS = {
    "tpu": {
        "matmul": (
            (16, Tiles(16, 512, 2048)),
            (64, Tiles(64, 512, 2048)),
            (128, Tiles(128, 256, 2048)),
            (MOST, Tiles(256, 256, 2048)),
        ),
        "grouped": ((16, Tiles(16, 256, 2048)), (64, Tiles(64, 256, 2048)), (MOST, Tiles(128, 256, 2048))),
        "attend": ((MOST, Tiles(0, 0, 512)),),
    },
    "cuda": {
        "matmul": (
            (16, Tiles(16, 64, 256, split=4, warps=4, stages=4)),
            (32, Tiles(32, 64, 128, split=4, warps=4, stages=4)),
            (64, Tiles(64, 64, 128, split=2, warps=4, stages=4)),
            (MOST, Tiles(128, 128, 64, warps=8, stages=3)),
        ),
        "grouped": (
            (16, Tiles(16, 64, 128, warps=4, stages=4)),
            (64, Tiles(64, 64, 64, warps=4, stages=4)),
            (MOST, Tiles(128, 128, 64, warps=8, stages=3)),
        ),
        "attend": ((MOST, Tiles(0, 0, 64, split=64, warps=4, stages=2)),),
    },
    "hopper": {
        "matmul": (
            (8, Tiles(8, 64, 256, split=8, stages=4)),
            (16, Tiles(16, 64, 256, split=8, stages=4)),
            (32, Tiles(32, 64, 128, split=8, stages=4)),
            (MOST, Tiles(64, 64, 128, split=4, stages=4)),
        ),
        "grouped": (
            (8, Tiles(8, 64, 256, stages=4)),
            (16, Tiles(16, 64, 256, stages=4)),
            (32, Tiles(32, 64, 128, stages=4)),
            (MOST, Tiles(64, 64, 128, stages=4)),
        ),
        "attend": ((MOST, Tiles(0, 0, 64, split=64, stages=3)),),
    },
}
PROGRAMS = 264  # two for each multiprocessor of an H100: columns are split no further


def chosen(op: str, platform: str, key: str, rows: int) -> Tiles:
    """The tiles of an operation: those stored for `key` on this kind of device, or the defaults for `rows`."""
    found = stored().get(_kind(platform), {}).get(name(op, platform, key, rows))
    return found or next(tiles for most, tiles in DEFAULTS[platform][op] if rows <= most)


def name(op: str, platform: str, key: str, rows: int) -> str:
    """What tiles are stored under: a GPU of Hopper has two bodies for some operations."""
    return f"{'hopper ' if platform == 'hopper' else ''}{op} {key} {bucket(rows)}"


def bucket(rows: int) -> int:
    """The power of two from 16 to 4096 that speaks for `rows`."""
    return min(4096, max(16, 1 << (rows - 1).bit_length()))


def _kind(platform: str) -> str:
    device = jax.devices()[0]
    here = {"gpu": ("cuda", "hopper")}.get(device.platform, (device.platform,))
    return device.device_kind if platform in here else platform


def capability() -> float:
    """The compute capability of the NVIDIA GPU at hand; without one infinite: programs are for newer ones then."""
    value = getattr(jax.devices()[0], "compute_capability", "")
    return float(value) if value.replace(".", "", 1).isdecimal() else float("inf")


def path() -> pathlib.Path:
    """The file of stored choices, in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "jaxllm" / "tiles.json"


@functools.cache
def stored() -> dict[str, dict[str, Tiles]]:
    """{kind of device: {"op key rows": tiles}} as `store` wrote it; empty where nothing was.

    Raises JaxllmError for a file that is not such a table."""
    if not path().is_file():
        return {}
    try:
        table = json.loads(path().read_text(encoding="utf-8"))
        return {kind: {key: read(t) for key, t in found.items()} for kind, found in table.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise JaxllmError(
            f"{path()} is no table of tile sizes ({error}); delete it, or run jaxllm tune again"
        ) from None


def read(values: dict[str, int]) -> Tiles:
    """Tiles from their fields. Raises ValueError for no whole number, or a size that is no power of two."""
    known = [f.name for f in fields(Tiles)]
    if not isinstance(values, dict) or any(
        n not in known or type(v) is not int or v < 0 for n, v in values.items()
    ):
        raise ValueError(f"tiles are {', '.join(known)}, each a whole number; got {values!r}")
    made = Tiles(**values)
    if any(size & (size - 1) for size in (made.rows, made.out, made.columns)) or not made.columns:
        raise ValueError(f"rows, out and columns of tiles are powers of two; got {values!r}")
    return made


def store(kind: str, found: dict[str, Tiles]) -> pathlib.Path:
    """Add choices for a kind of device to the stored ones; they hold from the next program on."""
    table = {k: {key: asdict(t) for key, t in v.items()} for k, v in stored().items()}
    table.setdefault(kind, {}).update({key: asdict(t) for key, t in found.items()})
    path().parent.mkdir(parents=True, exist_ok=True)
    write_whole(path(), json.dumps(table, indent=1).encode())
    stored.cache_clear()
    return path()


def fitted(tiles: Tiles, blocks: int, N: int, C: int, group: int | None) -> Tiles:
    """Tiles of a GPU's program for `blocks` of rows and N x C weights in groups: powers of two that divide."""
    out, columns = tiles.out, tiles.columns
    while N % out:
        out //= 2
    while C % columns:
        columns //= 2
    columns = max(columns, group or 0)
    steps, wanted = C // columns, -(-PROGRAMS // (blocks * (N // out)))
    split = max(n for n in range(1, tiles.split + 1) if steps % n == 0 and n <= wanted)
    return replace(tiles, out=out, columns=columns, split=split)
