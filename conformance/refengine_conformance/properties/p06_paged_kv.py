"""Chapter *Paged KV*. Whatever a table or a pool must look like is counted anew from what was asked of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refengine.errors import BlockStateError, OutOfBlocksError, RefengineError
from refengine.memory import RELEASED, BlockAllocator, KVCacheManager, KVGroupLayout, KVLayout
from refengine_conformance.registry import holds
from refengine_conformance.subject import Subject

POOL = st.integers(1, 9)
"""Blocks of a pool."""

WINDOW = st.sampled_from([None, 1, 2, 3, 5, 8])

WINDOWS = st.lists(WINDOW, min_size=1, max_size=3)
"""One to three groups."""

SEVERAL = st.lists(WINDOW, min_size=2, max_size=3)
"""Two or three."""

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
def a_fresh_pool_is_handed_out_in_order(subject: Subject, data: st.DataObject) -> None:
    """0, 1, 2 …, however many at a time."""
    counts = data.draw(st.lists(st.integers(0, 4), max_size=6))
    allocator = subject.allocator(sum(counts) + 1)
    assert [block for count in counts for block in allocator.allocate(count)] == list(range(sum(counts)))


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
def a_cache_takes_the_bytes_of_its_blocks(subject: Subject, data: st.DataObject) -> None:
    """What the layout says beforehand, what a count gives, and what the backend holds then."""
    layout = replace(data.draw(layouts()), dtype=subject.policy.kv)
    nbytes = [
        2 * layout.block_size * layout.dtype.itemsize * sum(heads * size for _, heads, size in group.layers)
        for group in layout.groups
    ]
    assert [layout.block_bytes(group) for group in range(len(layout.groups))] == nbytes
    total = sum(map(int.__mul__, nbytes, layout.num_blocks))
    assert layout.nbytes == total
    backend = subject.start()
    before = backend.memory().kv_cache
    backend.create_cache(layout)
    assert backend.memory().kv_cache - before == total


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
    """A misuse raises the error; afterwards a pool behaves as another does that never saw it."""
    pool, before, after = data.draw(POOL), data.draw(CALLS), data.draw(CALLS)
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
