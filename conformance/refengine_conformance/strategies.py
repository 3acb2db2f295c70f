"""Inputs that seek trouble."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

WIDTHS = st.sampled_from([1, 2, 7, 24, 32, 33, 64, 96, 100])
"""Below, at and just beyond what vector units and tiles like."""


@st.composite
def activations(
    draw: st.DrawFn,
    rows: st.SearchStrategy[int] = st.sampled_from([1, 2, 3, 8, 9, 17]),
    width: st.SearchStrategy[int] = WIDTHS,
    scale: st.SearchStrategy[float] = st.sampled_from([1.0, 1e-3, 100.0]),
) -> NDArray[np.float32]:
    """Float32 ``[rows, width]``: normal numbers, with here and there an outlier, a tie or a zero."""
    shape = (draw(rows), draw(width))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = (rng.standard_normal(shape) * draw(scale)).astype(np.float32)
    for special in draw(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 30.0, -30.0]), max_size=3)):
        x[tuple(rng.integers(0, shape))] = special
    return x
