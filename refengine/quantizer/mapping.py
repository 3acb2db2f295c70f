"""Mapped files, and the pages of one beneath an array, given back after use."""

from __future__ import annotations

import mmap
import os
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

WINDOW = 2**21
"""Touching a page of a mapped file maps others around it: Linux maps aligned runs of 64 KiB
(``fault_around_bytes``), and whole pieces of its file cache, aligned too, up to the size of a huge page."""

_RELEASE = getattr(mmap, "MADV_DONTNEED", None)


class MappedFile(mmap.mmap):
    """A file's bytes, read-only, that remember which file they are of.

    Attributes:
        identity: what tells this file, as it was when it was mapped, from others on this machine: device,
            inode, bytes, and the time of its last change.
    """

    identity: tuple[int, int, int, int]

    @classmethod
    def of(cls, file: BinaryIO) -> Self:
        """All of an open file.

        Raises:
            ValueError: it is empty.
        """
        mapped = cls(file.fileno(), 0, access=mmap.ACCESS_READ)
        status = os.fstat(file.fileno())
        mapped.identity = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        return mapped


class Pages:
    """The pages of a read-only file mapping that hold an array.

    The array keeps its contents: pages that were given back are read again when they are touched. Where it
    lies in other memory, or the system takes no such advice, nothing happens. (To announce pages before use,
    MADV_WILLNEED, made cold reads slower than the system's own reading ahead.)

    Args:
        array: contiguous, or nothing is ever done.
    """

    def __init__(self, array: NDArray[np.uint8]) -> None:
        self._map = _mapping(array) if array.flags.c_contiguous else None
        if self._map is not None:
            self._map_address = _address(np.frombuffer(self._map, np.uint8))
            self._address, self._size = _address(array), array.nbytes

    @property
    def place(self) -> tuple[int, ...] | None:
        """Which file the array is in, as :attr:`MappedFile.identity` says, and at which byte of it."""
        if not isinstance(self._map, MappedFile):
            return None
        return *self._map.identity, self._address - self._map_address

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Bytes ``start`` to ``stop`` of the array are not needed for now: their pages leave the process.

        They stay in the system's file cache for as long as it likes. Whole windows came and whole windows go:
        what a neighbour loses, it maps again.
        """
        if self._map is None or _RELEASE is None or not hasattr(self._map, "madvise"):
            return
        first = (self._address + start) // WINDOW * WINDOW - self._map_address
        last = self._address + (self._size if stop is None else stop)
        last = -(-last // WINDOW) * WINDOW - self._map_address
        first, last = max(first, 0), min(last, len(self._map))
        if first < last:
            self._map.madvise(_RELEASE, first, last - first)


def _mapping(array: object) -> mmap.mmap | None:
    """The file mapping beneath an array; ``None`` where there is none that can be read again."""
    while array is not None and not isinstance(array, mmap.mmap):
        array = array.obj if isinstance(array, memoryview) else getattr(array, "base", None)
    return array if array is not None and memoryview(array).readonly else None


def _address(array: NDArray[np.uint8]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
