"""Tiles of attention from keys and values that are stored as numbers. See :mod:`attention`."""

from __future__ import annotations

from typing import Any

from refengine_numba.kernels.attention_sizes import OWN, TILE, TILE_WORDS, parts_of
from refengine_numba.kernels.attention_tiles import NUMBER_BYTES, load_keys, load_values
from refengine_numba.kernels.compilation import Compiled, entry, part
from refengine_numba.kernels.entry import SIGNATURE, bytes_at, floats_at, ids_at, words_at


@part
def locate(
    tables: Any,
    row: int,
    block_size: int,
    stride: int,
    slot_bytes: int,
    offset: int,
    start: int,
    first: int,
    last: int,
    places: Any,
    at: int,
) -> None:
    """Where in the pool positions ``first`` to ``last - 1`` of a tile lie; its others repeat one of them.

    Args:
        tables: int32, block tables.
        row: where the sequence's begins.
        block_size: positions of a block.
        stride: bytes from one block to the next.
        slot_bytes: from one position of a block to the next.
        offset: of what is looked for, in a slot.
        start: the tile's first position.
        first: the first that is seen.
        last: the one after the last that is seen.
        places: int64, indices of bytes.
        at: where in ``places`` to write.
    """
    column, inside = first // block_size, first % block_size
    p = first
    while p < last:
        place = tables[row + column] * stride + inside * slot_bytes + offset
        until = min(last, p + block_size - inside)
        while p < until:
            places[at + p - start] = place
            place += slot_bytes
            p += 1
        column, inside = column + 1, 0
    for i in range(first - start):
        places[at + i] = places[at + first - start]
    for i in range(last - start, TILE):
        places[at + i] = places[at + last - 1 - start]


def load_entry(kind: str) -> Compiled:
    """Load a tile of numbers of a kind (``kv_pool.KINDS``), and ask memory for the next one.

    Arguments: those of ``tile_entry``. The op's own, from :data:`OWN` on: keys, values, bytes of the pool,
    bytes from one block to the next, positions of a block, block tables (int32).
    """
    nbytes = NUMBER_BYTES[kind]

    @entry(SIGNATURE)
    def run(thread: int, threads: int, w: Any) -> None:
        work, size = floats_at(w[0], w[1]), w[4]
        places = words_at(w[0] + 4 * w[1] - 8 * (2 * TILE + TILE_WORDS), 2 * TILE)
        a, own = words_at(w[13], OWN), words_at(w[13] + 8 * OWN, 6)
        sequence, kv_head, start, first, last = w[14], w[15], w[9], w[10], w[11]
        kv_heads, columns, pool_bytes, stride, block_size = a[9], a[4], own[2], own[3], own[4]
        tables, row = ids_at(own[5], a[3] * columns), sequence * columns
        slot_bytes, offset = kv_heads * size * nbytes, kv_head * size * nbytes
        here, ahead = w[16] % 2 * TILE, (w[16] + 1) % 2 * TILE
        if w[16] == 0:
            locate(tables, row, block_size, stride, slot_bytes, offset, start, first, last, places, here)
        following = start + TILE
        if following < w[17]:
            end = min(following + TILE, w[17])
            locate(
                tables,
                row,
                block_size,
                stride,
                slot_bytes,
                offset,
                following,
                following,
                end,
                places,
                ahead,
            )
        else:
            ahead = here
        values, _, _, _, _ = parts_of(w[2], (size + 15) // 16 * 16)
        load_keys(kind, bytes_at(own[0], pool_bytes), places, here, ahead, size, work, 0)
        load_values(kind, bytes_at(own[1], pool_bytes), places, here, ahead, last - start, size, work, values)

    return run
