"""The allocator and the block tables: nothing leaks, nothing is handed out twice, errors change nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from refengine.errors import BlockStateError, OutOfBlocksError, SequenceStateError
from refengine.memory import (
    RELEASED,
    BlockAllocator,
    BlockCopy,
    BlockTable,
    KVCacheManager,
    KVGroupLayout,
    KVLayout,
    PrefixCache,
    SequenceUse,
    pool_use,
    sequence_use,
    verify,
)


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
    """A block holds keys and values of its layers, 2 · heads · size · positions · 4 bytes; pools are whole pages."""
    made = layout((None, 9), (5, 2))
    assert made.block_bytes(0) == 2 * 2 * 8 * 4 * 4
    assert made.segment_blocks(0) == 8
    assert made.nbytes == (16 + 8) * made.block_bytes(0)


def test_a_recent_table_keeps_the_first_block_while_its_window_sees_it() -> None:
    """Behind a window of 6, position 9 sees 4 to 9: the first block of 4 goes, and that of position 9 stays."""
    allocator = BlockAllocator(8)
    table = BlockTable(allocator, block_size=4, window=6, recent=True)
    table.grow(12)
    table.release_passed(8)  # sees 3 to 8
    assert table.blocks.tolist() == [0, RELEASED, 2]
    table.release_passed(9)
    assert table.blocks.tolist() == [RELEASED, RELEASED, 2]
    table.release_all()
    assert allocator.num_free == 8


def test_positions_written_again_are_the_writers_own() -> None:
    """A sequence that goes back, as after rejected guesses, writes to no block that it has published."""
    manager = KVCacheManager(layout((None, 12)), PrefixCache())
    manager.grow("a", 8)
    manager.publish("a", range(8), "", 8)
    manager.release_passed("a", 8)
    manager.release_passed("a", 6)
    assert manager.missing("a", 8) == (1,)
    manager.grow("a", 8)
    assert manager.tables("a")[0].blocks.tolist() == [0, 2]
    assert manager.take_copies() == [BlockCopy(0, 1, 2)]
    verify(manager)
    manager.publish("a", [0, 1, 2, 3, 4, 5, 9, 9], "", 8)
    verify(manager, {"a": [0, 1, 2, 3, 4, 5, 9, 9]})


def test_the_whole_pool_can_be_had_again_after_a_refusal() -> None:
    """A sequence that was refused its first block leaves no sequence behind."""
    manager = KVCacheManager(layout((None, 2)))
    with pytest.raises(OutOfBlocksError):
        manager.grow("a", 9)
    assert manager.sequences == ()
    with pytest.raises(SequenceStateError, match="'a' holds no blocks"):
        manager.fork("a", "b")
    manager.grow("b", 8)


def test_reclaimable_blocks_are_those_that_nobody_else_holds() -> None:
    """Of two that share a block, each alone would give back its own; both together the shared one too."""
    manager = KVCacheManager(layout((None, 12)))
    manager.grow("a", 4)
    manager.release_passed("a", 4)
    manager.fork("a", "b")
    manager.grow("b", 12)
    assert manager.reclaimable(["a"]) == (0,)
    assert manager.reclaimable(["b"]) == (2,)
    assert manager.reclaimable(["a", "b"]) == (3,)


def test_what_became_free_is_told_once_and_where_its_memory_stays() -> None:
    """Blocks of segments that nobody uses any more are not told: their memory goes back."""
    manager = KVCacheManager(layout((None, 40)))  # segments of 8 blocks
    manager.grow("a", 4)
    manager.grow("b", 36)
    manager.release("b")
    assert manager.take_freed() == [(0, block) for block in range(1, 8)]
    assert manager.take_freed() == []
    assert manager.take_segment_changes() == ([(0, 0)], [])


def test_waste_of_a_mixed_load_is_below_four_percent() -> None:
    """64 sequences of 100 to 2,000 tokens in blocks of 16, a pool that keeps all and a window of 512."""
    numbers = np.random.default_rng(0)
    groups = tuple(KVGroupLayout(window, ((0, 2, 64),), 9000) for window in (None, 512))
    manager = KVCacheManager(KVLayout(16, np.dtype(np.float16), groups))
    for sequence, length in enumerate(numbers.integers(100, 2001, 64).tolist()):
        manager.grow(sequence, length)
        manager.release_passed(sequence, length)
    for pool in range(2):
        use = pool_use(manager, pool)
        assert use.waste < 0.04
        assert use.waste == pytest.approx(use.unwritten / (use.used * 16))
    assert pool_use(manager, 0).fragmentation < 0.01  # a last segment's blocks, at most


def test_use_counts_shared_blocks_once_and_names_them() -> None:
    """Two sequences with a common block: 3 blocks, of which each holds 2, one of them shared."""
    manager = KVCacheManager(layout((None, 12)))
    manager.grow("a", 8)
    manager.release_passed("a", 7)
    manager.fork("a", "b")
    manager.grow("b", 8)
    manager.take_copies()
    use, nbytes = pool_use(manager, 0), manager.layout.block_bytes(0)
    assert (use.used, use.shared, use.references, use.idle, use.nbytes) == (3, 1, 4, 0, 3 * nbytes)
    assert use.sharing == 4 / 3
    assert sequence_use(manager, "b") == SequenceUse((2,), (1,), nbytes, nbytes)
    assert use.fragmentation == 1 - 3 / 8


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
