"""Chapter *Paged KV*: faults of segments, and of pools that keep what is recent only."""

from __future__ import annotations

from refengine.memory import RELEASED, BlockTable, KVCacheManager
from refengine_conformance.faults.fault import Fault
from refengine_conformance.faults.kv_cache_fault import cache_fault, table_fault

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


FAULTS: tuple[Fault, ...] = (
    cache_fault(
        "an empty segment is never released",
        "KVC-15",
        _SegmentsStay,
        "Memory grows on demand, and stays at the most that was ever needed.",
    ),
    cache_fault(
        "segments in use are told again",
        "KVC-15",
        _SegmentsAreToldAgain,
        "The whole set for its changes: what is committed is committed twice.",
    ),
    cache_fault(
        "a segment is used while its first block is",
        "KVC-15",
        _SegmentsOfFirstBlocks,
        "Right as long as blocks come back in the order in which they went.",
    ),
    table_fault(
        "a recent pool keeps no first block",
        "KVC-16",
        _KeepsNoFirst,
        "The block of the next position alone, and attention's sink is read as quantized.",
    ),
    table_fault(
        "a recent pool keeps its first block behind the window",
        "KVC-16",
        _KeepsTheFirstForGood,
        "The first block is special, also where no query sees it any more.",
    ),
    table_fault(
        "a recent pool keeps one block more",
        "KVC-16",
        _KeepsTheBlockBefore,
        "The block before the next position's, for queries that were computed already.",
    ),
)
