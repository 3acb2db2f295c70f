"""A matrix product whose every output column has the bits it would have alone.

Rule 6 of the design: a token's result may not depend on which other tokens share its step. A BLAS breaks
that rule quietly: it picks another micro-kernel, another order of additions, for another number of
columns, and even for another position among them. So BLAS is not trusted here, it is *probed*:

* Its control flow does not depend on the data, only on the shape and layout of the call. Where random
  columns come out of two slots, or of two calls, with equal bits, all columns do.
* A call of ``BASE_WIDTHS`` columns, proved slot-independent, defines the result. Wider calls are probed for
  the slots that agree with it bit by bit; only those slots are used.

The other slots are not padded: a call's window is laid over the columns so that they fall on neighbours,
which another call computes. So no operand is copied, unless there are fewer columns than the narrowest call
has. The probe of a shape runs once, when the shape is first met.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refengine.ops.arrays import FloatArray
from refengine.ops.scratch import Scratch, aligned

BASE_WIDTHS = (8, 4, 2, 1)
"""Candidate widths of the call that defines a column's bits; one column alone always qualifies."""

WIDE_WIDTHS = (32, 64, 128, 256)
"""Widths tried for more columns at once."""

_CALL_OVERHEAD = 20
"""Fixed cost of a call in units of one column's cost (streaming the left operand), used to choose widths."""

Order = Literal["C", "F"]


class Call(NamedTuple):
    """One product: ``width`` columns from ``start`` on, of which ``first`` to ``last`` are taken."""

    start: int
    width: int
    first: int
    last: int


def matmul_columns(
    a: FloatArray,
    x: FloatArray,
    *,
    order: Order = "C",
    out: FloatArray | None = None,
    scratch: Scratch | None = None,
) -> FloatArray:
    """``a @ x`` with column-independent bits.

    Args:
        a: ``[..., M, K]``; the last two axes contiguous in either order (a weight, or keys or values).
        x: ``[..., K, R]``, leading axes as those of ``a``; same dtype. It may have more columns than ``out``:
            those are not asked for.
        order: which of the last two axes of ``x`` is contiguous: "C" the last, "F" the one before, where it
            is the transpose of rows. Part of what defines the bits.
        out: ``[..., M, R]`` in any memory order; freshly allocated where left out.
        scratch: working memory, at most ``matmul_workspace``.

    Returns:
        ``out``.

    Clauses: OPS-2, OPS-3, CNV-12, CNV-13.
    """
    scratch = scratch or Scratch()
    *lead, rows, inner = a.shape
    if out is None:
        out = np.empty((*lead, rows, x.shape[-1]), a.dtype)
    columns = out.shape[-1]
    a_order: Order = "C" if a.strides[-1] == a.itemsize else "F"
    with scratch.frame():
        x = padded(x, order, scratch)
        for start, width, first, last in _calls(rows, inner, a_order, order, a.dtype, columns, x.shape[-1]):
            with scratch.frame():
                product = scratch.empty((*lead, rows, width), a.dtype)
                np.matmul(a, x[..., start : start + width], out=product)
                out[..., start + first : start + last] = product[..., first:last]
    return out


def padded(x: FloatArray, order: Order, scratch: Scratch) -> FloatArray:
    """``x``, with columns of zeros behind its own if there are too few for the narrowest call.

    Where it does not lie as ``order`` says, a copy that does.
    """
    *lead, inner, columns = x.shape
    unit = x.strides[-1 if order == "C" else -2]
    if unit == x.itemsize and columns >= max(BASE_WIDTHS):
        return x
    width = max(columns, max(BASE_WIDTHS))
    copy = (
        scratch.empty((*lead, inner, width), x.dtype)
        if order == "C"
        else scratch.empty((*lead, width, inner), x.dtype).swapaxes(-1, -2)
    )
    copy[..., :columns], copy[..., columns:] = x, 0
    return copy


def matmul_workspace(lead: int, rows: int, inner: int, columns: int, itemsize: int) -> int:
    """The most working memory (bytes) of ``matmul_columns`` for at most these sizes.

    The widest call's product; or, where the columns are too few for a call, their copies too.
    """
    base, widest = max(BASE_WIDTHS), max([max(BASE_WIDTHS), *(w for w in WIDE_WIDTHS if w <= columns)])
    alone = aligned(lead * rows * base * itemsize) + aligned(lead * inner * base * itemsize)
    return max(alone, aligned(lead * rows * widest * itemsize))


@cache
def _calls(
    rows: int,
    inner: int,
    a_order: Order,
    x_order: Order,
    dtype: np.dtype[np.floating],
    columns: int,
    there: int,
) -> tuple[Call, ...]:
    """Calls that give every column once, each chosen for the least cost per column it gives.

    Their windows lie within the ``there`` columns that there are, at least as many as are asked for.
    """
    base = _base_width(rows, inner, a_order, x_order, dtype)
    calls: list[Call] = []
    done = 0
    while done < columns:
        start = min(done, there - base)
        best = Call(start, base, done - start, min(base, columns - start))
        for width in WIDE_WIDTHS:
            if width > there:
                break
            first, last = _usable_slots(rows, inner, a_order, x_order, dtype, width)
            start = min(done - first, there - width)
            wide = Call(start, width, done - start, min(last, columns - start))
            if start >= 0 and first <= done - start < last and _cost(wide) < _cost(best):
                best = wide
        calls.append(best)
        done = best.start + best.last
    return tuple(calls)


def _cost(call: Call) -> float:
    """Of one column that a call gives."""
    return (call.width + _CALL_OVERHEAD) / (call.last - call.first)


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
) -> tuple[int, int]:
    """The longest run of slots of a ``width``-wide call that agree bit by bit with the base call."""
    base = _base_width(rows, inner, a_order, x_order, dtype)
    a, x = _probe_operands(rows, inner, a_order, x_order, dtype, width)
    product = a @ x
    agrees = np.empty(width, dtype=bool)
    for first in range(0, width, base):
        alone = a @ x[:, first : first + base]
        agrees[first : first + base] = (product[:, first : first + base] == alone).all(axis=0)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], agrees, [False]]).astype(np.int8)))
    runs = [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
    return max(runs, key=lambda run: run[1] - run[0], default=(0, 0))


def _probe_operands(
    rows: int, inner: int, a_order: Order, x_order: Order, dtype: np.dtype[np.floating], width: int
) -> tuple[FloatArray, FloatArray]:
    """Irregular operands of this shape and layout, every row and every column another.

    Not from ``numpy.random``, whose import alone would take megabytes in every process.
    """
    a = _empty(rows, inner, dtype, a_order)
    pattern = np.resize(_irregular(8191).astype(dtype), inner + 8191)  # a prime: the rows differ
    for row in range(rows):
        a[row] = pattern[row * inner % 8191 :][:inner]
    x = _empty(inner, width, dtype, x_order)
    x[...] = _irregular(inner * width).reshape(inner, width)
    return a, x


def _irregular(count: int) -> NDArray[np.float64]:
    """Numbers in [-1, 1] whose every bit is used, none like its neighbours."""
    values: NDArray[np.float64] = np.sin(np.arange(1, count + 1) * 12.9898)
    return values


def _empty(rows: int, columns: int, dtype: np.dtype[np.floating], order: Order) -> FloatArray:
    return np.empty((rows, columns), dtype) if order == "C" else np.empty((columns, rows), dtype).T
