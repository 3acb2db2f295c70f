"""The KV cache's bookkeeping once more, written from the clauses alone: dictionaries, sets, and searches.

Blocks have sets of holders instead of counts, prefixes are found by comparing tokens instead of keys, and
what a window needs is found position by position. Slow, and with nothing in common with what it is a model of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Prefix = tuple[int, ...]


@dataclass
class NaivePool:
    blocks: int
    window: int | None
    recent: bool
    holders: dict[int, set[object]] = field(default_factory=dict)
    idle_since: dict[int, int] = field(default_factory=dict)
    cached: dict[Prefix, int] = field(default_factory=dict)

    def sees(self, index: int, position: int, size: int) -> bool:
        """Whether a query at ``position`` sees any position of the block before its own."""
        last = min((index + 1) * size, position) - 1
        return last >= index * size and (self.window is None or last > position - self.window)

    def keeps(self, index: int, position: int, size: int) -> bool:
        """Whether a sequence that writes ``position`` next keeps an entry."""
        if index * size >= position or position // size == index:
            return True
        return self.sees(index, position, size) and (index == 0 or not self.recent)


@dataclass
class NaiveSequence:
    tables: list[dict[int, int]]
    entries: int = 0
    position: int = 0


class NaiveCache:
    """See ``KVCacheManager``; the methods have its names. Results are blocks, or ``None`` for a refusal."""

    def __init__(self, size: int, pools: Sequence[NaivePool], max_idle: int | None) -> None:
        self.size, self.pools, self.max_idle = size, list(pools), max_idle
        self.sequences: dict[str, NaiveSequence] = {}
        self.copies: list[tuple[int, int, int]] = []
        self._clock = 0

    def free_blocks(self) -> tuple[int, ...]:
        return tuple(p.blocks - len(p.holders) + len(p.idle_since) for p in self.pools)

    def table(self, name: str, pool: int) -> list[int]:
        if name not in self.sequences:
            return []
        sequence = self.sequences[name]
        return [sequence.tables[pool].get(index, -1) for index in range(sequence.entries)]

    def grow(self, name: str, tokens: int) -> bool:
        """Whether there was room."""
        sequence = self.sequences.get(name) or NaiveSequence([{} for _ in self.pools])
        wanted = max(sequence.entries, -(-tokens // self.size))
        plans = []
        for p, pool in enumerate(self.pools):
            shared = [
                index
                for index, block in sorted(sequence.tables[p].items())
                if index * self.size < tokens
                and (index + 1) * self.size > sequence.position
                and any(holder not in (name,) and not self._is_copy(holder) for holder in pool.holders[block])
            ]
            plans.append(shared + list(range(sequence.entries, wanted)))
        if any(len(plan) > free for plan, free in zip(plans, self.free_blocks(), strict=True)):
            return False
        self.sequences[name] = sequence
        for p, (pool, plan) in enumerate(zip(self.pools, plans, strict=True)):
            while len(plan) > pool.blocks - len(pool.holders):
                self._evict(pool)
            fresh = sorted(set(range(pool.blocks)) - pool.holders.keys())[: len(plan)]
            for index, block in zip(plan, fresh, strict=True):
                pool.holders[block] = {name}
                old = sequence.tables[p].get(index)
                if old is not None:
                    if index * self.size < sequence.position:
                        copy = (p, old, block)
                        self.copies.append(copy)
                        pool.holders[old].add(("copy", copy))
                    self._drop(pool, old, name)
                sequence.tables[p][index] = block
        sequence.entries = wanted
        return True

    def release_passed(self, name: str, position: int) -> None:
        sequence = self.sequences[name]
        sequence.position = position
        for pool, table in zip(self.pools, sequence.tables, strict=True):
            for index in sorted(table):
                if not pool.keeps(index, position, self.size):
                    self._drop(pool, table.pop(index), name)
        self._forget_copies()

    def release(self, name: str) -> None:
        sequence = self.sequences.pop(name, None)
        for pool, table in zip(self.pools, sequence.tables if sequence else (), strict=False):
            for index in sorted(table, reverse=True):
                self._drop(pool, table[index], name)
        self._forget_copies()

    def fork(self, parent: str, child: str) -> bool:
        if parent not in self.sequences or child in self.sequences:
            return False
        old = self.sequences[parent]
        self.sequences[child] = NaiveSequence([dict(t) for t in old.tables], old.entries, old.position)
        for pool, table in zip(self.pools, old.tables, strict=True):
            for block in table.values():
                pool.holders[block].add(child)
        return True

    def take_copies(self) -> list[tuple[int, int, int]]:
        copies, self.copies = self.copies, []
        for copy in copies:
            self._drop(self.pools[copy[0]], copy[1], ("copy", copy))
        return copies

    def adopt(self, name: str, tokens: Prefix, limit: int) -> int:
        """``tokens`` begin with the salt's number, which counts for nothing else."""
        for count in range(min(len(tokens) - 2, limit) // self.size, 0, -1):
            whole = tokens[: 1 + count * self.size]
            if not any(key[: len(whole)] == whole for pool in self.pools for key in pool.cached):
                continue
            position = count * self.size
            tables = []
            for pool in self.pools:
                needed = [
                    i
                    for i in range(count)
                    if pool.sees(i, position, self.size) and (i == 0 or not pool.recent)
                ]
                if any(tokens[: 1 + (i + 1) * self.size] not in pool.cached for i in needed):
                    break
                tables.append({i: pool.cached[tokens[: 1 + (i + 1) * self.size]] for i in needed})
            else:
                for pool, table in zip(self.pools, tables, strict=True):
                    for block in table.values():
                        pool.holders[block].add(name)
                        pool.idle_since.pop(block, None)
                self.sequences[name] = NaiveSequence(tables, count, position)
                return position
        return 0

    def publish(self, name: str, tokens: Prefix, computed: int) -> None:
        sequence = self.sequences[name]
        for index in range(computed // self.size):
            key = tokens[: 1 + (index + 1) * self.size]
            for pool, table in zip(self.pools, sequence.tables, strict=True):
                if index not in table or (pool.recent and index):
                    continue
                block = pool.cached.setdefault(key, table[index])
                pool.holders[block] |= {"cache", name}
                if block != table[index]:
                    pool.idle_since.pop(block, None)
                    self._drop(pool, table[index], name)
                    table[index] = block
        self._forget_copies()

    @staticmethod
    def _is_copy(holder: object) -> bool:
        return isinstance(holder, tuple)

    def _drop(self, pool: NaivePool, block: int, holder: object) -> None:
        pool.holders[block].remove(holder)
        if not pool.holders[block]:
            del pool.holders[block]
            pool.idle_since.pop(block, None)
        elif pool.holders[block] == {"cache"}:
            self._clock += 1
            pool.idle_since[block] = self._clock
            if self.max_idle is not None and len(pool.idle_since) > self.max_idle:
                self._evict(pool)

    def _evict(self, pool: NaivePool) -> None:
        """The least recently used goes; where all that follows needs it, that goes too."""
        oldest = min(pool.idle_since, key=lambda block: pool.idle_since[block])
        prefix = next(key for key, block in pool.cached.items() if block == oldest)
        if pool.window is not None or pool.recent:
            del pool.cached[prefix]
            self._drop(pool, oldest, "cache")
            return
        for other in self.pools:
            for key in [key for key in other.cached if key[: len(prefix)] == prefix]:
                self._drop(other, other.cached.pop(key), "cache")

    def _forget_copies(self) -> None:
        while True:
            stale = [c for c in self.copies if c[2] not in self.pools[c[0]].holders]
            if not stale:
                return
            self.copies.remove(stale[-1])
            self._drop(self.pools[stale[-1][0]], stale[-1][1], ("copy", stale[-1]))
