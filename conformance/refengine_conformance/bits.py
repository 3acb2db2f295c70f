"""Equality as clauses mean it where they say exact (CNV-1)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def check_bits(result: NDArray[Any], expected: NDArray[Any]) -> None:
    """Equal dtype, shape and bits, but that any NaN stands for any other.

    Raises:
        AssertionError: naming the first element that differs.
    """
    if (result.dtype, result.shape) != (expected.dtype, expected.shape):
        raise AssertionError(
            f"the result is {result.dtype} {result.shape}, and {expected.dtype} {expected.shape} is expected"
        )
    differs = (result != expected) | (np.signbit(result) != np.signbit(expected))
    differs &= ~(np.isnan(result) & np.isnan(expected))
    if differs.any():
        at = tuple(int(i) for i in np.argwhere(differs)[0])
        raise AssertionError(
            f"{float(result[at])!r} at {list(at)}, expected {float(expected[at])!r}; "
            f"{int(differs.sum())} of {differs.size} elements differ"
        )
