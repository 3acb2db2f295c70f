"""The KV cache's layout: pools of blocks, what a block holds, and the segments in which memory is taken."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES = 4096
"""Segments are whole pages, so that they can be given back to the system."""


class SealedFormat(Protocol):
    """How keys or values lie in a sealed block; see ``refengine.quantizer``."""

    @property
    def name(self) -> str:
        """What the user types."""
        ...

    def nbytes(self, positions: int, kv_heads: int, head_size: int) -> int:
        """Bytes of one layer's keys, or values, in a block of ``positions``."""
        ...

    def seal(self, x: NDArray[np.floating], out: NDArray[np.uint8], workspace: Any) -> None:
        """Quantize blocks ``x[n, positions, kv_heads, head_size]`` into bytes ``out[n, nbytes]``."""
        ...

    def open(
        self, data: NDArray[np.uint8], out: NDArray[np.floating], workspace: Any, heads: slice = ...
    ) -> None:
        """The numbers ``out`` of some heads of blocks ``data``, shaped as above."""
        ...


@dataclass(frozen=True)
class KVGroupLayout:
    """One pool: the blocks of the layers that share block tables.

    Attributes:
        window: their attention window, ``None`` for the whole context.
        layers: for each: its number, its kv heads and its head size.
        num_blocks: blocks in the pool at most.
        sealed: formats of keys and of values, where blocks are quantized once they are full; ``None`` where
            they hold numbers of the layout's dtype.
        recent: whether a sequence keeps only its first block and the one it is writing: the exact copies
            beside a sealed pool.
    """

    window: int | None
    layers: tuple[tuple[int, int, int], ...]
    num_blocks: int
    sealed: tuple[SealedFormat, SealedFormat] | None = None
    recent: bool = False

    def state(self, layer: int) -> str:
        """The name, in a Program, of what this pool holds of a layer."""
        return f"layers.{layer}.{'exact' if self.recent else 'cache'}"


@dataclass(frozen=True)
class KVLayout:
    """The shape of a KV cache.

    Attributes:
        block_size: positions per block.
        dtype: of keys and values that are not sealed.
        groups: the pools.
    """

    block_size: int
    dtype: np.dtype[np.floating]
    groups: tuple[KVGroupLayout, ...]

    def layer_bytes(self, group: int) -> tuple[tuple[int, int], ...]:
        """Bytes of keys and of values that a block holds of each of its layers."""
        pool, P = self.groups[group], self.block_size
        if pool.sealed is not None:
            keys, values = pool.sealed
            return tuple((keys.nbytes(P, h, d), values.nbytes(P, h, d)) for _, h, d in pool.layers)
        return tuple((P * h * d * self.dtype.itemsize,) * 2 for _, h, d in pool.layers)

    def block_bytes(self, group: int) -> int:
        """Bytes of one block: keys and values of all the group's layers.

        Clauses: KVC-14.
        """
        return self._block_bytes[group]

    def segment_blocks(self, group: int) -> int:
        """Consecutive blocks in a segment: the fewest that fill whole pages."""
        return PAGE_BYTES // math.gcd(PAGE_BYTES, self.block_bytes(group))

    def segment_bytes(self, group: int) -> int:
        """Bytes of a segment."""
        return self.segment_blocks(group) * self.block_bytes(group)

    def num_segments(self, group: int) -> int:
        """Segments of a full pool."""
        return -(-self.groups[group].num_blocks // self.segment_blocks(group))

    @cached_property
    def _block_bytes(self) -> tuple[int, ...]:
        """Of each pool; asked for in every step."""
        return tuple(sum(map(sum, self.layer_bytes(group))) for group in range(len(self.groups)))

    @property
    def nbytes(self) -> int:
        """Bytes of all pools with every segment committed: the most the cache can take."""
        return sum(self.num_segments(g) * self.segment_bytes(g) for g in range(len(self.groups)))

    @property
    def num_blocks(self) -> tuple[int, ...]:
        """Blocks in the pool of each group."""
        return tuple(group.num_blocks for group in self.groups)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each group."""
        return tuple(group.window for group in self.groups)
