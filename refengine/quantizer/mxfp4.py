"""MXFP4: 32 four-bit floating-point numbers under one power of two.

Source: OCP Microscaling Formats (MX) v1.0, MXFP4 with its element format E2M1 and its scale format E8M0; the
order of the bytes, which OCP leaves open, is ggml's (``block_mxfp4`` in ``ggml-common.h``).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from refengine.quantizer.fields import multiply, nibbles

LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the value of each E2M1 code (1 sign, 2 exponent and 1 fraction bit), so that all are integers."""


def mxfp4(blocks: NDArray[np.uint8], weights: NDArray[np.float32]) -> None:
    """Write ``weights`` [n, 32] of ``blocks`` [n, 17]: weight = 2 ** (e - 128) * LEVELS[q].

    ======  ==================================================
    byte    meaning
    ======  ==================================================
    0       e, uint8: the E8M0 exponent
    1-16    q, 4 bits: low halves 0..15, high halves 16..31
    ======  ==================================================

    That is OCP's 2 ** (e - 127) * E2M1[q]. The product is exact in float32, or infinite from 2 ** 128 on. Two
    codes follow ggml rather than OCP: q = 8 is +0 (OCP: -0), and e = 255 continues the formula (OCP: every
    weight of the block is NaN).

    Clauses: ENC-13.
    """
    np.take(np.array(LEVELS, np.float32), nibbles(blocks[:, 1:17]), out=weights, mode="clip")
    multiply(weights, np.ldexp(np.float32(1), blocks[:, 0:1].astype(np.int32) - 128))
