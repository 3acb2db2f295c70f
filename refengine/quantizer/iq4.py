"""IQ4: four bits that index sixteen fixed, unevenly spaced levels.

A decoder takes ``blocks`` [n, block_bytes] and writes ``weights`` [n, block_size]. The arithmetic is float32
with one rounding per operation, in the order of the formula; the bracketed product is rounded first.
That order defines the bits. A NaN may be any NaN.

Source: ggml, ``ggml-common.h`` (``block_iq4_nl``, ``block_iq4_xs``, ``kvalues_iq4nl``), ``ggml-quants.c``
(``dequantize_row_iq4_*``).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from refengine.quantizer.fields import fields, multiply, nibbles, whole
from refengine.quantizer.scales import float16

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the four-bit integers 0..15 stand for, in units of the scale."""


def iq4_nl(blocks: NDArray[np.uint8], weights: NDArray[np.float32]) -> None:
    """32 weights: weight = d * LEVELS[q].

    ======  ==================================================
    bytes   meaning
    ======  ==================================================
    0-1     d, float16
    2-17    q, 4 bits: low halves 0..15, high halves 16..31
    ======  ==================================================

    Clauses: ENC-12.
    """
    np.take(np.array(LEVELS, np.float32), nibbles(blocks[:, 2:18]), out=weights, mode="clip")
    multiply(weights, float16(blocks[:, 0:2]))


def iq4_xs(blocks: NDArray[np.uint8], weights: NDArray[np.float32]) -> None:
    """256 weights in 8 groups of 32: weight = (d * (s[g] - 32)) * LEVELS[q].

    ======  ==========================================================================
    bytes   meaning
    ======  ==========================================================================
    0-1     d, float16
    2-3     high 2 bits of s: bits 2 g and 2 g + 1 of a little-endian uint16
    4-7     low 4 bits of s: byte i holds groups 2 i (low half) and 2 i + 1 (high half)
    8-135   q, 4 bits: bytes 8 + 16 g + (0..15) hold group g, low halves weights 0..15
            of the group, high halves 16..31
    ======  ==========================================================================

    Clauses: ENC-12.
    """
    quants = fields(whole(blocks[:, 8:136]).reshape(-1, 8, 16), bits=4).reshape(-1, 256)
    np.take(np.array(LEVELS, np.float32), quants, out=weights, mode="clip")

    group = np.arange(8, dtype=np.uint8)
    low = (blocks[:, 4:8].repeat(2, axis=1) >> (group % 2 * 4)) & 15
    high = (blocks[:, 2:4].repeat(4, axis=1) >> (group % 4 * 2)) & 3
    scales = (low | (high << 4)).view(np.int8) - 32
    multiply(weights, float16(blocks[:, 0:2]) * scales)
