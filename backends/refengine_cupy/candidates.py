"""Candidates, found on the device among the logits that a step leaves there; see ``candidates.cu``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.candidates import MOST_CANDIDATES, Candidates
from refengine_cupy.launches import launch
from refengine_cupy.runtime import Copy, Memory, Pinned, Runtime, Work
from refengine_cupy.source import Kernel

CHUNK = 4096
"""Logits that a block of threads looks through."""

THREADS = 1024

MOST_OF_THREAD = 32
"""Keys that a thread may look through, in a chunk as where chunks are put together; see ``candidates.cu``."""

MOST_CHUNKS = MOST_OF_THREAD * THREADS // MOST_CANDIDATES

MOST_LOGITS = MOST_CHUNKS * MOST_OF_THREAD * THREADS
"""Logits of a row, at most."""


class CandidateSearch:
    """Finds candidates of rows of logits; holds the memory for it.

    Exponentials are those of the vendor's library in float64, which is off by 1 unit in the last place at
    most (CUDA C++ Programming Guide, *Mathematical Functions*; HIP documentation, *HIP math API*), where
    BCK-18 allows 4; divisions and differences are correctly rounded. Sums of chunks are added up on the host.

    Args:
        runtime: the device.
        rows: of logits, at most.
        size: V, at most ``MOST_LOGITS``.

    Raises:
        MemoryLimitError: the device has no room.
    """

    def __init__(self, runtime: Runtime, rows: int, size: int) -> None:
        self._runtime, self._size = runtime, size
        self._most = min(MOST_CANDIDATES, size)
        self._chunk = CHUNK * -(-size // (CHUNK * MOST_CHUNKS))
        self._chunks = -(-size // self._chunk)
        self._keys: Memory = runtime.allocate(
            max(1, 8 * rows * self._most * self._chunks), "candidates of chunks"
        )
        self._layouts: dict[int, np.dtype[np.void]] = {}
        nbytes = max(1, self._layout(rows).itemsize)
        self._found: Memory = runtime.allocate(nbytes, "candidates")
        self._copied: Pinned = runtime.pinned(nbytes, "candidates")

    def work(self, rows: int, logits: int, temperatures: int) -> list[Work]:
        """What finds the candidates of a step, and copies them to the host.

        Args:
            rows: of logits.
            logits: address of float32 ``[R, V]``.
            temperatures: address of float64 ``[R]``.
        """
        if not rows:
            return []
        start, layout = self._found.address, self._layout(rows)
        places = {name: start + field[1] for name, field in (layout.fields or {}).items()}
        work: list[Work] = [
            launch(
                Kernel("candidates", f"candidates_of_{part}", "FindCandidates", THREADS),
                (blocks, rows, 1),
                logits=logits,
                temperatures=temperatures,
                keys=self._keys.address,
                size=self._size,
                chunk=self._chunk,
                chunks=self._chunks,
                most=self._most,
                **places,
            )
            for part, blocks in (("chunks", self._chunks), ("rows", self._chunks + 1))
        ]
        return [*work, Copy(start, self._copied.address, layout.itemsize)]

    def read(self, rows: int, row: Callable[[int], NDArray[Any]]) -> Candidates:
        """What was found and copied; waits for it.

        Args:
            rows: of logits in the step.
            row: fetches one.
        """
        layout = self._layout(rows)
        self._runtime.synchronise()
        found = np.ndarray((), layout, self._copied.data[: layout.itemsize].copy())
        return Candidates(
            logits=found["best"],
            tokens=found["tokens"],
            sums=found["sums"].sum(axis=1),
            finite=np.logical_and.reduce(found["finite"], axis=1),
            vocabulary_size=self._size,
            row=row,
        )

    def _layout(self, rows: int) -> np.dtype[np.void]:
        """How results for so many rows lie, one array after the other."""
        if rows not in self._layouts:
            arrays = (
                ("sums", np.float64, self._chunks),
                ("best", np.float32, self._most),
                ("tokens", np.int32, self._most),
                ("finite", np.int32, self._chunks),
            )
            self._layouts[rows] = np.dtype([(name, kind, (rows, each)) for name, kind, each in arrays])
        return self._layouts[rows]
