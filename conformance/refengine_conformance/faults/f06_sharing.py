"""Chapter *Paged KV*: faults of forks, copies and suspended sequences, and of what counts as written."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from refengine.memory import RELEASED, BlockCopy, BlockTable, KVCacheManager
from refengine_conformance.faults.fault import Fault
from refengine_conformance.faults.kv_cache_fault import cache_fault

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


# -- Suspended sequences -----------------------------------------------------------------------------------


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


# -- Accounts ----------------------------------------------------------------------------------------------


class _CountsWholeBlocks(KVCacheManager):
    def next_position(self, sequence: Hashable) -> int:
        size = self.layout.block_size
        return -(-super().next_position(sequence) // size) * size


class _OnePositionForAll(KVCacheManager):
    def next_position(self, sequence: Hashable) -> int:
        return max((super(_OnePositionForAll, self).next_position(s) for s in self.sequences), default=0)


FAULTS: tuple[Fault, ...] = (
    cache_fault(
        "a fork's references are not counted",
        "KVC-17",
        _ForksWithoutReferences,
        "The table is copied as a list of numbers.",
    ),
    cache_fault(
        "an abort frees what others still read",
        "KVC-17",
        _AbortFreesAll,
        "A block's life ends with the request that is aborted, not with its last reader (vllm#37076).",
    ),
    cache_fault(
        "a finished sequence is forked into an empty one",
        "KVC-17",
        _ForksTheFinished,
        "A dictionary's `get` with a default, where the parent's end came first.",
    ),
    cache_fault(
        "a fork takes the place of a running sequence",
        "KVC-17",
        _ForksOverTheChild,
        "The child's name is assigned to, and was somebody's.",
    ),
    cache_fault(
        "shared blocks are written",
        "KVC-18",
        _WritesShared,
        "Full blocks are shared and never written: the last one is not full.",
    ),
    cache_fault(
        "a fresh block holds nothing", "KVC-18", _CopiesNothing, "The table is right, and nobody copies."
    ),
    cache_fault(
        "a copy goes from the fresh block to the shared",
        "KVC-18",
        _CopiesBackwards,
        "Source and destination, as `memcpy` has them.",
    ),
    cache_fault(
        "one pool's blocks are copied",
        "KVC-18",
        _CopiesInTheFirstPool,
        "Written for one kind of layer, before models mixed windows.",
    ),
    cache_fault(
        "replaced blocks are not counted beforehand",
        "KVC-18",
        _CopiesAreExtra,
        "The scheduler counts new blocks, and a fork needs one at a position that it has.",
    ),
    cache_fault(
        "a copy's source may be handed out",
        "KVC-19",
        _SourcesMayGo,
        "Between the note and the copy the last holder is aborted (as in vllm#37076).",
    ),
    cache_fault(
        "copies are made for sequences that have ended",
        "KVC-19",
        _CopiesForTheDead,
        "The note outlives its sequence, and writes to whom the block belongs now.",
    ),
    cache_fault(
        "whole blocks count as written",
        "KVC-26",
        _CountsWholeBlocks,
        "Waste is measured in blocks, and there is none.",
    ),
    cache_fault(
        "one position for all sequences",
        "KVC-26",
        _OnePositionForAll,
        "The longest of the batch counts, as where all are padded to it.",
    ),
    cache_fault(
        "all pools are resumed alike",
        "KVC-27",
        _ResumesAsOneLength,
        "What a window has passed comes back as blocks with nothing in them.",
    ),
    cache_fault(
        "what is swapped out counts as held",
        "KVC-27",
        _ForgetsTheSuspended,
        "A sequence is admitted for its next token, and its context has no room.",
    ),
)
