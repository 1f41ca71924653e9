"""Memory for parameters on a CPU, such that Linux may back it with large pages.

Decoding reads every weight once a token, and a core reads faster from pages of 2 MiB than from pages of 4 KiB
(Zen 4: 21 and 17 GB/s). Linux gives large pages to whole, aligned pieces of memory that ask for them, unless
/sys/kernel/mm/transparent_hugepage/enabled says `never`. numpy asks for every array of 4 MiB or more that it makes
(NUMPY_MADVISE_HUGEPAGE=0 in the environment: for none), XLA for none. So small matrices, and whatever XLA copies,
lay in small pages; here they share blocks that are large enough.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

LINE = 64  # JAX on a CPU takes an array over without a copy where its address is a multiple of this
PAGE = 2**21  # bytes of a large page, on x86 and on most of the others
ASKED = 2**22  # bytes from which on numpy asks for large pages
LARGEST = 2**26  # bytes of a block; the first has ASKED, each of the next as many as there were before


class Arena:
    """Puts arrays onto the default device: on a CPU into blocks of its own, which JAX takes over piece by piece.

    A block is freed when the last of its arrays is. Large arrays that JAX can take over are not copied.
    """

    def __init__(self) -> None:
        device = next(iter(jax.device_put(np.zeros(0, np.float32)).devices()))
        self._on_cpu = device.platform == "cpu"
        self._block, self._used, self._given = np.empty(0, np.uint8), 0, 0

    def put(self, tree: Any) -> Any:
        """The tree (arrays, packed weights) as jax.Arrays; returns when they are on the device.

        What is put must not be written to afterwards: its memory may be that of the result."""
        placed = jax.tree.map(self._placed, tree) if self._on_cpu else tree
        return jax.block_until_ready(jax.device_put(placed))

    def _placed(self, x: Any) -> np.ndarray:
        x = np.asarray(x)
        ready = x.nbytes >= ASKED and x.flags.c_contiguous and x.ctypes.data % LINE == 0
        if ready or x.nbytes == 0:
            return x
        room = self._room(x.nbytes).view(x.dtype).reshape(x.shape)
        np.copyto(room, x)
        return room

    def _room(self, size: int) -> np.ndarray:
        """u8 [size] at a multiple of LINE."""
        start = -(-self._used // LINE) * LINE
        if start + size > len(self._block):
            start, self._block = 0, _block(max(size, min(LARGEST, max(ASKED, self._given))))
            self._given += len(self._block)
        self._used = start + size
        return self._block[start : start + size]


def _block(size: int) -> np.ndarray:
    """u8 of at least `size` bytes, whole large pages. Those that nobody writes to take no memory."""
    return aligned(-(-size // PAGE) * PAGE, PAGE)


def aligned(size: int, to: int = LINE) -> np.ndarray:
    """u8 [size], of any content, whose address is a multiple of `to`."""
    data = np.empty(size + to, np.uint8)
    start = -data.ctypes.data % to
    return data[start : start + size]
