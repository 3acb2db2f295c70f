"""Arithmetic in decimal numbers of 28 digits and more: exact beside the results of every policy."""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.ops import FloatArray
from refengine_conformance.bounds import check_bound
from refengine_conformance.subject import Subject

Decimals = NDArray[np.object_]


def exact(array: NDArray[Any]) -> Decimals:
    """The same numbers as decimals."""
    decimals: Decimals = np.frompyfunc(lambda number: Decimal(float(number)), 1, 1)(array)
    return decimals


def limits(subject: Subject) -> tuple[Decimal, Decimal, Decimal]:
    """u, η and Ω of the policy's dtype."""
    info = np.finfo(subject.policy.activations)
    return Decimal(subject.unit_roundoff), Decimal(float(info.tiny)), Decimal(float(info.max))


def check_decimals(
    result: FloatArray | Decimals, expected: Decimals, bound: Decimals, where: NDArray[np.bool_] | None = None
) -> None:
    """Hold every element, or those at ``where``, against its bound."""
    judged = np.broadcast_to(True if where is None else where.astype(bool), result.shape)
    if result.dtype != object:
        assert np.isfinite(result[judged]).all(), "the expected value is finite, and the result is not"
        result = exact(np.where(judged, result, 0))
    error = (result - expected).astype(np.float64)
    error[~judged] = 0
    check_bound(error, np.zeros_like(error), bound.astype(np.float64))


def tanh(x: Decimals) -> Decimals:
    """The hyperbolic tangent, without cancellation near zero."""

    def one(z: Decimal) -> Decimal:
        if abs(z) < Decimal("1e-8"):
            return z - z**3 / 3
        decay = (-2 * abs(z)).exp()
        return ((1 - decay) / (1 + decay)).copy_sign(z)

    elementwise: Any = np.frompyfunc(one, 1, 1)
    tangents: Decimals = elementwise(x)
    return tangents


def cosine_and_sine(angles: Decimals) -> tuple[Decimals, Decimals]:
    """By their power series at 2⁻²⁰ of the angle, which is then doubled twenty times."""

    def one(angle: Decimal) -> tuple[Decimal, Decimal]:
        with localcontext(prec=60):
            small = angle / 2**20
            terms = [Decimal(1)]
            for n in range(1, 32):
                terms.append(terms[-1] * small / n)
            zero = Decimal(0)
            cosine = sum(terms[0::4], zero) - sum(terms[2::4], zero)
            sine = sum(terms[1::4], zero) - sum(terms[3::4], zero)
            for _ in range(20):
                cosine, sine = cosine * cosine - sine * sine, 2 * cosine * sine
            return cosine, sine

    elementwise: Any = np.frompyfunc(one, 1, 2)
    cosines, sines = elementwise(angles)
    return cosines, sines
