"""Integers around a zero of their own: groups of 32, 64 or 128 weights, one scale d and one zero point z.

They hold what GPTQ's and AWQ's checkpoints store, group by group: see ``gptq`` and ``awq``. A block is one
group. A decoder takes ``blocks`` [n, block_bytes] and writes ``weights`` [n, g], for the g of the blocks.
The difference q - z is one of integers, from -255 to 255, and its product with d has 19 bits at most: every
weight is exact in float32. What the formulas are made of is what the functions ``…_parts`` give.

Source: Frantar et al., *GPTQ*, ICLR 2023, arXiv:2210.17323, and Lin et al., *AWQ*, MLSys 2024,
arXiv:2306.00978, for the formula; the order of the bytes is refengine's own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from refengine.quantizer.fields import fields, whole
from refengine.quantizer.parts import Parts, weigh
from refengine.quantizer.scales import float16

HEADER_BYTES = 3
"""Of a block, before its integers: d and z."""

HALVES_BYTES = 16
"""Of 32 four-bit integers."""


def int4(blocks: NDArray[np.uint8], weights: NDArray[np.float32]) -> None:
    """Four bits: weight = d * (q - z).

    ==========  ===================================================================
    bytes       meaning
    ==========  ===================================================================
    0-1         d, float16
    2           z, uint8
    3-(2+g/2)   q, 4 bits: 16 bytes for each 32 weights, one after the other; of
                these, low halves 0..15, high halves 16..31
    ==========  ===================================================================

    Clauses: ENC-15.
    """
    weigh(int4_parts(blocks), weights)


def int4_parts(blocks: NDArray[np.uint8]) -> Parts:
    """Integers q - z and scales d."""
    halves = blocks.shape[1] // HALVES_BYTES
    quants = fields(whole(blocks[:, HEADER_BYTES:]).reshape(-1, halves, HALVES_BYTES), bits=4)
    return _parts(blocks, quants.reshape(-1, halves * 2 * HALVES_BYTES))


def int8(blocks: NDArray[np.uint8], weights: NDArray[np.float32]) -> None:
    """Eight bits: weight = d * (q - z).

    ======  ==================================================
    bytes   meaning
    ======  ==================================================
    0-1     d, float16
    2       z, uint8
    3-(2+g) q, uint8
    ======  ==================================================

    Clauses: ENC-15.
    """
    weigh(int8_parts(blocks), weights)


def int8_parts(blocks: NDArray[np.uint8]) -> Parts:
    """Integers q - z and scales d."""
    return _parts(blocks, blocks[:, HEADER_BYTES:])


def _parts(blocks: NDArray[np.uint8], quants: NDArray[np.uint8]) -> Parts:
    integers = quants.astype(np.int16)
    integers -= blocks[:, 2:3]
    return Parts(integers, float16(blocks[:, 0:2]))
