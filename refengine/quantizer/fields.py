"""Moving the fields of many blocks at once.

A NumPy loop over an array of short rows starts anew at every row, which takes longer than the row itself. So
fields are first moved out of their blocks, a whole row at a time; arithmetic then goes over all rows as one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def whole(field: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A field of every block, [n, bytes], without the gaps between them: a copy."""
    return np.ascontiguousarray(_rows(field)).view(np.uint8)


def fields(run: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The bit fields of runs of bytes, the lowest field first: [..., bytes] -> [..., 8 // bits, bytes].

    ``run`` without gaps.
    """
    mask = np.uint8((1 << bits) - 1)
    found = np.empty((*run.shape[:-1], 8 // bits, run.shape[-1]), np.uint8)
    rows = _rows(found)[..., 0]
    for number, shift in enumerate(range(0, 8, bits)):
        rows[..., number] = _rows((run >> np.uint8(shift)) & mask)[..., 0]
    return found


def nibbles(field: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The low halves of a field's bytes, then their high halves: [n, bytes] -> [n, 2 * bytes]."""
    return fields(whole(field), bits=4).reshape(len(field), -1)


def multiply(weights: NDArray[np.float32], scales: NDArray[np.float32]) -> None:
    """Multiply each group of equally many consecutive weights by its scale."""
    flat = weights.reshape(-1)
    flat *= _each(scales, flat.size)


def subtract(weights: NDArray[np.float32], minima: NDArray[np.float32]) -> None:
    """Subtract from each group of equally many consecutive weights its minimum."""
    flat = weights.reshape(-1)
    flat -= _each(minima, flat.size)


def add(weights: NDArray[np.float32], offsets: NDArray[np.float32]) -> None:
    """Add to each group of equally many consecutive weights its offset."""
    flat = weights.reshape(-1)
    flat += _each(offsets, flat.size)


def _each(values: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    return values.reshape(-1).repeat(size // max(values.size, 1))


def _rows(array: NDArray[np.uint8]) -> NDArray[Any]:
    """Each row of bytes as one item, which is moved in one piece."""
    return array.view(f"V{array.shape[-1]}")
