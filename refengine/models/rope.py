"""RoPE frequencies: the plain ones and the ways of stretching them over longer contexts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., 2023, arXiv:2309.00071).

    Attributes:
        factor: new context over original context.
        original_context: positions the model was first trained on.
        beta_fast: rotations over the original context beyond which a pair keeps its frequency.
        beta_slow: rotations below which it is interpolated fully.
        magnitude: attention factor apart from YaRN's own ``0.1 · ln(factor) + 1``.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    magnitude: float = 1.0

    def attention_factor(self) -> float:
        """What cosine and sine are multiplied by."""
        return self.magnitude * (1.0 + 0.1 * math.log(self.factor))


def plain_frequencies(base: float, dims: int) -> NDArray[np.float64]:
    """``base^(-2i/dims)`` for pair ``i``, float64 ``[dims / 2]``, radians per position."""
    return base ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)


def linear_frequencies(base: float, dims: int, factor: float) -> NDArray[np.float64]:
    """Position interpolation (Chen et al., 2023, arXiv:2306.15595): positions divided by ``factor``."""
    return plain_frequencies(base, dims) / factor


def yarn_frequencies(base: float, dims: int, scaling: YarnScaling) -> NDArray[np.float64]:
    """Fast pairs keep their frequency, slow ones are interpolated, with a ramp between."""

    def pair_with_rotations(rotations: float) -> float:
        return dims * math.log(scaling.original_context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_with_rotations(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with_rotations(scaling.beta_slow)), dims - 1)
    ramp = np.clip((np.arange(dims // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    plain = plain_frequencies(base, dims)
    return plain * (1.0 - ramp) + plain / scaling.factor * ramp
