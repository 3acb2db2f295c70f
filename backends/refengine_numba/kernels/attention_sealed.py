"""Attention over a sealed cache: a tile's blocks are opened, or copied where queries read them exactly.

A query reads the first block, and its own, from exact copies, all others as sealed (SKV-7). Rows that are
treated together lie in one block; so they read the same numbers, and their tile is one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from refengine_numba.kernels.attention_sizes import OWN, TILE, TILE_WORDS, parts_of
from refengine_numba.kernels.attention_tiles import NUMBER_BYTES, copy_row, load_keys
from refengine_numba.kernels.compilation import Compiled, entry, part
from refengine_numba.kernels.entry import SIGNATURE, bytes_at, floats_at, ids_at, words_at
from refengine_numba.kernels.unseal import BlockSizes, open_rows
from refengine_numba.kernels.vectors import splat_f32, store

OWN_WORDS = 15
"""Words from ``attention_loading.OWN`` on that the loading entry reads."""


class Stored(NamedTuple):
    """A layer's keys, or values.

    Attributes:
        sealed: bytes of sealed blocks.
        stride: from one to the next.
        exact: bytes of exact copies.
        exact_stride: from one to the next.
    """

    sealed: Any
    stride: int
    exact: Any
    exact_stride: int


class Reading(NamedTuple):
    """Where a sequence's blocks are, and who reads them.

    Attributes:
        sizes: of a block.
        tables: int32, block tables of the sealed pool.
        row: where the sequence's begins.
        exact_tables: int32, those of exact copies.
        exact_row: where the sequence's begins.
        head: the key head.
        own: the number of the queries' block.
    """

    sizes: Any
    tables: Any
    row: int
    exact_tables: Any
    exact_row: int
    head: int
    own: int


@part
def load_rows(
    role: str,
    form: str,
    kind: str,
    itemsize: int,
    stored: Any,
    reading: Any,
    first: int,
    last: int,
    work: Any,
    at: int,
) -> None:
    """Keys, or values, of positions ``first`` to ``last - 1`` as rows of float32, the first at ``work[at]``.

    Args:
        role: ``"keys"`` or ``"values"``, literal.
        form: of sealed blocks, literal.
        kind: of exact numbers, literal.
        itemsize: bytes of one.
        stored: :class:`Stored`.
        reading: :class:`Reading`.
        first: position.
        last: position.
        work: float32.
        at: where to write; rows are whole vectors, with zeros at their ends.
    """
    sizes, head = reading.sizes, reading.head
    size, p = sizes.size, first
    width, row_bytes = (size + 15) // 16 * 16, size * itemsize
    while p < last:
        block, inside = p // sizes.positions, p % sizes.positions
        count = min(last - p, sizes.positions - inside)
        if block == 0 or block == reading.own:
            place = reading.exact_tables[reading.exact_row + block] * stored.exact_stride
            place += (inside * sizes.kv_heads + head) * row_bytes
            for i in range(count):
                row = place + i * sizes.kv_heads * row_bytes
                copy_row(kind, stored.exact, row, size, work, at + i * width)
        else:
            if width > size:
                for i in range(count):
                    store(work, at + (i + 1) * width - 16, splat_f32(0.0))
            place = reading.tables[reading.row + block] * stored.stride
            open_rows(role, form, stored.sealed, place, sizes, head, inside, count, work, at, width)
        p += count
        at += count * width


def sealed_load_entry(kind: str, keys: str, values: str) -> Compiled:
    """Load a tile of a sealed cache, whose exact copies are numbers of a kind (``kv_pool.KINDS``).

    Arguments: those of ``tile_entry``. The op's own, from ``attention_loading.OWN`` on: sealed keys, bytes of
    their pool, bytes from one block to the next; the same of values; exact keys, exact values, bytes of their
    pool, bytes from one block to the next; positions of a block; block tables, exact tables (int32), columns
    of the latter.
    """
    itemsize = NUMBER_BYTES[kind]

    @entry(SIGNATURE)
    def run(thread: int, threads: int, w: Any) -> None:
        work, size = floats_at(w[0], w[1]), w[4]
        places = words_at(w[0] + 4 * w[1] - 8 * (2 * TILE + TILE_WORDS), 2 * TILE)
        a, b = words_at(w[13], OWN), words_at(w[13] + 8 * OWN, OWN_WORDS)
        sequence, head, start, first, last = w[14], w[15], w[9], w[10], w[11]
        sizes = BlockSizes(b[10], a[9], size)
        tables, exact_tables = ids_at(b[11], a[3] * a[4]), ids_at(b[12], a[3] * b[13])
        reading = Reading(sizes, tables, sequence * a[4], exact_tables, sequence * b[13], head, w[8] // b[10])
        width = (size + 15) // 16 * 16
        at, _, _, _, _ = parts_of(w[2], width)
        rows = at + (first - start) * width
        stored = Stored(bytes_at(b[0], b[1]), b[2], bytes_at(b[6], b[8]), b[9])
        load_rows("keys", keys, kind, itemsize, stored, reading, first, last, work, rows)
        for i in range(TILE):
            places[i] = 4 * (at + i * width)
        load_keys("f32", bytes_at(w[0], 4 * w[1]), places, 0, 0, size, work, 0)
        stored = Stored(bytes_at(b[3], b[4]), b[5], bytes_at(b[7], b[8]), b[9])
        load_rows("values", values, kind, itemsize, stored, reading, first, last, work, rows)

    return run
