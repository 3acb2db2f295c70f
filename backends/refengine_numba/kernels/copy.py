"""Rows that are moved, bit by bit: those that somebody names."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine_numba.kernels.compilation import Compiled, entry, part
from refengine_numba.kernels.entry import SIGNATURE, floats_at, ids_at
from refengine_numba.kernels.lanes import load_first, store_first
from refengine_numba.kernels.share import share
from refengine_numba.kernels.vectors import LANES, load_f32, store

Floats = NDArray[np.float32]


@part
def copy_elements(x: Any, start: int, y: Any, to: int, count: int) -> None:
    """``y[to : to + count] = x[start : start + count]``, of flat float32 arrays that do not overlap there."""
    whole = count // LANES * LANES
    for k in range(0, whole, LANES):
        store(y, to + k, load_f32(x, start + k))
    if whole < count:
        store_first(y, to + whole, count - whole, load_first(x, start + whole, count - whole))


def take_rows_entry() -> Compiled:
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
