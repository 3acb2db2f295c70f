"""The allocator and the block tables: nothing leaks, nothing is handed out twice, errors change nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from refengine.errors import BlockStateError, OutOfBlocksError
from refengine.memory import RELEASED, BlockAllocator, BlockTable, KVCacheManager, KVGroupLayout, KVLayout


def layout(*groups: tuple[int | None, int], block_size: int = 4) -> KVLayout:
    """A layout of groups ``(window, num_blocks)`` with one layer each."""
    return KVLayout(
        block_size,
        np.dtype(np.float32),
        tuple(KVGroupLayout(window, ((i, 2, 8),), blocks) for i, (window, blocks) in enumerate(groups)),
    )


def test_blocks_are_counted_by_reference() -> None:
    """A shared block is free when its last holder lets go, and not before."""
    allocator = BlockAllocator(3)
    block, other = allocator.allocate(2)
    allocator.share(block)
    assert (allocator.references(block), allocator.num_free) == (2, 1)
    assert not allocator.release(block)
    assert allocator.release(block)
    assert allocator.release(other)
    assert allocator.num_free == 3


@pytest.mark.parametrize("action", ["release", "share", "references"])
def test_a_block_that_is_not_held_is_an_error(action: str) -> None:
    """Releasing twice, sharing a free block, naming one that is not there: refused, and nothing changes."""
    allocator = BlockAllocator(2)
    (block,) = allocator.allocate()
    allocator.release(block)
    if action != "references":
        with pytest.raises(BlockStateError):
            getattr(allocator, action)(block)
    with pytest.raises(BlockStateError):
        getattr(allocator, action)(2)
    assert allocator.num_free == 2


def test_allocation_is_all_or_none() -> None:
    """Asking for more blocks than are free takes none."""
    allocator = BlockAllocator(2)
    with pytest.raises(OutOfBlocksError, match="3 KV blocks"):
        allocator.allocate(3)
    assert allocator.num_free == 2


def test_growing_is_all_or_none_over_groups() -> None:
    """Where one group is short, no group's table grows."""
    manager = KVCacheManager(layout((None, 8), (5, 2)))
    manager.grow("a", 4)
    with pytest.raises(OutOfBlocksError):
        manager.grow("a", 20)
    assert manager.held("a") == (1, 1)
    assert manager.free_blocks == (7, 1)


def test_a_window_gives_back_the_blocks_it_has_passed() -> None:
    """With a window of 5 and blocks of 4, position 7 sees 3 to 7, position 8 sees 4 to 8: block 0 goes then."""
    table = BlockTable(BlockAllocator(4), block_size=4, window=5)
    table.grow(10)
    table.release_passed(7)
    assert RELEASED not in table.blocks
    table.release_passed(8)
    assert table.blocks[0] == RELEASED
    assert table.held == 2
    assert len(table.slots(4, 10)) == 6
    with pytest.raises(BlockStateError):
        table.slots(3, 5)
    with pytest.raises(BlockStateError):
        table.slots(9, 13)


def test_sizes_in_bytes() -> None:
    """A block holds keys and values of all its group's layers: 2 · heads · size · positions · 4 bytes."""
    made = layout((None, 8), (5, 2))
    assert made.block_bytes(0) == 2 * 2 * 8 * 4 * 4
    assert made.nbytes == 10 * made.block_bytes(0)


class CacheMachine(RuleBasedStateMachine):
    """Random sequences over two groups; every invariant is recounted from the tables."""

    def __init__(self) -> None:
        super().__init__()
        self.layout = layout((None, 12), (6, 9))
        self.manager = KVCacheManager(self.layout)
        self.lengths: dict[int, int] = {}

    @rule(sequence=st.integers(0, 4), tokens=st.integers(1, 9))
    def extend(self, sequence: int, tokens: int) -> None:
        length = self.lengths.get(sequence, 0) + tokens
        before = self.snapshot()
        try:
            self.manager.grow(sequence, length)
        except OutOfBlocksError:
            assert self.snapshot() == before
            return
        for table in self.manager.tables(sequence):
            slots = table.slots(length - tokens, length)
            assert len(set(slots.tolist())) == tokens
        self.lengths[sequence] = length
        self.manager.release_passed(sequence, length)

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.lengths)))
        self.manager.release(sequence)
        del self.lengths[sequence]

    def snapshot(self) -> list:
        return [
            [table.blocks.tolist() for table in self.manager.tables(sequence)] for sequence in range(5)
        ] + [list(self.manager.free_blocks)]

    @invariant()
    def every_block_is_free_or_held_once(self) -> None:
        for group, (pool, free) in enumerate(zip(self.layout.groups, self.manager.free_blocks, strict=True)):
            held = Counter(
                block
                for sequence in self.lengths
                for block in self.manager.tables(sequence)[group].blocks.tolist()
                if block != RELEASED
            )
            assert set(held.values()) <= {1}
            assert len(held) + free == pool.num_blocks

    @invariant()
    def what_can_still_be_seen_is_held(self) -> None:
        for sequence, length in self.lengths.items():
            for pool, table in zip(self.layout.groups, self.manager.tables(sequence), strict=True):
                first = 0 if pool.window is None else max(0, length - pool.window + 1)
                assert len(table.slots(min(first, length), length)) == length - min(first, length)
                passed = first // self.layout.block_size
                assert (table.blocks[:passed] == RELEASED).all()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
