"""The block allocator: fixed-size blocks of one pool, counted by reference, lowest first."""

from __future__ import annotations

from heapq import heappop, heappush

from refengine.errors import BlockStateError, OutOfBlocksError


class BlockAllocator:
    """Hands out blocks ``0 … num_blocks - 1`` and takes them back.

    A block is free, or it has as many references as there are holders. The lowest free blocks are handed out
    first, so that use gathers at the pool's low end and its high segments empty. Takes memory for the blocks
    that were ever used, not for those that could be.

    Args:
        num_blocks: blocks in the pool.
        segment_blocks: consecutive blocks whose memory is taken and given back together.

    Clauses: KVC-2, KVC-3, KVC-15.
    """

    def __init__(self, num_blocks: int, segment_blocks: int = 1) -> None:
        self._num_blocks, self._segment_blocks = num_blocks, segment_blocks
        self._references: list[int] = []  # of the blocks that were ever used; all others are free
        self._returned: list[int] = []  # a heap: those of them that are free
        self._freed: set[int] = set()
        self._used_in: list[int] = []  # by segment
        self._known: set[int] = set()  # segments in use as last told
        self._touched: set[int] = set()  # segments that filled or emptied since then

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool, free or not."""
        return self._num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out."""
        return self._num_blocks - len(self._references) + len(self._returned)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return len(self._references) - len(self._returned)

    def references(self, block: int) -> int:
        """How many holders a block has."""
        self._check(block)
        return self._references[block] if block < len(self._references) else 0

    def allocate(self, count: int = 1) -> list[int]:
        """Take the ``count`` lowest free blocks, each with one reference; all or none.

        Raises:
            OutOfBlocksError: fewer are free.

        Clauses: KVC-2, KVC-3, KVC-5.
        """
        if count > self.num_free:
            raise OutOfBlocksError(
                f"{count} KV blocks are needed and {self.num_free} of {self.num_blocks} are free"
            )
        return [self._take() for _ in range(count)]

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
        """Drop a reference; tells whether the block has none now.

        Raises:
            BlockStateError: the block is free already.

        Clauses: KVC-4, KVC-6.
        """
        if self.references(block) == 0:
            raise BlockStateError(f"block {block} is released twice")
        self._references[block] -= 1
        if self._references[block]:
            return False
        heappush(self._returned, block)
        self._freed.add(block)
        self._count(block, -1)
        return True

    @property
    def segments(self) -> tuple[int, ...]:
        """The segments that hold a block in use, ascending.

        Clauses: KVC-15.
        """
        return tuple(segment for segment, used in enumerate(self._used_in) if used)

    def take_segment_changes(self) -> tuple[list[int], list[int]]:
        """Segments that came into use, and that fell out of it, since this was last asked; both ascending.

        Clauses: KVC-15.
        """
        if not self._touched:  # as in most steps
            return [], []
        changed = sorted(s for s in self._touched if (self._used_in[s] > 0) != (s in self._known))
        self._touched.clear()
        self._known.symmetric_difference_update(changed)
        return [s for s in changed if s in self._known], [s for s in changed if s not in self._known]

    def take_freed(self) -> list[int]:
        """Blocks that became free since this was last asked, ascending.

        Some may be in use again. Those of segments that nobody uses any more are left out: their memory goes
        back as it is.
        """
        freed = sorted(block for block in self._freed if self._used_in[block // self._segment_blocks])
        self._freed.clear()
        return freed

    def overwritten(self, block: int) -> None:
        """Leave a block out of what ``take_freed`` tells: all of it is about to be written."""
        self._freed.discard(block)

    def _take(self) -> int:
        if self._returned:
            block = heappop(self._returned)
            self._references[block] = 1
        else:
            block = len(self._references)
            self._references.append(1)
        self._count(block, 1)
        return block

    def _count(self, block: int, change: int) -> None:
        segment = block // self._segment_blocks
        if segment == len(self._used_in):  # blocks are first used in order
            self._used_in.append(0)
        self._used_in[segment] += change
        if self._used_in[segment] == max(change, 0):  # the first block came, or the last one went
            self._touched.add(segment)

    def _check(self, block: int) -> None:
        if not 0 <= block < self._num_blocks:
            raise BlockStateError(f"block {block} is not one of the pool's {self._num_blocks}")
