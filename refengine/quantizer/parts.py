"""What blocks of integers are made of, before they become weights."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refengine.quantizer.fields import add, multiply


class Parts(NamedTuple):
    """The parts of n blocks: weight = (scale · factor) · integer + offset.

    Each scale, factor and offset belongs to equally many consecutive weights.

    Attributes:
        integers: int8 [n, block_size], less the encoding's zero; int16, from -255 to 255, where each block
            has a zero of its own.
        scales: float32 [n, g].
        offsets: float32 [n, g], ``None`` where the encoding has none.
        factors: int8 [n, f], ``None`` where the encoding has none.
    """

    integers: NDArray[np.int8] | NDArray[np.int16]
    scales: NDArray[np.float32]
    offsets: NDArray[np.float32] | None = None
    factors: NDArray[np.int8] | None = None


def weigh(parts: Parts, weights: NDArray[np.float32]) -> None:
    """Write the weights, float32 [n, block_size]: one rounding per operation, in the formula's order."""
    weights[...] = parts.integers
    multiply(weights, parts.scales if parts.factors is None else parts.scales * parts.factors)
    if parts.offsets is not None:
        add(weights, parts.offsets)
