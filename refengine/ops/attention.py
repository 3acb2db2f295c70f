"""Paged attention: writing keys and values into blocks, and attending through block tables.

A sequence's keys and values lie in fixed-size blocks anywhere in the cache; its block table names them in
order (Kwon et al., 2023, arXiv:2309.06180). Position ``p`` of a sequence lives in slot
``table[p // block_size] · block_size + p % block_size``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refengine.ops.arrays import FloatArray, IndexArray
from refengine.ops.matmul import matmul_columns
from refengine.ops.registry import op

KEY_TILE = 192
"""Keys multiplied and summed at once. The tiles of a sequence begin at fixed positions, so that a key is
always added in the same order, however the sequence was cut into steps."""

QUERY_TILE = 128
"""Queries treated at once: bounds the scores held to ``heads · QUERY_TILE · context`` numbers."""

ROW_MULTIPLE = 48
"""Rows of the value operand are padded to this: a common multiple of the register blocks (12, 16, 24) of
BLAS kernels, for which wide calls agree with narrow ones (see ``matmul``)."""


class LayerCache(NamedTuple):
    """One layer's ``keys`` and ``values``, each ``[blocks, block_size, kv_heads, head_size]``."""

    keys: FloatArray
    values: FloatArray


@op("cache[B, P, G, D], k[T, G, D], v[T, G, D], slot_mapping[T] -> [B, P, G, D]", sharing="state")
def kv_write(cache: LayerCache, k: FloatArray, v: FloatArray, slot_mapping: IndexArray) -> LayerCache:
    """Store token ``t``'s key and value in slot ``slot_mapping[t]``; gives the changed cache.

    Keys are stored after rotation. A slot is written once per step at most.

    Clauses: ATT-6, ATT-7.
    """
    for blocks, new in ((cache.keys, k), (cache.values, v)):
        blocks.reshape(-1, *blocks.shape[2:])[slot_mapping] = new
    return cache


@op(
    "q[T, H, D], cache[B, P, G, D], block_tables[S, M], query_starts[S1], context_lens[S] -> [T, H, D]",
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
) -> FloatArray:
    """Causal softmax attention of each sequence's queries over its own cached keys.

    Rows ``query_starts[s]`` to ``query_starts[s+1]`` of ``q`` are the last tokens of sequence ``s``, whose
    context (these tokens included) has ``context_lens[s]`` positions. Query head ``h`` reads key head
    ``h // (H / G)``. A query at position ``p`` sees keys at positions ``j`` with ``p - window < j <= p``;
    memory of any other position is never read. Entries of ``block_tables`` for blocks outside every
    window may be anything.

    ``score[j] = softcap(scale · (q · k[j]))`` and
    ``y = Σ_j exp(score[j] - max) · v[j] / Σ_j exp(score[j] - max)``, summed tile by tile (``KEY_TILE``) in
    order of position.

    Clauses: ATT-1, ATT-2, ATT-3, ATT-4, ATT-5, ATT-6, ATT-8, ATT-9, ATT-10, ATT-11, ATT-12, ATT-13, ATT-14.
    """
    if out is None:
        out = np.empty_like(q)
    for sequence, context in enumerate(context_lens):
        start, stop = int(query_starts[sequence]), int(query_starts[sequence + 1])
        first_position = int(context) - (stop - start)
        for top in range(start, stop, QUERY_TILE):
            bottom = min(top + QUERY_TILE, stop)
            _attend(
                q[top:bottom],
                cache,
                block_tables[sequence],
                first_position + top - start,
                scale,
                window,
                softcap,
                out[top:bottom],
            )
    return out


def _attend(
    q: FloatArray,
    cache: LayerCache,
    block_table: IndexArray,
    position: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    out: FloatArray,
) -> None:
    """Attention of consecutive queries of one sequence, the first at ``position``; ``q`` is ``[N, H, D]``."""
    queries, heads, size = q.shape
    kv_heads = cache.keys.shape[2]
    seen_from = 0 if window is None else max(0, position - window + 1)
    seen_to = position + queries
    first_tile, tiles = seen_from // KEY_TILE, -(-seen_to // KEY_TILE) - seen_from // KEY_TILE
    base = first_tile * KEY_TILE

    keys, values = _gather(cache, block_table, seen_from, seen_to, base, tiles)
    # One column per query and head; the heads that share a key head stand side by side.
    columns = q.reshape(queries, kv_heads, -1, size).transpose(1, 3, 0, 2).reshape(kv_heads, 1, size, -1)

    scores = matmul_columns(keys, columns)  # [G, tiles, KEY_TILE, columns]
    scores *= q.dtype.type(scale)
    if softcap is not None:
        scores /= q.dtype.type(softcap)
        np.tanh(scores, out=scores)
        scores *= q.dtype.type(softcap)
    key_position = (base + np.arange(tiles * KEY_TILE)).reshape(tiles, KEY_TILE, 1)
    query_position = np.repeat(position + np.arange(queries), heads // kv_heads)
    hidden = key_position > query_position
    if window is not None:
        hidden |= key_position <= query_position - window
    np.putmask(scores, np.broadcast_to(hidden, scores.shape), -np.inf)

    scores -= scores.max(axis=(1, 2), keepdims=True)
    weights = np.exp(scores, out=scores)  # a hidden key's weight is exactly zero
    sums = np.zeros((kv_heads, values.shape[-2], columns.shape[-1]), q.dtype)
    for tile in range(tiles):
        sums += matmul_columns(values[:, tile], weights[:, tile])
    attended = sums[:, :size] / sums[:, size : size + 1]  # the row of ones has summed the weights

    if queries > 1 and not np.isfinite(attended).all():
        # 0 · inf is not 0: a non-finite value may spoil only the queries that see it.
        for query in range(queries):
            row = slice(query, query + 1)
            _attend(q[row], cache, block_table, position + query, scale, window, softcap, out[row])
        return
    out[...] = (
        attended.reshape(kv_heads, size, queries, -1).transpose(2, 0, 3, 1).reshape(queries, heads, size)
    )


def _gather(
    cache: LayerCache,
    block_table: IndexArray,
    seen_from: int,
    seen_to: int,
    base: int,
    tiles: int,
) -> tuple[FloatArray, FloatArray]:
    """Copy the seen positions out of their blocks into whole tiles, the rest zero.

    Returns keys ``[G, tiles, KEY_TILE, D]`` and values ``[G, tiles, D', KEY_TILE]``, where row ``D`` of the
    values is ones and the rows up to ``D'`` are zero.
    """
    _, block_size, kv_heads, size = cache.keys.shape
    seen = np.arange(seen_from, seen_to)
    slots = block_table[seen // block_size] * block_size + seen % block_size
    span = slice(seen_from - base, seen_to - base)

    keys = np.zeros((tiles * KEY_TILE, kv_heads, size), cache.keys.dtype)
    keys[span] = cache.keys.reshape(-1, kv_heads, size)[slots]
    padded_size = -(-(size + 1) // ROW_MULTIPLE) * ROW_MULTIPLE
    values = np.zeros((tiles * KEY_TILE, kv_heads, padded_size), cache.values.dtype)
    values[span, :, :size] = cache.values.reshape(-1, kv_heads, size)[slots]
    values[span, :, size] = 1
    return (
        keys.reshape(tiles, KEY_TILE, kv_heads, size).transpose(2, 0, 1, 3),
        values.reshape(tiles, KEY_TILE, kv_heads, padded_size).transpose(2, 0, 3, 1),
    )
