"""Candidates, found on the device among the logits that a step leaves there; see ``candidates.cu``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.candidates import MOST_CANDIDATES, Candidates
from refengine_cupy.launches import launch
from refengine_cupy.runtime import Launch, Memory, Runtime
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
        self._found: Memory = runtime.allocate(max(1, self._offsets(rows)["end"]), "candidates")
        self._staging = runtime.staging(self._found.nbytes)

    def launches(self, rows: int, logits: int, temperatures: int) -> list[Launch]:
        """What finds the candidates of a step.

        Args:
            rows: of logits.
            logits: address of float32 ``[R, V]``.
            temperatures: address of float64 ``[R]``.
        """
        if not rows:
            return []
        start, offsets = self._found.address, self._offsets(rows)
        places = {name: start + offsets[name] for name in ("sums", "best", "tokens", "finite")}
        return [
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

    def read(self, rows: int, row: Callable[[int], NDArray[Any]]) -> Candidates:
        """What was found, in one copy from the device.

        Args:
            rows: of logits in the step.
            row: fetches one.
        """
        offsets = self._offsets(rows)
        staged = self._staging[: offsets["end"]]
        self._runtime.download(self._found.address, staged)
        own = staged.copy()

        def array(name: str, dtype: type[np.generic], columns: int) -> NDArray[Any]:
            at = offsets[name]
            nbytes = rows * columns * np.dtype(dtype).itemsize
            return own[at : at + nbytes].view(dtype).reshape(rows, columns)

        return Candidates(
            logits=array("best", np.float32, self._most),
            tokens=array("tokens", np.int32, self._most),
            sums=array("sums", np.float64, self._chunks).sum(axis=1),
            finite=np.all(array("finite", np.int32, self._chunks), axis=1),
            vocabulary_size=self._size,
            row=row,
        )

    def _offsets(self, rows: int) -> dict[str, int]:
        """Where results for so many rows begin, one after the other, and where they end."""
        sizes = {"sums": 8 * self._chunks, "best": 4 * self._most, "tokens": 4 * self._most}
        offsets, end = {}, 0
        for name, nbytes in {**sizes, "finite": 4 * self._chunks}.items():
            offsets[name], end = end, end + rows * nbytes
        return {**offsets, "end": end}
