"""Who holds which blocks of the KV cache."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from refengine.errors import OutOfBlocksError, SequenceStateError
from refengine.memory.block_table import RELEASED, BlockTable
from refengine.memory.kv_layout import KVLayout
from refengine.memory.prefix_cache import BlockPool, CachedBlock, PrefixCache, packed


@dataclass(frozen=True)
class BlockCopy:
    """A block's content is wanted in another block too, before anything is written to either."""

    pool: int
    source: int
    destination: int


@dataclass
class _Held:
    """What a sequence holds.

    Attributes:
        tables: one per pool.
        next_position: the next to be written.
        writable: positions below it, from the next on, lie in blocks that nobody else holds.
        chain: its blocks that were published or adopted, from the first on.
        salt: of these.
    """

    tables: tuple[BlockTable, ...]
    next_position: int = 0
    writable: int = 0
    chain: list[CachedBlock] = field(default_factory=list)
    salt: str = ""


@dataclass(frozen=True)
class _Suspended:
    """What a sequence held when it was suspended.

    Attributes:
        entries: by pool: whether each entry of its table named a block.
        next_position: the next to be written.
    """

    entries: tuple[tuple[bool, ...], ...]
    next_position: int


class KVCacheManager:
    """Block tables of all sequences, over the pools of all groups. Holds no keys or values itself.

    Args:
        layout: the pools.
        prefix_cache: finds what was computed before; ``None`` to keep nothing.
        table: makes the block tables.

    Clauses: KVC-12.
    """

    def __init__(
        self,
        layout: KVLayout,
        prefix_cache: PrefixCache | None = None,
        *,
        table: type[BlockTable] = BlockTable,
    ) -> None:
        self.layout, self.prefix_cache = layout, prefix_cache
        bound = None if prefix_cache is None else prefix_cache.max_idle_blocks
        self.pools = tuple(
            BlockPool(group.num_blocks, layout.segment_blocks(g), bound)
            for g, group in enumerate(layout.groups)
        )
        if prefix_cache is not None:
            full = [g for g, group in enumerate(layout.groups) if group.window is None and not group.recent]
            prefix_cache.attach(self.pools, tuple(full))
        self._table = table
        self._sequences: dict[Hashable, _Held] = {}
        self._suspended: dict[Hashable, _Suspended] = {}
        self._empty = self._new_tables()
        self._none = (0,) * len(self.pools)
        self._copies: list[BlockCopy] = []
        self._pinned: Counter[tuple[int, int]] = Counter()  # references that noted copies hold on sources

    # -- What there is -------------------------------------------------------------------------------------

    @property
    def sequences(self) -> tuple[Hashable, ...]:
        """Those that have tables, in the order in which they began."""
        return tuple(self._sequences)

    def tables(self, sequence: Hashable) -> tuple[BlockTable, ...]:
        """The block table of a sequence in each group; empty ones where it has not begun."""
        held = self._sequences.get(sequence)
        return self._new_tables() if held is None else held.tables

    def writable(self, sequence: Hashable) -> range:
        """The positions that a sequence may write now: those it has grown for, and has not published."""
        if (held := self._sequences.get(sequence)) is None:
            return range(0)
        return range(max(held.next_position, len(held.chain) * self.layout.block_size), held.writable)

    def chain(self, sequence: Hashable) -> tuple[CachedBlock, ...]:
        """The blocks of a sequence that it adopted or published, from the first on."""
        held = self._sequences.get(sequence)
        return () if held is None else tuple(held.chain)

    @property
    def pending_copies(self) -> tuple[BlockCopy, ...]:
        """The copies that were noted and not taken yet; each holds a reference to its source."""
        return tuple(self._copies)

    def sharers(self, group: int, block: int) -> int:
        """How many tables name a block."""
        return self.pools[group].holders(block) - self._pinned[group, block]

    def next_position(self, sequence: Hashable) -> int:
        """The next position of a sequence to be written, as last told by ``release_passed``."""
        held = self._sequences.get(sequence)
        return 0 if held is None else held.next_position

    @property
    def free_blocks(self) -> tuple[int, ...]:
        """Free blocks of each group; those that only the prefix cache holds are free."""
        return tuple([pool.num_free for pool in self.pools])

    def capacity(self, group: int) -> int:
        """Positions the pool of a group holds."""
        return self.layout.groups[group].num_blocks * self.layout.block_size

    def held(self, sequence: Hashable) -> tuple[int, ...]:
        """Blocks of each group that a sequence refers to."""
        held = self._sequences.get(sequence)
        return tuple([table.held for table in (self._empty if held is None else held.tables)])

    def missing(self, sequence: Hashable, tokens: int) -> tuple[int, ...]:
        """Blocks of each group that a sequence lacks to hold ``tokens`` positions and write what is new.

        Clauses: KVC-7, KVC-18, KVC-27.
        """
        held = self._sequences.get(sequence)
        if held is None:
            entries = -(-tokens // self.layout.block_size)
            suspended = self._suspended.get(sequence)
            if suspended is None:
                return (entries,) * len(self.pools)
            return tuple([sum(each) + max(0, entries - len(each)) for each in suspended.entries])
        if tokens <= held.writable:
            return self._none
        return tuple(
            [
                table.missing(tokens) + len(self._unwritable(pool, table, held.next_position, tokens))
                for pool, table in enumerate(held.tables)
            ]
        )

    def reclaimable(self, sequences: Iterable[Hashable]) -> tuple[int, ...]:
        """Free blocks of each group that there would be more if these sequences were released together."""
        found = []
        chosen = [self._sequences[s] for s in dict.fromkeys(sequences) if s in self._sequences]
        for number, pool in enumerate(self.pools):
            named = Counter(block for held in chosen for block in held.tables[number].blocks.tolist())
            del named[RELEASED]
            found.append(sum(pool.holders(block) == count for block, count in named.items()))
        return tuple(found)

    # -- A sequence's life ---------------------------------------------------------------------------------

    def grow(self, sequence: Hashable, tokens: int) -> None:
        """Give a sequence room for ``tokens`` positions in every group; all or none.

        Blocks that it is going to write to, from its next position on, are its own afterwards: shared ones
        are replaced, and copies noted of those that hold earlier positions.

        Raises:
            OutOfBlocksError: a group has too few free blocks; no table has changed.

        Clauses: KVC-7, KVC-8, KVC-18.
        """
        held = self._sequences.get(sequence)
        if held is not None and tokens <= held.writable:
            return
        if held is None:
            held = _Held(self._new_tables())
        wanted: list[tuple[list[int], int]] = []
        for number, (pool, table) in enumerate(zip(self.pools, held.tables, strict=True)):
            replaced = self._unwritable(number, table, held.next_position, tokens)
            count = len(replaced) + table.missing(tokens)
            if count > pool.num_free:
                raise OutOfBlocksError(f"{count} KV blocks are needed and {pool.num_free} are free")
            wanted.append((replaced, count))
        self._sequences[sequence] = held
        for number, (table, (replaced, count)) in enumerate(zip(held.tables, wanted, strict=True)):
            if count:
                blocks = self.pools[number].allocate(count)
                for index, block in zip(replaced, blocks, strict=False):
                    self._replace(number, table, index, block, written=held.next_position)
                table.extend(blocks[len(replaced) :])
        size = self.layout.block_size
        held.writable = -(-tokens // size) * size

    def release_passed(self, sequence: Hashable, next_position: int) -> None:
        """Tell which position is written next, and give back the blocks that no later query needs.

        Clauses: KVC-9, KVC-16.
        """
        if (held := self._sequences.get(sequence)) is None:
            return
        if next_position < held.next_position:
            held.writable = 0
        held.next_position = next_position
        del held.chain[next_position // self.layout.block_size :]  # what is written again is another block
        for table in held.tables:
            table.release_passed(next_position)
        if self._copies:
            self._forget_copies()

    def release(self, sequence: Hashable) -> None:
        """Give back all blocks of a sequence and forget it.

        Clauses: KVC-11.
        """
        self._suspended.pop(sequence, None)
        if (held := self._sequences.pop(sequence, None)) is not None:
            for table in held.tables:
                table.release_all()
            self._forget_copies()

    def suspend(self, sequence: Hashable) -> list[tuple[int, int]]:
        """Give back all blocks of a sequence and remember which it had; tells them, ``(pool, block)``.

        To be called between steps; whoever keeps what the blocks hold reads it before anything else happens.

        Raises:
            SequenceStateError: the sequence has ended or never began.

        Clauses: KVC-27.
        """
        if (held := self._sequences.pop(sequence, None)) is None:
            raise SequenceStateError(f"sequence {sequence!r} holds no blocks and cannot be suspended")
        tables = [table.blocks.tolist() for table in held.tables]
        self._suspended[sequence] = _Suspended(
            tuple(tuple([block != RELEASED for block in table]) for table in tables), held.next_position
        )
        for table in held.tables:
            table.release_all()
        self._forget_copies()
        return [(g, block) for g, table in enumerate(tables) for block in table if block != RELEASED]

    def resume(self, sequence: Hashable) -> list[tuple[int, int]]:
        """Give a suspended sequence as many blocks as it had, in the same places of its tables; all or none.

        Returns:
            ``(pool, block)``, in the order in which ``suspend`` told those that these replace.

        Raises:
            SequenceStateError: the sequence is not suspended.
            OutOfBlocksError: too few blocks are free; it stays suspended.

        Clauses: KVC-27.
        """
        if (suspended := self._suspended.get(sequence)) is None:
            raise SequenceStateError(f"sequence {sequence!r} is not suspended and cannot be resumed")
        for entries, free in zip(suspended.entries, self.free_blocks, strict=True):
            if sum(entries) > free:
                raise OutOfBlocksError(f"{sum(entries)} KV blocks are needed and {free} are free")
        del self._suspended[sequence]
        held = self._sequences[sequence] = _Held(self._new_tables(), suspended.next_position)
        given = []
        for number, (pool, table) in enumerate(zip(self.pools, held.tables, strict=True)):
            blocks = iter(pool.allocate(sum(suspended.entries[number])))
            table.restore([next(blocks) if had else RELEASED for had in suspended.entries[number]])
            given += [(number, block) for block in table.blocks.tolist() if block != RELEASED]
        return given

    def fork(self, parent: Hashable, child: Hashable) -> None:
        """Begin a sequence with all that another has computed, in the same blocks.

        Raises:
            SequenceStateError: the parent has ended or never began, or the child has begun already.

        Clauses: KVC-17.
        """
        if (held := self._sequences.get(parent)) is None:
            raise SequenceStateError(
                f"sequence {parent!r} holds no blocks: it has ended or never began, and cannot be forked"
            )
        if child in self._sequences:
            raise SequenceStateError(f"sequence {child!r} has begun already; fork under another name")
        held.writable = 0
        tables = tuple(table.copy() for table in held.tables)
        self._sequences[child] = _Held(tables, held.next_position, 0, list(held.chain), held.salt)

    def take_copies(self) -> list[BlockCopy]:
        """The copies noted since this was last asked, to be made in this order before anything is written.

        Until then their sources are kept, whoever releases them.

        Clauses: KVC-18, KVC-19.
        """
        copies, self._copies = self._copies, []
        for copy in copies:
            self._unpin(copy)
        return copies

    # -- The prefix cache ----------------------------------------------------------------------------------

    def adopt(
        self,
        sequence: Hashable,
        tokens: Sequence[int],
        salt: str = "",
        limit: int | None = None,
        *,
        again: bool = False,
    ) -> int:
        """Let a sequence begin with blocks of the longest prefix of its tokens that is cached.

        Args:
            sequence: whose tables are empty.
            tokens: its tokens.
            salt: of its tenant.
            limit: positions at most; ``None`` for any number.
            again: whether this was asked before, and is not to be counted twice.

        Returns:
            How many positions it has then: whole blocks, fewer than ``tokens``, at most ``limit``.

        Raises:
            SequenceStateError: the sequence has blocks already.

        Clauses: KVC-22, KVC-23.
        """
        if sequence in self._sequences and any(map(len, self.tables(sequence))):
            raise SequenceStateError(f"sequence {sequence!r} has begun already and can adopt no prefix")
        if (cache := self.prefix_cache) is None:
            return 0
        size = self.layout.block_size
        most = max(0, min(len(tokens) - 1, len(tokens) if limit is None else limit) // size)
        tables = self._new_tables()
        chain = cache.walk(salt, packed(tokens[: most * size]), 4 * size)
        del chain[self._adoptable(chain, tables) :]
        cache.count(len(tokens), len(chain) * size)
        if chain:
            for pool, table in enumerate(tables):
                needed = table.needed(len(chain))
                table.adopt(
                    [entry.blocks[pool] if i in needed else RELEASED for i, entry in enumerate(chain)]
                )
            self._sequences[sequence] = _Held(tables, len(chain) * size, 0, chain, salt)
        return len(chain) * size

    def publish(self, sequence: Hashable, tokens: Sequence[int], salt: str, computed: int) -> None:
        """Let the prefix cache hold the full blocks among the first ``computed`` positions of a sequence.

        To be called before ``release_passed``: what a window has passed is not there to be cached. Where the
        cache has an equal block, the sequence goes on with that one and gives its own back.

        Raises:
            SequenceStateError: its earlier blocks were published with another salt or other tokens.

        Clauses: KVC-24.
        """
        held, cache = self._sequences.get(sequence), self.prefix_cache
        size = self.layout.block_size
        if cache is None or held is None or computed // size <= len(held.chain):
            return
        while held.chain and not cache.is_live(held.chain[-1]):
            held.chain.pop()
        stop = len(held.chain) * size
        if held.chain and (held.salt, held.chain[-1].tokens) != (salt, packed(tokens[stop - size : stop])):
            raise SequenceStateError(f"sequence {sequence!r} was published with another salt or other tokens")
        held.salt = salt
        for start in range(stop, computed - size + 1, size):
            entry = cache.add(
                salt, held.chain[-1] if held.chain else None, packed(tokens[start : start + size])
            )
            if entry is None:  # a collision: nothing can be found behind it
                break
            for pool, table in enumerate(held.tables):
                self._join(cache, entry, pool, table, start // size)
            held.chain.append(entry)
        if held.chain:
            cache.prune(held.chain[-1])
        self._forget_copies()

    # -- What an engine turns into arrays ------------------------------------------------------------------

    def padded_tables(self, sequences: Sequence[Hashable], group: int) -> NDArray[np.int32]:
        """The tables of several sequences as one array ``[S, M]``, padded with ``RELEASED``.

        Clauses: KVC-13.
        """
        held, none = self._sequences, self._empty
        rows = [(held[s].tables if s in held else none)[group].entries for s in sequences]
        width = max(map(len, rows))
        padding = array("i", (RELEASED,))
        parts = []
        for row in rows:
            parts.append(row)
            if len(row) < width:
                parts.append(padding * (width - len(row)))
        return np.frombuffer(bytearray().join(parts), np.int32).reshape(len(rows), width)

    def segments(self, group: int) -> tuple[int, ...]:
        """The segments of a pool that hold a block in use, ascending.

        Clauses: KVC-15.
        """
        return self.pools[group].segments

    def take_segment_changes(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """``(pool, segment)`` of those to commit, and of those to release, since this was last asked.

        Clauses: KVC-15.
        """
        changes = [pool.take_segment_changes() for pool in self.pools]
        commits = [(number, s) for number, (came, _) in enumerate(changes) for s in came]
        return commits, [(number, s) for number, (_, went) in enumerate(changes) for s in went]

    def take_freed(self) -> list[tuple[int, int]]:
        """``(pool, block)`` of those that became free since this was last asked, to be poisoned.

        To be asked once a step, after its blocks were allocated and before its copies are taken. Blocks in
        segments that are not in use are left out.
        """
        return [(number, block) for number, pool in enumerate(self.pools) for block in pool.take_freed()]

    # -- Inside --------------------------------------------------------------------------------------------

    def _new_tables(self) -> tuple[BlockTable, ...]:
        return tuple(
            self._table(pool, self.layout.block_size, group.window, group.recent)
            for pool, group in zip(self.pools, self.layout.groups, strict=True)
        )

    def _unwritable(self, pool: int, table: BlockTable, start: int, stop: int) -> list[int]:
        """The entries of positions ``start … stop - 1`` whose blocks have other holders."""
        size, entries = self.layout.block_size, table.entries
        first, found = start // size, list[int]()
        if first >= len(entries):  # as where the next token begins a block
            return found
        references = self.pools[pool].references
        for index in range(first, min(-(-stop // size), len(entries))):
            block = entries[index]
            if block != RELEASED and references(block) - self._pinned[pool, block] > 1:
                found.append(index)
        return found

    def _replace(self, pool: int, table: BlockTable, index: int, block: int, written: int) -> None:
        """Put a fresh block in a shared one's place; what was written there before is to be copied."""
        if index * self.layout.block_size < written:
            copy = BlockCopy(pool, table[index], block)
            self._copies.append(copy)
            self._pinned[pool, copy.source] += 1
            self.pools[pool].share(copy.source)
            self.pools[pool].overwritten(block)
        table.replace(index, block)

    def _unpin(self, copy: BlockCopy) -> None:
        place = copy.pool, copy.source
        self._pinned[place] -= 1
        if not self._pinned[place]:
            del self._pinned[place]
        self.pools[copy.pool].release(copy.source)

    def _forget_copies(self) -> None:
        """Drop the noted copies whose destinations are free again, before others get these blocks."""
        for copy in reversed(self._copies):  # a source that is dropped may be an earlier one's destination
            if self.pools[copy.pool].references(copy.destination) == 0:
                self._copies.remove(copy)
                self._unpin(copy)

    def _adoptable(self, chain: list[CachedBlock], tables: Sequence[BlockTable]) -> int:
        """How many blocks of a chain can be adopted: every pool has what a query behind them needs.

        A block that is needed behind ``length`` blocks is needed behind fewer too, as long as these include
        it: so the search goes on in front of the last one that is not there.
        """
        length, absent = len(chain), 0
        while length and absent >= 0:
            absent = max(
                (
                    index
                    for pool, table in enumerate(tables)
                    for index in table.needed(length)
                    if chain[index].blocks[pool] == RELEASED
                ),
                default=-1,
            )
            length = length if absent < 0 else absent
        return length

    def _join(self, cache: PrefixCache, entry: CachedBlock, pool: int, table: BlockTable, index: int) -> None:
        """Let entry and table name one block: the entry's where it has one, else the table's."""
        if table[index] == RELEASED:
            return
        if entry.blocks[pool] == RELEASED:
            if index == 0 or not self.layout.groups[pool].recent:
                cache.hold(entry, pool, table[index])
        elif entry.blocks[pool] != table[index]:
            self.pools[pool].share(entry.blocks[pool])
            table.replace(index, entry.blocks[pool])
