"""K-quants: 256 weights per block, in groups of 16 or 32 whose small integer scales share one float16 scale.

A decoder takes ``blocks`` [n, block_bytes] and writes ``weights`` [n, 256]. A group is consecutive weights,
but not consecutive bits: integers lie so that a vector unit unpacks a run of 32 bytes at once. Each byte is
cut into fields of equal width, the lowest first; field f of a run's 32 bytes makes 32 consecutive weights,
field f + 1 the 32 after them. The tables write that as "run r, field f -> weights ...".

The arithmetic is float32 with one rounding per operation, in the order of the formula; the bracketed products
are rounded first. That order defines the bits. A NaN may be any NaN. What the formulas are made of is what
the functions ``…_parts`` give. (The bracketed products, of a float16 and eight bits at most, are exact.)

Source: ggml, ``ggml-common.h`` (``block_q2_K`` to ``block_q6_K``), ``ggml-quants.c`` (``dequantize_row_*``,
``get_scale_min_k4``).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from refengine.quantizer.fields import fields, multiply, subtract, whole
from refengine.quantizer.parts import Parts, weigh
from refengine.quantizer.scales import float16


def q2_k(blocks: NDArray[np.uint8], weights: NDArray[np.float32]) -> None:
    """Two bits in 16 groups of 16: weight = (d * s[g]) * q - (dmin * m[g]).

    ======  ================================================================================
    bytes   meaning
    ======  ================================================================================
    0-15    group g in byte g: s in the low half, m in the high half
    16-79   q, 2 bits: run r of 2, field f of 4 -> weights 128 r + 32 f + (0..31)
    80-81   d, float16
    82-83   dmin, float16
    ======  ================================================================================

    Clauses: ENC-7.
    """
    d, dmin = float16(blocks[:, 80:82]), float16(blocks[:, 82:84])
    scales, minima = blocks[:, 0:16] & 15, blocks[:, 0:16] >> 4
    weights.reshape(-1, 2, 4, 32)[...] = fields(whole(blocks[:, 16:80]).reshape(-1, 2, 32), bits=2)
    multiply(weights, d * scales)
    subtract(weights, dmin * minima)


def q3_k(blocks: NDArray[np.uint8], weights: NDArray[np.float32]) -> None:
    """Three bits in 16 groups of 16: weight = (d * (s[g] - 32)) * (low + 4 * high - 4).

    ======== ===============================================================================
    bytes    meaning
    ======== ===============================================================================
    0-31     high, 1 bit: field f of 8 -> weights 32 f + (0..31)
    32-95    low, 2 bits: run r of 2, field f of 4 -> weights 128 r + 32 f + (0..31)
    96-103   low 4 bits of s: byte i holds groups i (low half) and i + 8 (high half)
    104-107  high 2 bits of s: byte i, field f of 4 -> group 4 f + i
    108-109  d, float16
    ======== ===============================================================================

    Clauses: ENC-8.
    """
    d = float16(blocks[:, 108:110])
    scales = fields(whole(blocks[:, 96:104]), bits=4).reshape(-1, 16)
    scales |= fields(whole(blocks[:, 104:108]), bits=2).reshape(-1, 16) << 4
    quants = fields(whole(blocks[:, 32:96]).reshape(-1, 2, 32), bits=2).reshape(-1, 8, 32)
    quants |= fields(whole(blocks[:, 0:32]), bits=1) << 2
    weights.reshape(-1, 8, 32)[...] = quants.view(np.int8) - 4
    multiply(weights, d * (scales.view(np.int8) - 32))


def q4_k(blocks: NDArray[np.uint8], weights: NDArray[np.float32]) -> None:
    """Four bits in 8 groups of 32: weight = (d * s[g]) * q - (dmin * m[g]).

    ======  ================================================================================
    bytes   meaning
    ======  ================================================================================
    0-1     d, float16
    2-3     dmin, float16
    4-15    s and m, 6 bits each: see :func:`_six_bit_pairs`
    16-143  q, 4 bits: run r of 4, field f of 2 -> weights 64 r + 32 f + (0..31)
    ======  ================================================================================

    Clauses: ENC-9.
    """
    weigh(q4_k_parts(blocks), weights)


def q4_k_parts(blocks: NDArray[np.uint8]) -> Parts:
    """Integers q, scales d * s and offsets -(dmin * m)."""
    d, dmin = float16(blocks[:, 0:2]), float16(blocks[:, 2:4])
    scales, minima = _six_bit_pairs(blocks[:, 4:16])
    quants = fields(whole(blocks[:, 16:144]).reshape(-1, 4, 32), bits=4)
    return Parts(quants.view(np.int8).reshape(-1, 256), d * scales, -(dmin * minima))


def q5_k(blocks: NDArray[np.uint8], weights: NDArray[np.float32]) -> None:
    """Five bits in 8 groups of 32: weight = (d * s[g]) * (low + 16 * fifth) - (dmin * m[g]).

    ======  ================================================================================
    bytes   meaning
    ======  ================================================================================
    0-1     d, float16
    2-3     dmin, float16
    4-15    s and m, 6 bits each: see :func:`_six_bit_pairs`
    16-47   fifth, 1 bit: field f of 8 -> weights 32 f + (0..31)
    48-175  low, 4 bits: run r of 4, field f of 2 -> weights 64 r + 32 f + (0..31)
    ======  ================================================================================

    Clauses: ENC-10.
    """
    weigh(q5_k_parts(blocks), weights)


def q5_k_parts(blocks: NDArray[np.uint8]) -> Parts:
    """Integers q, scales d * s and offsets -(dmin * m)."""
    d, dmin = float16(blocks[:, 0:2]), float16(blocks[:, 2:4])
    scales, minima = _six_bit_pairs(blocks[:, 4:16])
    quants = fields(whole(blocks[:, 48:176]).reshape(-1, 4, 32), bits=4).reshape(-1, 8, 32)
    quants |= fields(whole(blocks[:, 16:48]), bits=1) << 4
    return Parts(quants.view(np.int8).reshape(-1, 256), d * scales, -(dmin * minima))


def q6_k(blocks: NDArray[np.uint8], weights: NDArray[np.float32]) -> None:
    """Six bits in 16 groups of 16: weight = (d * s[g]) * (low + 16 * high - 32).

    ======== ===============================================================================
    bytes    meaning
    ======== ===============================================================================
    0-127    low, 4 bits: run r of 2 (64 bytes), field f of 2 -> weights 128 r + 64 f + (0..63)
    128-191  high, 2 bits: run r of 2, field f of 4 -> weights 128 r + 32 f + (0..31)
    192-207  s, int8: group g in byte 192 + g
    208-209  d, float16
    ======== ===============================================================================

    Clauses: ENC-11.
    """
    weigh(q6_k_parts(blocks), weights)


def q6_k_parts(blocks: NDArray[np.uint8]) -> Parts:
    """Integers q - 32, their factors s, and scales d."""
    quants = fields(whole(blocks[:, 0:128]).reshape(-1, 2, 64), bits=4).reshape(-1, 8, 32)
    quants |= fields(whole(blocks[:, 128:192]).reshape(-1, 2, 32), bits=2).reshape(-1, 8, 32) << 4
    integers = quants.view(np.int8).reshape(-1, 256)
    integers -= 32
    return Parts(integers, float16(blocks[:, 208:210]), factors=blocks[:, 192:208].view(np.int8))


def _six_bit_pairs(packed: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Eight 6-bit scales and eight 6-bit minima out of 12 bytes: [n, 12] -> s [n, 8] and m [n, 8].

    ======  ========  ==================
    byte    bits 0-5  bits 6-7
    ======  ========  ==================
    j       s[j]      high 2 of s[j + 4]
    j + 4   m[j]      high 2 of m[j + 4]
    ======  ========  ==================

    for j in 0..3. Byte j + 8 holds the low 4 bits of s[j + 4] in its low half, of m[j + 4] in its high half.
    """
    s, m, low = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([s & 63, (low & 15) | (s >> 6 << 4)], axis=1)
    minima = np.concatenate([m & 63, (low >> 4) | (m >> 6 << 4)], axis=1)
    return scales, minima
