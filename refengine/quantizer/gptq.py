"""The tensors of a GPTQ checkpoint as rows of an affine encoding, bit by bit.

A matrix [N, K] lies transposed, as four tensors. ``qweight`` [K · bits / 32, N]: a column's integers,
consecutive ones in one word, the first in its lowest bits. ``scales`` [G, N], and ``qzeros`` [G, N · bits /
32]: of each group and column; zero points are packed along the columns. ``g_idx`` [K]: the group of each
weight.

Formats differ in what ``qzeros`` holds. The first (``checkpoint_format: gptq``) has z - 1, the second
(``gptq_v2``) z. A quantizer makes z from 0 to 2^bits - 1, so z - 1 may be -1, which a field holds as
2^bits - 1: the one that is added again must wrap, and a kernel that adds it in wider integers finds 16 where
0 is meant. (Where z is 0, some writers have subtracted one from a whole word, and the next field has lost one
more: no file tells, and here it is read as it stands.) What a checkpoint says of its format is not always so
(vllm#38966).

Source: AutoGPTQ 0.7, ``QuantLinear.pack``; GPTQModel 7.7, ``_shift_gptq_qzeros``.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from refengine.errors import FormatError, UnsupportedError
from refengine.quantizer.packed_tensors import WORD_BITS, require_groups, require_matrix, word_fields
from refengine.quantizer.stored_rows import StoredRows, affine_rows

BITS = (4, 8)

ZERO_POINTS = ("stored_minus_one", "stored")


def from_gptq(
    qweight: NDArray[np.int32],
    qzeros: NDArray[np.int32],
    scales: NDArray[np.float16],
    g_idx: NDArray[np.int32] | None,
    *,
    bits: int,
    zero_points: Literal["stored_minus_one", "stored"],
) -> StoredRows:
    """The same integers, zero points and scales, as N rows of K weights.

    A group of K / G weights becomes blocks of 128, 64 or 32, the largest that divides it, each with its d and
    z. Memory used beside the result stays within a few MiB.

    Args:
        qweight: int32 [K · bits / 32, N].
        qzeros: int32 [G, N · bits / 32].
        scales: float16 [G, N].
        g_idx: int32 [K]; ``None`` where the groups are equal runs of consecutive weights.
        bits: of an integer, 4 or 8.
        zero_points: what ``qzeros`` holds: z - 1, modulo 2^bits, or z itself.

    Raises:
        FormatError: a tensor has another dtype or shape than these, or names a group that there is not.
        UnsupportedError: other bits; groups that are not of the same multiple of 32 weights; groups of
            weights that are not consecutive (act-order).

    Clauses: ENC-16.
    """
    if bits not in BITS:
        raise UnsupportedError(f"GPTQ of {bits} bits is not implemented, only of 4 and 8")
    if zero_points not in ZERO_POINTS:
        raise UnsupportedError(f"zero_points is {zero_points!r}, and must be one of {', '.join(ZERO_POINTS)}")
    per_word = WORD_BITS // bits
    require_matrix("qweight", qweight, np.int32)
    require_matrix("scales", scales, np.float16)
    weights, rows, groups = len(qweight) * per_word, qweight.shape[1], len(scales)
    if rows % per_word:
        raise FormatError(
            f"qweight has {rows} columns, whose zero points are no whole words of {per_word} fields"
        )
    require_matrix("scales", scales, np.float16, (groups, rows))
    require_matrix("qzeros", qzeros, np.int32, (groups, rows // per_word))
    require_groups(weights, groups)
    if g_idx is not None:
        _require_runs(g_idx, weights, groups)
    added, mask = np.uint8(zero_points == "stored_minus_one"), np.uint8((1 << bits) - 1)

    def integers(some: slice, part: slice) -> NDArray[np.uint8]:
        return word_fields(qweight[part.start // per_word : part.stop // per_word, some].T, bits)

    def zeros(some: slice) -> NDArray[np.uint8]:
        stored = word_fields(qzeros[:, some.start // per_word : some.stop // per_word], bits)
        return (stored + added & mask).T

    return affine_rows(bits, weights, scales, integers, zeros)


def _require_runs(g_idx: NDArray[np.int32], weights: int, groups: int) -> None:
    """Unless the weights of each group stand side by side, equally many in each, one of the errors above."""
    if g_idx.dtype != np.int32 or g_idx.shape != (weights,):
        raise FormatError(f"g_idx is {g_idx.dtype} {list(g_idx.shape)}, and must be int32 [{weights}]")
    if np.array_equal(g_idx, np.arange(weights) // (weights // groups)):
        return
    if g_idx.min() < 0 or g_idx.max() >= groups:
        named = g_idx.min() if g_idx.min() < 0 else g_idx.max()
        raise FormatError(f"g_idx names the group {named}, and there are {groups}")
    if (np.diff(g_idx) < 0).any():
        raise UnsupportedError(
            "g_idx has the weights of a group in several places, as act-order (desc_act) leaves them, and "
            "blocks hold consecutive weights: take a checkpoint made with desc_act=false, or convert this one"
        )
    raise UnsupportedError(
        f"g_idx has groups of different sizes, where {groups} of {weights // groups} weights each are "
        "expected: take a checkpoint whose group size divides its rows"
    )
