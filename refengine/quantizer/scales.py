"""Scales shared by a whole block, as most block encodings store them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def float16(field: NDArray[np.uint8]) -> NDArray[np.float32]:
    """One little-endian IEEE 754 binary16 per block, [n, 2] -> [n, 1]; widening to float32 is exact."""
    return field.view("<f2").astype(np.float32)
