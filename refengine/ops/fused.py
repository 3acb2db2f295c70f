"""The fused multiply-add of float32, for NumPy, which has none."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from refengine.ops.scratch import Scratch, aligned

_LOW = 2**29 - 1
"""The bits of a float64's significand that float32 has not."""

_TIE = 2**28
"""Them, where the float64 lies in the middle between two float32."""

_NORMAL = 2.0**-126
"""The least normal float32: below it numbers are further apart, and middles lie elsewhere."""


def fma(a: NDArray[np.float32], b: NDArray[np.float32], sums: NDArray[np.float32], scratch: Scratch) -> None:
    """``sums = a · b + sums``, rounded once: ``a`` and ``b`` float32, broadcast to the shape of ``sums``.

    The product of two float32 is exact in float64. Its float64 sum with a third, rounded to float32, is what
    one rounding gives, unless the first rounding moved it onto the middle between two float32. There, and
    below the normal numbers, the first rounding is made anew: to the neighbour whose last bit is one, from
    which the second rounds as if there had been no first (round to odd: Boldo & Melquiond, 2008, IEEE Trans.
    Comput. 57(4)).
    """
    with scratch.frame():
        products, totals = (scratch.empty(sums.shape, np.float64) for _ in range(2))
        doubtful, small = (scratch.empty(sums.shape, np.bool_) for _ in range(2))
        np.multiply(a, b, out=products, dtype=np.float64)
        np.add(products, sums, out=totals)
        bits = scratch.empty(sums.shape, np.int64)
        np.bitwise_and(totals.view(np.int64), _LOW, out=bits)
        np.equal(bits, _TIE, out=doubtful)
        np.less(np.abs(totals, out=bits.view(np.float64)), _NORMAL, out=small)
        doubtful |= small
        if doubtful.any():
            totals[doubtful] = _odd(products[doubtful], sums[doubtful].astype(np.float64))
        sums[...] = totals


def fma_workspace(elements: int) -> int:
    """Bytes of working memory that ``fma`` takes for so many sums."""
    return 3 * aligned(8 * elements) + 2 * aligned(elements)


def _odd(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """``a + b`` rounded to the neighbour with an odd last bit, where it is no float64; both finite."""
    total = a + b
    part = total - a
    rest = (a - (total - part)) + (b - part)  # what rounding lost (Knuth's two-sum)
    bits = total.view(np.int64)
    even = (bits & 1 == 0) & (rest != 0)
    return np.where(even, bits + np.where((rest > 0) == (total > 0), 1, -1), bits).view(np.float64)
