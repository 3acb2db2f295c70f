"""Chapter *Paged KV*. Whatever a table or a pool must look like is counted anew from what was asked of it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refengine.errors import BlockStateError, OutOfBlocksError, RefengineError, SequenceStateError
from refengine.memory import RELEASED, BlockAllocator, KVCacheManager, KVGroupLayout, KVLayout, pool_use
from refengine.memory.prefix_cache import CachedBlock
from refengine_conformance.kv_lives import KVLives, Tokens
from refengine_conformance.registry import holds
from refengine_conformance.subject import Subject

POOL = st.integers(1, 9)
"""Blocks of a pool."""

WINDOW = st.sampled_from([None, 1, 2, 3, 5, 8])

WINDOWS = st.lists(WINDOW, min_size=1, max_size=3)
"""One to three groups."""

SEVERAL = st.lists(WINDOW, min_size=2, max_size=3)
"""Two or three."""

PROMPT = st.builds(
    lambda pattern, length: (pattern * length)[:length],
    st.sampled_from([(0,), (0, 0, 0, 0, 0, 0, 1), (0, 0, 0, 1), (0, 1), (1,)]),
    st.sampled_from([12, 16, 18, 17, 8, 9, 6, 3, 1]),
)
"""Prompts that begin like each other, for different lengths."""

TEXT = st.lists(st.integers(0, 1), max_size=6).map(tuple)
"""How a fork goes on."""

SALTS = st.sampled_from(["", "tenant"])

NAMES = "abc"
"""Sequences."""

GROWTH = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(1, 30)), min_size=1, max_size=6)
"""Sequences, and to how many positions they grow."""

CALLS = st.lists(
    st.tuples(st.sampled_from(["allocate", "allocate", "share", "release", "release"]), st.integers(0, 4)),
    max_size=20,
)
"""Calls of an allocator: how many blocks to allocate; which of the blocks to share or release."""

LIVES = st.lists(
    st.tuples(st.sampled_from(["grow", "grow", "grow", "end"]), st.sampled_from(NAMES), st.integers(1, 9)),
    max_size=15,
)
"""What happens to sequences: so many tokens are computed, and the windows move on; or it ends."""


@st.composite
def layouts(
    draw: st.DrawFn,
    blocks: st.SearchStrategy[int] = POOL,
    windows: st.SearchStrategy[list[int | None]] = WINDOWS,
) -> KVLayout:
    """One to three groups, each with a pool of its own size."""
    dtype = np.dtype(draw(st.sampled_from([np.float16, np.float32, np.float64])))
    groups, layer = [], 0
    for window in draw(windows):
        shapes = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 8)), min_size=1, max_size=2))
        layers = tuple((layer + i, heads, size) for i, (heads, size) in enumerate(shapes))
        layer += len(layers)
        groups.append(KVGroupLayout(window, layers, draw(blocks)))
    return KVLayout(draw(st.sampled_from([1, 2, 3, 4])), dtype, tuple(groups))


@st.composite
def mixed(draw: st.DrawFn, blocks: st.SearchStrategy[int]) -> KVLayout:
    """A pool that keeps everything, and one or two that may not, in any order."""
    kinds = st.tuples(st.sampled_from([2, 3, 5, 8, None]), st.booleans())
    pools = draw(st.permutations([(None, False), *draw(st.lists(kinds, min_size=1, max_size=2))]))
    size = draw(st.sampled_from([2, 3, 4]))
    return KVLayout(
        size,
        np.dtype(np.float16),
        tuple(
            KVGroupLayout(window, ((g, 1, 8),), draw(blocks), recent=recent)
            for g, (window, recent) in enumerate(pools)
        ),
    )


ROOMY = layouts(blocks=st.just(64))
"""Pools that hold whatever is asked for here."""


@holds("KVC-1", "kv_cache", tier="state")
def a_position_lies_in_its_block(subject: Subject, data: st.DataObject) -> None:
    """The slots of any stretch of positions, one by one."""
    layout, cache = _start(subject, data.draw(ROOMY))
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
    layout, cache = _start(subject, data.draw(layouts()))
    for act in data.draw(LIVES):
        _live(cache, act)
        for group, (pool, free) in enumerate(zip(layout.num_blocks, cache.free_blocks, strict=True)):
            named = [block for name in NAMES for block in _blocks(cache, name)[group] if block != RELEASED]
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
        result = _call(allocator, call)
        if call[0] == "allocate" and call[1] <= len(free):
            assert result == free[: call[1]]


@holds("KVC-3", "allocator", tier="state", level="L2")
def the_same_calls_give_the_same_blocks(subject: Subject, data: st.DataObject) -> None:
    """Two pools, one history."""
    pool, calls = data.draw(POOL), data.draw(CALLS)
    one, other = subject.allocator(pool), subject.allocator(pool)
    for call in calls:
        assert _call(one, call) == _call(other, call)


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
    _refused_without_trace(
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

    _refused_without_trace(subject, data, BlockStateError, misuse)


@holds("KVC-6", "allocator", tier="state")
def what_is_not_in_the_pool_is_no_block(subject: Subject, data: st.DataObject) -> None:
    """Numbers below and above, -1 among them, which some languages take for the last."""
    method = data.draw(st.sampled_from(["release", "share", "references"]))
    outside = data.draw(st.sampled_from([-1, -2, 0, 1, 1000]))

    def misuse(allocator: BlockAllocator) -> None:
        getattr(allocator, method)(outside if outside < 0 else allocator.num_blocks + outside)

    _refused_without_trace(subject, data, BlockStateError, misuse)


@holds("KVC-7", "kv_cache", tier="state")
def growing_adds_what_is_missing(subject: Subject, data: st.DataObject) -> None:
    """Whole blocks, as many as were announced, behind those that are there; never fewer than there were."""
    layout, cache = _start(subject, data.draw(ROOMY))
    longest = 0
    for tokens in data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=5)):
        before, free, missing = _blocks(cache, "a"), cache.free_blocks, cache.missing("a", tokens)
        cache.grow("a", tokens)
        longest = max(longest, tokens)
        needed = -(-longest // layout.block_size)
        for group, blocks in enumerate(_blocks(cache, "a")):
            assert len(blocks) == needed
            assert blocks[: len(before[group])] == before[group]
            assert missing[group] == needed - len(before[group]) == free[group] - cache.free_blocks[group]


@holds("KVC-8", "kv_cache", tier="state")
def a_sequence_grows_in_every_group_or_in_none(subject: Subject, data: st.DataObject) -> None:
    """It grows where every pool has room; else it is refused, and tables and pools are as they were."""
    layout, cache = _start(subject, data.draw(layouts(windows=SEVERAL)))
    for name, tokens in data.draw(GROWTH):
        before, free = _snapshot(cache), cache.free_blocks
        needed = -(-tokens // layout.block_size)
        fits = all(needed - len(blocks) <= f for blocks, f in zip(_blocks(cache, name), free, strict=True))
        try:
            cache.grow(name, tokens)
        except OutOfBlocksError:
            assert not fits
            assert _snapshot(cache) == before
        else:
            assert fits


@holds("KVC-9", "kv_cache", tier="state")
def a_window_releases_the_blocks_it_has_passed(subject: Subject, data: st.DataObject) -> None:
    """Entry by entry: a block goes when its last position leaves the next query's window, and no other."""
    layout, cache = _start(subject, data.draw(ROOMY))
    length = data.draw(st.integers(1, 20))
    cache.grow("a", length)
    full, free = _blocks(cache, "a"), cache.free_blocks
    for position in sorted(data.draw(st.lists(st.integers(0, length), min_size=1, max_size=4))):
        cache.release_passed("a", position)
        for group, blocks in enumerate(_blocks(cache, "a")):
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
    layout, cache = _start(subject, data.draw(ROOMY))
    length = data.draw(st.integers(1, 12))
    cache.grow("a", length)
    cache.release_passed("a", data.draw(st.integers(0, length)))
    for table in cache.tables("a"):
        blocks = table.blocks.tolist()
        for start, stop in combinations(range(length + layout.block_size + 2), 2):
            indices = range(start // layout.block_size, (stop - 1) // layout.block_size + 1)
            there = all(index < len(blocks) and blocks[index] != RELEASED for index in indices)
            assert there == _succeeds(partial(table.slots, start, stop))


@holds("KVC-11", "kv_cache", tier="state")
def an_ended_sequence_leaves_nothing(subject: Subject, data: st.DataObject) -> None:
    """Its blocks are free, nobody else's are touched, and under its name another may begin."""
    _, cache = _start(subject, data.draw(layouts(windows=SEVERAL)))
    for act in data.draw(LIVES):
        _live(cache, act)
    name = data.draw(st.sampled_from(NAMES))
    before, free = _snapshot(cache)
    held = [len(blocks) - blocks.count(RELEASED) for blocks in before[name]]
    cache.release(name)
    assert cache.free_blocks == tuple(map(int.__add__, free, held))
    for other in NAMES:
        assert _blocks(cache, other) == ([[] for _ in free] if other == name else before[other])
    cache.release(name)
    assert cache.free_blocks == tuple(map(int.__add__, free, held))


@holds("KVC-12", "kv_cache", tier="state")
def groups_know_nothing_of_each_other(subject: Subject, data: st.DataObject) -> None:
    """A cache of several groups, beside caches of one group each to which the same happens."""
    layout, cache = _start(subject, data.draw(layouts(windows=SEVERAL)))
    single = [subject.kv_cache(KVLayout(layout.block_size, layout.dtype, (g,))) for g in layout.groups]
    for act in data.draw(LIVES):
        if not _live(cache, act):
            continue
        for group, alone in enumerate(single):
            _live(alone, act)
            assert cache.free_blocks[group] == alone.free_blocks[0]
            for name in NAMES:
                assert _blocks(cache, name)[group] == _blocks(alone, name)[0]


@holds("KVC-13", "kv_cache", tier="state")
def a_steps_tables_stand_in_its_order(subject: Subject, data: st.DataObject) -> None:
    """One row per sequence, as asked for, filled up with released entries."""
    layout, cache = _start(subject, data.draw(ROOMY))
    order = data.draw(st.permutations(NAMES))[: data.draw(st.integers(1, len(NAMES)))]
    for name in order:
        length = data.draw(st.integers(1, 20))
        cache.grow(name, length)
        cache.release_passed(name, data.draw(st.integers(0, length)))
    for group in range(len(layout.groups)):
        tables = [_blocks(cache, name)[group] for name in order]
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
    layout, cache = _start(subject, KVLayout(4, np.dtype(np.float32), groups))
    committed: set[tuple[int, int]] = set()
    for act in [*data.draw(LIVES), *(("end", name, 0) for name in NAMES)]:
        _live(cache, act)
        used = {
            (group, block // layout.segment_blocks(group))
            for name in NAMES
            for group, blocks in enumerate(_blocks(cache, name))
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
    _, cache = _start(subject, KVLayout(size, np.dtype(np.float32), (pool,)))
    length = data.draw(st.integers(1, 20))
    cache.grow("a", length)
    (full,), kept = _blocks(cache, "a"), set(range(-(-length // size)))
    for position in sorted(data.draw(st.lists(st.integers(0, length), min_size=1, max_size=4))):
        cache.release_passed("a", position)
        first_is_seen = window is None or size - 1 > position - window or position < size
        kept = {i for i in kept if i >= position // size or (i == 0 and first_is_seen)}
        assert _blocks(cache, "a") == [[b if i in kept else RELEASED for i, b in enumerate(full)]]
        assert cache.held("a") == (len(kept),)
        assert cache.free_blocks == (64 - len(kept),)


@holds("KVC-17", "kv_cache", tier="state")
def a_fork_shares_every_block(subject: Subject, data: st.DataObject) -> None:
    """It takes no block; and parent and child end without the other noticing."""
    layout, cache = _start(subject, data.draw(ROOMY))
    length = data.draw(st.integers(1, 20))
    cache.grow("a", length)
    cache.release_passed("a", length)
    before, free = _blocks(cache, "a"), cache.free_blocks
    cache.fork("a", "b")
    assert _blocks(cache, "a") == _blocks(cache, "b") == before
    assert cache.free_blocks == free
    first, second = data.draw(st.permutations("ab"))
    cache.release(first)
    assert (_blocks(cache, second), cache.free_blocks) == (before, free)
    cache.grow("c", 12)
    for named, blocks in zip(_blocks(cache, "c"), before, strict=True):
        assert not set(named) & (set(blocks) - {RELEASED})
    cache.release("c")
    cache.release(second)
    assert cache.free_blocks == layout.num_blocks


@holds("KVC-17", "kv_cache", tier="state")
def what_cannot_be_forked_leaves_no_trace(subject: Subject, data: st.DataObject) -> None:
    """A parent that never began or has ended; a child that has begun."""
    _, cache = _start(subject, data.draw(ROOMY))
    cache.grow("a", data.draw(st.integers(1, 12)))
    cache.grow("b", data.draw(st.integers(1, 12)))
    cache.release("b")
    cache.grow("c", 1)
    before = _snapshot(cache)
    for parent, child in data.draw(st.permutations([("b", "d"), ("x", "d"), ("a", "a"), ("a", "c")])):
        try:
            cache.fork(parent, child)
        except SequenceStateError:
            assert _snapshot(cache) == before
        else:
            raise AssertionError("SequenceStateError was not raised")


@holds("KVC-18", "kv_cache", tier="state")
def nobody_writes_what_another_reads(subject: Subject, data: st.DataObject) -> None:
    """Forks that go on apart, several in one step, in pools large and small: each reads its own."""
    layout = data.draw(mixed(st.sampled_from([64, 64, 9])))
    lives = KVLives(subject.kv_cache(layout))
    lives.begin("a", data.draw(PROMPT))
    lives.advance(("a", data.draw(st.integers(1, 12))))
    for child in "bcd":
        alive = sorted(lives.lives)
        if not alive:
            return
        if data.draw(st.booleans()) or child == "b":
            lives.fork(data.draw(st.sampled_from(alive)), child, data.draw(TEXT))
        steps = data.draw(st.lists(st.sampled_from(sorted(lives.lives)), unique=True, max_size=4))
        abort = data.draw(st.sampled_from([None, None, *lives.lives]))
        lives.advance(*((name, data.draw(st.integers(1, 5))) for name in steps), abort=abort)


@holds("KVC-18", "kv_cache", tier="state")
def what_a_write_takes_is_known_before(subject: Subject, data: st.DataObject) -> None:
    """Replaced blocks count as missing; where there are too few, nothing changes; else none is shared."""
    layout = data.draw(mixed(st.integers(5, 9)))
    cache = subject.kv_cache(layout)
    length = data.draw(st.integers(1, 10))
    if not _succeeds(lambda: cache.grow("a", length)):
        return
    cache.release_passed("a", length)
    cache.fork("a", "b")
    for name in data.draw(st.lists(st.sampled_from("ab"), min_size=1, max_size=3)):
        stop = length + data.draw(st.integers(1, 9))
        before, missing, free = _snapshot(cache), cache.missing(name, stop), cache.free_blocks
        grown = _succeeds(partial(cache.grow, name, stop))
        assert grown == all(map(int.__le__, missing, free))
        if not grown:
            assert _snapshot(cache) == before
            continue
        assert cache.free_blocks == tuple(map(int.__sub__, free, missing))
        for mine, other in zip(
            _blocks(cache, name), _blocks(cache, "b" if name == "a" else "a"), strict=True
        ):
            assert not set(mine[length // layout.block_size :]) & set(other)


@holds("KVC-19", "kv_cache", tier="state")
def a_copys_source_stays_until_it_is_made(subject: Subject, data: st.DataObject) -> None:
    """All who held the source may end before: nobody else gets the block, and then it is free."""
    layout = data.draw(mixed(st.just(12)))
    cache, size = subject.kv_cache(layout), layout.block_size
    length = data.draw(st.integers(1, 9).filter(lambda n: n % size))
    cache.grow("a", length)
    cache.release_passed("a", length)
    cache.fork("a", "b")
    cache.grow("b", length + 1)
    sources = {group: blocks[-1] for group, blocks in enumerate(_blocks(cache, "a"))}
    cache.release("a")
    if data.draw(st.booleans()):  # the copy is not wanted any more
        cache.release("b")
        assert cache.free_blocks == layout.num_blocks
        assert cache.take_copies() == []
        return
    assert _succeeds(lambda: cache.grow("c", min(cache.free_blocks) * size))
    assert all(sources[group] not in blocks for group, blocks in enumerate(_blocks(cache, "c")))
    free, copies = cache.free_blocks, cache.take_copies()
    assert [(copy.pool, copy.source) for copy in copies] == sorted(sources.items())
    for copy in copies:
        assert copy.destination == _blocks(cache, "b")[copy.pool][length // size]
    assert cache.free_blocks == tuple(n + 1 for n in free)
    assert cache.take_copies() == []


@holds("KVC-20", "prefix_cache", tier="state")
def a_key_is_a_hash_of_all_before_it(subject: Subject, data: st.DataObject) -> None:
    """Every key, hashed anew from salt, identity and tokens."""
    layout, identity = data.draw(ROOMY), data.draw(st.binary(max_size=4))
    prefix_cache = subject.prefix_cache(identity)
    cache, size = subject.kv_cache(layout, prefix_cache), layout.block_size
    expected = set()
    for name in "ab":
        salt = data.draw(st.text(max_size=3))
        tokens = data.draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=12).map(tuple))
        cache.grow(name, len(tokens))
        cache.publish(name, tokens, salt, len(tokens))
        encoded = salt.encode()
        root = b"refengine prefix cache 1\0" + len(encoded).to_bytes(8, "little") + encoded + identity
        key = hashlib.sha256(root).digest()
        for start in range(0, len(tokens) - size + 1, size):
            ids = b"".join(token.to_bytes(4, "little") for token in tokens[start : start + size])
            key = hashlib.sha256(key + ids).digest()
            expected.add(key)
    assert {entry.key for entry in prefix_cache.entries()} == expected


@holds("KVC-21", "prefix_cache", "kv_cache", tier="state")
def no_collision_serves_another_prompt(subject: Subject, data: st.DataObject) -> None:
    """With a hash that has two values, one, or 256: whoever adopts reads what its own tokens gave."""
    mask = data.draw(st.sampled_from([1, 0, 255]))
    prefix_cache = subject.prefix_cache(hash=lambda key: bytes([hashlib.sha256(key).digest()[0] & mask]))
    lives = KVLives(subject.kv_cache(data.draw(mixed(st.just(64))), prefix_cache))
    for name in data.draw(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=6, unique=True)):
        lives.begin(name, data.draw(PROMPT), data.draw(SALTS))
        while lives.lives[name].computed < len(lives.lives[name].tokens):
            lives.advance((name, data.draw(st.integers(1, 9))))
        if data.draw(st.booleans()):
            lives.end(name)


@holds("KVC-22", "prefix_cache", "kv_cache", tier="state")
def the_longest_prefix_is_adopted(subject: Subject, data: st.DataObject) -> None:
    """Whole blocks, not all tokens, not above the limit: as many as any of the same salt has before it."""
    layout = data.draw(mixed(st.just(64)))
    lives, size = KVLives(subject.kv_cache(layout, subject.prefix_cache())), layout.block_size
    computed: list[tuple[str, Tokens]] = []
    for name in "abcd":
        tokens, salt = data.draw(PROMPT), data.draw(SALTS)
        limit = data.draw(st.sampled_from([len(tokens) // 2, None, len(tokens)]))
        common = [
            sum(1 for n in range(size, len(tokens), size) if other[:n] == tokens[:n])
            for other_salt, other in computed
            if other_salt == salt
        ]
        most = max([0, *common]) * size
        assert lives.begin(name, tokens, salt, limit) == min(
            most, len(tokens) if limit is None else limit // size * size
        )
        while lives.lives[name].computed < len(tokens):
            lives.advance((name, data.draw(st.integers(1, 9))))
        computed.append((salt, tokens))
        if whole := tokens[: len(tokens) // size * size]:  # all of it is there, and the last block not taken
            assert lives.begin("again", whole, salt) == len(whole) - size
            lives.end("again")
        if data.draw(st.booleans()):
            lives.end(name)


@holds("KVC-23", "prefix_cache", "kv_cache", tier="state")
def a_prefix_is_adopted_where_every_window_has_its_own(subject: Subject, data: st.DataObject) -> None:
    """In pools that evict: all is there that the next query sees; and no longer prefix had it all."""
    layout = data.draw(mixed(st.sampled_from([9, 6, 12])))
    prefix_cache = subject.prefix_cache()
    lives, size = KVLives(subject.kv_cache(layout, prefix_cache)), layout.block_size
    for name in "abcdefgh":
        tokens = data.draw(PROMPT)
        cached = {
            (_tokens_of(entry), pool)
            for entry in prefix_cache.entries()
            for pool, block in enumerate(entry.blocks)
            if block != RELEASED
        }
        longest = max(
            n
            for n in range(0, len(tokens), size)
            if all(
                (tokens[: (p // size + 1) * size], pool) in cached
                for pool in range(len(layout.groups))
                for p in lives.visible(pool, n)
            )
        )
        assert lives.begin(name, tokens) == longest
        held = _blocks(lives.cache, name)
        lives.cache.release_passed(name, longest)
        assert _blocks(lives.cache, name) == held
        for _ in range(20):
            if name in lives.lives and lives.lives[name].computed < len(tokens):
                lives.advance((name, data.draw(st.integers(1, 9))))
        if name in lives.lives and (data.draw(st.booleans()) or min(lives.cache.free_blocks) < 5):
            lives.end(name)


@holds("KVC-24", "prefix_cache", "kv_cache", tier="state")
def equal_blocks_become_one(subject: Subject, data: st.DataObject) -> None:
    """Two that compute the same tokens at once hold the same blocks afterwards."""
    layout = data.draw(mixed(st.just(64)))
    lives, tokens = KVLives(subject.kv_cache(layout, subject.prefix_cache())), data.draw(PROMPT)
    lives.begin("a", tokens)
    lives.begin("b", tokens)
    while lives.lives["a"].computed < len(tokens):
        count = data.draw(st.integers(1, 9))
        lives.advance(("a", count), ("b", count))
        whole = lives.lives["a"].computed // layout.block_size
        for group, (one, other) in enumerate(
            zip(_blocks(lives.cache, "a"), _blocks(lives.cache, "b"), strict=True)
        ):
            shared = 1 if layout.groups[group].recent else whole
            assert one[:shared] == other[:shared] or whole == 0
    before = _snapshot(lives.cache)
    lives.cache.publish("a", tokens, "", len(tokens))
    assert _snapshot(lives.cache) == before


@holds("KVC-24", "prefix_cache", "kv_cache", tier="state")
def only_what_is_computed_is_published(subject: Subject, data: st.DataObject) -> None:
    """Every cached block holds what its tokens gave, in every pool that names it."""
    layout = data.draw(mixed(st.sampled_from([64, 12])))
    prefix_cache = subject.prefix_cache()
    lives, size = KVLives(subject.kv_cache(layout, prefix_cache)), layout.block_size
    for name in "abcd":
        tokens = data.draw(PROMPT)
        lives.begin(name, tokens)
        for _ in range(data.draw(st.integers(1, 4))):
            if name in lives.lives:
                lives.advance((name, data.draw(st.integers(1, 9))))
        for entry in prefix_cache.entries():
            ids = _tokens_of(entry)
            for pool, block in enumerate(entry.blocks):
                cell = lives.cells.get((pool, block), {})
                wanted = [("", ids[: len(ids) - size + i + 1]) for i in range(size)]
                assert block == RELEASED or [cell.get(i) for i in range(size)] == wanted
        if name in lives.lives and data.draw(st.booleans()):
            lives.end(name)


@holds("KVC-25", "prefix_cache", "kv_cache", tier="state")
def cached_blocks_are_free_where_nobody_else_holds_them(subject: Subject, data: st.DataObject) -> None:
    """All sequences ended: every block can be had, and what others hold is never taken for it."""
    layout = data.draw(mixed(st.just(10)))
    lives = KVLives(subject.kv_cache(layout, subject.prefix_cache()))
    for name in "abcdef":
        lives.begin(name, data.draw(PROMPT), data.draw(SALTS))
        for _ in range(8):
            if name in lives.lives and lives.lives[name].computed < len(lives.lives[name].tokens):
                lives.advance((name, data.draw(st.integers(2, 9))))
        named = [
            {block for n in lives.lives for block in _blocks(lives.cache, n)[g] if block != RELEASED}
            for g in range(len(layout.groups))
        ]
        assert lives.cache.free_blocks == tuple(10 - len(blocks) for blocks in named)
        for other in data.draw(st.lists(st.sampled_from(sorted(lives.lives) or ["a"]), unique=True)):
            if other in lives.lives:
                lives.end(other)
    for other in list(lives.lives):
        lives.end(other)
    assert lives.cache.free_blocks == layout.num_blocks
    lives.cache.grow("all", 10 * layout.block_size)
    assert lives.cache.free_blocks == (0,) * len(layout.groups)


@holds("KVC-25", "prefix_cache", "kv_cache", tier="state")
def the_least_recently_used_goes_first(subject: Subject, data: st.DataObject) -> None:
    """Prompts end in some order, one is used again; room is made block by block, each prompt's tail first."""
    blocks = data.draw(st.integers(1, 3))
    prompts = {name: (i,) * (4 * blocks + 1) for i, name in enumerate("abc")}
    pool = KVGroupLayout(None, ((0, 1, 8),), 3 * (blocks + 1))
    cache = subject.kv_cache(KVLayout(4, np.dtype(np.float16), (pool,)), subject.prefix_cache())
    for name, tokens in prompts.items():
        cache.grow(name, len(tokens))
        cache.publish(name, tokens, "", len(tokens))
        cache.release_passed(name, len(tokens))
    order = data.draw(st.permutations("abc"))
    for name in order:
        cache.release(name)
    again = data.draw(st.sampled_from("abc"))
    assert cache.adopt("again", prompts[again]) == 4 * blocks
    cache.release("again")
    order = [*(name for name in order if name != again), again]
    taken = data.draw(st.integers(0, 3 * blocks))
    cache.grow("x", 4 * (3 + taken))
    left = {name: max(0, blocks - max(0, taken - i * blocks)) for i, name in enumerate(order)}
    for name, tokens in prompts.items():
        assert cache.adopt(f"{name} again", tokens) == 4 * left[name]


@holds("KVC-27", "kv_cache", tier="state")
def a_suspended_sequence_finds_its_places_again(subject: Subject, data: st.DataObject) -> None:
    """The same entries name blocks as before; what was told when it left matches what it gets, one by one."""
    layout, cache = _start(subject, data.draw(layouts(windows=SEVERAL)))
    for act in data.draw(LIVES):
        _live(cache, act)
    name = data.draw(st.sampled_from([n for n in NAMES if any(cache.held(n))] or [NAMES[0]]))
    cache.grow(name, 0)
    before, free, held = _snapshot(cache)[0], cache.free_blocks, cache.held(name)
    position = cache.next_position(name)
    told = cache.suspend(name)
    assert told == [(g, b) for g, blocks in enumerate(before[name]) for b in blocks if b != RELEASED]
    assert cache.free_blocks == tuple(map(int.__add__, free, held))
    tokens = len(before[name][0]) * layout.block_size + data.draw(st.integers(0, 9))
    grown = -(-tokens // layout.block_size) - len(before[name][0])
    assert cache.missing(name, tokens) == tuple(count + grown for count in held)

    other = next(n for n in NAMES if n != name)
    taken = data.draw(st.integers(0, 12))
    _succeeds(lambda: cache.grow(other, len(before[other][0]) * layout.block_size + taken))
    if not all(map(int.__le__, held, cache.free_blocks)):
        assert not _succeeds(lambda: cache.resume(name))
        assert cache.held(name) == (0,) * len(held)
        for each in NAMES:
            if each != name:
                cache.release(each)
    given = cache.resume(name)
    blocks = _blocks(cache, name)
    assert given == [(g, b) for g, each in enumerate(blocks) for b in each if b != RELEASED]
    places = [[b != RELEASED for b in each] for each in blocks]
    assert places == [[b != RELEASED for b in each] for each in before[name]]
    assert cache.held(name) == held
    assert cache.next_position(name) == position


@holds("KVC-26", "kv_cache", tier="state", level="M")
def waste_is_what_is_not_written(subject: Subject, data: st.DataObject) -> None:
    """Slot by slot: those of the tables' blocks at which no sequence has written."""
    layout = data.draw(mixed(st.just(64)))
    lives, size = KVLives(subject.kv_cache(layout, subject.prefix_cache())), layout.block_size
    for name in "ab":
        lives.begin(name, data.draw(PROMPT))
        lives.advance((name, data.draw(st.integers(1, 12))))
        lives.fork(name, f"{name}'", data.draw(TEXT))
        lives.advance((f"{name}'", data.draw(st.integers(1, 5))))
    for pool in range(len(layout.groups)):
        written: dict[int, set[int]] = {}
        for name, life in lives.lives.items():
            for index, block in enumerate(_blocks(lives.cache, name)[pool]):
                if block != RELEASED:
                    places = range(min(size, max(0, life.computed - index * size)))
                    written.setdefault(block, set()).update(places)
        use = pool_use(lives.cache, pool)
        unwritten = sum(size - len(places) for places in written.values())
        assert (use.used - use.idle, use.unwritten) == (len(written), unwritten)
        assert use.waste == (unwritten / (len(written) * size) if written else 0)


def _start(subject: Subject, layout: KVLayout) -> tuple[KVLayout, KVCacheManager]:
    return layout, subject.kv_cache(layout)


def _call(allocator: BlockAllocator, call: tuple[str, int]) -> object:
    """The result of a call that may be wrong, or the kind of its error."""
    try:
        return getattr(allocator, call[0])(call[1])
    except RefengineError as error:
        return type(error)


def _live(cache: KVCacheManager, act: tuple[str, str, int]) -> bool:
    """Let something happen to a sequence; tells whether it could."""
    what, name, tokens = act
    if what == "end":
        cache.release(name)
        return True
    length = len(_blocks(cache, name)[0]) * cache.layout.block_size + tokens
    if not _succeeds(lambda: cache.grow(name, length)):
        return False
    cache.release_passed(name, length)
    return True


def _tokens_of(entry: CachedBlock | None) -> Tokens:
    """The tokens up to the end of a cached block."""
    ids: list[int] = []
    while entry is not None:
        ids[:0] = np.frombuffer(entry.tokens, "<i4").tolist()
        entry = entry.parent
    return tuple(ids)


def _succeeds(act: Callable[[], Any]) -> bool:
    try:
        act()
    except (OutOfBlocksError, BlockStateError):
        return False
    return True


def _blocks(cache: KVCacheManager, name: str) -> list[list[int]]:
    """The tables of a sequence."""
    return [table.blocks.tolist() for table in cache.tables(name)]


def _snapshot(cache: KVCacheManager) -> tuple[dict[str, list[list[int]]], tuple[int, ...]]:
    """All tables and all pools."""
    return {name: _blocks(cache, name) for name in NAMES}, cache.free_blocks


def _refused_without_trace(
    subject: Subject, data: st.DataObject, error: type[Exception], misuse: Callable[[BlockAllocator], object]
) -> None:
    """A misuse raises the error; afterwards a pool behaves as another does that never saw it.

    Once where free blocks were never used, and once where all were, so that those free now came back.
    """
    pool, calls, after = data.draw(POOL), data.draw(CALLS), data.draw(CALLS)
    for before in (calls, [("allocate", pool), ("release", 0), *calls]):
        one, other = subject.allocator(pool), subject.allocator(pool)
        for call in before:
            assert _call(one, call) == _call(other, call)
        try:
            misuse(one)
        except error:
            pass
        else:
            raise AssertionError(f"{error.__name__} was not raised")
        for call in after:
            assert _call(one, call) == _call(other, call)
        assert one.num_free == other.num_free
        assert [one.references(b) for b in range(pool)] == [other.references(b) for b in range(pool)]
