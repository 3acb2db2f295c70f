"""What an entry is called with: words that were made from checked arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Arguments:
    """Of one call of an entry.

    Attributes:
        words: int64, what the entry reads: addresses and sizes.
        arrays: whose addresses these are; kept alive with them.
        symbols: which words are sizes of a step, by their position: ``T``, ``S``, ``R``, or ``M0``, ``M1`` …,
            the columns of a pool's block tables. An executor makes arguments for the largest step and writes
            the sizes of each step over these words.
    """

    words: NDArray[np.int64]
    arrays: tuple[NDArray[Any], ...]
    symbols: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, *words: NDArray[Any] | int, symbols: Mapping[int, str]) -> Arguments:
        """Sizes as they are, and the addresses of arrays."""
        arrays = tuple(word for word in words if not isinstance(word, int))
        numbers = [word if isinstance(word, int) else word.ctypes.data for word in words]
        return cls(np.array(numbers, np.int64), arrays, symbols)


def check(
    name: str,
    array: NDArray[np.generic],
    dtype: type[np.generic],
    shape: tuple[int, ...],
    *,
    written: bool = False,
) -> None:
    """Raise ValueError unless an array is what a kernel takes for granted; ``written``: may be written to."""
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(
            f"{name} must be C-contiguous {np.dtype(dtype).name} {list(shape)}, "
            f"not {array.dtype.name} {list(array.shape)}"
        )
    if written and not array.flags.writeable:
        raise ValueError(f"{name} is read-only")


def float32_word(value: float) -> int:
    """A number, rounded to float32, as the word whose low half has its bits."""
    return int(np.float32(value).view(np.int32))
