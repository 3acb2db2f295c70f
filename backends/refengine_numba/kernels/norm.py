"""Root-mean-square normalisation of rows, or of every head of a row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine_numba.kernels.compilation import Compiled, entry, part
from refengine_numba.kernels.entry import SIGNATURE, floats_at
from refengine_numba.kernels.lanes import load_first, store_first, sum_of_lanes
from refengine_numba.kernels.share import share
from refengine_numba.kernels.vectors import LANES, float_of_bits, fma, load_f32, splat_f32, store

AT_ONCE = 4 * LANES
"""Elements squared at once: four sums grow side by side, since one would wait for itself."""

Floats = NDArray[np.float32]


@part
def sum_of_squares(x: Any, at: int, size: int) -> Any:
    """Of a row of x, float32: in an order that its size alone decides."""
    a = b = c = d = splat_f32(np.float32(0))
    k = at
    while k + AT_ONCE <= at + size:
        first, second = load_f32(x, k), load_f32(x, k + LANES)
        third, fourth = load_f32(x, k + 2 * LANES), load_f32(x, k + 3 * LANES)
        a, b = fma(first, first, a), fma(second, second, b)
        c, d = fma(third, third, c), fma(fourth, fourth, d)
        k += AT_ONCE
    while k + LANES <= at + size:
        first = load_f32(x, k)
        a = fma(first, first, a)
        k += LANES
    if k < at + size:
        first = load_first(x, k, at + size - k)
        b = fma(first, first, b)
    return sum_of_lanes((a + b) + (c + d))


@part
def normalise(x: Any, at: int, weight: Any, y: Any, size: int, eps: Any) -> None:
    """A row: ``x / sqrt(mean(x²) + eps) · weight``; the root's reciprocal first, and the weight last."""
    mean = sum_of_squares(x, at, size) / np.float32(size)
    factor = splat_f32(np.float32(1) / math.sqrt(mean + eps))
    for k in range(0, size // LANES * LANES, LANES):
        store(y, at + k, load_f32(x, at + k) * factor * load_f32(weight, k))
    if size % LANES != 0:
        k, count = size // LANES * LANES, size % LANES
        store_first(y, at + k, count, load_first(x, at + k, count) * factor * load_first(weight, k, count))


def rms_norm_entry() -> Compiled:
    """RMS normalisation, by rows. Arguments: x, weight, y, rows T, heads of a row, size N, eps (float32)."""

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        rows, heads, size = a[3], a[4], a[5]
        x, y = floats_at(a[0], rows * heads * size), floats_at(a[2], rows * heads * size)
        weight, eps = floats_at(a[1], size), float_of_bits(np.int32(a[6]))
        first, last = share(rows, thread, threads)
        for head in range(first * heads, last * heads):
            normalise(x, head * size, weight, y, size, eps)

    return run
