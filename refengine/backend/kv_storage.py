"""Keys and values in the host's memory: pools whose segments come from the system and go back to it."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.backend.segments import Segments
from refengine.memory import KVLayout
from refengine.ops import LayerCache, SealedLayerCache

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux; Python names it from 3.13 on


class HostKVStorage:
    """The pools of a KV cache, each one stretch of anonymous memory, block after block.

    All addresses are taken at once and no memory: the system commits a page when it is first written. A
    segment that is released is handed back (``madvise``), where the system can do that.

    Attributes:
        states: by the name of its value in a Program (``layers.3.cache``): a layer's keys and values, as
            views ``[blocks, block_size, kv_heads, head_size]`` into its pool, or ``[blocks, nbytes]`` where
            they are sealed.

    Clauses: KVC-14.
    """

    def __init__(self, layout: KVLayout) -> None:
        self._layout = layout
        self._pools = [_Pool(layout, group) for group in range(len(layout.groups))]
        self.states: dict[str, Any] = {}
        for group, (pool, described) in enumerate(zip(self._pools, layout.groups, strict=True)):
            offset = 0
            for (layer, heads, size), nbytes in zip(described.layers, layout.layer_bytes(group), strict=True):
                keys, values = (
                    pool.blocks[:, start : start + count]
                    for start, count in zip((offset, offset + nbytes[0]), nbytes, strict=True)
                )
                offset += sum(nbytes)
                if described.sealed is not None:
                    self.states[described.state(layer)] = SealedLayerCache(keys, values, described.sealed)
                    continue
                shape = (described.num_blocks, layout.block_size, heads, size)
                self.states[described.state(layer)] = LayerCache(
                    keys.view(layout.dtype).reshape(shape), values.view(layout.dtype).reshape(shape)
                )

    @property
    def nbytes(self) -> int:
        """Bytes of all committed segments."""
        return sum([pool.nbytes for pool in self._pools])

    def commit(self, pool: int, segment: int) -> None:
        """Count a segment; its pages come when they are written."""
        self._pools[pool].commit(segment)

    def release(self, pool: int, segment: int) -> None:
        """Give a segment's pages back."""
        self._pools[pool].release(segment)

    def copy(self, pool: int, source: int, destination: int) -> None:
        """Copy a block."""
        blocks = self._pools[pool].blocks
        blocks[destination] = blocks[source]

    def poison(self, pool: int, block: int) -> None:
        """Fill a block with NaN (bytes of ones, which are NaN in every float format)."""
        self._pools[pool].blocks[block] = 0xFF

    def read(self, pool: int, block: int) -> NDArray[np.uint8]:
        """What a block holds, a copy."""
        content: NDArray[np.uint8] = self._pools[pool].blocks[block].copy()
        return content

    def write(self, pool: int, block: int, content: NDArray[np.uint8]) -> None:
        """Let a block hold what ``read`` gave."""
        self._pools[pool].blocks[block] = content


class _Pool:
    """One pool's memory, and which of its segments are committed."""

    def __init__(self, layout: KVLayout, group: int) -> None:
        self._segment_bytes, self.segments = layout.segment_bytes(group), Segments(layout.num_segments(group))
        self._memory = _anonymous(max(1, layout.num_segments(group) * self._segment_bytes))
        count, nbytes = layout.groups[group].num_blocks, layout.block_bytes(group)
        whole: NDArray[np.uint8] = np.frombuffer(self._memory, np.uint8)
        self.blocks = whole[: count * nbytes].reshape(count, nbytes)

    @property
    def nbytes(self) -> int:
        return len(self.segments) * self._segment_bytes

    def commit(self, segment: int) -> None:
        self.segments.commit(segment)

    def release(self, segment: int) -> None:
        self.segments.release(segment)
        if hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED, segment * self._segment_bytes, self._segment_bytes)


def _anonymous(nbytes: int) -> mmap.mmap:
    """Private zero pages, none of them taken yet.

    Huge pages are refused: with them the first write of a block would take the memory of many.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows commits on first use by itself
        return mmap.mmap(-1, nbytes)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, nbytes, flags=flags | (_NORESERVE if hasattr(mmap, "MADV_NOHUGEPAGE") else 0))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory
