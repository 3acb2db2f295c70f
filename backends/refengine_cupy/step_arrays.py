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
    lengths = np.diff(batch.query_starts)
    starts = batch.context_lens - lengths
    partitions = 1
    for pool in layout.groups:
        seen = starts if pool.window is None else starts - pool.window + 1
        first = np.maximum(seen if pool.window is not None else 0, 0) // PARTITION
        partitions = max(partitions, int(((batch.context_lens - 1) // PARTITION - first).max()) + 1)
    blocks = -(-int(batch.context_lens.max()) // layout.block_size)
    return StepShape(
        tokens=len(batch.token_ids),
        sequences=len(batch.context_lens),
        rows=len(batch.logit_rows),
        blocks=_power_of_two(blocks),
        partitions=_power_of_two(partitions),
        query_tiles=len(query_tiles(batch)),
        fills=any(pool.sealed for pool in layout.groups)
        and bool(((batch.positions + 1) % layout.block_size == 0).any()),
    )


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


def write_arrays(
    batch: StepBatch, shape: StepShape, offsets: Mapping[str, int], out: NDArray[np.uint8]
) -> None:
    """Put a step's arrays into ``out``. Columns that no context needs are left out of the block tables."""
    words = out.view(np.int32)
    sequences = np.arange(shape.sequences, dtype=np.int32)
    if shape.tokens > shape.sequences:
        sequences = np.repeat(sequences, np.diff(batch.query_starts))
    given = {
        "token_ids": batch.token_ids,
        "positions": batch.positions,
        "sequences": sequences,
        "query_starts": batch.query_starts,
        "context_lens": batch.context_lens,
        "logit_rows": batch.logit_rows,
        **{f"slot_mapping.{pool}": slots for pool, slots in enumerate(batch.slot_mapping)},
    }
    if shape.query_tiles:
        given["query_tiles"] = query_tiles(batch)
    for name, values in given.items():
        at = offsets[name] // 4
        words[at : at + len(values)] = values
    for pool, tables in enumerate(batch.block_tables):
        columns, at = min(tables.shape[1], shape.blocks), offsets[f"block_tables.{pool}"] // 4
        table = words[at : at + shape.sequences * shape.blocks].reshape(shape.sequences, shape.blocks)
        table[:, :columns] = tables[:, :columns]


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
