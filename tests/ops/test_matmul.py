"""A column's bits do not depend on its neighbours, its place or their number."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.ops.matmul import matmul_columns

SHAPES = [(576, 576), (192, 576), (96, 192), (192, 64), (65, 33), (7, 5), (1, 3), (3, 1), (5000, 16)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("rows", "inner"), SHAPES)
def test_a_column_has_the_bits_it_has_alone(rows: int, inner: int, order: str, dtype: type) -> None:
    """Any slice of the columns, multiplied on its own, gives the same bits."""
    rng = np.random.default_rng(0)
    a, x = rng.standard_normal((rows, inner)).astype(dtype), rng.standard_normal((inner, 300)).astype(dtype)
    whole = matmul_columns(a, x, order=order)
    for first, last in [(0, 1), (299, 300), (5, 7), (17, 50), (3, 131), (100, 228), (0, 299)]:
        part = matmul_columns(a, x[:, first:last], order=order)
        assert np.array_equal(part, whole[:, first:last]), f"columns {first} to {last}"


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_product_is_right(rows: int, inner: int, columns: int, transposed: bool, batched: bool) -> None:
    """Against float64: within (K + 1)·u·Σ|a·x|, with leading axes broadcast and either layout of ``a``."""
    rng = np.random.default_rng(rows * 71 + inner)
    lead = (2,) if batched else ()
    a = rng.standard_normal((*lead, *((inner, rows) if transposed else (rows, inner)))).astype(np.float32)
    a = a.swapaxes(-1, -2) if transposed else a
    x = rng.standard_normal((*lead, inner, columns)).astype(np.float32)
    exact = a.astype(np.float64) @ x.astype(np.float64)
    bound = (inner + 1) * 2.0**-24 * (np.abs(a).astype(np.float64) @ np.abs(x).astype(np.float64))
    assert (np.abs(matmul_columns(a, x) - exact) <= bound).all()


def test_padding_does_not_leak_what_is_not_finite() -> None:
    """An infinite column spoils itself only."""
    a = np.ones((4, 4), np.float32)
    x = np.ones((4, 5), np.float32)
    x[:, 2] = np.inf
    assert np.isfinite(matmul_columns(a, x)[:, [0, 1, 3, 4]]).all()
