"""The state of a barrier between threads; :mod:`refengine_numba.kernels.barrier` waits at it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ARRIVED = 0
"""Word of the state: how many threads wait in this round."""

ROUND = 16
"""Word of the state: rounds that were opened. Two cache lines away, as lines are fetched in pairs."""

STATE_WORDS = 32
"""Words of a barrier's state."""


def barrier_state() -> NDArray[np.int64]:
    """A barrier at rest: int64 [STATE_WORDS], aligned to two cache lines."""
    words = np.zeros(STATE_WORDS + 15, np.int64)
    start = -words.ctypes.data % 128 // 8
    return words[start : start + STATE_WORDS]
