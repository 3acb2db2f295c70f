"""How full the pools of a KV cache are, and by whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass

from refengine.memory.block_table import RELEASED
from refengine.memory.kv_cache import KVCacheManager


@dataclass(frozen=True)
class PoolUse:
    """What a pool's blocks are used for; a shared block counts once.

    Attributes:
        blocks: in the pool.
        used: held by somebody, the prefix cache included.
        idle: of these, held by the prefix cache alone.
        shared: of the used, held by several sequences.
        cached: of the used, held by the prefix cache, alone or not.
        references: by how many entries of tables the used ones are named.
        committed: blocks of the segments that hold a used one.
        unwritten: positions of blocks in tables at which nothing has been written yet.
        block_size: positions of a block.
        block_bytes: its bytes.
    """

    blocks: int
    used: int
    idle: int
    shared: int
    cached: int
    references: int
    committed: int
    unwritten: int
    block_size: int
    block_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of the used blocks."""
        return self.used * self.block_bytes

    @property
    def waste(self) -> float:
        """Of the positions in sequences' blocks, the part that is not written yet: 0 to 1.

        Clauses: KVC-26.
        """
        positions = (self.used - self.idle) * self.block_size
        return self.unwritten / positions if positions else 0.0

    @property
    def fragmentation(self) -> float:
        """Of the blocks whose memory is taken, the part that nobody uses: 0 to 1."""
        return 1 - self.used / self.committed if self.committed else 0.0

    @property
    def sharing(self) -> float:
        """How many tables name a block that any names, on average: 1 where nothing is shared."""
        named = self.used - self.idle
        return self.references / named if named else 1.0


@dataclass(frozen=True)
class SequenceUse:
    """What a sequence holds.

    Attributes:
        blocks: of each pool.
        shared: of these, the ones that other sequences hold too.
        own_bytes: of blocks that no other sequence holds.
        shared_bytes: of those that others hold too.
    """

    blocks: tuple[int, ...]
    shared: tuple[int, ...]
    own_bytes: int
    shared_bytes: int


def pool_use(manager: KVCacheManager, number: int) -> PoolUse:
    """Count a pool's use, from the tables of all sequences.

    Clauses: KVC-26.
    """
    pool, size = manager.pools[number], manager.layout.block_size
    named = Counter(block for s in manager.sequences for block in _blocks(manager, s, number))
    unwritten: dict[int, int] = {}
    for sequence in manager.sequences:
        table, position = manager.tables(sequence)[number], manager.next_position(sequence)
        for index in range(position // size, len(table)):
            if (block := table[index]) != RELEASED:  # shared, it is as full as the one that wrote most says
                left = min(size, (index + 1) * size - position)
                unwritten[block] = min(left, unwritten.get(block, size))
    segment_blocks = manager.layout.segment_blocks(number)
    committed = sum(
        min(pool.num_blocks - segment * segment_blocks, segment_blocks) for segment in pool.segments
    )
    return PoolUse(
        blocks=pool.num_blocks,
        used=pool.num_used,
        idle=len(pool.idle),
        shared=sum(times > 1 for times in named.values()),
        cached=pool.num_cached,
        references=named.total(),
        committed=committed,
        unwritten=sum(unwritten.values()),
        block_size=size,
        block_bytes=manager.layout.block_bytes(number),
    )


def sequence_use(manager: KVCacheManager, sequence: Hashable) -> SequenceUse:
    """Count what a sequence holds; blocks that only the prefix cache holds beside it are its own."""
    held = [_blocks(manager, sequence, number) for number in range(len(manager.pools))]
    blocks = tuple(map(len, held))
    shared = tuple(
        sum(manager.sharers(number, block) > 1 for block in numbers) for number, numbers in enumerate(held)
    )
    sizes = [manager.layout.block_bytes(number) for number in range(len(held))]
    shared_bytes = sum(map(int.__mul__, shared, sizes))
    return SequenceUse(blocks, shared, sum(map(int.__mul__, blocks, sizes)) - shared_bytes, shared_bytes)


def _blocks(manager: KVCacheManager, sequence: Hashable, number: int) -> list[int]:
    """The blocks of a sequence in a pool."""
    return [block for block in manager.tables(sequence)[number].blocks.tolist() if block != RELEASED]
