"""Chapter *Paged KV*, shared blocks: faults of segments, forks, copies, windows and the prefix cache."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial

from refengine.backend.numpy_backend import NumpyBackend
from refengine.memory import (
    RELEASED,
    BlockAllocator,
    BlockCopy,
    BlockTable,
    KVCacheManager,
    KVLayout,
    PrefixCache,
)
from refengine.memory.prefix_cache import BlockPool, CachedBlock
from refengine_conformance.faults.fault import Fault
from refengine_conformance.subject import Subject

Segments = list[tuple[int, int]]

# -- Segments ----------------------------------------------------------------------------------------------


class _SegmentsStay(KVCacheManager):
    def take_segment_changes(self) -> tuple[Segments, Segments]:
        commits, _ = super().take_segment_changes()
        return commits, []


class _SegmentsAreToldAgain(KVCacheManager):
    def take_segment_changes(self) -> tuple[Segments, Segments]:
        _, releases = super().take_segment_changes()
        return [(g, s) for g in range(len(self.pools)) for s in self.segments(g)], releases


class _SegmentsOfFirstBlocks(KVCacheManager):
    def segments(self, group: int) -> tuple[int, ...]:
        count, pool = self.layout.segment_blocks(group), self.pools[group]
        return tuple(s for s in super().segments(group) if pool.references(s * count))


# -- Recent pools ------------------------------------------------------------------------------------------


class _KeepsNoFirst(BlockTable):
    def release_passed(self, next_position: int) -> None:
        super().release_passed(next_position)
        if self._recent and next_position >= self._block_size and len(self) and self[0] != RELEASED:
            self._give_back(0)


class _KeepsTheFirstForGood(BlockTable):
    def release_passed(self, next_position: int) -> None:
        window = self._window
        if self._recent:
            self._window = None
        super().release_passed(next_position)
        self._window = window


class _KeepsTheBlockBefore(BlockTable):
    def release_passed(self, next_position: int) -> None:
        super().release_passed(next_position - self._block_size * self._recent)


# -- Forks and copies --------------------------------------------------------------------------------------


class _ForksWithoutReferences(KVCacheManager):
    def fork(self, parent: Hashable, child: Hashable) -> None:
        super().fork(parent, child)
        for pool, table in zip(self.pools, self.tables(child), strict=True):
            for block in table.blocks.tolist():
                if block != RELEASED:
                    pool._references[block] -= 1


class _AbortFreesAll(KVCacheManager):
    def release(self, sequence: Hashable) -> None:
        for pool, table in zip(self.pools, self.tables(sequence), strict=True):
            for block in table.blocks.tolist():
                while block != RELEASED and pool.references(block) > 1:
                    pool.release(block)
        super().release(sequence)


class _ForksTheFinished(KVCacheManager):
    def fork(self, parent: Hashable, child: Hashable) -> None:
        if parent in self.sequences:
            super().fork(parent, child)


class _ForksOverTheChild(KVCacheManager):
    def fork(self, parent: Hashable, child: Hashable) -> None:
        if child in self.sequences:
            self.release(child)
        super().fork(parent, child)


class _WritesShared(KVCacheManager):
    def _unwritable(self, pool: int, table: BlockTable, start: int, stop: int) -> list[int]:
        return []


class _CopiesNothing(KVCacheManager):
    def take_copies(self) -> list[BlockCopy]:
        super().take_copies()
        return []


class _CopiesBackwards(KVCacheManager):
    def take_copies(self) -> list[BlockCopy]:
        return [BlockCopy(c.pool, c.destination, c.source) for c in super().take_copies()]


class _CopiesInTheFirstPool(KVCacheManager):
    def take_copies(self) -> list[BlockCopy]:
        return [copy for copy in super().take_copies() if copy.pool == 0]


class _CopiesAreExtra(KVCacheManager):
    def missing(self, sequence: Hashable, tokens: int) -> tuple[int, ...]:
        return tuple(table.missing(tokens) for table in self.tables(sequence))


class _SourcesMayGo(KVCacheManager):
    def _replace(self, pool: int, table: BlockTable, index: int, block: int, written: int) -> None:
        if index * self.layout.block_size < written:
            self._copies.append(BlockCopy(pool, table[index], block))
        table.replace(index, block)

    def _unpin(self, copy: BlockCopy) -> None:
        pass


class _CopiesForTheDead(KVCacheManager):
    def _forget_copies(self) -> None:
        pass


# -- Keys and hits -----------------------------------------------------------------------------------------


class _RootWithoutSalt(PrefixCache):
    def root(self, salt: str) -> bytes:
        return super().root("")


class _RootWithoutLength(PrefixCache):
    def root(self, salt: str) -> bytes:
        return self._hash(b"refengine prefix cache 1\0" + salt.encode() + self._identity)


class _KeysOfOneBlock(PrefixCache):
    def _key(self, salt: str, parent: CachedBlock | None, tokens: bytes) -> bytes:
        return self._hash(self.root(salt) + tokens)


class _LowBytes(PrefixCache):
    def _key(self, salt: str, parent: CachedBlock | None, tokens: bytes) -> bytes:
        return super()._key(salt, parent, tokens[::4])


class _TrustsTheKey(PrefixCache):
    def _match(self, key: bytes, salt: str, parent: CachedBlock | None, tokens: bytes) -> CachedBlock | None:
        return self._entries.get(key)


class _ComparesTokensOnly(PrefixCache):
    def _match(self, key: bytes, salt: str, parent: CachedBlock | None, tokens: bytes) -> CachedBlock | None:
        found = self._entries.get(key)
        return found if found is not None and found.tokens == tokens else None


class _ComparesNoSalt(PrefixCache):
    def _match(self, key: bytes, salt: str, parent: CachedBlock | None, tokens: bytes) -> CachedBlock | None:
        found = self._entries.get(key)
        same = found is not None and found.tokens == tokens and found.parent is parent
        return found if same else None


class _ResumesAsOneLength(KVCacheManager):
    def suspend(self, sequence: Hashable) -> list[tuple[int, int]]:
        told = super().suspend(sequence)
        left = self._suspended[sequence]
        longest = tuple([True] * max(map(len, left.entries), default=0))
        self._suspended[sequence] = replace(left, entries=(longest,) * len(left.entries))
        return told


class _ForgetsTheSuspended(KVCacheManager):
    def missing(self, sequence: Hashable, tokens: int) -> tuple[int, ...]:
        if sequence not in self._suspended:
            return super().missing(sequence, tokens)
        return tuple(
            max(0, -(-tokens // self.layout.block_size) - len(e)) for e in self._suspended[sequence].entries
        )


class _AdoptsAll(KVCacheManager):
    def adopt(
        self,
        sequence: Hashable,
        tokens: Sequence[int],
        salt: str = "",
        limit: int | None = None,
        *,
        again: bool = False,
    ) -> int:
        return super().adopt(sequence, [*tokens, 0], salt, len(tokens) if limit is None else limit)


class _KnowsNoLimit(KVCacheManager):
    def adopt(
        self,
        sequence: Hashable,
        tokens: Sequence[int],
        salt: str = "",
        limit: int | None = None,
        *,
        again: bool = False,
    ) -> int:
        return super().adopt(sequence, tokens, salt)


class _FindsOne(PrefixCache):
    def walk(self, salt: str, tokens: bytes, block_bytes: int) -> list[CachedBlock]:
        return super().walk(salt, tokens, block_bytes)[:1]


# -- Prefixes and windows ----------------------------------------------------------------------------------


class _FullPoolsDecide(KVCacheManager):
    def _adoptable(self, chain: list[CachedBlock], tables: Sequence[BlockTable]) -> int:
        return len(chain)


class _WindowedByNumber(PrefixCache):
    """Windowed pools keep numbers of blocks, and no references to them."""

    def hold(self, entry: CachedBlock, pool: int, block: int) -> None:
        if pool in self._chained:
            super().hold(entry, pool, block)
        else:
            entry.blocks[pool] = block

    def _let_go(self, entry: CachedBlock, pool: int) -> None:
        if pool in self._chained:
            super()._let_go(entry, pool)


class _NeedsOneLess(BlockTable):
    def needed(self, blocks: int) -> range:
        needed = super().needed(blocks)
        return needed if self._window is None else needed[1:]


class _NeedsAll(BlockTable):
    def needed(self, blocks: int) -> range:
        return range(blocks)


# -- Publishing and eviction -------------------------------------------------------------------------------


class _KeepsEqualBlocks(KVCacheManager):
    def _join(self, cache: PrefixCache, entry: CachedBlock, pool: int, table: BlockTable, index: int) -> None:
        if entry.blocks[pool] == RELEASED:
            super()._join(cache, entry, pool, table, index)


class _PublishesTheUnfinished(KVCacheManager):
    def publish(self, sequence: Hashable, tokens: Sequence[int], salt: str, computed: int) -> None:
        size = self.layout.block_size
        super().publish(sequence, tokens, salt, min(len(tokens) // size, -(-computed // size)) * size)


class _PublishesTooLate(KVCacheManager):
    def publish(self, sequence: Hashable, tokens: Sequence[int], salt: str, computed: int) -> None:
        for table in self.tables(sequence):
            table.release_passed(computed)
        super().publish(sequence, tokens, salt, computed)


class _CachedAreUsed(KVCacheManager):
    @property
    def free_blocks(self) -> tuple[int, ...]:
        return tuple(pool.num_blocks - pool.num_used for pool in self.pools)


class _LatestFirst(BlockPool):
    def _evict(self) -> None:
        self._idle.move_to_end(next(reversed(self._idle)), last=False)
        super()._evict()


class _LowestFirst(BlockPool):
    def _evict(self) -> None:
        self._idle.move_to_end(min(self._idle), last=False)
        super()._evict()


class _EvictsUnderPressure(BlockPool):
    """Frees what it evicts, whoever else holds it; and takes for idle what was published by two."""

    def share(self, block: int) -> None:
        idle = block in self._idle
        super().share(block)
        if idle:
            self._idle[block] = None

    def uncache(self, block: int) -> None:
        while self.references(block) > 1:
            BlockAllocator.release(self, block)
        super().uncache(block)


def _pools_of(wrong: type[BlockPool]) -> Callable[..., KVCacheManager]:
    """A cache whose pools are of another class."""

    class Cache(KVCacheManager):
        def __init__(self, layout: KVLayout, prefix_cache: PrefixCache | None = None) -> None:
            super().__init__(layout, prefix_cache)
            for pool in self.pools:
                pool.__class__ = wrong

    return Cache


# -- Accounts ----------------------------------------------------------------------------------------------


class _CountsWholeBlocks(KVCacheManager):
    def next_position(self, sequence: Hashable) -> int:
        size = self.layout.block_size
        return -(-super().next_position(sequence) // size) * size


class _OnePositionForAll(KVCacheManager):
    def next_position(self, sequence: Hashable) -> int:
        return max((super(_OnePositionForAll, self).next_position(s) for s in self.sequences), default=0)


def _table(name: str, clause: str, wrong: type[BlockTable], story: str) -> Fault:
    return _cache(name, clause, partial(KVCacheManager, table=wrong), story)


def _prefix(name: str, clause: str, wrong: type[PrefixCache], story: str) -> Fault:
    return Fault(name, clause, story, lambda: Subject(NumpyBackend, prefix_cache=wrong))


def _cache(name: str, clause: str, wrong: Callable[..., KVCacheManager], story: str) -> Fault:
    return Fault(name, clause, story, lambda: Subject(NumpyBackend, kv_cache=wrong))


FAULTS: tuple[Fault, ...] = (
    _cache(
        "an empty segment is never released",
        "KVC-15",
        _SegmentsStay,
        "Memory grows on demand, and stays at the most that was ever needed.",
    ),
    _cache(
        "segments in use are told again",
        "KVC-15",
        _SegmentsAreToldAgain,
        "The whole set for its changes: what is committed is committed twice.",
    ),
    _cache(
        "a segment is used while its first block is",
        "KVC-15",
        _SegmentsOfFirstBlocks,
        "Right as long as blocks come back in the order in which they went.",
    ),
    _table(
        "a recent pool keeps no first block",
        "KVC-16",
        _KeepsNoFirst,
        "The block of the next position alone, and attention's sink is read as quantized.",
    ),
    _table(
        "a recent pool keeps its first block behind the window",
        "KVC-16",
        _KeepsTheFirstForGood,
        "The first block is special, also where no query sees it any more.",
    ),
    _table(
        "a recent pool keeps one block more",
        "KVC-16",
        _KeepsTheBlockBefore,
        "The block before the next position's, for queries that were computed already.",
    ),
    _cache(
        "a fork's references are not counted",
        "KVC-17",
        _ForksWithoutReferences,
        "The table is copied as a list of numbers.",
    ),
    _cache(
        "an abort frees what others still read",
        "KVC-17",
        _AbortFreesAll,
        "A block's life ends with the request that is aborted, not with its last reader (vllm#37076).",
    ),
    _cache(
        "a finished sequence is forked into an empty one",
        "KVC-17",
        _ForksTheFinished,
        "A dictionary's `get` with a default, where the parent's end came first.",
    ),
    _cache(
        "a fork takes the place of a running sequence",
        "KVC-17",
        _ForksOverTheChild,
        "The child's name is assigned to, and was somebody's.",
    ),
    _cache(
        "shared blocks are written",
        "KVC-18",
        _WritesShared,
        "Full blocks are shared and never written: the last one is not full.",
    ),
    _cache("a fresh block holds nothing", "KVC-18", _CopiesNothing, "The table is right, and nobody copies."),
    _cache(
        "a copy goes from the fresh block to the shared",
        "KVC-18",
        _CopiesBackwards,
        "Source and destination, as `memcpy` has them.",
    ),
    _cache(
        "one pool's blocks are copied",
        "KVC-18",
        _CopiesInTheFirstPool,
        "Written for one kind of layer, before models mixed windows.",
    ),
    _cache(
        "replaced blocks are not counted beforehand",
        "KVC-18",
        _CopiesAreExtra,
        "The scheduler counts new blocks, and a fork needs one at a position that it has.",
    ),
    _cache(
        "a copy's source may be handed out",
        "KVC-19",
        _SourcesMayGo,
        "Between the note and the copy the last holder is aborted (as in vllm#37076).",
    ),
    _cache(
        "copies are made for sequences that have ended",
        "KVC-19",
        _CopiesForTheDead,
        "The note outlives its sequence, and writes to whom the block belongs now.",
    ),
    _prefix(
        "tenants share prefixes",
        "KVC-20",
        _RootWithoutSalt,
        "The salt is an argument that nobody hashes: timing tells what others have asked.",
    ),
    _prefix(
        "salt and identity run into each other",
        "KVC-20",
        _RootWithoutLength,
        "Joined without a length: `ab` + `c` is `a` + `bc`.",
    ),
    _prefix(
        "a key hashes one block",
        "KVC-20",
        _KeysOfOneBlock,
        "The chain is forgotten: the same words behind other words.",
    ),
    _prefix(
        "a key hashes the low byte of each token",
        "KVC-20",
        _LowBytes,
        "`t & 0xFF`: every vocabulary above 256 collides (vllm-mlx#444).",
    ),
    _prefix(
        "the key is trusted",
        "KVC-21",
        _TrustsTheKey,
        "Only the hash is stored: a collision serves another prompt's cache (openvino.genai#3722).",
    ),
    _prefix(
        "a block's own tokens are compared, and not what came before",
        "KVC-21",
        _ComparesTokensOnly,
        "The mend of a collision that sees one block: the one before has collided.",
    ),
    _prefix(
        "a collision crosses tenants",
        "KVC-21",
        _ComparesNoSalt,
        "Tokens are compared and salts are not, which is what a salt is for.",
    ),
    _cache(
        "a whole prompt is adopted",
        "KVC-22",
        _AdoptsAll,
        "Nothing is left to compute, and there are no logits to sample from.",
    ),
    _cache(
        "the limit is not looked at",
        "KVC-22",
        _KnowsNoLimit,
        "Logits are wanted from an earlier position on, and were never computed.",
    ),
    _prefix("one block is found", "KVC-22", _FindsOne, "The chain's second key is made from the root again."),
    _cache(
        "full pools decide what is adopted",
        "KVC-23",
        _FullPoolsDecide,
        "What the window's layers need was evicted, and nobody asks them (kvcached#446).",
    ),
    _prefix(
        "windowed pools are cached by number",
        "KVC-23",
        _WindowedByNumber,
        "The window passes, the block goes to another, and the entry still names it (kvcached#446).",
    ),
    _table(
        "a window's first block is not needed",
        "KVC-23",
        _NeedsOneLess,
        "`window // block_size` blocks, where the window begins within one.",
    ),
    _table(
        "a windowed pool needs all of a prefix",
        "KVC-23",
        _NeedsAll,
        "Safe, and there is never a hit behind the window.",
    ),
    _cache(
        "equal blocks stay two",
        "KVC-24",
        _KeepsEqualBlocks,
        "Equal prompts that arrive together are kept as often as they came.",
    ),
    _cache(
        "unfinished blocks are published",
        "KVC-24",
        _PublishesTheUnfinished,
        "The prompt is known, and is taken for computed while it is cut into chunks.",
    ),
    _cache(
        "blocks are published behind the window",
        "KVC-22",
        _PublishesTooLate,
        "First release, then publish: windowed pools never have what a prefix needs.",
    ),
    _cache(
        "cached blocks count as used",
        "KVC-25",
        _CachedAreUsed,
        "Nobody is admitted, because of what nobody needs.",
    ),
    _cache(
        "the most recently used goes first",
        "KVC-25",
        _pools_of(_LatestFirst),
        "`popitem()` takes from the end.",
    ),
    _cache(
        "the lowest block goes first",
        "KVC-25",
        _pools_of(_LowestFirst),
        "A set has no order of use; and a prompt loses its beginning before its end.",
    ),
    _cache(
        "eviction frees what is read",
        "KVC-25",
        _pools_of(_EvictsUnderPressure),
        "A block is adopted and stays on the list of those to evict: use after free (vllm#37076).",
    ),
    _cache(
        "whole blocks count as written",
        "KVC-26",
        _CountsWholeBlocks,
        "Waste is measured in blocks, and there is none.",
    ),
    _cache(
        "one position for all sequences",
        "KVC-26",
        _OnePositionForAll,
        "The longest of the batch counts, as where all are padded to it.",
    ),
    _cache(
        "all pools are resumed alike",
        "KVC-27",
        _ResumesAsOneLength,
        "What a window has passed comes back as blocks with nothing in them.",
    ),
    _cache(
        "what is swapped out counts as held",
        "KVC-27",
        _ForgetsTheSuspended,
        "A sequence is admitted for its next token, and its context has no room.",
    ),
)
