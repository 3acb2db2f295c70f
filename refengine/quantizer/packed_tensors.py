"""What tensors of GPTQ's and AWQ's checkpoints have in common: their forms, and fields in 32-bit words."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from refengine.errors import FormatError, UnsupportedError

WORD_BITS = 32

SMALLEST_GROUP = 32
"""Weights; a group is a multiple of it."""


def require_matrix(
    name: str, tensor: NDArray[Any], dtype: DTypeLike, shape: tuple[int, int] | None = None
) -> None:
    """FormatError unless a tensor is a matrix of this dtype, not empty, and of this shape if one is given."""
    found, wanted = f"{tensor.dtype} {list(tensor.shape)}", f"{np.dtype(dtype)} {list(shape or ('?', '?'))}"
    if tensor.dtype != dtype or tensor.ndim != 2 or (shape is not None and tensor.shape != shape):
        raise FormatError(f"{name} is {found}, and must be {wanted}".replace("'?'", "?"))
    if tensor.size == 0:
        raise FormatError(f"{name} is {found}: it holds nothing")


def require_groups(weights: int, groups: int) -> None:
    """UnsupportedError unless so many weights of a row are so many groups of the same multiple of 32."""
    if weights % groups or weights // groups % SMALLEST_GROUP:
        raise UnsupportedError(
            f"rows of {weights} weights with {groups} scales: groups of {weights / groups:g} weights are not "
            f"implemented, only those of a multiple of {SMALLEST_GROUP}, all of the same size; "
            "take a checkpoint with groups of 32, 64 or 128"
        )


def word_fields(words: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """Fields of 4 or 8 bits, the lowest of a word first: [..., words] -> [..., words * 32 / bits].

    Those of 8 bits may be a view of ``words``.
    """
    found = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 8:
        return found
    halves = np.empty((*found.shape, 2), np.uint8)
    np.bitwise_and(found, 15, out=halves[..., 0])
    np.right_shift(found, 4, out=halves[..., 1])
    return halves.reshape(*found.shape[:-1], -1)
