"""Block tables: which blocks hold a sequence's keys and values, position by position."""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

from refengine.errors import BlockStateError
from refengine.memory.blocks import BlockAllocator

RELEASED = -1
"""Stands in a table for a block that has been given back, or that was never needed."""


class BlockTable:
    """The blocks of one sequence in one pool.

    What it keeps as the sequence moves on: everything; with a window, the blocks that the next query sees;
    where only what is recent counts, the first block and that of the next position, and the first for no
    longer than a window sees it.

    Args:
        allocator: the pool.
        block_size: positions per block.
        window: the attention window, ``None`` for the whole context.
        recent: whether only the first block and that of the next position are kept.

    Attributes:
        entries: the blocks in order of position, ``RELEASED`` for those given back; to be changed by this
            table alone.
    """

    def __init__(
        self, allocator: BlockAllocator, block_size: int, window: int | None = None, recent: bool = False
    ) -> None:
        self._allocator, self._block_size = allocator, block_size
        self._window, self._recent = window, recent
        self.entries = array("i")
        self._released = 0
        self._passed = int(recent)  # entries below have been looked at; a recent pool's first stands apart

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> int:
        return self.entries[index]

    @property
    def blocks(self) -> NDArray[np.int32]:
        """The blocks in order of position, int32; ``RELEASED`` for those given back. A copy."""
        return np.array(self.entries, np.int32)

    @property
    def held(self) -> int:
        """Blocks this table refers to."""
        return len(self.entries) - self._released

    def missing(self, tokens: int) -> int:
        """Blocks that must be added before positions ``0 … tokens - 1`` have an entry."""
        lacking = -(-tokens // self._block_size) - len(self.entries)
        return lacking if lacking > 0 else 0

    def grow(self, tokens: int) -> None:
        """Add blocks until positions ``0 … tokens - 1`` have an entry; all or none.

        Raises:
            OutOfBlocksError: too few are free; the table is as it was.

        Clauses: KVC-7.
        """
        self.extend(self._allocator.allocate(self.missing(tokens)))

    def extend(self, blocks: list[int]) -> None:
        """Add blocks behind the others; their references become the table's."""
        self.entries.extend(blocks)

    def slots(self, start: int, stop: int) -> NDArray[np.int32]:
        """The slots of positions ``start … stop - 1``: ``block · block_size + offset``, int32.

        Raises:
            BlockStateError: a position has no block (yet, or any more).

        Clauses: KVC-1, KVC-10.
        """
        return np.array(self.slot_list(start, stop), np.int32)

    def slot_list(self, start: int, stop: int) -> list[int]:
        """The slots of positions ``start … stop - 1``, as ``slots`` gives them."""
        size, known = self._block_size, len(self.entries)
        first, last = start // size, (stop - 1) // size
        if first == last < known and 0 <= start < stop and (block := self.entries[first]) != RELEASED:
            slot = block * size + start % size  # as in every step but a prompt's
            return [slot] if stop - start == 1 else list(range(slot, slot + stop - start))
        blocks = self.entries[first : last + 1]
        if not 0 <= start <= stop or last >= known or RELEASED in blocks:
            raise BlockStateError(f"positions {start} to {stop - 1} have no block")
        slots = [slot for block in blocks for slot in range(block * size, (block + 1) * size)]
        return slots[start - first * size : stop - first * size]

    def release_passed(self, next_position: int) -> None:
        """Give back the blocks that no query at ``next_position`` or later needs.

        Clauses: KVC-9, KVC-16.
        """
        if self._window is None and not self._recent:
            return
        first_seen = self._first_seen(next_position)
        first_kept = next_position // self._block_size if self._recent else first_seen
        while self._passed < min(first_kept, len(self.entries)):
            self._give_back(self._passed)
            self._passed += 1
        if self._recent and first_seen and self.entries and self.entries[0] != RELEASED:
            self._give_back(0)

    def release_all(self) -> None:
        """Give back every block, the last one first; the table is empty then."""
        for block in reversed(self.entries):
            if block != RELEASED:
                self._allocator.release(block)
        self.entries, self._released, self._passed = array("i"), 0, int(self._recent)

    def needed(self, blocks: int) -> range:
        """Which entries of a prefix of so many whole blocks a query behind it needs.

        Clauses: KVC-23.
        """
        first = self._first_seen(blocks * self._block_size)
        return range(min(1, blocks) if first == 0 else 0) if self._recent else range(first, blocks)

    def adopt(self, blocks: list[int]) -> None:
        """Begin with blocks that others hold, ``RELEASED`` where none is needed; adds a reference to each."""
        for block in blocks:
            if block != RELEASED:
                self._allocator.share(block)
        self.entries = array("i", blocks)
        self._released = blocks.count(RELEASED)

    def restore(self, blocks: list[int]) -> None:
        """Begin with blocks that were allocated for this table, ``RELEASED`` where it has none.

        Clauses: KVC-27.
        """
        self.entries = array("i", blocks)
        self._released = blocks.count(RELEASED)

    def copy(self) -> BlockTable:
        """A table that shares every block of this one.

        Clauses: KVC-17.
        """
        other = type(self)(self._allocator, self._block_size, self._window, self._recent)
        other.adopt(self.entries.tolist())
        other._passed = self._passed
        return other

    def replace(self, index: int, block: int) -> None:
        """Put another block in an entry's place; the reference to the one before is given back."""
        self._allocator.release(self.entries[index])
        self.entries[index] = block

    def _first_seen(self, next_position: int) -> int:
        """The block of the first position that a query at ``next_position`` sees."""
        if self._window is None:
            return 0
        return max(0, next_position - self._window + 1) // self._block_size

    def _give_back(self, index: int) -> None:
        if self.entries[index] != RELEASED:  # of a prefix that was adopted, those never came
            self._allocator.release(self.entries[index])
            self.entries[index] = RELEASED
            self._released += 1


def slots_of(
    tables: NDArray[np.int32], rows: NDArray[np.integer], positions: NDArray[np.int32], block_size: int
) -> NDArray[np.int32]:
    """The slots of many positions at once: ``block · block_size + offset``, int32 ``[T]``.

    Args:
        tables: ``[S, M]``, padded with ``RELEASED``.
        rows: whose position it is, ``[T]``, in 0 … S - 1.
        positions: ``[T]``, at least 0; not none.
        block_size: positions per block.

    Raises:
        BlockStateError: a position has no block (yet, or any more).

    Clauses: KVC-1, KVC-10.
    """
    entries = positions // block_size
    if entries[entries.argmax()] < tables.shape[1]:
        blocks = tables[rows, entries]
        if blocks[blocks.argmin()] > RELEASED:
            slots: NDArray[np.int32] = (blocks - entries) * block_size + positions
            return slots
    raise BlockStateError("a position of the step has no block")
