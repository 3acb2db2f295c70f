"""A step's shape, and its arrays in memory, against loops over tokens."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from refengine.memory import KVGroupLayout, KVLayout
from refengine.program import StepBatch
from refengine_cupy.attention import PARTITION
from refengine_cupy.step_arrays import StepArrays, offsets_of, query_tiles, shape_of

BLOCK, BLOCKS = 16, 4096


def layout(*windows: int | None) -> KVLayout:
    groups = tuple(KVGroupLayout(window, ((i, 1, 8),), BLOCKS) for i, window in enumerate(windows))
    return KVLayout(BLOCK, np.dtype(np.float16), groups)


def batch(rng: np.random.Generator, lengths: list[int], pools: int) -> StepBatch:
    """Sequences with so many tokens in the step, behind contexts of any length."""
    contexts = [length + int(rng.integers(0, 3 * PARTITION)) for length in lengths]
    width = -(-max(contexts) // BLOCK) + int(rng.integers(0, 3))

    def numbers(*shape: int) -> NDArray[np.int32]:
        return rng.integers(0, BLOCKS, shape, np.int32)

    tokens = sum(lengths)
    return StepBatch(
        token_ids=numbers(tokens),
        positions=np.concatenate(
            [np.arange(c - n, c, dtype=np.int32) for c, n in zip(contexts, lengths, strict=True)]
        ),
        query_starts=np.cumsum([0, *lengths], dtype=np.int32),
        context_lens=np.array(contexts, np.int32),
        logit_rows=np.flatnonzero(rng.integers(0, 2, tokens)).astype(np.int32),
        slot_mapping=tuple(numbers(tokens) for _ in range(pools)),
        block_tables=tuple(numbers(len(lengths), width) for _ in range(pools)),
    )


LENGTHS = [[1], [1] * 5, [1] * 64, [7, 1], [1, 300], [200], [130, 1, 90]]
WINDOWS: list[tuple[int | None, ...]] = [(None,), (None, 40), (40,), (200, 40), (129, 40)]


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_as_many_partitions_as_hold_what_the_queries_of_a_sequence_see(
    lengths: list[int], windows: tuple[int | None, ...]
) -> None:
    """Rounded up to a power of two."""
    rng = np.random.default_rng(len(lengths))
    for _ in range(20):
        step, most = batch(rng, lengths, len(windows)), 0
        for stop, length in zip(step.context_lens.tolist(), lengths, strict=True):
            for window in windows:
                seen = {
                    position
                    for query in range(stop - length, stop)
                    for position in range(0 if window is None else max(0, query - window + 1), query + 1)
                }
                most = max(most, max(seen) // PARTITION - min(seen) // PARTITION + 1)
        found = shape_of(step, layout(*windows)).partitions
        assert found.bit_count() == 1
        assert found // 2 < most <= found


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("pools", [1, 2])
def test_every_array_is_where_its_offset_says_and_none_over_another(lengths: list[int], pools: int) -> None:
    """Of steps of one shape, one after the other in the same memory."""
    rng = np.random.default_rng(pools)
    step = batch(rng, lengths, pools)
    shape = shape_of(step, layout(*[None] * pools))
    offsets, nbytes = offsets_of(shape, pools)
    memory = np.full(nbytes + 64, 0xFF, np.uint8)
    arrays = StepArrays(shape, pools, memory)

    def held(name: str, count: int, dtype: type[np.generic] = np.int32) -> list[float]:
        numbers: list[float] = np.frombuffer(memory, dtype, count, offsets[name]).tolist()
        return numbers

    for times in (1, 2):
        temperatures = rng.random(len(step.logit_rows))
        arrays.write(step, temperatures)
        for name in ("token_ids", "positions", "query_starts", "context_lens", "logit_rows"):
            given = getattr(step, name)
            assert held(name, len(given)) == given.tolist()
        sequences = [row for row, length in enumerate(lengths) for _ in range(length)]
        assert held("sequences", len(sequences)) == sequences
        assert held("query_tiles", shape.query_tiles) == query_tiles(step).tolist()
        assert held("temperatures", shape.rows, np.float64) == temperatures.tolist()
        for pool in range(pools):
            slots, tables = step.slot_mapping[pool], step.block_tables[pool]
            assert held(f"slot_mapping.{pool}", len(slots)) == slots.tolist()
            count = shape.sequences * shape.blocks
            rows = np.reshape(held(f"block_tables.{pool}", count), (-1, shape.blocks))
            for row, table, context in zip(rows.tolist(), tables.tolist(), step.context_lens, strict=True):
                needed = -(-int(context) // BLOCK)
                assert row[:needed] == table[:needed]
        assert (memory[nbytes:] == 0xFF).all(), times
        step = StepBatch(
            step.token_ids + 1, step.positions, step.query_starts, step.context_lens, step.logit_rows,
            tuple(slots[::-1] for slots in step.slot_mapping),
            tuple(tables[::-1, ::-1].copy() for tables in step.block_tables),
        )  # fmt: skip
