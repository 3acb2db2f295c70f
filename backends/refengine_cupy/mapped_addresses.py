"""Addresses of the device behind which memory is mapped, by extents: to map many small pieces takes a driver
much longer than a few large ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from refengine.errors import MemoryManagerError

EXTENT_BYTES = 32 * 2**20
"""The most that is mapped at once, and so the most that a single piece keeps from going back.

On an H200 it takes 44 ms to map, allow and unmap 1 GiB by pieces of 2 MiB, 11 ms by 8 MiB, 3.3 ms by 32 MiB.
"""


class Mapper(Protocol):
    """What maps memory: see ``Driver``."""

    def granularity(self) -> int:
        """Bytes of the least that is mapped."""
        ...

    def reserve(self, nbytes: int) -> int:
        """Addresses without memory."""
        ...

    def free_addresses(self, address: int, nbytes: int) -> None:
        """Give them back."""
        ...

    def map(self, address: int, nbytes: int) -> int:
        """Put memory behind addresses; gives its handle. Raises ``MemoryError`` where there is none left."""
        ...

    def allow(self, address: int, nbytes: int) -> None:
        """Let the device use addresses with memory behind them."""
        ...

    def unmap(self, address: int, nbytes: int, handle: int) -> None:
        """Give what was mapped at once back."""
        ...


@dataclass(eq=False)
class _Extent:
    """Pieces that were mapped together, and go back together: how many of them are backed."""

    pieces: range
    handle: int
    backed: int = 0


class MappedAddresses:
    """Addresses of which pieces get memory.

    Pieces that follow each other and get it at once share an extent, which goes back when the last of them
    does; until then those that are given back are kept for the next that want them.

    Args:
        driver: maps memory.
        nbytes: of addresses.
        device: its name, for errors.
        synchronise: waits until nothing that is queued can use memory any more.
    """

    def __init__(self, driver: Mapper, nbytes: int, device: str, synchronise: Callable[[], None]) -> None:
        self._driver, self._device, self._synchronise = driver, device, synchronise
        self.piece = driver.granularity()
        self._nbytes = -(-nbytes // self.piece) * self.piece
        self.address = driver.reserve(self._nbytes)
        self._extents: dict[int, _Extent] = {}  # by each of their pieces

    @property
    def mapped_bytes(self) -> int:
        """Bytes that the device has given."""
        return len(self._extents) * self.piece

    def back(self, pieces: range) -> None:
        """Put memory behind pieces that follow each other: all or none.

        Raises:
            MemoryManagerError: the device has not so much left.
        """
        mapped: list[_Extent] = []
        try:
            for run in self._missing(pieces):
                handle = self._driver.map(self._place(run.start), len(run) * self.piece)
                mapped.append(_Extent(run, handle))
            for run in _joined(extent.pieces for extent in mapped):
                self._driver.allow(self._place(run.start), len(run) * self.piece)
        except MemoryError as cause:
            self._unmap(mapped)
            wanted = f"{len(pieces) * self.piece / 1e6:,.1f} MB of KV cache"
            raise MemoryManagerError(
                f"{self._device} has no memory left for {wanted}: submit fewer or shorter requests at once, "
                "or start with fewer --kv-tokens"
            ) from cause
        self._extents.update((piece, extent) for extent in mapped for piece in extent.pieces)
        for piece in pieces:
            self._extents[piece].backed += 1

    def unback(self, pieces: range) -> None:
        """Give it back, once nothing that is queued can use it."""
        emptied = []
        for piece in pieces:
            extent = self._extents[piece]
            extent.backed -= 1
            if not extent.backed:
                emptied.append(extent)
        if emptied:
            self._synchronise()
            self._unmap(emptied)
            for extent in emptied:
                for piece in extent.pieces:
                    del self._extents[piece]

    def _missing(self, pieces: range) -> list[range]:
        """Pieces without memory, in runs as long as an extent may be."""
        most, runs = max(1, EXTENT_BYTES // self.piece), list[range]()
        for run in _joined(range(piece, piece + 1) for piece in pieces if piece not in self._extents):
            runs += [range(at, min(at + most, run.stop)) for at in range(run.start, run.stop, most)]
        return runs

    def _place(self, piece: int) -> int:
        return self.address + piece * self.piece

    def _unmap(self, extents: Iterable[_Extent]) -> None:
        for extent in extents:
            nbytes = len(extent.pieces) * self.piece
            self._driver.unmap(self._place(extent.pieces.start), nbytes, extent.handle)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._synchronise()
            self._unmap(set(self._extents.values()))
            self._driver.free_addresses(self.address, self._nbytes)


def _joined(runs: Iterable[range]) -> list[range]:
    """Runs in ascending order, those that meet as one."""
    found: list[range] = []
    for run in runs:
        if found and found[-1].stop == run.start:
            found[-1] = range(found[-1].start, run.stop)
        else:
            found.append(run)
    return found
