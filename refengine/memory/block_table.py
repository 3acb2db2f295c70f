"""Block tables: which blocks hold a sequence's keys and values, position by position."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from refengine.errors import BlockStateError
from refengine.memory.blocks import BlockAllocator

RELEASED = -1
"""Stands in a table for a block that a sliding window has passed."""


class BlockTable:
    """The blocks of one sequence in one KV group.

    Args:
        allocator: the group's pool.
        block_size: positions per block.
        window: the group's attention window, ``None`` for the whole context.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int, window: int | None = None) -> None:
        self._allocator, self._block_size, self._window = allocator, block_size, window
        self._blocks: list[int] = []
        self._passed = 0

    @property
    def blocks(self) -> NDArray[np.int32]:
        """The blocks in order of position, int32; ``RELEASED`` for those given back."""
        return np.array(self._blocks, np.int32)

    @property
    def held(self) -> int:
        """Blocks this table refers to."""
        return len(self._blocks) - self._passed

    def missing(self, tokens: int) -> int:
        """Blocks that must be added before positions ``0 … tokens - 1`` have a slot."""
        return max(0, -(-tokens // self._block_size) - len(self._blocks))

    def grow(self, tokens: int) -> None:
        """Add blocks until positions ``0 … tokens - 1`` have a slot; all or none.

        Raises:
            OutOfBlocksError: too few are free; the table is as it was.

        Clauses: KVC-7.
        """
        self._blocks += self._allocator.allocate(self.missing(tokens))

    def slots(self, start: int, stop: int) -> NDArray[np.int32]:
        """The slots of positions ``start … stop - 1``: ``block · block_size + offset``, int32.

        Raises:
            BlockStateError: a position has no block (yet, or any more).

        Clauses: KVC-1, KVC-10.
        """
        positions = np.arange(start, stop)
        if stop > len(self._blocks) * self._block_size or start < self._passed * self._block_size:
            raise BlockStateError(f"positions {start} to {stop - 1} have no block")
        blocks = self.blocks[positions // self._block_size]
        return (blocks * self._block_size + positions % self._block_size).astype(np.int32)

    def release_passed(self, next_position: int) -> None:
        """Give back the blocks that no query at ``next_position`` or later can see.

        Clauses: KVC-9.
        """
        if self._window is None:
            return
        first_seen = max(0, next_position - self._window + 1) // self._block_size
        for index in range(self._passed, min(first_seen, len(self._blocks))):
            self._allocator.release(self._blocks[index])
            self._blocks[index] = RELEASED
            self._passed = index + 1

    def release_all(self) -> None:
        """Give back every block; the table is empty then."""
        for block in self._blocks[self._passed :]:
            self._allocator.release(block)
        self._blocks, self._passed = [], 0
