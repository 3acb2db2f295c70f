"""A step's arrays in one stretch of memory, so that one copy takes them to the device."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from refengine.memory import KVLayout
from refengine.program import StepBatch
from refengine_cupy.attention import PARTITION, QUERY_TILE
from refengine_cupy.step_shape import StepShape

ALIGNMENT = 16
"""Arrays begin at multiples of so many bytes."""

MANY_QUERIES = 8
"""Tokens per sequence from which on attention goes by tiles of queries."""


def shape_of(batch: StepBatch, layout: KVLayout) -> StepShape:
    """What the launches for a step depend on.

    Columns of block tables and partitions are rounded up to powers of two: so contexts that grow a little
        have the same launches.
    """
    longest = max(batch.context_lens.tolist())
    sealed = [pool for pool in layout.groups if pool.sealed is not None]
    return StepShape(
        tokens=len(batch.token_ids),
        sequences=len(batch.context_lens),
        rows=len(batch.logit_rows),
        blocks=_power_of_two(-(-longest // layout.block_size)),
        partitions=_power_of_two(_partitions(batch, layout, longest)),
        query_tiles=len(query_tiles(batch)),
        fills=bool(sealed) and bool(((batch.positions + 1) % layout.block_size == 0).any()),
    )


def _partitions(batch: StepBatch, layout: KVLayout, longest: int) -> int:
    """Of the pool in which the queries of some sequence see most."""
    windows = [pool.window for pool in layout.groups if pool.window is not None]
    if len(windows) < len(layout.groups):
        return (longest - 1) // PARTITION + 1
    starts = batch.context_lens - np.diff(batch.query_starts)
    first = np.maximum(starts - max(windows) + 1, 0) // PARTITION
    return int(((batch.context_lens - 1) // PARTITION - first).max()) + 1


def query_tiles(batch: StepBatch) -> NDArray[np.int32]:
    """First tokens of tiles of queries: none, where sequences have few."""
    if len(batch.token_ids) < MANY_QUERIES * len(batch.context_lens):
        return np.empty(0, np.int32)
    starts = batch.query_starts
    tiles = [np.arange(a, b, QUERY_TILE) for a, b in pairwise(starts)]
    return np.concatenate(tiles).astype(np.int32)


def offsets_of(shape: StepShape, pools: int) -> tuple[Mapping[str, int], int]:
    """Where each array of a step lies, by name, and the bytes of all."""
    sizes = {
        "token_ids": shape.tokens,
        "positions": shape.tokens,
        "sequences": shape.tokens,
        "query_starts": shape.sequences + 1,
        "context_lens": shape.sequences,
        "logit_rows": shape.rows,
        "query_tiles": shape.query_tiles,
        "temperatures": 2 * shape.rows,  # of 8 bytes; only where candidates are wanted
    }
    for pool in range(pools):
        sizes[f"slot_mapping.{pool}"] = shape.tokens
        sizes[f"block_tables.{pool}"] = shape.sequences * shape.blocks
    offsets, end = {}, 0
    for name, count in sizes.items():
        offsets[name] = end
        end += -(-4 * count // ALIGNMENT) * ALIGNMENT
    return offsets, end


class StepArrays:
    """The arrays of steps of one shape, as views of the memory from which they are copied.

    Args:
        shape: of the steps.
        pools: of the KV cache.
        out: memory, as many bytes as ``offsets_of`` says.
    """

    def __init__(self, shape: StepShape, pools: int, out: NDArray[np.uint8]) -> None:
        offsets, nbytes = offsets_of(shape, pools)
        words = out[:nbytes].view(np.int32)

        def view(name: str, count: int) -> NDArray[np.int32]:
            return words[offsets[name] // 4 :][:count]

        self._shape = shape
        self._plain = [
            (name, view(name, count))
            for name, count in (
                ("token_ids", shape.tokens),
                ("positions", shape.tokens),
                ("query_starts", shape.sequences + 1),
                ("context_lens", shape.sequences),
                ("logit_rows", shape.rows),
            )
        ]
        self._sequences = view("sequences", shape.tokens)
        self._numbers = np.arange(shape.sequences, dtype=np.int32)
        self._query_tiles = view("query_tiles", shape.query_tiles)
        self._temperatures = view("temperatures", 2 * shape.rows).view(np.float64)
        self._slots = [view(f"slot_mapping.{pool}", shape.tokens) for pool in range(pools)]
        self._tables = [
            view(f"block_tables.{pool}", shape.sequences * shape.blocks).reshape(-1, shape.blocks)
            for pool in range(pools)
        ]

    def write(self, batch: StepBatch, temperatures: NDArray[np.float64] | None = None) -> None:
        """Put a step's arrays there. Columns that no context needs are left out of the block tables."""
        for name, view in self._plain:
            view[:] = getattr(batch, name)
        self._sequences[:] = (
            self._numbers
            if len(self._sequences) == len(self._numbers)
            else self._numbers.repeat(np.diff(batch.query_starts))
        )
        for view, slots in zip(self._slots, batch.slot_mapping, strict=True):
            view[:] = slots
        for view, tables in zip(self._tables, batch.block_tables, strict=True):
            columns = min(tables.shape[1], self._shape.blocks)
            view[:, :columns] = tables[:, :columns]
        if self._shape.query_tiles:
            self._query_tiles[:] = query_tiles(batch)
        if temperatures is not None:
            self._temperatures[:] = temperatures


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
