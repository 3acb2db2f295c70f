"""Rotary position embedding: the table of a step's angles, and the turning of heads by it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine_numba.kernels.compilation import Compiled, entry, inlined, part
from refengine_numba.kernels.copy import copy_elements
from refengine_numba.kernels.entry import SIGNATURE, doubles_at, floats_at, ids_at
from refengine_numba.kernels.lanes import alternating_high, alternating_low, evens, odds
from refengine_numba.kernels.share import share
from refengine_numba.kernels.vectors import LANES, load_f32, store
from refengine_numba.row_arguments import PAIRINGS

Floats = NDArray[np.float32]


# -------------------------------------------------------------------------------------------------- turning


def turn_whole(pairing: str, x: Any, at: int, table: Any, turns: int, y: Any, half: int) -> None:
    """Turn as many pairs as are whole vectors. Of each product of four, and each sum, one rounding.

    Args:
        pairing: literal.
        x: float32.
        at: where the head starts, in x and in y.
        table: float32, cosines and then sines.
        turns: where the token's cosines start.
        y: float32, may be x.
        half: number of pairs.
    """
    raise NotImplementedError


@inlined(turn_whole)
def _turn_whole(pairing: Any) -> Any:
    def interleaved(pairing: str, x: Any, at: int, table: Any, turns: int, y: Any, half: int) -> None:
        for i in range(0, half // LANES * LANES, LANES):
            cosines, sines = load_f32(table, turns + i), load_f32(table, turns + half + i)
            low, high = load_f32(x, at + 2 * i), load_f32(x, at + 2 * i + LANES)
            a, b = evens(low, high), odds(low, high)
            turned_a, turned_b = a * cosines - b * sines, b * cosines + a * sines
            store(y, at + 2 * i, alternating_low(turned_a, turned_b))
            store(y, at + 2 * i + LANES, alternating_high(turned_a, turned_b))

    def halves(pairing: str, x: Any, at: int, table: Any, turns: int, y: Any, half: int) -> None:
        for i in range(0, half // LANES * LANES, LANES):
            cosines, sines = load_f32(table, turns + i), load_f32(table, turns + half + i)
            a, b = load_f32(x, at + i), load_f32(x, at + half + i)
            store(y, at + i, a * cosines - b * sines)
            store(y, at + half + i, b * cosines + a * sines)

    return {"interleaved": interleaved, "halves": halves}[pairing.literal_value]


@part
def turn(pairing: str, x: Any, at: int, table: Any, turns: int, y: Any, half: int) -> None:
    """Turn all pairs of a head; the arguments are those of :func:`turn_whole`."""
    turn_whole(pairing, x, at, table, turns, y, half)
    step, apart = (2, 1) if pairing == "interleaved" else (1, half)
    for i in range(half // LANES * LANES, half):
        cosine, sine = table[turns + i], table[turns + half + i]
        a, b = x[at + step * i], x[at + step * i + apart]
        y[at + step * i] = a * cosine - b * sine
        y[at + step * i + apart] = b * cosine + a * sine


def rope_entry(pairing: str) -> Compiled:
    """Turning, by rows. Arguments: x, table, y, rows T, heads H, size of a head D, dims of the table."""
    if pairing not in PAIRINGS:
        raise KeyError(pairing)

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        rows, heads, size, dims = a[3], a[4], a[5], a[6]
        x, table = floats_at(a[0], rows * heads * size), floats_at(a[1], rows * dims)
        y = floats_at(a[2], rows * heads * size)
        first, last = share(rows, thread, threads)
        for row in range(first, last):
            for head in range(row * heads, (row + 1) * heads):
                turn(pairing, x, head * size, table, row * dims, y, dims // 2)
                if a[0] != a[2]:
                    copy_elements(x, head * size + dims, y, head * size + dims, size - dims)

    return run


# -------------------------------------------------------------------------------------------------- angles


def rope_table_entry() -> Compiled:
    """Cosines, then sines, of a step's angles, by rows: in float64, with the C library's functions.

    Arguments: positions (int32), frequencies and after them the magnitude (float64), table, rows T, pairs.
    """

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        rows, pairs = a[3], a[4]
        positions, numbers = ids_at(a[0], rows), doubles_at(a[1], pairs + 1)
        table = floats_at(a[2], rows * 2 * pairs)
        first, last = share(rows, thread, threads)
        for row in range(first, last):
            for i in range(pairs):
                angle = np.float64(positions[row]) * numbers[i]
                table[row * 2 * pairs + i] = np.float32(math.cos(angle) * numbers[pairs])
                table[row * 2 * pairs + pairs + i] = np.float32(math.sin(angle) * numbers[pairs])

    return run
