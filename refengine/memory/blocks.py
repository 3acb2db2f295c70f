"""The block allocator: fixed-size blocks of one pool, counted by reference."""

from __future__ import annotations

from refengine.errors import BlockStateError, OutOfBlocksError


class BlockAllocator:
    """Hands out blocks ``0 … num_blocks - 1`` and takes them back.

    A block is free, or it has as many references as tables name it. A fresh pool hands out its lowest blocks
    first, and the same requests in the same order get the same blocks.

    Clauses: KVC-2, KVC-3.
    """

    def __init__(self, num_blocks: int) -> None:
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool, free or not."""
        return len(self._references)

    @property
    def num_free(self) -> int:
        """Blocks nobody holds."""
        return len(self._free)

    def references(self, block: int) -> int:
        """How many tables name a block."""
        return self._references[self._checked(block)]

    def allocate(self, count: int = 1) -> list[int]:
        """Take ``count`` free blocks, each with one reference; all or none.

        Raises:
            OutOfBlocksError: fewer are free.

        Clauses: KVC-2, KVC-5.
        """
        if count > len(self._free):
            raise OutOfBlocksError(
                f"{count} KV blocks are needed and {len(self._free)} of {self.num_blocks} are free"
            )
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, block: int) -> None:
        """Add a reference to a block in use.

        Raises:
            BlockStateError: the block is free.

        Clauses: KVC-2, KVC-6.
        """
        if self.references(block) == 0:
            raise BlockStateError(f"block {block} is free and cannot be shared")
        self._references[block] += 1

    def release(self, block: int) -> bool:
        """Drop a reference; tells whether the block is free now.

        Raises:
            BlockStateError: the block is free already.

        Clauses: KVC-4, KVC-6.
        """
        if self.references(block) == 0:
            raise BlockStateError(f"block {block} is released twice")
        self._references[block] -= 1
        if self._references[block]:
            return False
        self._free.append(block)
        return True

    def _checked(self, block: int) -> int:
        if not 0 <= block < self.num_blocks:
            raise BlockStateError(f"block {block} is not one of the pool's {self.num_blocks}")
        return block
