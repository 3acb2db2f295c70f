"""Candidates: of each row of a step's logits the first in rank, which is mostly all that a draw needs.

A vocabulary has a hundred thousand entries and more. A device that holds a step's logits can pick the few
that come first, and add up what all of them weigh; then these are copied to the host, and the row stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_CANDIDATES = 128
"""Candidates of a row. Top-k is seldom above 100. So many are 1 KiB, beside the 512 KiB of a row for 131,072
tokens; how much of a distribution they hold is in ``benchmarks/RESULTS.md``."""

LEAST_VOCABULARY = 2 * MOST_CANDIDATES + 16
"""Tokens of a vocabulary from which on a row of float32 logits is larger than its candidates."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """What a step tells of its logits ``[R, V]``: ``K`` candidates of each row.

    Attributes:
        logits: ``[R, K]``, in the dtype of the logits: each row's highest, falling.
        tokens: int32 ``[R, K]``: their ids; among equal logits (-0 and 0 are equal) the lowest, rising.
        sums: float64 ``[R]``: of exp((l - max l) ÷ temperature), over each whole row; 0 where its temperature
            is.
        finite: bool ``[R]``: whether all logits of a row are finite; where not, the rest of its row may be
            anything.
        vocabulary_size: V.
        row: fetches a row of the logits, ``[V]``; no longer than until the next step.

    Clauses: BCK-18.
    """

    logits: NDArray[Any]
    tokens: NDArray[np.int32]
    sums: NDArray[np.float64]
    finite: NDArray[np.bool_]
    vocabulary_size: int
    row: Callable[[int], NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return self.logits.nbytes + self.tokens.nbytes + self.sums.nbytes + self.finite.nbytes


def candidates_of(
    logits: NDArray[Any], temperatures: NDArray[np.float64], count: int = MOST_CANDIDATES
) -> Candidates:
    """The candidates of a step's logits.

    Args:
        logits: ``[R, V]``, any float dtype.
        temperatures: ``[R]``, 0 where no sum is wanted.
        count: K, or all where there are fewer tokens.

    Clauses: BCK-18.
    """
    rows, size = logits.shape
    finite = np.isfinite(logits).all(axis=1)
    ids = np.broadcast_to(np.arange(size), logits.shape)
    with np.errstate(invalid="ignore"):
        order = np.lexsort((ids, -logits))[:, :count]
    sums = np.zeros(rows)
    for row in np.flatnonzero(finite & (temperatures > 0)):
        exact = logits[row].astype(np.float64)
        with np.errstate(over="ignore"):
            sums[row] = np.exp((exact - exact.max()) / temperatures[row]).sum()
    return Candidates(
        np.take_along_axis(logits, order, axis=1),
        order.astype(np.int32),
        sums,
        finite,
        size,
        logits.__getitem__,
    )
