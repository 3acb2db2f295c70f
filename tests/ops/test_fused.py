"""The fused multiply-add against rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.ops.fused import fma, fma_workspace
from refengine.ops.scratch import Scratch

ANY = st.floats(width=32, allow_nan=False, allow_infinity=False)
FEW_BITS = st.builds(lambda n, e: float(np.float32(n * 2.0**e)), st.integers(-9, 9), st.integers(-40, 40))


def nearest(exact: Fraction) -> float:
    """The float32 nearest to a rational number, ties to even; infinite where that is out of range."""
    if exact == 0:
        return 0.0
    exponent = -126
    while Fraction(2) ** (exponent + 1) <= abs(exact):
        exponent += 1
    unit = Fraction(2) ** (exponent - 23)
    rounded = round(exact / unit) * unit  # Fraction rounds ties to even
    return float(rounded) if abs(rounded) < Fraction(2) ** 128 else math.inf * (1 if exact > 0 else -1)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    sums = c.copy()
    scratch = Scratch(np.empty(fma_workspace(sums.size), np.uint8))
    with np.errstate(all="ignore"):
        fma(a, b, sums, scratch)
    return sums


@given(st.lists(st.tuples(*[ANY | FEW_BITS] * 3), min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_it_rounds_once(triples: list[tuple[float, float, float]]) -> None:
    """Any finite numbers: of all sizes, with cancellation, and with ties."""
    a, b, c = np.array(triples, np.float32).T
    for found, *exact in zip(fused(a, b, c).tolist(), a.tolist(), b.tolist(), c.tolist(), strict=True):
        x, y, z = map(Fraction, exact)
        assert found == nearest(x * y + z)


@given(st.integers(0, 2**32 - 1), st.integers(-120, 60))
@settings(max_examples=60, deadline=None)
def test_it_rounds_once_beside_the_middle_of_two_numbers(seed: int, exponent: int) -> None:
    """Sums in the middle of two float32, or so close beside it that float64 does not tell them apart."""
    rng = np.random.default_rng(seed)
    c = (rng.integers(2**23, 2**24, 50) * 2.0**exponent * rng.choice([-1, 1], 50)).astype(np.float32)
    beside = rng.choice([0, 2.0**-23], 50)
    a = (2.0 ** (exponent // 2) * (1 + beside)).astype(np.float32)
    b = (2.0 ** (exponent - 1 - exponent // 2) * (1 - beside)).astype(np.float32)
    for found, *exact in zip(fused(a, b, c).tolist(), a.tolist(), b.tolist(), c.tolist(), strict=True):
        x, y, z = map(Fraction, exact)
        assert found == nearest(x * y + z)


def test_two_roundings_would_show_there() -> None:
    """The case above is no illusion: by way of float64 the sum is one unit off."""
    a, b, c = (np.array([x], np.float32) for x in (2.0**-12 * (1 + 2.0**-23), 2.0**-12 * (1 - 2.0**-23), 1))
    c += np.float32(2.0**-23)
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert twice[0] == 1 + 2.0**-22
    assert fused(a, b, c)[0] == 1 + 2.0**-23


def test_what_is_not_finite_stays_so() -> None:
    """As IEEE 754 has it: infinity times zero is NaN, and so is the sum of opposite infinities."""
    inf, nan = np.inf, np.nan
    a = np.array([inf, inf, inf, nan, 3e38], np.float32)
    b = np.array([2, 0, 1, 1, 10], np.float32)
    c = np.array([1, 1, -inf, 1, 1], np.float32)
    assert np.array_equal(fused(a, b, c), np.array([inf, nan, nan, nan, inf], np.float32), equal_nan=True)
