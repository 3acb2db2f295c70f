"""Bounds: how far a result may lie from its expectation, and how far it did."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


class BoundExceeded(AssertionError):  # noqa: N818 an assertion that failed, told apart by what it knows
    """A result lies further from its expectation than its bound allows.

    Attributes:
        worst: the largest error as a fraction of its bound: above 1, infinite where the bound is zero.
    """

    def __init__(self, worst: float, message: str) -> None:
        self.worst = worst
        super().__init__(message)


def check_bound(result: ArrayLike, expected: ArrayLike, bound: ArrayLike) -> None:
    """Hold every element of a result against its bound: ``|result - expected| <= bound``.

    NaN where a number is expected, or the other way round, exceeds every bound; a NaN or an infinity that
    is expected is met by itself only.

    Args:
        result: of any float dtype.
        expected: of ``result``'s shape, in float64.
        bound: absolute, 0 or more; broadcast.

    Raises:
        BoundExceeded: an element lies further away.
        AssertionError: the shapes differ.
    """
    r, e = np.asarray(result, np.float64), np.asarray(expected, np.float64)
    if r.shape != e.shape:
        raise AssertionError(f"the result has the shape {r.shape}, and {e.shape} is expected")
    b = np.broadcast_to(np.asarray(bound, np.float64), r.shape)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        same = (r == e) | (np.isnan(r) & np.isnan(e))
        error = np.where(same, 0.0, np.abs(r - e))
        fraction = np.where(same, 0.0, np.where(np.isfinite(error), error / b, np.inf))
    fraction = np.where(np.isnan(fraction), np.inf, fraction)
    if fraction.size and (worst := float(fraction.max())) > 1:
        at = np.unravel_index(int(fraction.argmax()), fraction.shape)
        place = f" at {[int(i) for i in at]}" if at else ""
        raise BoundExceeded(
            worst,
            f"{float(r[at])!r}{place}, expected {float(e[at])!r} ± {float(b[at]):.3g}: "
            f"{worst:.3g} times the bound; {int((fraction > 1).sum())} of {fraction.size} exceed theirs",
        )
