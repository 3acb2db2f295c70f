"""Products of the mixed policies once more: in rational arithmetic, weight by weight, as chapter 12 says.

Nothing here is shared with the engine. Integers, scales and offsets are read off the formulas of chapter
*Encodings*, through blocks that are edited so that all else is one, or zero.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from refengine_conformance.properties.p03_encodings import AFFINE, LAYOUTS, six_bits

GROUP = 32
CODED = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k", *AFFINE)
"""The encodings of which MIX-5 tells."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Group:
    """32 weights of a row: ``d · w + m``; ``m`` is ``None`` where the encoding has no offsets."""

    w: tuple[int, ...]
    d: float
    m: float | None


@dataclass(frozen=True)
class Codes:
    """32 activations: codes and their scale; and the scale times their sum, rounded."""

    c: tuple[int, ...]
    s: float
    scaled_sum: float


def nearest(exact: Fraction) -> float:
    """The float32 nearest to a rational number, ties to even; infinite beyond the largest."""
    if exact == 0:
        return 0.0
    exponent = abs(exact.numerator).bit_length() - exact.denominator.bit_length()
    exponent -= abs(exact) < Fraction(2) ** exponent
    bits = max(exponent, -126) - 23  # of the last place
    units = round(exact / Fraction(2) ** bits)  # ties to even
    return math.ldexp(units, bits) if units.bit_length() + bits <= 128 else math.copysign(math.inf, exact)


def rounded(*factors: float, plus: float = 0.0) -> float:
    """Their product, plus a number, rounded once to float32; float64 knows what is not finite."""
    if all(map(math.isfinite, (*factors, plus))):
        exact = math.prod(map(Fraction, factors), start=Fraction(1)) + Fraction(plus)
        return nearest(exact)
    return math.prod(factors) + plus


@lru_cache(maxsize=4096)
def groups_of(encoding: str, row: bytes) -> tuple[Group, ...]:
    """MIX-5: the groups of a stored row."""
    layout = LAYOUTS[encoding]
    found: list[Group] = []
    for start in range(0, len(row), layout.bytes):
        block = row[start : start + layout.bytes]
        found += [_group(encoding, block, first) for first in range(0, layout.weights, GROUP)]
    return tuple(found)


def _group(encoding: str, block: bytes, first: int) -> Group:
    layout, one, zero = LAYOUTS[encoding], struct.pack("<e", 1), struct.pack("<e", 0)
    unit, d, m = bytearray(block), struct.unpack_from("<e", block, layout.scales[0])[0], None
    unit[layout.scales[0] : layout.scales[0] + 2] = one
    if len(layout.scales) == 2:
        unit[2:4] = zero
        m = struct.unpack_from("<e", block, 2)[0]
    if encoding in ("q4_k", "q5_k"):
        s, minimum = six_bits(block, first // GROUP)
        unit[4:16] = bytes([1] * 4 + [0] * 4 + [1] * 4)  # every s is one, every m zero
        d, m = d * s, -(struct.unpack_from("<e", block, 2)[0] * minimum)
    integers = (layout.formula(bytes(unit), i)[0] for i in range(first, first + GROUP))
    return Group(tuple(map(int, integers)), d, m)


def codes_of(x: Floats) -> Codes:
    """MIX-2 to MIX-4: of 32 activations."""
    numbers = x.tolist()
    if not all(map(math.isfinite, numbers)):
        s = math.nan if any(map(math.isnan, numbers)) else math.inf
        return Codes((1,) * GROUP, s, s)
    s = nearest(Fraction(max(map(abs, numbers))) / 127)
    if s == 0:
        return Codes((0,) * GROUP, s, 0.0)
    quotients = (nearest(Fraction(number) / Fraction(s)) for number in numbers)
    c = tuple(max(-127, min(127, round(Fraction(q)))) for q in quotients)
    return Codes(c, s, rounded(s, sum(c)))


def a8_product(encoding: str, stored: NDArray[np.uint8], x: Floats, bias: Floats | None = None) -> Floats:
    """MIX-6: ``[T, N]``, of stored rows uint8 ``[N, row_bytes]`` and activations ``[T, K]``."""
    rows = [groups_of(encoding, row.tobytes()) for row in stored]
    y = np.empty((len(x), len(rows)), np.float32)
    for t, activations in enumerate(x.reshape(len(x), -1, GROUP)):
        coded = [codes_of(group) for group in activations]
        for n, groups in enumerate(rows):
            total = 0.0
            for group, codes in zip(groups, coded, strict=True):
                integer = sum(w * c for w, c in zip(group.w, codes.c, strict=True))
                total = rounded(rounded(group.d, codes.s), integer, plus=total)
                if group.m is not None:
                    total = rounded(group.m, codes.scaled_sum, plus=total)
            y[t, n] = total if bias is None else rounded(total, plus=float(bias[n]))
    return y


def a8_bound(
    encoding: str, stored: NDArray[np.uint8], x: Floats, bias: Floats
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """MIX-8: exact products with the weights, and how far results may lie from them."""
    u, count = 2.0**-24, x.shape[1] // GROUP
    y, bound = np.empty((2, len(x), len(stored)))
    for n, row in enumerate(stored):
        groups = groups_of(encoding, row.tobytes())
        weights = np.array([g.d * np.array(g.w) + (g.m or 0.0) for g in groups])  # exact but for one rounding
        for t, activations in enumerate(x.reshape(len(x), count, GROUP).astype(np.float64)):
            coded = [codes_of(a.astype(np.float32)) for a in activations]
            y[t, n] = math.fsum((weights * activations).ravel()) + float(bias[n])
            steps = np.array([[c.s / 2] for c in coded]) + 2 * u * np.abs(activations)
            size = abs(float(bias[n])) + sum(
                abs(rounded(g.d, c.s)) * sum(abs(w * k) for w, k in zip(g.w, c.c, strict=True))
                + abs((g.m or 0.0) * c.s * sum(c.c))
                for g, c in zip(groups, coded, strict=True)
            )
            n_u = (2 * count + 3) * u
            bound[t, n] = (np.abs(weights) * steps).sum() + n_u / (1 - n_u) * size
    return y, bound


def a16_product(
    weights: Floats, x: Floats, bias: Floats | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """MIX-9 and MIX-10: exact products ``[T, N]`` of rounded numbers, and how far results may lie off."""
    with np.errstate(over="ignore", invalid="ignore"):
        w = weights.astype(np.float16).astype(np.float64)
        y, bound = np.empty((2, len(x), len(w)))
        added = np.zeros(len(w)) if bias is None else bias.astype(np.float64)
        for t, row in enumerate(x.astype(np.float64)):
            power = 1.0
            while math.isfinite(np.abs(row).max()) and np.abs(row).max() / power > 2**15:
                power *= 2
            half = (row / power).astype(np.float16).astype(np.float64) * power
            products = w * half
            y[t] = [math.fsum(p) if np.isfinite(p).all() else np.sum(p) for p in products] + added
            bound[t] = (x.shape[1] + 1) * 2.0**-24 * (np.abs(products).sum(axis=1) + np.abs(added))
    return y, bound
