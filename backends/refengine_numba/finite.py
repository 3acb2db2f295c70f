"""Whether stored weights are all numbers, told from their bytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from refengine.quantizer import encoding
from refengine_numba.layout import LAYOUTS

CHUNK_BYTES = 2**20
"""Stored bytes looked at together, so that little memory is used beside them."""

HALVES = {"half": (0,), "pair": (0, 2), "six_bit": (0, 2), "eight_bit": (208,)}
"""Where in a stored block float16 numbers stand, by the kind of scales; everything else is an integer."""

EXPONENTS = {"f16": ("<u2", 0x7C00), "bf16": ("<u2", 0x7F80), "f32": ("<u4", 0x7F800000)}
"""Weights as unsigned integers, and their exponent's bits: all set in infinity and NaN alone."""


def all_finite(name: str, data: NDArray[np.uint8]) -> bool:
    """Whether no weight of stored rows, uint8 [N, row_bytes], is infinite or NaN.

    Finite scales give finite weights: the greatest product of float16 and integers is far below float32's
    end.
    """
    stored, layout = encoding(name), LAYOUTS[name]
    step = max(1, CHUNK_BYTES // max(1, data.shape[1]))
    for first in range(0, len(data), step):
        rows = data[first : first + step]
        if name in EXPONENTS:
            dtype, exponent = EXPONENTS[name]
            numbers = [np.ascontiguousarray(rows).view(dtype)]
        else:
            dtype, exponent = EXPONENTS["f16"]
            blocks = rows.reshape(len(rows), -1, stored.block_bytes)
            numbers = [
                np.ascontiguousarray(blocks[..., at : at + 2]).view(dtype) for at in HALVES[layout.scales]
            ]
        if any(((bits & exponent) == exponent).any() for bits in numbers):
            return False
    return True
