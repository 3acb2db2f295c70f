"""A KV cache at work, over memory that remembers for which tokens each slot was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from refengine.errors import OutOfBlocksError
from refengine.memory import KVCacheManager

Tokens = tuple[int, ...]


@dataclass
class _Life:
    tokens: Tokens
    salt: str
    computed: int = 0


class KVLives:
    """Sequences that are computed step by step, as an engine would.

    What is written for a position is the salt and all tokens up to it, which is what its keys and values
    depend on. After every step, each sequence is made to read all that its next query will see.

    Attributes:
        cache: who holds which blocks.
        cells: what was written, by ``(pool, block)``, a dictionary by place in the block.
    """

    def __init__(self, cache: KVCacheManager) -> None:
        self.cache = cache
        self.cells: dict[tuple[int, int], dict[int, Any]] = {}
        self.lives: dict[str, _Life] = {}

    def begin(self, name: str, tokens: Tokens, salt: str = "", limit: int | None = None) -> int:
        """Begin with what is cached of a prompt; returns its length."""
        found = self.cache.adopt(name, tokens, salt, limit)
        self.lives[name] = _Life(tokens, salt, found)
        self.read()
        return found

    def advance(self, *steps: tuple[str, int], publish: bool = True, abort: str | None = None) -> bool:
        """Compute the next tokens of some sequences in one step, up to the end of what is known of each.

        Whoever is named as ``abort`` ends after blocks were given out, and before anything is written.
        Returns whether there was room for all; those for which there is none end.
        """
        spans, room = [], True
        for name, count in steps:
            life = self.lives[name]
            stop = min(life.computed + count, len(life.tokens))
            try:
                self.cache.grow(name, stop)
            except OutOfBlocksError:
                self.end(name)
                room = False
            else:
                spans.append((name, stop))
        if abort in self.lives:
            self.end(abort)
        self.copy()
        for name, stop in spans:
            self.write(name, stop)
        for name, stop in spans:
            if name in self.lives:
                self._account(name, stop, publish)
        self.read()
        return room

    def fork(self, parent: str, child: str, tokens: Tokens = ()) -> None:
        """A child that goes on with other tokens."""
        life = self.lives[parent]
        self.cache.fork(parent, child)
        self.lives[child] = _Life(life.tokens[: life.computed] + tokens, life.salt, life.computed)
        self.read()

    def end(self, name: str) -> None:
        """End a sequence."""
        self.cache.release(name)
        del self.lives[name]

    def copy(self) -> None:
        """Make the copies that were noted, in order."""
        for copy in self.cache.take_copies():
            self.cells[copy.pool, copy.destination] = dict(self.cells.get((copy.pool, copy.source), {}))

    def write(self, name: str, stop: int) -> None:
        """Write the positions from the next one on."""
        if (life := self.lives.get(name)) is None:
            return
        size = self.cache.layout.block_size
        for pool, table in enumerate(self.cache.tables(name)):
            slots = table.slots(life.computed, stop).tolist()
            for position, slot in zip(range(life.computed, stop), slots, strict=True):
                block = self.cells.setdefault((pool, slot // size), {})
                block[slot % size] = (life.salt, life.tokens[: position + 1])

    def read(self) -> None:
        """Every sequence reads what its next query sees.

        Raises:
            AssertionError: something else lies there, or nothing.
        """
        for name, life in self.lives.items():
            for pool in range(len(self.cache.layout.groups)):
                self._read(name, life, pool)

    def visible(self, pool: int, position: int) -> Sequence[int]:
        """The earlier positions that a query at ``position`` sees in a pool."""
        group, size = self.cache.layout.groups[pool], self.cache.layout.block_size
        return [
            p
            for p in range(position)
            if (group.window is None or p > position - group.window)
            and (not group.recent or p // size in (0, position // size))
        ]

    def _read(self, name: str, life: _Life, pool: int) -> None:
        size, table = self.cache.layout.block_size, self.cache.tables(name)[pool].blocks.tolist()
        for position in self.visible(pool, life.computed):
            index = position // size
            there = self.cells.get((pool, table[index])) if index < len(table) else None
            found = (there or {}).get(position % size)
            wanted = (life.salt, life.tokens[: position + 1])
            assert found == wanted, f"{name} sees {found} at position {position} and wants {wanted}"

    def _account(self, name: str, stop: int, publish: bool) -> None:
        life = self.lives[name]
        life.computed = stop
        if publish:
            self.cache.publish(name, life.tokens, life.salt, stop)
        self.cache.release_passed(name, stop)
