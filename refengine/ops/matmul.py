"""A matrix product whose every output column has the bits it would have alone.

Rule 6 of the design: a token's result may not depend on which other tokens share its step. A BLAS breaks
that rule quietly: it picks another micro-kernel, another order of additions, for another number of
columns, and even for another position among them. So BLAS is not trusted here, it is *probed*:

* Its control flow does not depend on the data, only on the shape and layout of the call. Where random
  columns come out of two slots, or of two calls, with equal bits, all columns do.
* A call of ``BASE_WIDTHS`` columns, proved slot-independent, defines the result. Wider calls are probed for
  the slots that agree with it bit by bit; only those slots are used, the others are padding.

The probe of a shape runs once, when the shape is first met. On a BLAS that is consistent nothing is
wasted; on one that is not, the padding costs some speed and the result stays the same.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np

from refengine.ops.arrays import FloatArray

BASE_WIDTHS = (8, 4, 2, 1)
"""Candidate widths of the call that defines a column's bits; one column alone always qualifies."""

WIDE_WIDTHS = (32, 64, 128, 256, 512)
"""Widths tried for more columns at once."""

MAX_ROWS = 4096
"""Taller left operands are multiplied in pieces, so that a probe stays small beside the weights."""

_CALL_OVERHEAD = 20
"""Fixed cost of a call in units of one column's cost (streaming the left operand), used to choose widths."""

Order = Literal["C", "F"]
Slots = tuple[int, int]


def matmul_columns(
    a: FloatArray,
    x: FloatArray,
    *,
    order: Order = "C",
    out: FloatArray | None = None,
) -> FloatArray:
    """``a @ x`` with column-independent bits.

    Args:
        a: ``[..., M, K]``; the last two axes contiguous in either order (a weight, or keys or values).
        x: ``[..., K, R]``, leading axes broadcast against those of ``a``; same dtype.
        order: the memory order in which columns are handed to BLAS: "F" where ``x`` is the transpose of
            contiguous rows, so that they are copied as they lie. It is part of what defines the bits.
        out: ``[..., M, R]`` in any memory order; freshly allocated where left out.

    Returns:
        ``out``.

    Clauses: OPS-2, OPS-3, CNV-12, CNV-13.
    """
    rows, inner = a.shape[-2:]
    columns = x.shape[-1]
    if out is None:
        out = np.empty((*np.broadcast_shapes(a.shape[:-2], x.shape[:-2]), rows, columns), a.dtype)
    for top in range(0, rows, MAX_ROWS):
        piece = a[..., top : top + MAX_ROWS, :]
        a_order: Order = "C" if piece.strides[-1] == piece.itemsize else "F"
        done = 0
        while done < columns:
            width, (first, last) = _best_call(piece.shape[-2], inner, a_order, order, a.dtype, columns - done)
            count = min(last - first, columns - done)
            padded = _zeros((*x.shape[:-2], inner, width), a.dtype, order)
            padded[..., first : first + count] = x[..., done : done + count]
            product = piece @ padded
            out[..., top : top + MAX_ROWS, done : done + count] = product[..., first : first + count]
            done += count
    return out


@cache
def _best_call(
    rows: int, inner: int, a_order: Order, x_order: Order, dtype: np.dtype[np.floating], columns: int
) -> tuple[int, Slots]:
    """The call (width and usable slots) that costs least per column when ``columns`` are left."""
    base = _base_width(rows, inner, a_order, x_order, dtype)
    best = (base, (0, base))
    best_cost = (base + _CALL_OVERHEAD) / min(base, columns)
    for width in WIDE_WIDTHS:
        if width > 2 * columns + base:
            break
        first, last = _usable_slots(rows, inner, a_order, x_order, dtype, width)
        usable = min(last - first, columns)
        if usable and (width + _CALL_OVERHEAD) / usable < best_cost:
            best, best_cost = (width, (first, last)), (width + _CALL_OVERHEAD) / usable
    return best


@cache
def _base_width(rows: int, inner: int, a_order: Order, x_order: Order, dtype: np.dtype[np.floating]) -> int:
    """The widest of ``BASE_WIDTHS`` in which a column has the same bits in every slot."""
    for width in BASE_WIDTHS:
        a, x = _probe_operands(rows, inner, a_order, x_order, dtype, width)
        expected = a @ x
        for shift in range(1, width):
            x[...] = np.roll(x, 1, axis=-1)
            if not np.array_equal(a @ x, np.roll(expected, shift, axis=-1)):
                break
        else:
            return width
    return 1


@cache
def _usable_slots(
    rows: int, inner: int, a_order: Order, x_order: Order, dtype: np.dtype[np.floating], width: int
) -> Slots:
    """The longest run of slots of a ``width``-wide call that agree bit by bit with the base call."""
    base = _base_width(rows, inner, a_order, x_order, dtype)
    a, x = _probe_operands(rows, inner, a_order, x_order, dtype, width)
    product = a @ x
    narrow = _zeros((inner, base), dtype, x_order)
    agrees = np.empty(width, dtype=bool)
    for first in range(0, width, base):
        narrow[...] = x[:, first : first + base]
        agrees[first : first + base] = (product[:, first : first + base] == a @ narrow).all(axis=0)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], agrees, [False]]).astype(np.int8)))
    runs = [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
    return max(runs, key=lambda run: run[1] - run[0], default=(0, 0))


def _probe_operands(
    rows: int, inner: int, a_order: Order, x_order: Order, dtype: np.dtype[np.floating], width: int
) -> tuple[FloatArray, FloatArray]:
    """Random operands of this shape and layout, every row and every column another."""
    random = np.random.default_rng(0)
    a = _zeros((rows, inner), dtype, a_order)
    a[...] = np.resize(random.standard_normal(8191), (rows, inner))  # a prime: rows differ, and it is cheap
    x = _zeros((inner, width), dtype, x_order)
    x[...] = random.standard_normal((inner, width))
    return a, x


def _zeros(shape: tuple[int, ...], dtype: np.dtype[np.floating], order: Order) -> FloatArray:
    """Zeros whose last two axes lie in memory in ``order``."""
    if order == "C":
        return np.zeros(shape, dtype)
    return np.zeros((*shape[:-2], shape[-1], shape[-2]), dtype).swapaxes(-1, -2)
