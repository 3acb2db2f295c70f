"""Paged attention: writing keys and values into blocks, and attending through block tables.

A sequence's keys and values lie in fixed-size blocks anywhere in the cache; its block table names them in
order (Kwon et al., 2023, arXiv:2309.06180). Position ``p`` of a sequence lives in block
``table[p // block_size]`` at offset ``p % block_size``.

No array grows with the context: keys come tile by tile, and beside the sums of weighted values stand the
largest score so far and the sum of the weights, both corrected when a larger score comes (Milakov &
Gimelshein, 2018, arXiv:1805.02867; Dao et al., 2022, arXiv:2205.14135). Two parts do this, of which another
kind of cache can use the second as it is:

``gather(blocks, table, positions, out)``
    copies positions of one sequence out of their blocks.
``attend(q, position, tiles, out, ...)``
    attends from consecutive queries over whatever ``tiles(first, position, last, heads)`` yields: for every
    tile of ``KEY_TILE`` positions that meets ``range(first, last)``, in order, a ``KeyTile`` of keys and
    values. It must yield the same numbers for a position whatever the range is. Where different queries see
    different numbers at one position, it yields a tile for each, and hides from a query what is another's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from math import ldexp, prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refengine.ops.arrays import FloatArray, IndexArray
from refengine.ops.matmul import matmul_columns, matmul_workspace
from refengine.ops.registry import op
from refengine.ops.scratch import Scratch, aligned

KEY_TILE = 192
"""Keys multiplied and summed at once. Tiles begin at multiples of this position, so that a key is always
added in the same order, however the sequence was cut into steps."""

QUERY_TILE = 128
"""Queries treated at once, or fewer: so many that they make about ``COLUMN_TILE`` columns."""

COLUMN_TILE = 256
"""Columns of a product: one per query, and query head of a key head."""

HEAD_TILE = 8
"""Key heads treated at once."""

ROW_MULTIPLE = 48
"""Rows of the value operand are padded to this: a common multiple of the register blocks (12, 16, 24) of
BLAS kernels, for which wide calls agree with narrow ones (see ``matmul``)."""


class LayerCache(NamedTuple):
    """One layer's ``keys`` and ``values``, each ``[blocks, block_size, kv_heads, head_size]``.

    They may be strided views: memory of other layers may lie between two blocks.
    """

    keys: FloatArray
    values: FloatArray


class KeyTile(NamedTuple):
    """Keys and values of ``KEY_TILE`` positions from ``start`` on, zero where they are not seen.

    ``keys`` are ``[KEY_TILE, g, D]`` and ``values`` ``[KEY_TILE, g, value_width(D)]``, for some key heads;
    element ``D`` of the values is one, and those behind it zero. ``hides`` tells what some queries do not
    see, beside later positions and those before their windows. A tile holds until the next one is asked for.
    """

    start: int
    keys: FloatArray
    values: FloatArray
    hides: Hides | None = None


Hides = Callable[[NDArray[np.integer], NDArray[np.integer], NDArray[np.bool_]], object]
"""``hides(key_position, query_position, out)`` makes ``out`` true where the query does not see the key."""

Tiles = Callable[[int, int, int, slice], Iterator[KeyTile]]
"""``tiles(first, position, last, heads)``: the tiles that hold positions ``first`` to ``last - 1``, of these
key heads, for queries at ``position`` to ``last - 1``."""


@op("cache[B, P, G, D], k[T, G, D], v[T, G, D], slot_mapping[T] -> [B, P, G, D]", sharing="state")
def kv_write(cache: LayerCache, k: FloatArray, v: FloatArray, slot_mapping: IndexArray) -> LayerCache:
    """Store token ``t``'s key and value in slot ``slot_mapping[t]``; gives the changed cache.

    Keys are stored after rotation. A slot is written once per step at most. What the cache's dtype cannot
    hold is stored as NaN: an infinite key would drop out of the softmax unseen.

    Clauses: ATT-6, ATT-7.
    """
    block, offset = np.divmod(slot_mapping, cache.keys.shape[1])
    for blocks, new in ((cache.keys, k), (cache.values, v)):
        with np.errstate(over="ignore"):
            blocks[block, offset] = new
        if blocks.dtype.itemsize < new.dtype.itemsize:
            most = _overflow(blocks.dtype)
            if new.max() >= most or new.min() <= -most:
                blocks[block, offset] = np.where(np.abs(new) < most, new, np.nan)
    return cache


def _overflow(dtype: np.dtype[np.floating]) -> float:
    """From here on numbers round to infinity: half a unit above the largest."""
    limits = np.finfo(dtype)
    return ldexp(1 - float(limits.eps) / 4, int(limits.maxexp))


def attend_workspace(
    shapes: Sequence[tuple[int, ...] | None], attributes: Mapping[str, Any], itemsize: int
) -> int:
    """Of as many queries and key heads as are treated at once, the tile of keys and values among them."""
    q, cache = shapes[0], shapes[1]
    if q is None or cache is None:
        return 0
    (tokens, heads, size), kv_heads = q, cache[2]
    group, at_once = heads // kv_heads, min(kv_heads, HEAD_TILE)
    columns, rows = min(tokens, _queries_at_once(group)) * group, value_width(size)

    def array(*shape: int) -> int:
        return aligned(prod(shape) * itemsize)

    scores = array(at_once, KEY_TILE, columns)
    scoring = max(aligned(KEY_TILE * columns), matmul_workspace(at_once, KEY_TILE, size, columns, itemsize))
    adding = array(at_once, rows, columns) + matmul_workspace(at_once, rows, KEY_TILE, columns, itemsize)
    return (
        array(KEY_TILE, at_once, size)
        + array(KEY_TILE, at_once, rows)
        + array(at_once, columns, size)
        + array(at_once, rows, columns)
        + array(at_once, 1, columns)
        + scores
        + 2 * array(at_once, 1, columns)
        + max(scoring, adding)
    )


@op(
    "q[T, H, D], cache[B, P, G, D], block_tables[S, M], query_starts[S1], context_lens[S] -> [T, H, D]",
    workspace=attend_workspace,
)
def attention(
    q: FloatArray,
    cache: LayerCache,
    block_tables: IndexArray,
    query_starts: IndexArray,
    context_lens: IndexArray,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    out: FloatArray | None = None,
    scratch: Scratch | None = None,
) -> FloatArray:
    """Causal softmax attention of each sequence's queries over its own cached keys.

    Rows ``query_starts[s]`` to ``query_starts[s+1]`` of ``q`` are the last tokens of sequence ``s``, whose
    context (these tokens included) has ``context_lens[s]`` positions. Query head ``h`` reads key head
    ``h // (H / G)``. A query at position ``p`` sees keys at positions ``j`` with ``p - window < j <= p``;
    memory of any other position is never read. Entries of ``block_tables`` for blocks outside every
    window may be anything.

    ``score[j] = softcap(scale · (q · k[j]))`` and
    ``y = Σ_j exp(score[j] - max) · v[j] / Σ_j exp(score[j] - max)``, summed tile by tile (``KEY_TILE``) in
    order of position, with the largest score so far for ``max``.

    Clauses: ATT-1, ATT-2, ATT-3, ATT-4, ATT-5, ATT-6, ATT-8, ATT-9, ATT-10, ATT-11, ATT-12, ATT-13, ATT-14.
    """
    scratch = scratch or Scratch()
    if out is None:
        out = np.empty_like(q)
    for sequence, context in enumerate(context_lens):
        start, stop = int(query_starts[sequence]), int(query_starts[sequence + 1])
        attend(
            q[start:stop],
            int(context) - (stop - start),
            paged_tiles(cache, block_tables[sequence], q.dtype, scratch),
            out[start:stop],
            kv_heads=cache.keys.shape[2],
            scale=scale,
            window=window,
            softcap=softcap,
            scratch=scratch,
        )
    return out


def attend(
    q: FloatArray,
    position: int,
    tiles: Tiles,
    out: FloatArray,
    *,
    kv_heads: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    scratch: Scratch,
) -> None:
    """Attention of consecutive queries ``q[N, H, D]`` of one sequence, the first at ``position``.

    Works on some queries and some key heads at a time. What a query gets does not depend on which: it sees
    the same tiles in the same order, and its columns of every product have the bits they would have alone.
    """
    group = q.shape[1] // kv_heads
    step = _queries_at_once(group)
    for top, head in product(range(0, len(q), step), range(0, kv_heads, HEAD_TILE)):
        heads = slice(head, min(head + HEAD_TILE, kv_heads))
        query_heads = slice(heads.start * group, heads.stop * group)

        def stands(rows: slice, heads: slice = heads, query_heads: slice = query_heads) -> bool:
            part = q[rows, query_heads], out[rows, query_heads]
            return _attend(*part, position + rows.start, tiles, heads, scale, window, softcap, scratch)

        bottom = min(top + step, len(q))
        with np.errstate(over="ignore", invalid="ignore"):
            if not stands(slice(top, bottom)):
                # 0 · inf is not 0: a non-finite value may spoil only the queries that see it.
                for row in range(top, bottom):
                    stands(slice(row, row + 1))


def paged_tiles(
    cache: LayerCache, table: IndexArray, dtype: np.dtype[np.floating], scratch: Scratch
) -> Tiles:
    """The tiles of one sequence, gathered from a cache into ``scratch``, one at a time."""
    size = cache.keys.shape[3]

    def tiles(first: int, position: int, last: int, heads: slice) -> Iterator[KeyTile]:
        count = heads.stop - heads.start
        keys = scratch.zeros((KEY_TILE, count, size), dtype)
        values = scratch.zeros((KEY_TILE, count, value_width(size)), dtype)
        for start in range(first // KEY_TILE * KEY_TILE, last, KEY_TILE):
            seen = range(max(first, start), min(last, start + KEY_TILE))
            rows = slice(seen.start - start, seen.stop - start)
            for array in (keys, values):
                array[: rows.start] = array[rows.stop :] = 0
            gather(cache.keys[:, :, heads], table, seen, keys[rows])
            gather(cache.values[:, :, heads], table, seen, values[rows, :, :size])
            values[rows, :, size] = 1
            yield KeyTile(start, keys, values)

    return tiles


def gather(blocks: FloatArray, table: IndexArray, positions: range, out: FloatArray) -> None:
    """Copy positions of a sequence out of ``blocks[B, P, g, D]`` into the rows of ``out``."""
    block_size, done = blocks.shape[1], 0
    while done < len(positions):
        number, offset = divmod(positions[done], block_size)
        count = min(block_size - offset, len(positions) - done)
        out[done : done + count] = blocks[table[number], offset : offset + count]
        done += count


def value_width(head_size: int) -> int:
    """Rows of the value operand: a head's elements, one for the sum of the weights, and padding."""
    return -(-(head_size + 1) // ROW_MULTIPLE) * ROW_MULTIPLE


def _queries_at_once(group: int) -> int:
    return min(QUERY_TILE, -(-COLUMN_TILE // group))


def _attend(
    q: FloatArray,
    out: FloatArray,
    position: int,
    tiles: Tiles,
    heads: slice,
    scale: float,
    window: int | None,
    softcap: float | None,
    scratch: Scratch,
) -> bool:
    """Attention of all of these queries at once, over some key heads.

    Returns:
        Whether the results stand: not, where one is not finite and may be another query's.
    """
    queries, size, kv_heads = len(q), q.shape[2], heads.stop - heads.start
    group, dtype = q.shape[1] // kv_heads, q.dtype
    seen_from = 0 if window is None else max(0, position - window + 1)
    with scratch.frame():
        # One column per query and head; the heads that share a key head stand side by side.
        columns = scratch.empty((kv_heads, queries, group, size), dtype)
        columns[...] = q.reshape(queries, kv_heads, group, size).transpose(1, 0, 2, 3)
        columns = columns.reshape(kv_heads, queries * group, size).swapaxes(1, 2)
        sums = scratch.zeros((kv_heads, value_width(size), queries * group), dtype)
        largest = scratch.empty((kv_heads, 1, queries * group), dtype)
        largest.fill(np.finfo(dtype).min)
        for tile in tiles(seen_from, position, position + queries, heads):
            # The queries that see anything of this tile; only their sums are touched.
            first = max(0, tile.start - position)
            last = queries if window is None else min(queries, tile.start + KEY_TILE + window - 1 - position)
            part = slice(first * group, last * group)
            query_position = np.repeat(np.arange(position + first, position + last), group)
            with scratch.frame():
                scores = scratch.empty((kv_heads, KEY_TILE, (last - first) * group), dtype)
                _score(tile, columns[..., part], query_position, scores, scale, window, softcap, scratch)
                _add(tile, scores, largest[..., part], sums[..., part], scratch)
        weight = largest  # its memory: a quotient's operand must not lie in its result's array
        weight[...] = sums[:, size : size + 1]
        np.divide(sums[:, :size], weight, out=sums[:, :size])
        attended = sums[:, :size].reshape(kv_heads, size, queries, group)
        out.reshape(queries, kv_heads, group, size)[...] = attended.transpose(2, 0, 3, 1)
        return queries == 1 or bool(np.isfinite([attended.min(), attended.max()]).all())


def _score(
    tile: KeyTile,
    columns: FloatArray,
    query_position: IndexArray,
    scores: FloatArray,
    scale: float,
    window: int | None,
    softcap: float | None,
    scratch: Scratch,
) -> None:
    """Scores ``[g, KEY_TILE, columns]`` of a tile, minus infinity where a query does not see the key."""
    kind = scores.dtype.type
    matmul_columns(tile.keys.transpose(1, 0, 2), columns, order="F", out=scores, scratch=scratch)
    scores *= kind(scale)
    if softcap is not None:
        scores /= kind(softcap)
        np.tanh(scores, out=scores)
        scores *= kind(softcap)
    key_position = np.arange(tile.start, tile.start + KEY_TILE)
    with scratch.frame():
        hidden = scratch.empty(scores.shape[1:], np.bool_)
        if key_position[-1] > query_position[0]:
            later = np.greater(key_position[:, None], query_position, out=hidden)
            np.copyto(scores, -np.inf, where=later)
        if window is not None and key_position[0] <= query_position[-1] - window:
            passed = np.less_equal(key_position[:, None], query_position - window, out=hidden)
            np.copyto(scores, -np.inf, where=passed)
        if tile.hides is not None:
            tile.hides(key_position[:, None], query_position, hidden)
            np.copyto(scores, -np.inf, where=hidden)


def _add(tile: KeyTile, scores: FloatArray, largest: FloatArray, sums: FloatArray, scratch: Scratch) -> None:
    """Add a tile's weighted values, and their weights, to the sums under the largest score so far."""
    risen, shrink = (scratch.empty(largest.shape, largest.dtype) for _ in range(2))
    np.maximum(largest, np.max(scores, axis=1, keepdims=True, out=risen), out=risen)
    np.exp(np.subtract(largest, risen, out=shrink), out=shrink)  # what was added before weighs less now
    largest[...] = risen
    scores -= largest
    weights = np.exp(scores, out=scores)  # a hidden key's weight is exactly zero
    sums *= shrink
    with scratch.frame():
        added = scratch.empty(sums.shape, sums.dtype)
        matmul_columns(tile.values.transpose(1, 2, 0), weights, out=added, scratch=scratch)
        sums += added
