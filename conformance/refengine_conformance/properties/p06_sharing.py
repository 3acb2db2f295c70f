"""Chapter *Paged KV*: blocks that several hold, cached ones, and sequences that are suspended."""

from __future__ import annotations

import hashlib
from functools import partial

import numpy as np
from hypothesis import strategies as st

from refengine.errors import SequenceStateError
from refengine.memory import RELEASED, KVGroupLayout, KVLayout, pool_use
from refengine.memory.prefix_cache import CachedBlock
from refengine_conformance.kv_lives import KVLives, Tokens
from refengine_conformance.kv_tables import (
    LIVES,
    NAMES,
    ROOMY,
    SEVERAL,
    happens,
    layouts,
    mixed,
    new_cache,
    snapshot,
    succeeds,
    tables_of,
)
from refengine_conformance.registry import holds
from refengine_conformance.subject import Subject

PROMPT = st.builds(
    lambda pattern, length: (pattern * length)[:length],
    st.sampled_from([(0,), (0, 0, 0, 0, 0, 0, 1), (0, 0, 0, 1), (0, 1), (1,)]),
    st.sampled_from([12, 16, 18, 17, 8, 9, 6, 3, 1]),
)
"""Prompts that begin like each other, for different lengths."""


TEXT = st.lists(st.integers(0, 1), max_size=6).map(tuple)
"""How a fork goes on."""


SALTS = st.sampled_from(["", "tenant"])


@holds("KVC-17", "kv_cache", tier="state")
def a_fork_shares_every_block(subject: Subject, data: st.DataObject) -> None:
    """It takes no block; and parent and child end without the other noticing."""
    layout, cache = new_cache(subject, data.draw(ROOMY))
    length = data.draw(st.integers(1, 20))
    cache.grow("a", length)
    cache.release_passed("a", length)
    before, free = tables_of(cache, "a"), cache.free_blocks
    cache.fork("a", "b")
    assert tables_of(cache, "a") == tables_of(cache, "b") == before
    assert cache.free_blocks == free
    first, second = data.draw(st.permutations("ab"))
    cache.release(first)
    assert (tables_of(cache, second), cache.free_blocks) == (before, free)
    cache.grow("c", 12)
    for named, blocks in zip(tables_of(cache, "c"), before, strict=True):
        assert not set(named) & (set(blocks) - {RELEASED})
    cache.release("c")
    cache.release(second)
    assert cache.free_blocks == layout.num_blocks


@holds("KVC-17", "kv_cache", tier="state")
def what_cannot_be_forked_leaves_no_trace(subject: Subject, data: st.DataObject) -> None:
    """A parent that never began or has ended; a child that has begun."""
    _, cache = new_cache(subject, data.draw(ROOMY))
    cache.grow("a", data.draw(st.integers(1, 12)))
    cache.grow("b", data.draw(st.integers(1, 12)))
    cache.release("b")
    cache.grow("c", 1)
    before = snapshot(cache)
    for parent, child in data.draw(st.permutations([("b", "d"), ("x", "d"), ("a", "a"), ("a", "c")])):
        try:
            cache.fork(parent, child)
        except SequenceStateError:
            assert snapshot(cache) == before
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
    if not succeeds(lambda: cache.grow("a", length)):
        return
    cache.release_passed("a", length)
    cache.fork("a", "b")
    for name in data.draw(st.lists(st.sampled_from("ab"), min_size=1, max_size=3)):
        stop = length + data.draw(st.integers(1, 9))
        before, missing, free = snapshot(cache), cache.missing(name, stop), cache.free_blocks
        grown = succeeds(partial(cache.grow, name, stop))
        assert grown == all(map(int.__le__, missing, free))
        if not grown:
            assert snapshot(cache) == before
            continue
        assert cache.free_blocks == tuple(map(int.__sub__, free, missing))
        for mine, other in zip(
            tables_of(cache, name), tables_of(cache, "b" if name == "a" else "a"), strict=True
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
    sources = {group: blocks[-1] for group, blocks in enumerate(tables_of(cache, "a"))}
    cache.release("a")
    if data.draw(st.booleans()):  # the copy is not wanted any more
        cache.release("b")
        assert cache.free_blocks == layout.num_blocks
        assert cache.take_copies() == []
        return
    assert succeeds(lambda: cache.grow("c", min(cache.free_blocks) * size))
    assert all(sources[group] not in blocks for group, blocks in enumerate(tables_of(cache, "c")))
    free, copies = cache.free_blocks, cache.take_copies()
    assert [(copy.pool, copy.source) for copy in copies] == sorted(sources.items())
    for copy in copies:
        assert copy.destination == tables_of(cache, "b")[copy.pool][length // size]
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
            (tokens_of(entry), pool)
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
        held = tables_of(lives.cache, name)
        lives.cache.release_passed(name, longest)
        assert tables_of(lives.cache, name) == held
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
            zip(tables_of(lives.cache, "a"), tables_of(lives.cache, "b"), strict=True)
        ):
            shared = 1 if layout.groups[group].recent else whole
            assert one[:shared] == other[:shared] or whole == 0
    before = snapshot(lives.cache)
    lives.cache.publish("a", tokens, "", len(tokens))
    assert snapshot(lives.cache) == before


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
            ids = tokens_of(entry)
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
            {block for n in lives.lives for block in tables_of(lives.cache, n)[g] if block != RELEASED}
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
    layout, cache = new_cache(subject, data.draw(layouts(windows=SEVERAL)))
    for act in data.draw(LIVES):
        happens(cache, act)
    name = data.draw(st.sampled_from([n for n in NAMES if any(cache.held(n))] or [NAMES[0]]))
    cache.grow(name, 0)
    before, free, held = snapshot(cache)[0], cache.free_blocks, cache.held(name)
    position = cache.next_position(name)
    told = cache.suspend(name)
    assert told == [(g, b) for g, blocks in enumerate(before[name]) for b in blocks if b != RELEASED]
    assert cache.free_blocks == tuple(map(int.__add__, free, held))
    tokens = len(before[name][0]) * layout.block_size + data.draw(st.integers(0, 9))
    grown = -(-tokens // layout.block_size) - len(before[name][0])
    assert cache.missing(name, tokens) == tuple(count + grown for count in held)

    other = next(n for n in NAMES if n != name)
    taken = data.draw(st.integers(0, 12))
    succeeds(lambda: cache.grow(other, len(before[other][0]) * layout.block_size + taken))
    if not all(map(int.__le__, held, cache.free_blocks)):
        assert not succeeds(lambda: cache.resume(name))
        assert cache.held(name) == (0,) * len(held)
        for each in NAMES:
            if each != name:
                cache.release(each)
    given = cache.resume(name)
    blocks = tables_of(cache, name)
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
            for index, block in enumerate(tables_of(lives.cache, name)[pool]):
                if block != RELEASED:
                    places = range(min(size, max(0, life.computed - index * size)))
                    written.setdefault(block, set()).update(places)
        use = pool_use(lives.cache, pool)
        unwritten = sum(size - len(places) for places in written.values())
        assert (use.used - use.idle, use.unwritten) == (len(written), unwritten)
        assert use.waste == (unwritten / (len(written) * size) if written else 0)


def tokens_of(entry: CachedBlock | None) -> Tokens:
    """The tokens up to the end of a cached block."""
    ids: list[int] = []
    while entry is not None:
        ids[:0] = np.frombuffer(entry.tokens, "<i4").tolist()
        entry = entry.parent
    return tuple(ids)
