"""Keys and values on the device: addresses taken at once, memory behind them only where segments are
committed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from refengine.backend.segments import Segments
from refengine.memory import KVLayout
from refengine_cupy.runtime import Addresses, Runtime


@dataclass(frozen=True)
class LayerPlace:
    """Where a layer's keys and values are.

    Attributes:
        keys, values: addresses of their first numbers in block 0.
        block_bytes: from one block to the next.
        kv_heads: of the layer.
        head_size: elements.
        formats: names of those of keys and of values, where they are sealed.
    """

    keys: int
    values: int
    block_bytes: int
    kv_heads: int
    head_size: int
    formats: tuple[str, str] | None = None

    def aligned(self, nbytes: int) -> bool:
        """Whether keys and values of all blocks begin at multiples of so many bytes."""
        return not any(at % nbytes for at in (self.keys, self.values, self.block_bytes))


class DeviceKVStorage:
    """The pools of a KV cache on the device.

    The device gives memory in pieces larger than a page; segments that meet in a piece share it, and it goes
    back when the last of them does.

    Attributes:
        states: by the name of its value in a Program: where a layer's keys and values are.

    Clauses: KVC-14.
    """

    def __init__(self, runtime: Runtime, layout: KVLayout) -> None:
        self._layout = layout
        self._pools = [_Pool(runtime, layout, group) for group in range(len(layout.groups))]
        self.states: dict[str, LayerPlace] = {}
        for group, (pool, described) in enumerate(zip(self._pools, layout.groups, strict=True)):
            at = pool.address
            for (layer, heads, size), (keys, values) in zip(
                described.layers, layout.layer_bytes(group), strict=True
            ):
                formats = None
                if described.sealed is not None:
                    formats = described.sealed[0].name, described.sealed[1].name
                place = LayerPlace(at, at + keys, layout.block_bytes(group), heads, size, formats)
                self.states[described.state(layer)] = place
                at += keys + values

    @property
    def nbytes(self) -> int:
        """Bytes of all committed segments."""
        return sum(len(pool.segments) * self._layout.segment_bytes(g) for g, pool in enumerate(self._pools))

    def commit(self, pool: int, segment: int) -> None:
        """Put memory behind a segment."""
        self._pools[pool].commit(range(segment, segment + 1))

    def release(self, pool: int, segment: int) -> None:
        """Give a segment's memory back, where no other shares it."""
        self._pools[pool].release(range(segment, segment + 1))

    def commit_run(self, pool: int, segments: range) -> None:
        """Put memory behind segments at once: see the protocol."""
        self._pools[pool].commit(segments)

    def release_run(self, pool: int, segments: range) -> None:
        """Give the memory of segments back at once: see the protocol."""
        self._pools[pool].release(segments)

    def copy(self, pool: int, source: int, destination: int) -> None:
        """Copy a block."""
        self._pools[pool].copy(source, destination)

    def poison(self, pool: int, block: int) -> None:
        """Fill a block with NaN (bytes of ones, which are NaN in every float format)."""
        self._pools[pool].poison(block)

    def read(self, pool: int, block: int) -> NDArray[np.uint8]:
        """What a block holds, a copy."""
        return self._pools[pool].read(block)

    def write(self, pool: int, block: int, content: NDArray[np.uint8]) -> None:
        """Let a block hold what ``read`` gave."""
        self._pools[pool].write(block, content)


class _Pool:
    def __init__(self, runtime: Runtime, layout: KVLayout, group: int) -> None:
        self._runtime = runtime
        self._block_bytes = layout.block_bytes(group)
        self._segment_bytes, self.segments = layout.segment_bytes(group), Segments(layout.num_segments(group))
        self._addresses: Addresses = runtime.reserve(max(1, layout.num_segments(group) * self._segment_bytes))
        self._users = Counter[int]()  # of a piece: segments that meet in it

    @property
    def address(self) -> int:
        return self._addresses.address

    def commit(self, segments: range) -> None:
        noted: list[int] = []
        try:
            for segment in segments:
                self.segments.commit(segment)
                noted.append(segment)
            self._addresses.back(self._unused(segments))
        except Exception:
            for segment in noted:
                self.segments.release(segment)
            raise
        for segment in segments:
            self._users.update(self._pieces(segment, segment + 1))

    def release(self, segments: range) -> None:
        noted: list[int] = []
        try:
            for segment in segments:
                self.segments.release(segment)
                noted.append(segment)
        except Exception:
            for segment in noted:
                self.segments.commit(segment)
            raise
        for segment in segments:
            self._users.subtract(self._pieces(segment, segment + 1))
        self._addresses.unback(self._unused(segments))

    def copy(self, source: int, destination: int) -> None:
        self._runtime.copy(self._place(source), self._place(destination), self._block_bytes)

    def poison(self, block: int) -> None:
        self._runtime.fill(self._place(block), 0xFF, self._block_bytes)

    def read(self, block: int) -> NDArray[np.uint8]:
        content = np.empty(self._block_bytes, np.uint8)
        self._runtime.download(self._place(block), content)
        return content

    def write(self, block: int, content: NDArray[np.uint8]) -> None:
        self._runtime.upload(self._place(block), np.ascontiguousarray(content))

    def _place(self, block: int) -> int:
        return self.address + block * self._block_bytes

    def _unused(self, segments: range) -> range:
        """Their pieces that no segment has: all but those at the ends, where others may meet them."""
        pieces = self._pieces(segments.start, segments.stop)
        unused = [piece for piece in pieces if not self._users[piece]]
        return range(unused[0], unused[-1] + 1) if unused else range(0)

    def _pieces(self, first: int, end: int) -> range:
        """The pieces in which segments from the first one to before the last lie."""
        start, stop = first * self._segment_bytes, end * self._segment_bytes
        return range(start // self._addresses.piece, -(-stop // self._addresses.piece))
