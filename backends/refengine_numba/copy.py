"""Rows that are moved, bit by bit: all of them, or those that somebody names."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine_numba.arguments import Arguments, check
from refengine_numba.compilation import entry, part
from refengine_numba.entry import SIGNATURE, floats_at, ids_at
from refengine_numba.lanes import load_first, store_first
from refengine_numba.share import share
from refengine_numba.vectors import LANES, load_f32, store

Floats = NDArray[np.float32]


@part
def copy_elements(x: Any, start: int, y: Any, to: int, count: int) -> None:
    """``y[to : to + count] = x[start : start + count]``, of flat float32 arrays that do not overlap there."""
    whole = count // LANES * LANES
    for k in range(0, whole, LANES):
        store(y, to + k, load_f32(x, start + k))
    if whole < count:
        store_first(y, to + whole, count - whole, load_first(x, start + whole, count - whole))


@cache
def copy_entry() -> Any:
    """A copy, by rows. Arguments: x, y, rows T, elements of a row."""

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        rows, size = a[2], a[3]
        first, last = share(rows, thread, threads)
        x, y = floats_at(a[0], rows * size), floats_at(a[1], rows * size)
        copy_elements(x, first * size, y, first * size, (last - first) * size)

    return run


@cache
def take_rows_entry() -> Any:
    """Some rows of x, by rows of the result: a thread reads rows of x that other threads wrote.

    Arguments: x, ids of rows (int32), y, number of ids R, elements of a row, rows of x T.
    """

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        count, size = a[3], a[4]
        x, ids, y = floats_at(a[0], a[5] * size), ids_at(a[1], count), floats_at(a[2], count * size)
        first, last = share(count, thread, threads)
        for r in range(first, last):
            copy_elements(x, ids[r] * size, y, r * size, size)

    return run


def copy(x: Floats, y: Floats, *, rows: str = "T") -> Arguments:
    """Arguments of ``copy_entry``: x [T, …] -> y of the same shape.

    Args:
        x: float32.
        y: float32, elsewhere.
        rows: the symbol of T.

    Raises:
        ValueError: a shape, dtype or stride is wrong.
    """
    check("x", x, np.float32, x.shape)
    check("y", y, np.float32, x.shape, written=True)
    return Arguments.of(x, y, len(x), math.prod(x.shape[1:]), symbols={2: rows})


def take_rows(
    x: Floats, ids: NDArray[np.int32], y: Floats, *, rows: str = "T", taken: str = "R"
) -> Arguments:
    """Arguments of ``take_rows_entry``: x [T, N], ids [R] -> y [R, N], elsewhere.

    Args:
        x: float32.
        ids: which rows, int32, in any order and any number of times; each must lie in 0 to T - 1 when the
            entry runs.
        y: float32.
        rows: the symbol of T.
        taken: the symbol of R.

    Raises:
        ValueError: a shape, dtype or stride is wrong.
    """
    check("x", x, np.float32, x.shape)
    check("ids", ids, np.int32, (len(y),))
    check("y", y, np.float32, (len(ids), *x.shape[1:]), written=True)
    size = math.prod(x.shape[1:])
    return Arguments.of(x, ids, y, len(ids), size, len(x), symbols={3: taken, 5: rows})
