"""ggml's first block encodings: 32 weights, one scale d, and for the ``_1`` forms an offset m.

A decoder takes ``blocks`` [n, block_bytes] and writes ``weights`` [n, 32]. The arithmetic is float32 with one
rounding per operation, in the order of the formula: ``d * q + m`` rounds the product, then the sum (no fused
multiply-add). That order defines the bits. A NaN may be any NaN. What the formulas are made of is what the
functions ``…_parts`` give.

Four-bit fields always lie the same way: the low halves of 16 bytes hold weights 0..15, their high halves
weights 16..31.

Source: ggml, ``ggml-common.h`` (``block_q4_0`` to ``block_q8_0``), ``ggml-quants.c`` (``dequantize_row_*``).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from refengine.quantizer.fields import nibbles, whole
from refengine.quantizer.parts import Parts, weigh
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
    weigh(q4_0_parts(blocks), weights)


def q4_0_parts(blocks: NDArray[np.uint8]) -> Parts:
    """Integers q - 8 and scales d."""
    quants = nibbles(blocks[:, 2:18]).view(np.int8)
    quants -= 8
    return Parts(quants, float16(blocks[:, 0:2]))


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
    weigh(q4_1_parts(blocks), weights)


def q4_1_parts(blocks: NDArray[np.uint8]) -> Parts:
    """Integers q, scales d and offsets m."""
    quants = nibbles(blocks[:, 4:20]).view(np.int8)
    return Parts(quants, float16(blocks[:, 0:2]), float16(blocks[:, 2:4]))


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
    weigh(q5_0_parts(blocks), weights)


def q5_0_parts(blocks: NDArray[np.uint8]) -> Parts:
    """Integers q - 16 and scales d."""
    quants = nibbles(blocks[:, 6:22])
    quants |= _bits(blocks[:, 2:6]) << 4
    integers = quants.view(np.int8)
    integers -= 16
    return Parts(integers, float16(blocks[:, 0:2]))


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
    weigh(q5_1_parts(blocks), weights)


def q5_1_parts(blocks: NDArray[np.uint8]) -> Parts:
    """Integers q, scales d and offsets m."""
    quants = nibbles(blocks[:, 8:24])
    quants |= _bits(blocks[:, 4:8]) << 4
    return Parts(quants.view(np.int8), float16(blocks[:, 0:2]), float16(blocks[:, 2:4]))


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
    weigh(q8_0_parts(blocks), weights)


def q8_0_parts(blocks: NDArray[np.uint8]) -> Parts:
    """Integers q and scales d."""
    return Parts(whole(blocks[:, 2:34]).view(np.int8), float16(blocks[:, 0:2]))


def _bits(field: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The bits of four bytes, the lowest first: [n, 4] -> [n, 32]."""
    return np.unpackbits(whole(field), bitorder="little").reshape(-1, 32)
