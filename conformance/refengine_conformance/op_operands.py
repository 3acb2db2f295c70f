"""Operands of ops: rows and widths beside what vector units and tiles like, and numbers of any magnitude."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

ROWS = st.sampled_from([1, 2, 3, 8, 9, 17])
WIDTHS = st.sampled_from([1, 2, 7, 8, 24, 31, 33, 48, 65])
PAIRINGS = st.sampled_from(["interleaved", "halves"])
SIZES = st.sampled_from([1e-45, 1e-42, 1e-38, 1e-20, 1e-3, 1.0, 1.0, 1.0, 30.0, 1e4, 1e15, 1e30, 3e38])


@st.composite
def numbers(
    draw: st.DrawFn,
    rows: st.SearchStrategy[int] = ROWS,
    width: st.SearchStrategy[int] = WIDTHS,
    largest: float = 3e38,
) -> NDArray[np.float32]:
    """Float32 ``[rows, width]``, finite: ordinary, subnormal, tiny and large ones; zeros of either sign."""
    shape = (draw(rows), draw(width))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.uniform(-1, 1, shape)
    for size in draw(st.lists(SIZES, max_size=3)):
        x[rng.random(shape) < 0.2] *= min(size, largest)
    for zero in draw(st.lists(st.sampled_from([0.0, -0.0]), max_size=2)):
        x[tuple(rng.integers(0, shape))] = zero
    return np.clip(x, -largest, largest).astype(np.float32)
