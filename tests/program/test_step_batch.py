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
