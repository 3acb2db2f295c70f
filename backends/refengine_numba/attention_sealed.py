"""Attention over a sealed cache: a tile's blocks are opened, or copied where queries read them exactly.

A query reads the first block, and its own, from exact copies, all others as sealed (SKV-7). Rows that are
treated together lie in one block; so they read the same numbers, and their tile is one.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.errors import UnsupportedError
from refengine.ops import LayerCache, SealedLayerCache
from refengine.quantizer.sealed_kv import Floats, Integers
from refengine_numba.arguments import Arguments, check
from refengine_numba.attention_arithmetic import TILE_WORDS
from refengine_numba.attention_entry import common_arguments
from refengine_numba.attention_lanes import TILE
from refengine_numba.attention_loading import OWN
from refengine_numba.attention_sums import parts_of
from refengine_numba.attention_tiles import NUMBER_BYTES, copy_row, load_keys
from refengine_numba.compilation import entry, part
from refengine_numba.entry import SIGNATURE, bytes_at, floats_at, ids_at, words_at
from refengine_numba.kv_pool import pool_of
from refengine_numba.unseal import BlockSizes, open_rows
from refengine_numba.vectors import splat_f32, store

OWN_WORDS = 15
"""Words from ``attention_loading.OWN`` on that the loading entry reads."""


@part
def load_rows(
    role: str,
    form: str,
    kind: str,
    itemsize: int,
    sealed: Any,
    stride: int,
    exact: Any,
    exact_stride: int,
    sizes: Any,
    tables: Any,
    row: int,
    exact_tables: Any,
    exact_row: int,
    head: int,
    own: int,
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
        sealed: bytes of sealed blocks.
        stride: from one to the next.
        exact: bytes of exact copies.
        exact_stride: from one to the next.
        sizes: of a block.
        tables: int32, block tables of the sealed pool.
        row: where the sequence's begins.
        exact_tables: int32, those of exact copies.
        exact_row: where the sequence's begins.
        head: the key head.
        own: the number of the queries' block.
        first: position.
        last: position.
        work: float32.
        at: where to write; rows are whole vectors, with zeros at their ends.
    """
    size, p = sizes.size, first
    width, row_bytes = (size + 15) // 16 * 16, size * itemsize
    while p < last:
        block, inside = p // sizes.positions, p % sizes.positions
        count = min(last - p, sizes.positions - inside)
        if block == 0 or block == own:
            place = exact_tables[exact_row + block] * exact_stride
            place += (inside * sizes.kv_heads + head) * row_bytes
            for i in range(count):
                copy_row(kind, exact, place + i * sizes.kv_heads * row_bytes, size, work, at + i * width)
        else:
            if width > size:
                for i in range(count):
                    store(work, at + (i + 1) * width - 16, splat_f32(0.0))
            place = tables[row + block] * stride
            open_rows(role, form, sealed, place, sizes, head, inside, count, work, at, width)
        p += count
        at += count * width


@cache
def sealed_load_entry(kind: str, keys: str, values: str) -> Any:
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
        tables, row = ids_at(b[11], a[3] * a[4]), sequence * a[4]
        exact_tables, exact_row = ids_at(b[12], a[3] * b[13]), sequence * b[13]
        width = (size + 15) // 16 * 16
        at, _, _, _, _ = parts_of(w[2], width)
        rows = at + (first - start) * width
        load_rows(
            "keys",
            keys,
            kind,
            itemsize,
            bytes_at(b[0], b[1]),
            b[2],
            bytes_at(b[6], b[8]),
            b[9],
            sizes,
            tables,
            row,
            exact_tables,
            exact_row,
            head,
            w[8] // b[10],
            first,
            last,
            work,
            rows,
        )
        for i in range(TILE):
            places[i] = 4 * (at + i * width)
        load_keys("f32", bytes_at(w[0], 4 * w[1]), places, 0, 0, size, work, 0)
        load_rows(
            "values",
            values,
            kind,
            itemsize,
            bytes_at(b[3], b[4]),
            b[5],
            bytes_at(b[7], b[8]),
            b[9],
            sizes,
            tables,
            row,
            exact_tables,
            exact_row,
            head,
            w[8] // b[10],
            first,
            last,
            work,
            rows,
        )

    return run


def sealed_attention_arguments(
    q: NDArray[np.float32],
    cache: SealedLayerCache,
    exact: LayerCache,
    block_tables: NDArray[np.int32],
    exact_tables: NDArray[np.int32],
    query_starts: NDArray[np.int32],
    context_lens: NDArray[np.int32],
    y: NDArray[np.float32],
    workspace: NDArray[np.uint8],
    *,
    isa: str,
    threads: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    rows: str = "T",
    sequences: str = "S",
    columns: str = "M",
    exact_columns: str = "N",
) -> Arguments:
    """Arguments of ``attention_entry`` and ``merge_entry`` for a sealed cache; others as there.

    Args:
        cache: the layer's sealed blocks.
        exact: its exact copies.
        exact_tables: int32 [S, N], of the pool of exact copies, row after row with the step's own N.
        exact_columns: the symbol of N.

    Raises:
        ValueError: a shape, dtype or stride is wrong, or the workspace too small.
        UnsupportedError: there are no kernels for the exact copies' dtype, or the formats.
    """
    pool = pool_of(exact)
    block = pool.block_size, pool.kv_heads, pool.head_size
    sealed: list[NDArray[np.uint8] | int] = []
    names = []
    for stored, form in zip(cache[:2], cache.formats, strict=True):
        if not isinstance(form, Floats | Integers):
            raise UnsupportedError(f"there are no kernels for sealed blocks of the format {form}")
        blocks, nbytes = stored.shape
        if stored.dtype != np.uint8 or nbytes != form.nbytes(*block) or stored.strides[1] != 1:
            raise ValueError(
                f"{stored.dtype.name} {list(stored.shape)} must be blocks of {form.name} {block}"
            )
        sealed += [stored, (blocks - 1) * stored.strides[0] + nbytes, stored.strides[0]]
        names.append(form.name)
    check("block_tables", block_tables, np.int32, (len(context_lens), block_tables.shape[-1]))
    check("exact_tables", exact_tables, np.int32, (len(context_lens), exact_tables.shape[-1]))
    common = common_arguments(
        q,
        (pool.kv_heads, pool.head_size),
        query_starts,
        context_lens,
        y,
        workspace,
        columns=block_tables.shape[1],
        load=sealed_load_entry(pool.kind, *names),
        cut=pool.block_size,
        isa=isa,
        threads=threads,
        scale=scale,
        window=window,
        softcap=softcap,
    )
    own = (exact.keys, exact.values, pool.nbytes, pool.stride, pool.block_size, block_tables, exact_tables)
    return Arguments.of(
        *common,
        *sealed,
        *own,
        exact_tables.shape[1],
        symbols={2: rows, 3: sequences, 4: columns, OWN + 13: exact_columns},
    )
