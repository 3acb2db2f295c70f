"""Memory is mapped by extents, and goes back with the last piece of one."""

from __future__ import annotations

import pytest

from refengine.errors import MemoryManagerError
from refengine_cupy import mapped_addresses
from refengine_cupy.mapped_addresses import MappedAddresses

PIECE, START = 2**21, 2**40
EXTENT = mapped_addresses.EXTENT_BYTES // PIECE


class Memory:
    """A driver that keeps books, and refuses what a real one would."""

    def __init__(self, most: int = 2**40) -> None:
        self.most, self.mapped, self.allowed = most, dict[int, tuple[int, int]](), set[int]()
        self.calls: list[str] = []

    def granularity(self) -> int:
        return PIECE

    def reserve(self, nbytes: int) -> int:
        return START

    def free_addresses(self, address: int, nbytes: int) -> None:
        self.calls.append("free")

    def map(self, address: int, nbytes: int) -> int:
        if self.nbytes + nbytes > self.most:
            raise MemoryError
        assert all(address + nbytes <= a or a + n <= address for a, (n, _) in self.mapped.items())
        self.calls.append("map")
        self.mapped[address] = nbytes, len(self.calls)
        return len(self.calls)

    def allow(self, address: int, nbytes: int) -> None:
        self.calls.append("allow")
        self.allowed |= set(range(address, address + nbytes, PIECE))

    def unmap(self, address: int, nbytes: int, handle: int) -> None:
        assert self.mapped.pop(address) == (nbytes, handle)
        self.allowed -= set(range(address, address + nbytes, PIECE))
        self.calls.append("unmap")

    def synchronise(self) -> None:
        self.calls.append("synchronise")

    @property
    def nbytes(self) -> int:
        return sum(nbytes for nbytes, _ in self.mapped.values())

    def usable(self, pieces: range) -> bool:
        return {START + piece * PIECE for piece in pieces} <= self.allowed


def addresses(memory: Memory) -> MappedAddresses:
    return MappedAddresses(memory, 1000 * PIECE, "a card", memory.synchronise)


def test_what_is_wanted_at_once_is_mapped_by_extents_and_allowed_once() -> None:
    memory = Memory()
    found = addresses(memory)
    found.back(range(3, 3 + 2 * EXTENT + 5))
    assert memory.calls == ["map"] * 3 + ["allow"]
    assert memory.usable(range(3, 8 + 2 * EXTENT))
    assert found.mapped_bytes == memory.nbytes == (2 * EXTENT + 5) * PIECE


def test_an_extent_goes_back_with_its_last_piece() -> None:
    """All that is free goes back together, after one wait."""
    memory = Memory()
    found = addresses(memory)
    found.back(range(2 * EXTENT))
    found.unback(range(1, 2 * EXTENT - 1))
    assert found.mapped_bytes == 2 * EXTENT * PIECE
    found.unback(range(1))
    assert found.mapped_bytes == memory.nbytes == EXTENT * PIECE
    found.unback(range(2 * EXTENT - 1, 2 * EXTENT))
    assert found.mapped_bytes == memory.nbytes == 0
    found.back(range(3 * EXTENT))
    memory.calls.clear()
    found.unback(range(3 * EXTENT))
    assert memory.calls == ["synchronise"] + ["unmap"] * 3


def test_pieces_that_an_extent_keeps_are_taken_first() -> None:
    memory = Memory()
    found = addresses(memory)
    found.back(range(4))
    found.unback(range(1, 3))
    memory.calls.clear()
    found.back(range(1, 2))
    assert memory.calls == []
    found.back(range(2, 6))
    assert memory.calls == ["map", "allow"]
    assert memory.usable(range(6))
    assert memory.nbytes == 6 * PIECE


def test_a_run_without_room_takes_nothing() -> None:
    memory = Memory(most=(EXTENT + 3) * PIECE)
    found = addresses(memory)
    found.back(range(2))
    with pytest.raises(MemoryManagerError, match="a card has no memory left for"):
        found.back(range(2, 2 * EXTENT))
    assert memory.nbytes == found.mapped_bytes == 2 * PIECE
    found.back(range(2, EXTENT))
    assert memory.usable(range(EXTENT))


def test_all_goes_back_with_the_addresses() -> None:
    memory = Memory()
    found = addresses(memory)
    found.back(range(EXTENT + 1))
    del found
    assert memory.nbytes == 0
    assert memory.calls[-1] == "free"
