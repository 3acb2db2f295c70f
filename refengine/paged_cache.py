"""The KV cache of a running engine: who holds which blocks, and the memory behind them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from refengine.backend import KVStorage, RunKVStorage
from refengine.memory import FlightRecorder, KVCacheManager
from refengine.memory.sanitizer import verify


class PagedCache:
    """Carries out on a storage what a manager decides.

    The manager moves block numbers and no bytes. Before a step reads or writes any, ``settle`` takes the
    memory of segments that came into use, poisons what is free (where checking), copies the blocks that a
    fork writes to, fills those that were swapped in, and gives empty segments back. In this order: a copy's
    source may lie in a segment that empties, its destination in a block that was free.

    Args:
        manager: tables and references.
        storage: keys and values.
        recorder: told of every segment and copy.
        check: gives the tokens of all sequences, where freed blocks are to be poisoned and the manager's
            books to be verified; ``None`` where not.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        storage: KVStorage,
        recorder: FlightRecorder,
        check: Callable[[], Mapping[Hashable, Sequence[int]]] | None = None,
    ) -> None:
        self.manager = manager
        self._storage, self._recorder, self._check = storage, recorder, check
        self._by_runs = storage if isinstance(storage, RunKVStorage) else None
        self._kept: set[tuple[int, int]] = set()
        self._evictions = 0
        self._swapped: dict[Hashable, list[NDArray[np.uint8]]] = {}
        self._arriving: dict[Hashable, list[tuple[int, int, NDArray[np.uint8]]]] = {}
        self._to_commit: dict[tuple[int, int], None] = {}  # in this order; both are empty once settled
        self._to_release: dict[tuple[int, int], None] = {}

    def reserve(self, positions: int) -> None:
        """Take memory for so many positions of every pool, lowest blocks first, and keep it."""
        layout = self.manager.layout
        for pool, blocks in enumerate(layout.num_blocks):
            wanted = min(-(-positions // layout.block_size), blocks)
            segments = -(-wanted // layout.segment_blocks(pool))
            kept = [(pool, segment) for segment in range(segments)]
            self._kept.update(kept)
            for _, run in self._runs(kept):
                self._commit(pool, run)

    @property
    def swapped_bytes(self) -> int:
        """Bytes of blocks that are kept on the host."""
        return sum([block.nbytes for blocks in self._swapped.values() for block in blocks])

    def is_swapped(self, sequence: Hashable) -> bool:
        """Whether a sequence's blocks are kept on the host."""
        return sequence in self._swapped

    def swap_out(self, sequence: Hashable) -> None:
        """Keep what a sequence's blocks hold on the host, and give the blocks back."""
        blocks = self.manager.suspend(sequence)
        self._swapped[sequence] = [self._storage.read(pool, block) for pool, block in blocks]

    def swap_in(self, sequence: Hashable) -> None:
        """Give a sequence blocks again, which hold what they did once this is settled.

        Raises:
            OutOfBlocksError: too few are free.
        """
        blocks = self.manager.resume(sequence)
        contents = self._swapped.pop(sequence)
        self._arriving[sequence] = [(*place, held) for place, held in zip(blocks, contents, strict=True)]

    def release(self, sequence: Hashable) -> None:
        """Give back what a sequence holds, wherever it is."""
        self._swapped.pop(sequence, None)
        self._arriving.pop(sequence, None)
        self.manager.release(sequence)

    def settle(self) -> None:
        """Make the storage what the manager has decided.

        What fails is not lost: it is done when this is called again, if it is still to be done then.

        Raises:
            MemoryManagerError: a segment's memory cannot be taken.
        """
        manager, storage = self.manager, self._storage
        self._record_evictions()
        self._note_segments()
        for pool, segments in self._runs(self._to_commit):
            self._commit(pool, segments)
            for segment in segments:
                del self._to_commit[pool, segment]
                self._recorder.record("commit", pool=pool, segment=segment)
        if self._check is not None:
            verify(manager, self._check())
            for pool, block in manager.take_freed():
                storage.poison(pool, block)
        for copy in manager.take_copies():
            storage.copy(copy.pool, copy.source, copy.destination)
            self._recorder.record("copy", pool=copy.pool, source=copy.source, destination=copy.destination)
        for blocks in self._arriving.values():
            for pool, block, content in blocks:
                storage.write(pool, block, content)
        self._arriving.clear()
        for pool, segments in self._runs(self._to_release):
            self._release(pool, segments)
            for segment in segments:
                del self._to_release[pool, segment]
                self._recorder.record("release", pool=pool, segment=segment)

    def _runs(self, places: Iterable[tuple[int, int]]) -> list[tuple[int, range]]:
        """Segments that a storage takes at once: those that follow each other, or each by itself."""
        runs: list[tuple[int, range]] = []
        for pool, segment in sorted(places) if self._by_runs is not None else places:
            last = runs[-1] if runs and self._by_runs is not None else None
            if last is not None and last[0] == pool and last[1].stop == segment:
                runs[-1] = pool, range(last[1].start, segment + 1)
            else:
                runs.append((pool, range(segment, segment + 1)))
        return runs

    def _commit(self, pool: int, segments: range) -> None:
        if self._by_runs is not None:
            self._by_runs.commit_run(pool, segments)
        else:
            self._storage.commit(pool, segments.start)

    def _release(self, pool: int, segments: range) -> None:
        if self._by_runs is not None:
            self._by_runs.release_run(pool, segments)
        else:
            self._storage.release(pool, segments.start)

    def _note_segments(self) -> None:
        """Segments to commit and to release: those that changed, and those left over from a failure."""
        commits, releases = self.manager.take_segment_changes()
        for changed, to_do, opposite in (
            (commits, self._to_commit, self._to_release),
            (releases, self._to_release, self._to_commit),
        ):
            for place in changed:
                if place in opposite:  # it was never carried out
                    del opposite[place]
                elif place not in self._kept:
                    to_do[place] = None

    def _record_evictions(self) -> None:
        cache = self.manager.prefix_cache
        if cache is not None and cache.statistics.evictions > self._evictions:
            self._recorder.record("evict", blocks=cache.statistics.evictions - self._evictions)
            self._evictions = cache.statistics.evictions
