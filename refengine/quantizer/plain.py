"""Encodings without blocks: every weight is one little-endian floating-point number.

A decoder takes ``blocks`` [n, block_bytes] and writes ``weights`` [n, 1]: here a block is a single weight.

Sources: IEEE 754-2019 for binary32 and binary16; bfloat16 is the upper half of a binary32.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray


def f32(blocks: NDArray[np.uint8], weights: NDArray[np.float32]) -> None:
    """binary32: the bits are the weight's, NaN payloads included.

    Clauses: ENC-2.
    """
    weights[...] = blocks.view("<f4")


def f16(blocks: NDArray[np.uint8], weights: NDArray[np.float32]) -> None:
    """binary16: 1 sign, 5 exponent and 10 fraction bits. Exact; a NaN becomes any NaN.

    Clauses: ENC-2.
    """
    np.take(_binary16(), blocks.view("<u2"), out=weights, mode="clip")


@cache
def _binary16() -> NDArray[np.float32]:
    """Every binary16 number, by its bits: a table is faster than NumPy's conversion."""
    table = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    table.flags.writeable = False
    return table


def bf16(blocks: NDArray[np.uint8], weights: NDArray[np.float32]) -> None:
    """bfloat16: 1 sign, 8 exponent and 7 fraction bits, the upper 16 of a binary32 whose lower 16 are zero.

    Exact, NaN payloads included.

    Clauses: ENC-2.
    """
    np.left_shift(blocks.view("<u2"), 16, out=weights.view(np.uint32), dtype=np.uint32)
