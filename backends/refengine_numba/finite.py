"""Whether stored weights are all numbers, in float32 or in float16, told from their bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from refengine.quantizer import decode, encoding
from refengine_numba.layout import LAYOUTS, Layout

CHUNK_BYTES = 2**20
"""Stored bytes looked at together, so that little memory is used beside them."""

HALVES = {"half": (0,), "pair": (0, 2), "zero_point": (0,), "six_bit": (0, 2), "eight_bit": (208,)}
"""Where in a stored block float16 numbers stand, by the kind of scales; everything else is an integer."""

EXPONENTS = {"f16": ("<u2", 0x7C00), "bf16": ("<u2", 0x7F80), "f32": ("<u4", 0x7F800000)}
"""Weights as unsigned integers, and their exponent's bits: all set in infinity and NaN alone."""

TOO_LARGE = np.float32(65520)
"""From here on numbers round to infinity."""

Bytes = NDArray[np.uint8]


def all_finite(name: str, data: Bytes) -> bool:
    """Whether no weight of stored rows, uint8 [N, row_bytes], is infinite or NaN.

    Finite scales give finite weights: the greatest product of float16 and integers is far below float32's
    end.
    """
    exponent = EXPONENTS[name if name in EXPONENTS else "f16"][1]
    return not any(
        ((bits & exponent) == exponent).any() for rows in _chunks(data) for bits in _numbers(name, rows)
    )


def fit_float16(name: str, data: Bytes) -> bool:
    """Whether all weights of stored rows, uint8 [N, row_bytes], finite ones, are finite in float16.

    Rows are decoded only where their greatest scales, times the greatest integers, could overflow.
    """
    if name == "f16":
        return True
    for rows in _chunks(data):
        if name in EXPONENTS:
            (bits,) = _numbers(name, rows)
            wide = bits.astype(np.uint32) << np.uint32(32 - 8 * bits.itemsize)
            if ((wide & 0x7FFFFFFF) >= TOO_LARGE.view(np.uint32)).any():
                return False
        elif _most(name, rows) >= TOO_LARGE and (np.abs(decode(name, rows)) >= TOO_LARGE).any():
            return False
    return True


def _most(name: str, rows: Bytes) -> float:
    """What no weight of stored rows is above, in absolute value."""
    halves = [bits & np.uint16(0x7FFF) for bits in _numbers(name, rows)]
    largest = [float(bits.max(initial=0).astype(np.uint16).view(np.float16)) for bits in halves]
    return sum(factor * half for factor, half in zip(_factors(LAYOUTS[name]), largest, strict=True))


def _factors(layout: Layout) -> tuple[int, ...]:
    """The greatest integers that the float16 numbers of :data:`HALVES` are multiplied by."""
    integer = max(layout.zero, 2**layout.bits - 1 - layout.zero)
    return {
        "half": (integer,),
        "pair": (integer, 1),
        "zero_point": (255,),  # of an integer and a zero point of eight bits
        "six_bit": (63 * integer, 63),
        "eight_bit": (128 * integer,),
    }[layout.scales]


def _chunks(data: Bytes) -> Iterator[Bytes]:
    step = max(1, CHUNK_BYTES // max(1, data.shape[1]))
    for first in range(0, len(data), step):
        yield data[first : first + step]


def _numbers(name: str, rows: Bytes) -> Iterator[NDArray[np.unsignedinteger]]:
    """The bits of all floating-point numbers of stored rows, those at the same place of blocks together."""
    if name in EXPONENTS:
        yield np.ascontiguousarray(rows).view(EXPONENTS[name][0])
        return
    blocks = rows.reshape(len(rows), -1, encoding(name).block_bytes)
    for at in HALVES[LAYOUTS[name].scales]:
        yield np.ascontiguousarray(blocks[..., at : at + 2]).view("<u2")
