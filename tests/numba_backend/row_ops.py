"""The row-wise ops as functions of arrays, run by so many threads, and a sum of the bits they all give."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from refengine_numba import entries, row_arguments

Run = Callable[..., None]

GUARD = 40
"""Elements before and after a result that nobody may touch."""


class Guarded:
    """An array for a result, with others around it that stay as they are."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        size = int(np.prod(shape))
        self._all = np.full(size + 2 * GUARD, 1234.5, np.float32)
        self.inside = self._all[GUARD : GUARD + size].reshape(shape)

    def checked(self) -> np.ndarray:
        """The result."""
        around = np.concatenate([self._all[:GUARD], self._all[-GUARD:]])
        if not (around == 1234.5).all():
            raise AssertionError("a kernel wrote outside of its result")
        return self.inside


class RowOps:
    """Every row-wise op.

    Args:
        call: runs an entry.
        threads: by how many threads.
        in_place: whether the first operand's memory takes the result.
    """

    def __init__(self, call: Run, threads: int = 1, in_place: bool = False) -> None:
        self._call, self._threads, self._in_place = call, threads, in_place

    def _result(
        self, entry: Any, make: Callable[..., Any], x: np.ndarray, shape: tuple[int, ...]
    ) -> np.ndarray:
        result = Guarded(shape)
        if self._in_place:
            result.inside[...] = x
            x = result.inside
        self._call(entry, make(x, result.inside), self._threads)
        return result.checked()

    def rms_norm(self, x: np.ndarray, weight: np.ndarray, *, eps: float) -> np.ndarray:
        make = lambda x, y: row_arguments.rms_norm(x, weight, y, eps=eps)  # noqa: E731
        return self._result(entries.entry("norm.rms_norm"), make, x, x.shape)

    def elementwise(
        self, name: str, x: np.ndarray, y: np.ndarray | None = None, factor: float = 1.0
    ) -> np.ndarray:
        make = lambda x, out: row_arguments.elementwise(name, x, y, out, factor=factor)  # noqa: E731
        return self._result(entries.entry("elementwise.elementwise", name), make, x, x.shape)

    def rope(self, x: np.ndarray, table: np.ndarray, *, pairing: str) -> np.ndarray:
        make = lambda x, y: row_arguments.rope(x, table, y)  # noqa: E731
        return self._result(entries.entry("rope.rope", pairing), make, x, x.shape)

    def rope_table(
        self, positions: np.ndarray, frequencies: tuple[float, ...], magnitude: float
    ) -> np.ndarray:
        table = Guarded((len(positions), 2 * len(frequencies)))
        arguments = row_arguments.rope_table(
            positions, table.inside, frequencies=frequencies, magnitude=magnitude
        )
        self._call(entries.entry("rope.rope_table"), arguments, self._threads)
        return table.checked()

    def take_rows(self, x: np.ndarray, ids: np.ndarray) -> np.ndarray:
        y = Guarded((len(ids), x.shape[1]))
        self._call(entries.entry("copy.take_rows"), row_arguments.take_rows(x, ids, y.inside), self._threads)
        return y.checked()


def checksum(call: Run, threads: int = 2) -> int:
    """Of the bits that every op gives, at sizes with and without a part of a vector at the end."""
    ops, total = RowOps(call, threads), 0
    rng = np.random.default_rng(0)

    def numbers(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * np.exp2(rng.integers(-4, 4, shape))).astype(np.float32)

    for size in (3, 16, 70, 128):
        x, y = numbers(5, size), numbers(5, size)
        table = ops.rope_table(
            np.array([0, 1, 9, 100_000, 2**31 - 1], np.int32), tuple(np.exp2(-np.arange(size))), 1.5
        )
        results = [
            ops.rms_norm(x, y[0], eps=1e-5),
            *(ops.elementwise(name, x, y, 0.0) for name in ("add", "silu", "gelu_tanh")),
            *(ops.elementwise(name, x, None, 3.0) for name in ("scale", "softcap")),
            *(
                ops.rope(numbers(5, 3, 2 * size + 1), table, pairing=pairing)
                for pairing in row_arguments.PAIRINGS
            ),
            ops.take_rows(x, np.array([4, 0, 4], np.int32)),
            table,
        ]
        for result in results:
            total = zlib.crc32(result.tobytes(), total)
    return total
