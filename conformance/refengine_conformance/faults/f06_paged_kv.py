"""Chapter *Paged KV*: faults of counting, of order, of what is undone and of what is given back."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.backend import MemoryUse
from refengine.backend.numpy_backend import NumpyBackend
from refengine.errors import OutOfBlocksError
from refengine.memory import RELEASED, BlockAllocator, BlockTable, KVCacheManager, KVLayout
from refengine_conformance.faults.fault import Fault
from refengine_conformance.faults.kv_cache_fault import cache_fault, table_fault
from refengine_conformance.subject import Subject


class _FirstReleaseFrees(BlockAllocator):
    def release(self, block: int) -> bool:
        while self.references(block) > 1:
            super().release(block)
        return super().release(block)


class _SharedAreLost(BlockAllocator):
    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self._shared: set[int] = set()

    def share(self, block: int) -> None:
        super().share(block)
        self._shared.add(block)

    def release(self, block: int) -> bool:
        freed = super().release(block)
        if freed and block in self._shared:
            self._returned.remove(block)
        return freed


class _SharesWithoutCounting(BlockAllocator):
    def share(self, block: int) -> None:
        super().share(block)
        self._references[block] -= 1


class _HighestFirst(BlockAllocator):
    def allocate(self, count: int = 1) -> list[int]:
        return super().allocate(count)[::-1]


class _LastReturnedFirst(BlockAllocator):
    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self._came_back: list[int] = []

    def release(self, block: int) -> bool:
        freed = super().release(block)
        if freed:
            self._came_back.append(block)
        return freed

    def _take(self) -> int:
        if self._returned:  # a heap's first is taken, whatever it is
            last = self._came_back.pop()
            self._returned.remove(last)
            self._returned.insert(0, last)
        return super()._take()


class _HandsOutAgain(BlockAllocator):
    def allocate(self, count: int = 1) -> list[int]:
        blocks = super().allocate(count)
        if count > 2:
            self._returned.append(blocks[-1])
        return blocks


class _TakesWhatThereIs(BlockAllocator):
    def allocate(self, count: int = 1) -> list[int]:
        try:
            return super().allocate(count)
        except OutOfBlocksError:
            super().allocate(self.num_free)
            raise


class _ReleasesTwice(BlockAllocator):
    def release(self, block: int) -> bool:
        if self.references(block) == 0:
            self._returned.append(block)
            return True
        return super().release(block)


class _CountsBeforeItLooks(BlockAllocator):
    def release(self, block: int) -> bool:
        if self.references(block) == 0 and block < len(self._references):
            self._references[block] -= 1
        return super().release(block)


class _SharesTheFree(BlockAllocator):
    def share(self, block: int) -> None:
        self._check(block)
        if block < len(self._references):
            self._references[block] += 1


class _CountsFromTheEnd(BlockAllocator):
    def references(self, block: int) -> int:
        return super().references(block if block >= 0 else block + self.num_blocks)


class _OffsetsOfTheStretch(BlockTable):
    def slots(self, start: int, stop: int) -> NDArray[np.int32]:
        slots = super().slots(start, stop)
        return slots // self._block_size * self._block_size + np.arange(stop - start) % self._block_size


class _RoundsDown(BlockTable):
    def missing(self, tokens: int) -> int:
        return max(0, tokens // self._block_size - len(self.entries))


class _OneBlockEarly(BlockTable):
    def release_passed(self, next_position: int) -> None:
        super().release_passed(next_position + self._block_size)


class _OnePositionEarly(BlockTable):
    def release_passed(self, next_position: int) -> None:
        super().release_passed(next_position + 1)


class _NeverReleases(BlockTable):
    def release_passed(self, next_position: int) -> None:
        pass


class _SlotsOfTheReleased(BlockTable):
    def slots(self, start: int, stop: int) -> NDArray[np.int32]:
        if stop > len(self) * self._block_size:
            return super().slots(start, stop)
        positions = np.arange(start, stop)
        slots = self.blocks[positions // self._block_size] * self._block_size + positions % self._block_size
        return slots.astype(np.int32)


class _GrowsGroupByGroup(KVCacheManager):
    def grow(self, sequence: Hashable, tokens: int) -> None:
        try:
            super().grow(sequence, tokens)
        except OutOfBlocksError:
            super().grow(sequence, 0)  # it has begun
            for table in self.tables(sequence):
                table.grow(tokens)


class _ReleasesTheFirstGroup(KVCacheManager):
    def release(self, sequence: Hashable) -> None:
        for table in self.tables(sequence)[:1]:
            table.release_all()
        self._sequences.pop(sequence, None)


class _KeepsReleased(KVCacheManager):
    def release(self, sequence: Hashable) -> None:
        lengths = [len(table) for table in self.tables(sequence)]
        super().release(sequence)
        if any(lengths):
            super().grow(sequence, 0)
            for table, length in zip(self.tables(sequence), lengths, strict=True):
                table.adopt([RELEASED] * length)


class _OneWindow(KVCacheManager):
    def release_passed(self, sequence: Hashable, next_position: int) -> None:
        windows = [window for window in self.layout.windows if window is not None]
        for table in self.tables(sequence):
            table._window = min(windows, default=None)
        super().release_passed(sequence, next_position)


class _SortedTables(KVCacheManager):
    def padded_tables(self, sequences: Sequence[Hashable], group: int) -> NDArray[np.int32]:
        return super().padded_tables(sorted(sequences, key=str), group)


class _PaddedWithZero(KVCacheManager):
    def padded_tables(self, sequences: Sequence[Hashable], group: int) -> NDArray[np.int32]:
        return np.maximum(super().padded_tables(sequences, group), 0)


class _CountsKeysOnly(NumpyBackend):
    def memory(self) -> MemoryUse:
        use = super().memory()
        return replace(use, kv_cache=use.kv_cache // 2)


class _TakesAllAtOnce(NumpyBackend):
    def create_cache(self, layout: KVLayout) -> Any:
        cache = super().create_cache(layout)
        for group in range(len(layout.groups)):
            for segment in range(layout.num_segments(group)):
                cache.commit(group, segment)
        return cache


class _KeepsWhatItHas(NumpyBackend):
    def create_cache(self, layout: KVLayout) -> Any:
        cache = super().create_cache(layout)
        cache.__dict__["release"] = lambda pool, segment: None
        cache.__dict__["commit"] = lambda pool, segment: cache._pools[pool].segments._committed.add(segment)
        return cache


def _allocator(name: str, clause: str, wrong: type[BlockAllocator], story: str) -> Fault:
    return Fault(name, clause, story, lambda: Subject(NumpyBackend, allocator=wrong))


def _backend(name: str, clause: str, wrong: Callable[[], NumpyBackend], story: str) -> Fault:
    return Fault(name, clause, story, lambda: Subject(wrong))


FAULTS: tuple[Fault, ...] = (
    table_fault(
        "offsets count from the stretch's start",
        "KVC-1",
        _OffsetsOfTheStretch,
        "Right for stretches that begin a block, as whole prompts do.",
    ),
    _allocator(
        "a block of a larger request is handed out again",
        "KVC-2",
        _HandsOutAgain,
        "A slice of the free list is taken, and one too few is cut off.",
    ),
    _allocator(
        "a fresh pool is handed out from its end",
        "KVC-3",
        _HighestFirst,
        "A stack is filled in the order in which it should be emptied.",
    ),
    _allocator(
        "what came back last goes first",
        "KVC-3",
        _LastReturnedFirst,
        "A stack of free blocks, warm in the cache: and use scatters over all segments.",
    ),
    _allocator(
        "the first release frees a shared block",
        "KVC-4",
        _FirstReleaseFrees,
        "An aborted request frees blocks that another still reads (vllm#37076).",
    ),
    _allocator(
        "a block that was shared is never free again",
        "KVC-4",
        _SharedAreLost,
        "The branch for shared blocks forgets the free list.",
    ),
    _allocator(
        "sharing does not count",
        "KVC-4",
        _SharesWithoutCounting,
        "The prefix is found, and its table copied without a reference.",
    ),
    _allocator(
        "a refused request keeps what there was",
        "KVC-5",
        _TakesWhatThereIs,
        "Blocks are taken one by one until there are none.",
    ),
    _allocator(
        "a block released twice is free twice",
        "KVC-6",
        _ReleasesTwice,
        "The check was an assertion, and assertions are off.",
    ),
    _allocator(
        "a second release is refused, after it is counted",
        "KVC-6",
        _CountsBeforeItLooks,
        "The count is lowered first and looked at then.",
    ),
    _allocator("a free block may be shared", "KVC-6", _SharesTheFree, "A cached prefix outlives its blocks."),
    _allocator(
        "block -1 is the last one",
        "KVC-6",
        _CountsFromTheEnd,
        "Python's negative indices: a released entry names a block.",
    ),
    table_fault(
        "the last, unfilled block is missing",
        "KVC-7",
        _RoundsDown,
        "Division rounds down, and the tests use whole blocks.",
    ),
    cache_fault(
        "one group grows before another is refused",
        "KVC-8",
        _GrowsGroupByGroup,
        "Each table grows all-or-none, and nobody asked all of them first.",
    ),
    table_fault(
        "a window releases one block early",
        "KVC-9",
        _OneBlockEarly,
        "The block that the window's edge lies in is taken for passed.",
    ),
    table_fault(
        "a window releases one position early",
        "KVC-9",
        _OnePositionEarly,
        "The window is measured from the token after the next.",
    ),
    table_fault(
        "a window releases nothing",
        "KVC-9",
        _NeverReleases,
        "Attention masks what the window has passed, and memory is never asked back.",
    ),
    table_fault(
        "released positions have slots",
        "KVC-10",
        _SlotsOfTheReleased,
        "-1 · block_size + offset is a number like any other.",
    ),
    cache_fault(
        "only the first group is given back",
        "KVC-11",
        _ReleasesTheFirstGroup,
        "Written when there was one group.",
    ),
    cache_fault(
        "an ended sequence's name keeps its table",
        "KVC-11",
        _KeepsReleased,
        "Blocks are given back and the entry stays, until the name is used again.",
    ),
    cache_fault(
        "all groups have the narrowest window",
        "KVC-12",
        _OneWindow,
        "One window per model, in an engine that met two (kvcached#446).",
    ),
    cache_fault(
        "tables are sorted by name",
        "KVC-13",
        _SortedTables,
        "The batch is in order of arrival, and a dictionary's is not.",
    ),
    cache_fault(
        "released entries name block 0", "KVC-13", _PaddedWithZero, "Padding with zeros, as arrays are made."
    ),
    _backend("only keys are counted", "KVC-14", _CountsKeysOnly, "The factor two for values is forgotten."),
    _backend(
        "the whole pool is taken at start",
        "KVC-14",
        _TakesAllAtOnce,
        "One allocation, and nothing to do while running: as engines did before paging.",
    ),
    _backend(
        "an empty segment is kept for later",
        "KVC-14",
        _KeepsWhatItHas,
        "Memory that was needed once may be needed again, and is never given back.",
    ),
)
