"""Steps over a sealed cache are checked where exact copies are read, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from refengine.errors import RequestError
from refengine.memory import RELEASED, KVGroupLayout, KVLayout
from refengine.program import StepBatch, check_step_batch, kv_formats, policy

BLOCK, POOL = 4, 8


def layout(window: int | None) -> KVLayout:
    """One layer over a sealed pool, and the pool of its exact copies."""
    dtype, sealed = kv_formats("int8", policy("float32"))
    pool = KVGroupLayout(window, ((0, 1, 8),), POOL, sealed)
    return KVLayout(BLOCK, dtype, (pool, replace(pool, sealed=None, recent=True)))


def batch(*copies: int) -> StepBatch:
    """Positions 12 and 13 of a sequence, in its fourth block."""
    positions = np.array([12, 13], np.int32)
    return StepBatch(
        token_ids=np.zeros(2, np.int32),
        positions=positions,
        query_starts=np.array([0, 2], np.int32),
        context_lens=np.array([14], np.int32),
        logit_rows=np.array([1], np.int32),
        slot_mapping=(positions, positions),
        block_tables=(np.array([[0, 1, 2, 3]], np.int32), np.array([copies], np.int32)),
    )


def check(step: StepBatch, window: int | None = None) -> None:
    check_step_batch(step, layout(window), vocabulary_size=10)


def test_copies_between_the_first_and_the_own_block_may_be_gone() -> None:
    """They are read as sealed."""
    check(batch(0, RELEASED, 99, 3))


def test_the_first_copy_may_be_gone_once_a_window_has_passed_it() -> None:
    """A window of 9 shows position 4 to the query at 12, one of 10 position 3."""
    check(batch(RELEASED, RELEASED, RELEASED, 3), window=9)
    with pytest.raises(RequestError, match="outside the pool"):
        check(batch(RELEASED, RELEASED, RELEASED, 3), window=10)


@pytest.mark.parametrize("copies", [(RELEASED, 1, 2, 3), (0, 1, 2, RELEASED), (0, 1, 2, POOL)])
def test_copies_that_are_read_must_be_in_the_pool(copies: tuple[int, ...]) -> None:
    """The first block's, and that of the step's own positions."""
    with pytest.raises(RequestError, match="outside the pool"):
        check(batch(*copies))


@pytest.mark.parametrize("window", [None, 1, 4, 5, 6, 30])
@pytest.mark.parametrize("recent", [False, True])
def test_entries_must_be_in_the_pool_where_a_query_reads_them_and_nowhere_else(
    window: int | None, recent: bool
) -> None:
    """Several sequences, one or two entries of whose tables name no block, against a loop over positions."""
    rng, refused = np.random.default_rng(0), 0
    pool = replace(layout(window).groups[0], sealed=None, recent=recent)
    for _ in range(300):
        lengths = rng.integers(1, 7, 3)
        contexts = lengths + rng.integers(0, 20, 3)
        tables = rng.integers(0, POOL, (3, 8), np.int32)
        tables[rng.integers(0, 3, 2), rng.integers(0, 8, 2)] = rng.choice(
            [RELEASED, POOL, 2**31 - 1, -(2**31)]
        )
        read = set()
        for row, (length, context) in enumerate(zip(lengths.tolist(), contexts.tolist(), strict=True)):
            for query in range(context - length, context):
                for position in range(0 if window is None else max(0, query - window + 1), query + 1):
                    entry = position // BLOCK
                    if not recent or entry == 0 or entry >= (context - length) // BLOCK:
                        read.add((row, entry))
        strange = {(row, entry) for row, entry in np.ndindex(3, 8) if not 0 <= tables[row, entry] < POOL}
        starts = np.cumsum([0, *lengths], dtype=np.int32)
        step = StepBatch(
            token_ids=np.zeros(starts[-1], np.int32),
            positions=np.concatenate(
                [np.arange(c - n, c, dtype=np.int32) for c, n in zip(contexts, lengths, strict=True)]
            ),
            query_starts=starts,
            context_lens=contexts.astype(np.int32),
            logit_rows=starts[1:] - 1,
            slot_mapping=(np.zeros(starts[-1], np.int32),),
            block_tables=(tables,),
        )
        layout_of_one = KVLayout(BLOCK, np.dtype(np.float32), (pool,))
        if strange & read:
            refused += 1
            with pytest.raises(RequestError, match="outside the pool"):
                check_step_batch(step, layout_of_one, vocabulary_size=10)
        else:
            check_step_batch(step, layout_of_one, vocabulary_size=10)
    assert 0 < refused < 300


@pytest.mark.parametrize(
    ("starts", "contexts", "tokens"),
    [
        ([0, 2**31 - 1, -2, 3], [2**31 - 1] * 3, 3),
        ([0, 3, 1, 3], [9, 9, 9], 3),
        ([0, 1], [-(2**31)], 1),
        ([0, 1], [0], 1),
    ],
)
def test_numbers_whose_differences_overflow_are_refused(
    starts: list[int], contexts: list[int], tokens: int
) -> None:
    """As are those that do not rise, and contexts shorter than their tokens."""
    zeros = np.zeros(tokens, np.int32)
    step = StepBatch(
        token_ids=zeros,
        positions=np.full(tokens, 2**31 - 1, np.int32),
        query_starts=np.array(starts, np.int32),
        context_lens=np.array(contexts, np.int32),
        logit_rows=zeros[:1],
        slot_mapping=(zeros,),
        block_tables=(np.zeros((len(contexts), 4), np.int32),),
    )
    one = KVLayout(BLOCK, np.dtype(np.float32), (KVGroupLayout(None, ((0, 1, 8),), POOL),))
    with pytest.raises(RequestError, match=r"query_starts|more tokens"):
        check_step_batch(step, one, vocabulary_size=10)
