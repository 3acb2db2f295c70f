"""How fast memory is read here: the most that a loop reaches which reads and does next to nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

NBYTES = 2**30
"""Much more than any cache holds."""

Words = NDArray[np.uint64]


class Bandwidth:
    """Reads a gibibyte with threads that each take a part of it.

    Args:
        threads: as many as the engines have.
        nbytes: how much is read at once.

    Attributes:
        kernels: the loops that were tried: NumPy's reduction, and a Numba one where Numba is installed.
    """

    def __init__(self, threads: int, nbytes: int = NBYTES) -> None:
        self._parts = np.array_split(np.ones(nbytes // 8, np.uint64), threads)
        self._nbytes = nbytes // 8 * 8
        self._pool = ThreadPoolExecutor(threads)
        self.kernels: dict[str, Callable[[Words], Any]] = {"numpy.bitwise_or": np.bitwise_or.reduce}
        if (compiled := _compiled_sum()) is not None:
            self.kernels["a sum in Numba"] = compiled

    def measure(self, times: int = 5) -> float:
        """Bytes per second: the best of so many passes of each loop."""
        return max(self._pass(kernel) for _ in range(times) for kernel in self.kernels.values())

    def _pass(self, kernel: Callable[[Words], Any]) -> float:
        begin = time.perf_counter()
        list(self._pool.map(kernel, self._parts))
        return self._nbytes / (time.perf_counter() - begin)


def _compiled_sum() -> Callable[[Words], Any] | None:
    try:
        import numba
    except ImportError:
        return None

    @numba.njit("uint64(uint64[::1])", nogil=True)  # type: ignore[untyped-decorator, unused-ignore]
    def total(words: Words) -> Any:
        result = np.uint64(0)
        for i in range(words.size):
            result += words[i]
        return result

    compiled: Callable[[Words], Any] = total
    return compiled
