"""Rows of an affine encoding, made of integers, zero points and scales that a checkpoint keeps apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from refengine.quantizer.affine import HALVES_BYTES, HEADER_BYTES
from refengine.quantizer.encodings import encoding

ROWS, WEIGHTS = 64, 4096
"""What is laid out at a time: rows, whole words of either format, and weights of each, whole blocks."""

BLOCK_SIZES = (128, 64, 32)
"""Of the affine encodings, the largest first."""

Integers = Callable[[slice, slice], NDArray[np.uint8]]
"""Gives the integers q of some rows [n] and weights [k]: uint8 [n, k]."""

Zeros = Callable[[slice], NDArray[np.uint8]]
"""Gives the zero points z of some rows [n]: uint8 [n, G]."""


@dataclass(frozen=True, eq=False)
class StoredRows:
    """N rows of weights in an encoding of refengine's.

    Attributes:
        encoding: a name in :data:`refengine.quantizer.ENCODINGS`.
        data: uint8 [N, row_bytes].
    """

    encoding: str
    data: NDArray[np.uint8]


def affine_rows(
    bits: int, weights: int, scales: NDArray[np.float16], integers: Integers, zeros: Zeros
) -> StoredRows:
    """Lay rows out as blocks of the largest size that divides their groups, each with its group's d and z.

    Memory used beside the result stays within a few MiB.

    Args:
        bits: of an integer, 4 or 8.
        weights: K, those of a row: G groups of the same multiple of 32.
        scales: [G, N].
        integers, zeros: give those of some rows.
    """
    groups, rows = scales.shape
    size = next(size for size in BLOCK_SIZES if weights // groups % size == 0)
    stored = encoding(f"int{bits}_g{size}")
    data = np.empty((rows, stored.row_bytes(weights)), np.uint8)
    for first in range(0, rows, ROWS):
        some = slice(first, min(first + ROWS, rows))
        count = some.stop - some.start
        blocks = data[some].reshape(count, -1, stored.block_bytes)
        by_group = blocks.reshape(count, groups, -1, stored.block_bytes)
        halves = np.ascontiguousarray(scales[:, some].T, "<f2")
        by_group[..., 0:2] = halves.view(np.uint8).reshape(count, groups, 1, 2)
        by_group[..., 2] = zeros(some)[..., None]
        for start in range(0, weights, WEIGHTS):
            stop = min(start + WEIGHTS, weights)
            quants = integers(some, slice(start, stop))
            packed = _in_halves(quants) if bits == 4 else quants
            blocks[:, start // size : stop // size, HEADER_BYTES:] = packed.reshape(
                count, -1, stored.block_bytes - HEADER_BYTES
            )
    return StoredRows(stored.name, data)


def _in_halves(quants: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Of each 32 integers below 16, the second 16 above the first: [n, k] -> [n, k / 2]."""
    pairs = quants.reshape(len(quants), -1, 2, HALVES_BYTES)
    packed = pairs[:, :, 1] << np.uint8(4)
    packed |= pairs[:, :, 0]
    return packed.reshape(len(quants), -1)
