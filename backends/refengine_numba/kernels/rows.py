"""Rows of a repacked matrix as numbers: what a table of embeddings is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from refengine_numba.kernels.compilation import Compiled, entry, inlined, part
from refengine_numba.kernels.entry import SIGNATURE, bytes_at, floats_at, ids_at
from refengine_numba.kernels.product import cell_size, column, lane, tile_size
from refengine_numba.kernels.share import share
from refengine_numba.kernels.unpacking import layout_of, weights
from refengine_numba.kernels.vectors import peek, stack_f32
from refengine_numba.layout import GROUP, LAYOUTS, TILE_ROWS


@part
def look_up(encoding: str, thread: int, threads: int, tiles: Any, ids: Any, y: Any, size: int) -> None:
    """Write the rows named by a thread's share of ``ids``, bit for bit as the golden decoder gives them.

    Args:
        encoding: literal.
        thread: from 0.
        threads: how many share the work.
        tiles: uint8, a repacked matrix [N, size].
        ids: int32 [T], each checked to lie in 0 to N - 1.
        y: float32 [T · size].
        size: columns.
    """
    decoded = stack_f32(GROUP)
    per_cell, cell_bytes = cell_size(encoding)
    first, last = share(ids.size, thread, threads)
    for t in range(first, last):
        tile, which = ids[t] // TILE_ROWS, ids[t] % TILE_ROWS
        begin = tile * tile_size(encoding, size)
        for index in range(size // GROUP):
            weights(encoding, tiles, begin + index // per_cell * cell_bytes, index % per_cell, decoded)
            for k in range(GROUP):
                y[t * size + index * GROUP + k] = lane(peek(decoded, k), which)
        rest(encoding, tiles, begin, which, y, t * size, size)


def rest(encoding: str, tiles: Any, begin: int, which: int, y: Any, at: int, size: int) -> None:
    """The columns after the last whole group, of encodings without blocks."""
    raise NotImplementedError


@inlined(rest)
def _rest(encoding: Any) -> Callable[..., Any]:
    def none(encoding: str, tiles: Any, begin: int, which: int, y: Any, at: int, size: int) -> None:
        pass

    def some(encoding: str, tiles: Any, begin: int, which: int, y: Any, at: int, size: int) -> None:
        for k in range(size // GROUP * GROUP, size):
            y[at + k] = lane(column(encoding, tiles, begin, k), which)

    return some if layout_of(encoding).bits == 0 else none


def look_up_entry(encoding: str) -> Compiled:
    """Rows of a table. Arguments: tiles, bytes of tiles, ids (int32), y, number of ids T, columns K."""
    LAYOUTS[encoding]

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        look_up(
            encoding,
            thread,
            threads,
            bytes_at(a[0], a[1]),
            ids_at(a[2], a[4]),
            floats_at(a[3], a[4] * a[5]),
            a[5],
        )

    return run
