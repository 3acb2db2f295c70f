"""Barriers stand where threads would meet in memory, and a table of stages is run by all threads in step."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from refengine_numba.arguments import Arguments
from refengine_numba.kernels.compilation import entry
from refengine_numba.kernels.entry import SIGNATURE, words_at
from refengine_numba.kernels.share import share
from refengine_numba.stage import Span, Stage, barriers
from refengine_numba.stage_table import StageTable
from refengine_numba.team import Team

THREADS, ROWS = 3, {"T": 5, "R": 2}


def shared(items: int, thread: int) -> tuple[int, int]:
    """As the kernels share rows out."""
    return items * thread // THREADS, items * (thread + 1) // THREADS


def touched(span: Span, thread: int) -> set[int]:
    """The bytes of a span that a thread may touch."""
    if not span.row_bytes:
        return set(range(span.start, span.start + span.nbytes))
    first, last = shared(ROWS[span.rows], thread)
    return set(range(span.start + first * span.row_bytes, span.start + last * span.row_bytes))


def collide(earlier: Stage, later: Stage) -> bool:
    """Whether a thread in the later stage can meet another that is still in the earlier one."""
    for a, b in itertools.permutations(range(THREADS), 2):
        for first, second in (("writes", "writes"), ("writes", "reads"), ("reads", "writes")):
            for x, y in itertools.product(getattr(earlier, first), getattr(later, second)):
                if touched(x, a) & touched(y, b):
                    return True
    return False


@st.composite
def spans(draw: st.DrawFn) -> Span:
    rows = draw(st.sampled_from(["", "T", "R"]))
    start = draw(st.integers(0, 30))
    if not rows:
        return Span(start, draw(st.integers(1, 12)))
    row_bytes = draw(st.integers(1, 4))
    return Span(start, row_bytes * ROWS[rows], row_bytes, rows)


@st.composite
def stages(draw: st.DrawFn) -> Stage:
    few = st.lists(spans(), max_size=2).map(tuple)
    return Stage(None, Arguments(np.zeros(1, np.int64), ()), draw(few), draw(few))


@given(st.lists(stages(), max_size=8))
def test_no_two_stages_collide_without_a_barrier_between_them(sequence: list[Stage]) -> None:
    """Byte by byte, thread by thread."""
    meets = barriers(sequence)
    for i, j in itertools.combinations(range(len(sequence)), 2):
        if not any(meets[i + 1 : j + 1]):
            assert not collide(sequence[i], sequence[j])


@given(st.lists(stages(), max_size=8))
def test_a_barrier_has_a_cause(sequence: list[Stage]) -> None:
    """Where one stands, spans of this stage and of one since the last barrier overlap, and one is written."""
    meets = barriers(sequence)
    for j, meet in enumerate(meets):
        if meet:
            since = max((i for i in range(j) if meets[i]), default=0)
            assert any(
                x.start < y.start + y.nbytes and y.start < x.start + x.nbytes
                for earlier in sequence[since:j]
                for x, y in itertools.product(
                    (*earlier.reads, *earlier.writes), (*sequence[j].reads, *sequence[j].writes)
                )
            )


def test_a_row_by_row_chain_needs_no_barrier() -> None:
    """Norm, residual and rotation of the same rows follow each other freely."""
    x = np.zeros((8, 16), np.float32)
    rows = Span.of(x, "T")
    chain = [Stage(None, Arguments(np.zeros(1, np.int64), ()), (rows,), (rows,)) for _ in range(4)]
    assert barriers(chain) == [False] * 4
    whole = Stage(None, Arguments(np.zeros(1, np.int64), ()), (Span.of(x),), ())
    assert barriers([*chain, whole]) == [False] * 4 + [True]


@entry(SIGNATURE)
def add_neighbours(thread: int, threads: int, a: Any) -> None:
    """y[i] = x[i] + x[i + 1] on a ring. Arguments: x, y, length."""
    count = a[2]
    x, y = words_at(a[0], count), words_at(a[1], count)
    first, last = share(count, thread, threads)
    for i in range(first, last):
        y[i] = x[i] + x[(i + 1) % count]


def test_every_stage_sees_what_all_threads_wrote_before() -> None:
    """A hundred rounds on a ring, each of which reads a neighbour's share, with one to nine threads."""
    a, b = np.arange(40, dtype=np.int64), np.zeros(40, np.int64)
    expected = a.copy()
    for _ in range(100):
        expected = expected + np.roll(expected, -1)
    for threads in (1, 2, 3, 9):
        x, y = a.copy(), b.copy()
        sequence = [
            Stage(
                add_neighbours,
                Arguments(np.array([*(q.ctypes.data for q in pair), 40], np.int64), pair, {2: "T"}),
                (Span.of(pair[0]),),
                (Span.of(pair[1]),),
            )
            for pair in [(x, y), (y, x)] * 50
        ]
        StageTable(sequence, {}).run(Team(threads), threads, {"T": 40}, {})
        assert np.array_equal(x, expected)


def test_sizes_and_moving_arrays_are_those_of_the_step() -> None:
    """A table made for 40 words of a stand-in computes 7 of the array it is given."""
    x, stand_in = np.arange(40, dtype=np.int64), np.zeros(40, np.int64)
    words = np.array([x.ctypes.data, stand_in.ctypes.data, 40], np.int64)
    stage = Stage(
        add_neighbours, Arguments(words, (x, stand_in), {2: "T"}), (Span.of(x),), (Span.of(stand_in),)
    )
    table = StageTable([stage], {"output": stand_in})
    output = np.full(40, -1, np.int64)
    table.run(Team(2), 2, {"T": 7}, {"output": output})
    assert output.tolist() == [*(2 * i + 1 for i in range(6)), 6, *[-1] * 33]
    assert not stand_in.any()
