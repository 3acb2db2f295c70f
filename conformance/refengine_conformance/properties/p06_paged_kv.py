"""Chapter *Paged KV*: blocks, tables and segments. All is counted anew from what was asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations

import numpy as np
from hypothesis import strategies as st

from refengine.errors import BlockStateError, OutOfBlocksError, RefengineError
from refengine.memory import RELEASED, BlockAllocator, KVGroupLayout, KVLayout
from refengine_conformance.kv_tables import (
    LIVES,
    NAMES,
    POOL,
    ROOMY,
    SEVERAL,
    WINDOW,
    WINDOWS,
    happens,
    layouts,
    new_cache,
    snapshot,
    succeeds,
    tables_of,
)
from refengine_conformance.registry import holds
from refengine_conformance.subject import Subject

GROWTH = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(1, 30)), min_size=1, max_size=6)
"""Sequences, and to how many positions they grow."""


CALLS = st.lists(
    st.tuples(st.sampled_from(["allocate", "allocate", "share", "release", "release"]), st.integers(0, 4)),
    max_size=20,
)
"""Calls of an allocator: how many blocks to allocate; which of the blocks to share or release."""


@holds("KVC-1", "kv_cache", tier="state")
def a_position_lies_in_its_block(subject: Subject, data: st.DataObject) -> None:
    """The slots of any stretch of positions, one by one."""
    layout, cache = new_cache(subject, data.draw(ROOMY))
    size = layout.block_size
    for name in NAMES:
        cache.grow(name, data.draw(st.integers(1, 12)))
    length = data.draw(st.integers(1, 20))
    cache.grow("a", length)
    start, stop = sorted(data.draw(st.lists(st.integers(0, length), min_size=2, max_size=2, unique=True)))
    for table in cache.tables("a"):
        blocks = table.blocks.tolist()
        expected = [blocks[p // size] * size + p % size for p in range(start, stop)]
        assert table.slots(start, stop).tolist() == expected


@holds("KVC-2", "allocator", tier="state")
def an_allocated_block_was_free(subject: Subject, data: st.DataObject) -> None:
    """Through any calls: pool, free blocks and references agree with a count of who took and gave what."""
    pool = data.draw(POOL)
    allocator = subject.allocator(pool)
    held: Counter[int] = Counter()
    for call in data.draw(CALLS):
        if call[0] == "allocate" and call[1] <= pool - len(held):
            blocks = allocator.allocate(call[1])
            assert len(set(blocks)) == len(blocks) == call[1]
            assert all(0 <= block < pool for block in blocks)
            assert not held.keys() & set(blocks)
            held.update(blocks)
        elif call[0] != "allocate" and held:
            block = sorted(held)[call[1] % len(held)]
            getattr(allocator, call[0])(block)
            held[block] += 1 if call[0] == "share" else -1
            held = +held
        assert (allocator.num_blocks, allocator.num_free) == (pool, pool - len(held))
        assert [allocator.references(block) for block in range(pool)] == [held[b] for b in range(pool)]


@holds("KVC-2", "kv_cache", tier="state")
def no_two_sequences_hold_a_block(subject: Subject, data: st.DataObject) -> None:
    """Through any life of several sequences: every block of a pool is free, or in one table, once."""
    layout, cache = new_cache(subject, data.draw(layouts()))
    for act in data.draw(LIVES):
        happens(cache, act)
        for group, (pool, free) in enumerate(zip(layout.num_blocks, cache.free_blocks, strict=True)):
            named = [block for name in NAMES for block in tables_of(cache, name)[group] if block != RELEASED]
            assert len(set(named)) == len(named)
            assert set(named) <= set(range(pool))
            assert free == pool - len(named)


@holds("KVC-3", "allocator", tier="state")
def the_lowest_free_blocks_are_handed_out(subject: Subject, data: st.DataObject) -> None:
    """Ascending, and none that is higher than one left free; whatever came back, and in which order."""
    pool = data.draw(POOL)
    allocator, returned = subject.allocator(pool), data.draw(st.permutations(range(pool)))
    releases = [("release", block) for block in returned[: data.draw(st.integers(0, pool))]]
    for call in [("allocate", pool), *releases, ("allocate", len(releases) // 2), *data.draw(CALLS)]:
        free = [block for block in range(pool) if allocator.references(block) == 0]
        result = call_of(allocator, call)
        if call[0] == "allocate" and call[1] <= len(free):
            assert result == free[: call[1]]


@holds("KVC-3", "allocator", tier="state", level="L2")
def the_same_calls_give_the_same_blocks(subject: Subject, data: st.DataObject) -> None:
    """Two pools, one history."""
    pool, calls = data.draw(POOL), data.draw(CALLS)
    one, other = subject.allocator(pool), subject.allocator(pool)
    for call in calls:
        assert call_of(one, call) == call_of(other, call)


@holds("KVC-4", "allocator", tier="state")
def a_block_is_free_when_its_last_holder_lets_go(subject: Subject, data: st.DataObject) -> None:
    """As many releases as there were references, of which the last alone frees."""
    pool = data.draw(POOL)
    allocator = subject.allocator(pool)
    block = data.draw(st.sampled_from(allocator.allocate(data.draw(st.integers(1, pool)))))
    free, holders = allocator.num_free, data.draw(st.integers(1, 5))
    for _ in range(holders - 1):
        allocator.share(block)
    for left in range(holders, 0, -1):
        assert allocator.references(block) == left
        assert allocator.num_free == free
        assert allocator.release(block) == (left == 1)
    assert allocator.num_free == free + 1
    assert block in allocator.allocate(free + 1)


@holds("KVC-5", "allocator", tier="state")
def too_many_blocks_are_none(subject: Subject, data: st.DataObject) -> None:
    """A refused request is as if it had never been made."""
    refused_without_trace(
        subject, data, OutOfBlocksError, lambda a: a.allocate(a.num_free + data.draw(st.integers(1, 3)))
    )


@holds("KVC-6", "allocator", tier="state")
def a_free_block_is_neither_released_nor_shared(subject: Subject, data: st.DataObject) -> None:
    """Refused as if it had never been tried."""
    method = data.draw(st.sampled_from(["release", "share"]))
    pick = data.draw(st.integers(0, 8))

    def misuse(allocator: BlockAllocator) -> None:
        free = [b for b in range(allocator.num_blocks) if allocator.references(b) == 0]
        getattr(allocator, method)(free[pick % len(free)] if free else allocator.num_blocks)

    refused_without_trace(subject, data, BlockStateError, misuse)


@holds("KVC-6", "allocator", tier="state")
def what_is_not_in_the_pool_is_no_block(subject: Subject, data: st.DataObject) -> None:
    """Numbers below and above, -1 among them, which some languages take for the last."""
    method = data.draw(st.sampled_from(["release", "share", "references"]))
    outside = data.draw(st.sampled_from([-1, -2, 0, 1, 1000]))

    def misuse(allocator: BlockAllocator) -> None:
        getattr(allocator, method)(outside if outside < 0 else allocator.num_blocks + outside)

    refused_without_trace(subject, data, BlockStateError, misuse)


@holds("KVC-7", "kv_cache", tier="state")
def growing_adds_what_is_missing(subject: Subject, data: st.DataObject) -> None:
    """Whole blocks, as many as were announced, behind those that are there; never fewer than there were."""
    layout, cache = new_cache(subject, data.draw(ROOMY))
    longest = 0
    for tokens in data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=5)):
        before, free, missing = tables_of(cache, "a"), cache.free_blocks, cache.missing("a", tokens)
        cache.grow("a", tokens)
        longest = max(longest, tokens)
        needed = -(-longest // layout.block_size)
        for group, blocks in enumerate(tables_of(cache, "a")):
            assert len(blocks) == needed
            assert blocks[: len(before[group])] == before[group]
            assert missing[group] == needed - len(before[group]) == free[group] - cache.free_blocks[group]


@holds("KVC-8", "kv_cache", tier="state")
def a_sequence_grows_in_every_group_or_in_none(subject: Subject, data: st.DataObject) -> None:
    """It grows where every pool has room; else it is refused, and tables and pools are as they were."""
    layout, cache = new_cache(subject, data.draw(layouts(windows=SEVERAL)))
    for name, tokens in data.draw(GROWTH):
        before, free = snapshot(cache), cache.free_blocks
        needed = -(-tokens // layout.block_size)
        fits = all(needed - len(blocks) <= f for blocks, f in zip(tables_of(cache, name), free, strict=True))
        try:
            cache.grow(name, tokens)
        except OutOfBlocksError:
            assert not fits
            assert snapshot(cache) == before
        else:
            assert fits


@holds("KVC-9", "kv_cache", tier="state")
def a_window_releases_the_blocks_it_has_passed(subject: Subject, data: st.DataObject) -> None:
    """Entry by entry: a block goes when its last position leaves the next query's window, and no other."""
    layout, cache = new_cache(subject, data.draw(ROOMY))
    length = data.draw(st.integers(1, 20))
    cache.grow("a", length)
    full, free = tables_of(cache, "a"), cache.free_blocks
    for position in sorted(data.draw(st.lists(st.integers(0, length), min_size=1, max_size=4))):
        cache.release_passed("a", position)
        for group, blocks in enumerate(tables_of(cache, "a")):
            window = layout.windows[group]
            passed = [
                window is not None and (index + 1) * layout.block_size - 1 <= position - window
                for index in range(len(blocks))
            ]
            expected = [RELEASED if gone else b for gone, b in zip(passed, full[group], strict=True)]
            assert blocks == expected
            assert cache.free_blocks[group] == free[group] + sum(passed)
            assert cache.held("a")[group] == len(blocks) - sum(passed)


@holds("KVC-10", "kv_cache", tier="state")
def a_position_without_a_block_has_no_slot(subject: Subject, data: st.DataObject) -> None:
    """Released, or not yet there: of all stretches those are refused that hold such a position."""
    layout, cache = new_cache(subject, data.draw(ROOMY))
    length = data.draw(st.integers(1, 12))
    cache.grow("a", length)
    cache.release_passed("a", data.draw(st.integers(0, length)))
    for table in cache.tables("a"):
        blocks = table.blocks.tolist()
        for start, stop in combinations(range(length + layout.block_size + 2), 2):
            indices = range(start // layout.block_size, (stop - 1) // layout.block_size + 1)
            there = all(index < len(blocks) and blocks[index] != RELEASED for index in indices)
            assert there == succeeds(partial(table.slots, start, stop))


@holds("KVC-11", "kv_cache", tier="state")
def an_ended_sequence_leaves_nothing(subject: Subject, data: st.DataObject) -> None:
    """Its blocks are free, nobody else's are touched, and under its name another may begin."""
    _, cache = new_cache(subject, data.draw(layouts(windows=SEVERAL)))
    for act in data.draw(LIVES):
        happens(cache, act)
    name = data.draw(st.sampled_from(NAMES))
    before, free = snapshot(cache)
    held = [len(blocks) - blocks.count(RELEASED) for blocks in before[name]]
    cache.release(name)
    assert cache.free_blocks == tuple(map(int.__add__, free, held))
    for other in NAMES:
        assert tables_of(cache, other) == ([[] for _ in free] if other == name else before[other])
    cache.release(name)
    assert cache.free_blocks == tuple(map(int.__add__, free, held))


@holds("KVC-12", "kv_cache", tier="state")
def groups_know_nothing_of_each_other(subject: Subject, data: st.DataObject) -> None:
    """A cache of several groups, beside caches of one group each to which the same happens."""
    layout, cache = new_cache(subject, data.draw(layouts(windows=SEVERAL)))
    single = [subject.kv_cache(KVLayout(layout.block_size, layout.dtype, (g,))) for g in layout.groups]
    for act in data.draw(LIVES):
        if not happens(cache, act):
            continue
        for group, alone in enumerate(single):
            happens(alone, act)
            assert cache.free_blocks[group] == alone.free_blocks[0]
            for name in NAMES:
                assert tables_of(cache, name)[group] == tables_of(alone, name)[0]


@holds("KVC-13", "kv_cache", tier="state")
def a_steps_tables_stand_in_its_order(subject: Subject, data: st.DataObject) -> None:
    """One row per sequence, as asked for, filled up with released entries."""
    layout, cache = new_cache(subject, data.draw(ROOMY))
    order = data.draw(st.permutations(NAMES))[: data.draw(st.integers(1, len(NAMES)))]
    for name in order:
        length = data.draw(st.integers(1, 20))
        cache.grow(name, length)
        cache.release_passed(name, data.draw(st.integers(0, length)))
    for group in range(len(layout.groups)):
        tables = [tables_of(cache, name)[group] for name in order]
        width = max(map(len, tables))
        padded = cache.padded_tables(order, group)
        assert padded.dtype == np.int32
        assert padded.tolist() == [table + [RELEASED] * (width - len(table)) for table in tables]


@holds("KVC-14", "backend", tier="state", level="M")
def a_cache_takes_the_bytes_of_its_segments(subject: Subject, data: st.DataObject) -> None:
    """Block and segment, counted; then segments taken and given back, in any order."""
    layout = replace(data.draw(layouts()), dtype=subject.policy.kv)
    pools = range(len(layout.groups))
    for group, pool in enumerate(layout.groups):
        numbers = 2 * layout.block_size * sum(heads * size for _, heads, size in pool.layers)
        assert layout.block_bytes(group) == numbers * layout.dtype.itemsize
        blocks = layout.segment_blocks(group)
        assert [n for n in range(1, blocks + 1) if n * layout.block_bytes(group) % 4096 == 0] == [blocks]
        assert layout.num_segments(group) == -(-pool.num_blocks // blocks)
    places = [(g, s) for g in pools for s in range(layout.num_segments(g))]
    assert layout.nbytes == sum(layout.segment_blocks(g) * layout.block_bytes(g) for g, _ in places)
    backend = subject.start()
    before = backend.memory().kv_cache
    cache, committed = backend.create_cache(layout), set[tuple[int, int]]()
    for place in data.draw(st.lists(st.sampled_from(places), max_size=12)):
        (cache.release if place in committed else cache.commit)(*place)
        committed ^= {place}
        expected = sum(layout.segment_blocks(g) * layout.block_bytes(g) for g, _ in committed)
        assert backend.memory().kv_cache - before == expected


@holds("KVC-15", "kv_cache", tier="state", level="M")
def a_segment_is_committed_while_it_holds_a_block(subject: Subject, data: st.DataObject) -> None:
    """Counted from the tables, after every act; what is told of changes adds up to it."""
    windows = data.draw(WINDOWS)
    groups = tuple(
        KVGroupLayout(window, ((g, 1, data.draw(st.sampled_from([32, 64, 128]))),), data.draw(POOL))
        for g, window in enumerate(windows)
    )
    layout, cache = new_cache(subject, KVLayout(4, np.dtype(np.float32), groups))
    committed: set[tuple[int, int]] = set()
    for act in [*data.draw(LIVES), *(("end", name, 0) for name in NAMES)]:
        happens(cache, act)
        used = {
            (group, block // layout.segment_blocks(group))
            for name in NAMES
            for group, blocks in enumerate(tables_of(cache, name))
            for block in blocks
            if block != RELEASED
        }
        for group in range(len(groups)):
            assert cache.segments(group) == tuple(sorted(s for g, s in used if g == group))
        if act[2] == 0 or data.draw(st.booleans()):
            commits, releases = cache.take_segment_changes()
            assert sorted(set(commits)) == sorted(commits)
            assert (set(commits), set(releases)) == (used - committed, committed - used)
            committed = used


@holds("KVC-16", "kv_cache", tier="state")
def a_recent_pool_keeps_the_first_block_and_the_next(subject: Subject, data: st.DataObject) -> None:
    """Entry by entry: the first while a window sees it, the one that is written next, and those to come."""
    window, size = data.draw(WINDOW), data.draw(st.sampled_from([1, 2, 3, 4]))
    pool = KVGroupLayout(window, ((0, 1, 8),), 64, recent=True)
    _, cache = new_cache(subject, KVLayout(size, np.dtype(np.float32), (pool,)))
    length = data.draw(st.integers(1, 20))
    cache.grow("a", length)
    (full,), kept = tables_of(cache, "a"), set(range(-(-length // size)))
    for position in sorted(data.draw(st.lists(st.integers(0, length), min_size=1, max_size=4))):
        cache.release_passed("a", position)
        first_is_seen = window is None or size - 1 > position - window or position < size
        kept = {i for i in kept if i >= position // size or (i == 0 and first_is_seen)}
        assert tables_of(cache, "a") == [[b if i in kept else RELEASED for i, b in enumerate(full)]]
        assert cache.held("a") == (len(kept),)
        assert cache.free_blocks == (64 - len(kept),)


def call_of(allocator: BlockAllocator, call: tuple[str, int]) -> object:
    """The result of a call that may be wrong, or the kind of its error."""
    try:
        return getattr(allocator, call[0])(call[1])
    except RefengineError as error:
        return type(error)


def refused_without_trace(
    subject: Subject, data: st.DataObject, error: type[Exception], misuse: Callable[[BlockAllocator], object]
) -> None:
    """A misuse raises the error; afterwards a pool behaves as another does that never saw it.

    Once where free blocks were never used, and once where all were, so that those free now came back.
    """
    pool, calls, after = data.draw(POOL), data.draw(CALLS), data.draw(CALLS)
    for before in (calls, [("allocate", pool), ("release", 0), *calls]):
        one, other = subject.allocator(pool), subject.allocator(pool)
        for call in before:
            assert call_of(one, call) == call_of(other, call)
        try:
            misuse(one)
        except error:
            pass
        else:
            raise AssertionError(f"{error.__name__} was not raised")
        for call in after:
            assert call_of(one, call) == call_of(other, call)
        assert one.num_free == other.num_free
        assert [one.references(b) for b in range(pool)] == [other.references(b) for b in range(pool)]
