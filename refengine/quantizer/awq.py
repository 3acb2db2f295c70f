"""The tensors of an AWQ checkpoint as rows of an affine encoding, bit by bit.

A matrix [N, K] lies transposed, as three tensors in the layout called GEMM. ``qweight`` [K, N / 8] and
``qzeros`` [G, N / 8]: of eight consecutive columns, the integers and the zero points, in the order
:data:`COLUMNS`, the first in a word's lowest bits. ``scales`` [G, N].

Source: AutoAWQ 0.2, ``WQLinear_GEMM``; the order is that in which its kernel unpacks a word to pairs of
float16.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from refengine.errors import UnsupportedError
from refengine.quantizer.packed_tensors import require_groups, require_matrix
from refengine.quantizer.stored_rows import StoredRows, affine_rows

COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column, of eight, that each field of a word belongs to."""

BITS = 4


def from_awq(
    qweight: NDArray[np.int32], qzeros: NDArray[np.int32], scales: NDArray[np.float16], *, bits: int = BITS
) -> StoredRows:
    """The same integers, zero points and scales, as N rows of K weights.

    A group of K / G weights becomes blocks of 128, 64 or 32, the largest that divides it, each with its d and
    z. Memory used beside the result stays within a few MiB.

    Args:
        qweight: int32 [K, N / 8].
        qzeros: int32 [G, N / 8].
        scales: float16 [G, N].
        bits: of an integer: 4.

    Raises:
        FormatError: a tensor has another dtype or shape than these.
        UnsupportedError: other bits; groups that are not of the same multiple of 32 weights.

    Clauses: ENC-17.
    """
    if bits != BITS:
        raise UnsupportedError(f"AWQ of {bits} bits is not implemented, only of {BITS}")
    require_matrix("qweight", qweight, np.int32)
    require_matrix("scales", scales, np.float16)
    weights, words, groups = *qweight.shape, len(scales)
    require_matrix("scales", scales, np.float16, (groups, words * len(COLUMNS)))
    require_matrix("qzeros", qzeros, np.int32, (groups, words))
    require_groups(weights, groups)

    def integers(some: slice, part: slice) -> NDArray[np.uint8]:
        return _by_column(qweight[part, _words(some)])

    def zeros(some: slice) -> NDArray[np.uint8]:
        return _by_column(qzeros[:, _words(some)])

    return affine_rows(bits, weights, scales, integers, zeros)


def _words(columns: slice) -> slice:
    """The words of whole eights of columns."""
    return slice(columns.start // len(COLUMNS), columns.stop // len(COLUMNS))


def _by_column(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Fields in the order of their columns: [k, words] -> [8 * words, k]."""
    turned = np.ascontiguousarray(words.T).view(np.uint32)
    found = np.empty((len(turned), len(COLUMNS), turned.shape[1]), np.uint8)
    for field, column in enumerate(COLUMNS):
        found[:, column] = turned >> np.uint32(BITS * field) & np.uint32(15)
    return found.reshape(-1, turned.shape[1])
