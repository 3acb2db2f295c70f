"""Exponential and hyperbolic tangent of sixteen lanes.

Both reduce their argument by multiples of ln 2 (Cody & Waite, *Software Manual for the Elementary Functions*,
1980, ch. 6) and take Taylor's polynomial of degree 7 of what is left, so that its remainder has Lagrange's
bound. Errors are counted in u = 2⁻²⁴, the unit roundoff of float32, by adding up what each rounding can do
(Muller et al., *Handbook of Floating-Point Arithmetic*, 2nd ed., ch. 10); half a unit in the last place is u
at most. Every operation is one of IEEE 754, so all instruction sets give the same bits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refengine_numba.kernels.compilation import part
from refengine_numba.kernels.lanes import floats_of, where_less
from refengine_numba.kernels.vectors import bits_of, fma, splat_f32, splat_i32

LOG2_E = np.float32(1 / math.log(2))
"""Its product with an argument rounds to the multiple of ln 2 that is taken away."""

LN2_HIGH = np.float32(round(math.log(2) * 2**16) / 2**16)
"""Sixteen bits of ln 2: a product with an integer of eight bits is exact."""

LN2_LOW = np.float32(math.log(2) - float(LN2_HIGH))
"""The rest of ln 2."""

ROUNDER = np.float32(1.5 * 2**23)
"""Added to a number below 2²², rounds it to the nearest integer, which is then in the sum's low bits."""

ROUNDER_BITS = int(ROUNDER.view(np.int32))

C3, C4, C5, C6, C7 = (np.float32(1 / math.factorial(n)) for n in range(3, 8))
"""Taylor's coefficients after 1, 1 and 1/2."""

LEAST, MOST = np.float32(-104), np.float32(89)
"""Beyond these, the exponential is below half of the least number, or above the greatest."""

FLAT = np.float32(10)
"""From here on, the tangent rounds to 1: 1 - tanh 10 < 2⁻²⁷."""


@part
def multiple_of_ln2(x: Any) -> Any:
    """``(n, rest)``: the bits of an integer n, and ``x - n · ln 2``; |x| <= 104.

    ``|rest| < 0.3466``, rounded once, by 2⁻²⁶ at most; where n is 0, it is x. Of NaN, n may be any number.
    """
    rounded = fma(x, splat_f32(LOG2_E), splat_f32(ROUNDER))
    n = splat_f32(ROUNDER) - rounded  # with the sign that the products below need
    high = fma(n, splat_f32(LN2_HIGH), x)  # exact
    return bits_of(rounded) - splat_i32(ROUNDER_BITS), fma(n, splat_f32(LN2_LOW), high)


@part
def expm1_near_zero(x: Any) -> Any:
    """``exp(x) - 1`` for |x| < 0.3466, off by 1.8u at most, relative; u of it is the last rounding."""
    p = fma(splat_f32(C7), x, splat_f32(C6))
    p = fma(p, x, splat_f32(C5))
    p = fma(p, x, splat_f32(C4))
    p = fma(p, x, splat_f32(C3))
    p = fma(p, x, splat_f32(np.float32(0.5)))
    return fma(x * x, p, x)


@part
def power_of_two(n: Any) -> Any:
    """``2 ** n`` for integers from -126 to 127."""
    return floats_of((n + splat_i32(127)) << splat_i32(23))


@part
def exp(x: Any) -> Any:
    """The exponential, off by 1.8u at most, relative (0.9 units in the last place of a result just above 1).

    Counted: the rest's rounding 0.25u; Taylor's remainder, 0.3466⁸ / 8! · √2 < 0.13u; the polynomial 0.15u,
    and its rounding 0.25u, of a result of √½ to √2; adding 1, u where the result is above 1 and else 0.5u.
    Where the result is subnormal, 2⁻¹⁵⁰ is added. exp(±0) is 1, exp(-inf) 0, exp(inf) inf, exp(NaN) NaN; a
    result too large is infinity, and no result for a negative argument is above 1.
    """
    x = where_less(x, splat_f32(LEAST), splat_f32(LEAST), x)
    x = where_less(splat_f32(MOST), x, splat_f32(MOST), x)
    n, rest = multiple_of_ln2(x)
    # In two factors: 2 ** n itself may be too small, or too large, for a normal number.
    half = ((n + splat_i32(256)) >> splat_i32(1)) - splat_i32(128)
    near_one = splat_f32(np.float32(1)) + expm1_near_zero(rest)
    return near_one * power_of_two(half) * power_of_two(n - half)


@part
def tanh(x: Any) -> Any:
    """The hyperbolic tangent, off by 4.5u at most, relative; odd, and never beyond ±1.

    With ``e = exp(-2|x|) - 1``, tanh |x| = -e / (2 + e). Counted at the worst place, where e is near -0.3 and
    the reduction has just begun: e is off by 2.43u, and the quotient by 2 / (2 + e) = 1.17 times that; its
    denominator's rounding gives 0.6u, its own u. tanh(±0) is ±0, subnormal numbers are their own tangent,
    tanh(±inf) is ±1, tanh(NaN) NaN.
    """
    sign = bits_of(x) & splat_i32(-0x80000000)
    size = floats_of(bits_of(x) ^ sign)
    size = where_less(splat_f32(FLAT), size, splat_f32(FLAT), size)
    n, rest = multiple_of_ln2(size * splat_f32(np.float32(-2)))
    power = power_of_two(n)
    e = fma(power, expm1_near_zero(rest), power - splat_f32(np.float32(1)))
    positive = e / (splat_f32(np.float32(-2)) - e)
    return floats_of(bits_of(positive) & splat_i32(0x7FFFFFFF) | sign)
