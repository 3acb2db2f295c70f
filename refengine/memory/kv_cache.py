"""The KV cache's layout, and who holds which of its blocks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from refengine.errors import OutOfBlocksError
from refengine.memory.block_table import RELEASED, BlockTable
from refengine.memory.blocks import BlockAllocator


@dataclass(frozen=True)
class KVGroupLayout:
    """The pool of the layers that share block tables.

    Attributes:
        window: their attention window, ``None`` for the whole context.
        layers: for each: its number, its kv heads and its head size.
        num_blocks: blocks in the pool.
    """

    window: int | None
    layers: tuple[tuple[int, int, int], ...]
    num_blocks: int


@dataclass(frozen=True)
class KVLayout:
    """The shape of a KV cache.

    Attributes:
        block_size: positions per block.
        dtype: of keys and values.
        groups: the pools.
    """

    block_size: int
    dtype: np.dtype[np.floating]
    groups: tuple[KVGroupLayout, ...]

    def block_bytes(self, group: int) -> int:
        """Bytes of one block: keys and values of all the group's layers.

        Clauses: KVC-14.
        """
        elements = sum(heads * size for _, heads, size in self.groups[group].layers)
        return 2 * elements * self.block_size * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all pools."""
        return sum(self.block_bytes(g) * group.num_blocks for g, group in enumerate(self.groups))

    @property
    def num_blocks(self) -> tuple[int, ...]:
        """Blocks in the pool of each group."""
        return tuple(group.num_blocks for group in self.groups)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each group."""
        return tuple(group.window for group in self.groups)


class KVCacheManager:
    """Block tables of all sequences, over the pools of all groups. Holds no keys or values itself.

    Clauses: KVC-12.
    """

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self._allocators = tuple(BlockAllocator(group.num_blocks) for group in layout.groups)
        self._tables: dict[Hashable, tuple[BlockTable, ...]] = {}

    def tables(self, sequence: Hashable) -> tuple[BlockTable, ...]:
        """The block table of a sequence in each group; made when first asked for."""
        if sequence not in self._tables:
            self._tables[sequence] = tuple(
                BlockTable(allocator, self.layout.block_size, group.window)
                for allocator, group in zip(self._allocators, self.layout.groups, strict=True)
            )
        return self._tables[sequence]

    @property
    def free_blocks(self) -> tuple[int, ...]:
        """Free blocks of each group."""
        return tuple(allocator.num_free for allocator in self._allocators)

    def missing(self, sequence: Hashable, tokens: int) -> tuple[int, ...]:
        """Blocks of each group that a sequence lacks to hold ``tokens`` positions."""
        return tuple(table.missing(tokens) for table in self.tables(sequence))

    def held(self, sequence: Hashable) -> tuple[int, ...]:
        """Blocks of each group that a sequence refers to."""
        return tuple(table.held for table in self.tables(sequence))

    def grow(self, sequence: Hashable, tokens: int) -> None:
        """Give a sequence room for ``tokens`` positions in every group; all or none.

        Raises:
            OutOfBlocksError: a group has too few free blocks; no table has changed.

        Clauses: KVC-7, KVC-8.
        """
        missing = self.missing(sequence, tokens)
        for needed, free in zip(missing, self.free_blocks, strict=True):
            if needed > free:
                raise OutOfBlocksError(f"{needed} KV blocks are needed and {free} are free")
        for table in self.tables(sequence):
            table.grow(tokens)

    def release_passed(self, sequence: Hashable, next_position: int) -> None:
        """Give back the blocks that windows have passed."""
        for table in self.tables(sequence):
            table.release_passed(next_position)

    def release(self, sequence: Hashable) -> None:
        """Give back all blocks of a sequence and forget it.

        Clauses: KVC-11.
        """
        for table in self._tables.pop(sequence, ()):
            table.release_all()

    def capacity(self, group: int) -> int:
        """Positions the pool of a group holds."""
        return self.layout.groups[group].num_blocks * self.layout.block_size

    def padded_tables(self, sequences: Sequence[Hashable], group: int) -> NDArray[np.int32]:
        """The tables of several sequences as one array ``[S, M]``, padded with ``RELEASED``.

        Clauses: KVC-13.
        """
        tables = [self.tables(sequence)[group].blocks for sequence in sequences]
        padded = np.full((len(tables), max(map(len, tables))), RELEASED, np.int32)
        for row, table in zip(padded, tables, strict=True):
            row[: len(table)] = table
        return padded
