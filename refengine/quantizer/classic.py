"""ggml's first block encodings: 32 weights, one scale d, and for the ``_1`` forms an offset m.

A decoder takes ``blocks`` [n, block_bytes] and writes ``weights`` [n, 32]. The arithmetic is float32 with one
rounding per operation, in the order of the formula: ``d * q + m`` rounds the product, then the sum (no fused
multiply-add). That order defines the bits. A NaN may be any NaN.

Four-bit fields always lie the same way: the low halves of 16 bytes hold weights 0..15, their high halves
weights 16..31.

Source: ggml, ``ggml-common.h`` (``block_q4_0`` to ``block_q8_0``), ``ggml-quants.c`` (``dequantize_row_*``).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from refengine.quantizer.scales import float16


def q4_0(blocks: NDArray[np.uint8], weights: NDArray[np.float32]) -> None:
    """Four bits around eight: weight = d * (q - 8).

    ======  ==================================================
    bytes   meaning
    ======  ==================================================
    0-1     d, float16
    2-17    q, 4 bits: low halves 0..15, high halves 16..31
    ======  ==================================================

    Clauses: ENC-3.
    """
    d, nibbles = float16(blocks[:, 0:2]), blocks[:, 2:18]
    weights[:, :16] = (nibbles & 15).view(np.int8) - 8
    weights[:, 16:] = (nibbles >> 4).view(np.int8) - 8
    weights *= d


def q4_1(blocks: NDArray[np.uint8], weights: NDArray[np.float32]) -> None:
    """Four bits above an offset: weight = d * q + m.

    ======  ==================================================
    bytes   meaning
    ======  ==================================================
    0-1     d, float16
    2-3     m, float16
    4-19    q, 4 bits: low halves 0..15, high halves 16..31
    ======  ==================================================

    Clauses: ENC-4.
    """
    d, m, nibbles = float16(blocks[:, 0:2]), float16(blocks[:, 2:4]), blocks[:, 4:20]
    weights[:, :16] = nibbles & 15
    weights[:, 16:] = nibbles >> 4
    weights *= d
    weights += m


def q5_0(blocks: NDArray[np.uint8], weights: NDArray[np.float32]) -> None:
    """Five bits around sixteen: weight = d * (q - 16), q = low + 16 * fifth.

    ======  ==================================================
    bytes   meaning
    ======  ==================================================
    0-1     d, float16
    2-5     fifth, 1 bit: bit j of a little-endian uint32
    6-21    low, 4 bits: low halves 0..15, high halves 16..31
    ======  ==================================================

    Clauses: ENC-5.
    """
    d, nibbles = float16(blocks[:, 0:2]), blocks[:, 6:22]
    fifth = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little") << 4
    weights[:, :16] = ((nibbles & 15) | fifth[:, :16]).view(np.int8) - 16
    weights[:, 16:] = ((nibbles >> 4) | fifth[:, 16:]).view(np.int8) - 16
    weights *= d


def q5_1(blocks: NDArray[np.uint8], weights: NDArray[np.float32]) -> None:
    """Five bits above an offset: weight = d * q + m, q = low + 16 * fifth.

    ======  ==================================================
    bytes   meaning
    ======  ==================================================
    0-1     d, float16
    2-3     m, float16
    4-7     fifth, 1 bit: bit j of a little-endian uint32
    8-23    low, 4 bits: low halves 0..15, high halves 16..31
    ======  ==================================================

    Clauses: ENC-5.
    """
    d, m, nibbles = float16(blocks[:, 0:2]), float16(blocks[:, 2:4]), blocks[:, 8:24]
    fifth = np.unpackbits(blocks[:, 4:8], axis=1, bitorder="little") << 4
    weights[:, :16] = (nibbles & 15) | fifth[:, :16]
    weights[:, 16:] = (nibbles >> 4) | fifth[:, 16:]
    weights *= d
    weights += m


def q8_0(blocks: NDArray[np.uint8], weights: NDArray[np.float32]) -> None:
    """Eight bits: weight = d * q.

    ======  ==================================================
    bytes   meaning
    ======  ==================================================
    0-1     d, float16
    2-33    q, int8
    ======  ==================================================

    Clauses: ENC-6.
    """
    weights[...] = blocks[:, 2:34].view(np.int8)
    weights *= float16(blocks[:, 0:2])
