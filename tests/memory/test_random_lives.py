"""A million random steps: allocator and KV cache beside a naive model, and beside memory that remembers."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from memory.naive_cache import NaiveCache, NaivePool
from refengine.errors import BlockStateError, OutOfBlocksError, SequenceStateError
from refengine.memory import BlockAllocator, KVCacheManager, KVGroupLayout, KVLayout, PrefixCache, verify

SIZE = 4

POISON = -7

LAYOUTS: dict[str, list[tuple[int | None, bool, int]]] = {
    "full": [(None, False, 40)],
    "windowed": [(None, False, 40), (6, False, 24)],
    "sealed": [(None, False, 40), (9, False, 30), (None, True, 18), (9, True, 14)],
    "windows only": [(7, False, 24), (2, False, 20)],
}
"""Pools: window, whether only what is recent is kept, blocks."""


class Lives:
    """Random sequences; every step is done by a manager and by the model, and what is written is read again."""

    def __init__(self, seed: int, pools: list[tuple[int | None, bool, int]], max_idle: int | None) -> None:
        self.random = random.Random(seed)
        groups = tuple(
            KVGroupLayout(window, ((g, 1, 64),), blocks, recent=recent)
            for g, (window, recent, blocks) in enumerate(pools)
        )
        self.layout = KVLayout(SIZE, np.dtype(np.float16), groups)
        self.manager = KVCacheManager(self.layout, PrefixCache(max_idle_blocks=max_idle))
        self.model = NaiveCache(SIZE, [NaivePool(n, w, r) for w, r, n in pools], max_idle)
        self.tokens: dict[str, tuple[int, ...]] = {}
        self.names = iter(range(10**9))
        self.cells = [[POISON] * (blocks * SIZE) for _, _, blocks in pools]
        self.committed: set[tuple[int, int]] = set()
        self.prefixes: dict[tuple[int, int], int] = {}

    def run(self, steps: int) -> None:
        """Do so many random things, then end everything."""
        done = 0
        while done < steps:
            chance = self.random.random()
            if chance < 0.25 or not self.tokens:
                done += self.begin()
            elif chance < 0.33:
                done += self.fork()
            elif chance < 0.45:
                done += self.end(self.random.choice(list(self.tokens)))
            else:
                done += self.step()
            if done % 500 < 3:
                self.compare_everything()
        self.compare_everything()
        for name in list(self.tokens):
            self.end(name)
        self.settle()
        self.compare_everything()
        assert self.manager.free_blocks == self.layout.num_blocks
        assert self.manager.sequences == ()

    def begin(self) -> int:
        """A sequence whose prompt begins as others do."""
        name = f"s{next(self.names)}"
        kind, salt, length = self.random.randrange(4), self.random.randrange(2), self.random.randint(1, 30)
        tokens = (salt, *((kind >> (i // 6) & 1) + 2 * (i % 3) for i in range(length)))
        limit = self.random.choice((length, length, self.random.randint(0, length)))
        found = self.manager.adopt(name, tokens[1:], str(salt), limit)
        assert found == self.model.adopt(name, tokens, limit)
        self.tokens[name] = tokens
        self.compare(name)
        return 1

    def fork(self) -> int:
        """A child, or a refusal: where the parent has not begun, or the child has."""
        parent, child = self.random.choice(list(self.tokens)), f"s{next(self.names)}"
        if self.random.random() < 0.1:
            child = self.random.choice([child, *self.manager.sequences])
        done = self.model.fork(parent, child)
        if not done:
            with pytest.raises(SequenceStateError):
                self.manager.fork(parent, child)
            return 1
        self.manager.fork(parent, child)
        self.tokens[child] = self.tokens[parent]
        self.compare(child)
        return 1

    def end(self, name: str) -> int:
        self.manager.release(name)
        self.model.release(name)
        del self.tokens[name]
        assert self.manager.free_blocks == self.model.free_blocks()
        return 1

    def step(self) -> int:
        """Some sequences grow, one may be aborted, memory follows; then they write, and read what they see."""
        names = self.random.sample(list(self.tokens), min(len(self.tokens), self.random.randint(1, 3)))
        batch = []
        for name in names:
            start = self.manager.next_position(name)
            stop = start + self.random.choice((1, 1, 1, 2, 5, 9))
            prompt = len(self.tokens[name]) - 1
            stop = min(stop, prompt) if start < prompt else start + 1
            if stop > prompt:
                self.tokens[name] += (self.random.randrange(2),)
            free, missing = self.manager.free_blocks, self.manager.missing(name, stop)
            if self.model.grow(name, stop):
                self.manager.grow(name, stop)
                assert self.manager.free_blocks == tuple(map(int.__sub__, free, missing))
                batch.append((name, start, stop))
            else:
                with pytest.raises(OutOfBlocksError):
                    self.manager.grow(name, stop)
                assert self.manager.free_blocks == free
                self.end(
                    self.random.choice([n for n in self.tokens if n not in dict.fromkeys(names)] or [name])
                )
                if name not in self.tokens:
                    return len(names)
            self.compare(name)
        if batch and self.random.random() < 0.05:
            self.end(batch.pop(self.random.randrange(len(batch)))[0])
        self.settle()
        for name, start, stop in batch:
            self.write(name, start, stop)
        for name, start, stop in batch:
            self.read(name, start, stop)
            if self.random.random() < 0.9:
                self.manager.publish(name, self.tokens[name][1:], str(self.tokens[name][0]), stop)
                self.model.publish(name, self.tokens[name], stop)
            self.manager.release_passed(name, stop)
            self.model.release_passed(name, stop)
            self.compare(name)
            if stop > 34:
                self.end(name)
        return len(names)

    def settle(self) -> None:
        """Memory as an engine moves it."""
        commits, releases = self.manager.take_segment_changes()
        self.committed |= set(commits)
        for pool, block in self.manager.take_freed():
            self.cells[pool][block * SIZE : (block + 1) * SIZE] = [POISON] * SIZE
        copies = self.manager.take_copies()
        for copy in copies:
            source = copy.source * SIZE
            self.cells[copy.pool][copy.destination * SIZE : (copy.destination + 1) * SIZE] = self.cells[
                copy.pool
            ][source : source + SIZE]
        assert [(c.pool, c.source, c.destination) for c in copies] == self.model.take_copies()
        self.committed -= set(releases)

    def write(self, name: str, start: int, stop: int) -> None:
        for pool, table in enumerate(self.manager.tables(name)):
            cells, marks = self.cells[pool], self.marks(name, start, stop)
            for slot, mark in zip(table.slot_list(start, stop), marks, strict=True):
                assert (pool, slot // SIZE // self.layout.segment_blocks(pool)) in self.committed
                cells[slot] = mark

    def read(self, name: str, start: int, stop: int) -> None:
        """Every position that a query from ``start`` to ``stop - 1`` sees."""
        for pool, (table, group) in enumerate(
            zip(self.manager.tables(name), self.layout.groups, strict=True)
        ):
            first = 0 if group.window is None else max(0, start - group.window + 1)
            current = max(first, start // SIZE * SIZE)
            seen = [(first, stop)]
            if group.recent:
                seen = [(first, min(SIZE, current)), (current, stop)]
            for low, high in seen:
                slots = table.slot_list(low, high) if low < high else []
                assert [self.cells[pool][slot] for slot in slots] == self.marks(name, low, high)

    def marks(self, name: str, start: int, stop: int) -> list[int]:
        """What is written at positions: one number for each prefix that ends there."""
        return [hash(self.tokens[name][: position + 2]) for position in range(start, stop)]

    def compare(self, name: str) -> None:
        assert self.manager.free_blocks == self.model.free_blocks()
        for pool, table in enumerate(self.manager.tables(name)):
            assert table.blocks.tolist() == self.model.table(name, pool)

    def compare_everything(self) -> None:
        verify(self.manager, {name: tokens[1:] for name, tokens in self.tokens.items()})
        for name in self.tokens:
            self.compare(name)
        for pool, naive in zip(self.manager.pools, self.model.pools, strict=True):
            assert list(pool.idle) == sorted(naive.idle_since, key=naive.idle_since.__getitem__)
            assert pool.num_cached == len(naive.cached)
            assert [pool.references(b) for b in range(pool.num_blocks)] == [
                len(naive.holders.get(b, ())) for b in range(pool.num_blocks)
            ]


BOUNDS = (None, 3, 0)
"""Of blocks that only the prefix cache holds."""

SHORT, LONG = 150_000, 1_000_000
"""Steps of sequences, in an ordinary run and with ``--refengine-profile thorough``."""

CALLS = 850_000
"""Of an allocator alone: with the steps of an ordinary run, a million."""


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("pools", LAYOUTS)
def test_lives_are_those_of_the_model(pools: str, bound: int | None, pytestconfig: pytest.Config) -> None:
    """Same blocks, same refusals, same hits; what a query sees was written for it; nothing is left over."""
    steps = LONG if pytestconfig.getoption("--refengine-profile") == "thorough" else SHORT
    Lives(len(pools), LAYOUTS[pools], bound).run(steps // (len(LAYOUTS) * len(BOUNDS)))


def test_an_allocators_life_is_that_of_a_set() -> None:
    """Whatever is called: the lowest of the free, as many references as were asked for, every misuse refused."""
    numbers = random.Random(0)
    allocator, held, free = BlockAllocator(32, segment_blocks=5), Counter[int](), set(range(32))
    committed: set[int] = set()
    for call in range(CALLS):
        block, chance = numbers.randrange(32), numbers.random()
        if chance < 0.3:
            count = numbers.randrange(5)
            if count > len(free):
                with pytest.raises(OutOfBlocksError):
                    allocator.allocate(count)
            else:
                lowest = sorted(free)[:count]
                assert allocator.allocate(count) == lowest
                held.update(lowest)
                free.difference_update(lowest)
        elif block in free:
            with pytest.raises(BlockStateError):
                (allocator.share if chance < 0.4 else allocator.release)(block)
        elif chance < 0.45:
            allocator.share(block)
            held[block] += 1
        else:
            held[block] -= 1
            assert allocator.release(block) == (held[block] == 0)
            if held[block] == 0:
                free.add(block)
        assert (allocator.num_free, allocator.references(block)) == (len(free), held[block])
        if call % 7 == 0:
            used = {block // 5 for block in range(32) if block not in free}
            came, went = allocator.take_segment_changes()
            assert (set(came), set(went)) == (used - committed, committed - used)
            assert allocator.segments == tuple(sorted(used))
            committed = used
