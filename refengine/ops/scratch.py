"""Working memory of an op: what it needs while it runs, taken from one planned buffer."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from refengine.errors import MemoryManagerError

ALIGNMENT = 64
"""Arrays begin at multiples of a cache line (bytes)."""


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to whole cache lines."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Scratch:
    """Hands out arrays from one buffer, last taken first given back.

    An op that allocates here, and nowhere else, takes no memory that was not planned: its share of the arena
    is the buffer. Without a buffer every array is memory of its own, and only counted: so the golden ops run
    eagerly, and so a plan can be checked.

    Args:
        buffer: uint8, beginning at a multiple of ``ALIGNMENT``; ``None`` for memory of the system.

    Attributes:
        peak: the most bytes ever held at once.
    """

    def __init__(self, buffer: NDArray[np.uint8] | None = None) -> None:
        self._buffer = buffer
        self._taken = self.peak = 0

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array with any contents, C-contiguous.

        Raises:
            MemoryManagerError: the buffer is used up: the op's declared workspace is too small, a bug.
        """
        kind = np.dtype(dtype)
        start, self._taken = self._taken, self._taken + aligned(math.prod(shape) * kind.itemsize)
        self.peak = max(self.peak, self._taken)
        if self._buffer is None:
            return np.empty(shape, kind)
        if self._taken > len(self._buffer):
            raise MemoryManagerError(
                f"an op asks for {self._taken} bytes of working memory and {len(self._buffer)} are planned: "
                "its declared workspace is wrong"
            )
        return np.ndarray(shape, kind, self._buffer, start)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array of zeros."""
        array = self.empty(shape, dtype)
        array.fill(0)
        return array

    def frame(self) -> AbstractContextManager[None]:
        """What is taken inside is given back at the end: a loop's turns share memory."""
        return _Frame(self, self._taken)

    def give_back(self, taken: int) -> None:
        """Hold only the first ``taken`` bytes from now on."""
        self._taken = taken


class _Frame:
    """Remembers how much was taken. A class, because a generator takes three times as long, at every op."""

    def __init__(self, scratch: Scratch, taken: int) -> None:
        self._scratch, self._taken = scratch, taken

    def __enter__(self) -> None:
        pass

    def __exit__(self, *raised: object) -> None:
        self._scratch.give_back(self._taken)
