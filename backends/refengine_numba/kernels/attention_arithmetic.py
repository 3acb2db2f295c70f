"""What attention does with a tile in scratch: scores, weights, sums of weighted values. See :mod:`attention`.

This is an entry of its own, called by address: it is compiled once, whatever tiles are loaded from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refengine_numba.kernels.attention_lanes import greatest_lane, hide, score_block, value_block
from refengine_numba.kernels.attention_sizes import BLOCK, TILE, blocks_of, parts_of
from refengine_numba.kernels.attention_tiles import all_finite_rows
from refengine_numba.kernels.compilation import Compiled, entry, inlined, part
from refengine_numba.kernels.entry import SIGNATURE, floats_at
from refengine_numba.kernels.functions import exp, tanh
from refengine_numba.kernels.lanes import sum_of_lanes, where_less
from refengine_numba.kernels.vectors import float_of_bits, fma, load_f32, splat_f32, store


def multiply_keys(isa: str, work: Any, keys: int, q: int, size: int, scores: int, rows: int) -> None:
    """Scores [rows, TILE] of up to :data:`BLOCK` rows of q [size, rows]."""
    raise NotImplementedError


@inlined(multiply_keys)
def _multiply_keys(isa: Any) -> Callable[..., Any]:
    vectors = vectors_of(isa.literal_value)

    def multiply(isa: str, work: Any, keys: int, q: int, size: int, scores: int, rows: int) -> None:
        for i in range(0, TILE, 16 * vectors):
            if rows == 6:
                score_block(work, keys + i, q, size, scores + i, 6, vectors)
            elif rows == 5:
                score_block(work, keys + i, q, size, scores + i, 5, vectors)
            elif rows == 4:
                score_block(work, keys + i, q, size, scores + i, 4, vectors)
            elif rows == 3:
                score_block(work, keys + i, q, size, scores + i, 3, vectors)
            elif rows == 2:
                score_block(work, keys + i, q, size, scores + i, 2, vectors)
            else:
                score_block(work, keys + i, q, size, scores + i, 1, vectors)

    return multiply


def vectors_of(isa: str) -> int:
    """Vectors multiplied with each factor of a block: 24 sums fit 32 registers, 6 in halves fit 16."""
    return 4 if isa.startswith("avx512") else 1


@part
def add_columns(
    work: Any,
    values: int,
    width: int,
    weights: int,
    first: int,
    last: int,
    sums: int,
    factors: int,
    rows: int,
    vectors: int,
) -> None:
    """:func:`value_block` of up to :data:`BLOCK` rows."""
    if rows == 6:
        value_block(work, values, width, weights, first, last, sums, factors, 6, vectors)
    elif rows == 5:
        value_block(work, values, width, weights, first, last, sums, factors, 5, vectors)
    elif rows == 4:
        value_block(work, values, width, weights, first, last, sums, factors, 4, vectors)
    elif rows == 3:
        value_block(work, values, width, weights, first, last, sums, factors, 3, vectors)
    elif rows == 2:
        value_block(work, values, width, weights, first, last, sums, factors, 2, vectors)
    else:
        value_block(work, values, width, weights, first, last, sums, factors, 1, vectors)


def add_values(
    isa: str,
    work: Any,
    values: int,
    width: int,
    weights: int,
    first: int,
    last: int,
    sums: int,
    factors: int,
    rows: int,
) -> None:
    """Add weighted values of keys ``first`` to ``last - 1`` of a tile to sums [rows, width]."""
    raise NotImplementedError


@inlined(add_values)
def _add_values(isa: Any) -> Callable[..., Any]:
    wide = vectors_of(isa.literal_value)

    def add(
        isa: str,
        work: Any,
        values: int,
        width: int,
        weights: int,
        first: int,
        last: int,
        sums: int,
        factors: int,
        rows: int,
    ) -> None:
        column = 0
        while column + 16 * wide <= width:
            add_columns(
                work, values + column, width, weights, first, last, sums + column, factors, rows, wide
            )
            column += 16 * wide
        while column < width:
            add_columns(work, values + column, width, weights, first, last, sums + column, factors, rows, 1)
            column += 16

    return add


@part
def larger(a: Any, b: Any) -> Any:
    """The larger lanes; b where a is NaN."""
    return where_less(b, a, a, b)


@part
def capped(score: Any, softcap: float) -> Any:
    """``softcap · tanh(score / softcap)``."""
    cap = splat_f32(softcap)
    return cap * tanh(score / cap)


@part
def weigh(
    work: Any,
    scores: int,
    rows: int,
    scale: float,
    softcap: float,
    window: int,
    start: int,
    ragged: bool,
    position: int,
    pair: int,
    group: int,
    greatest: int,
    totals: int,
    factors: int,
) -> None:
    """Turn a block's scores [rows, TILE] into weights.

    Args:
        work: scratch.
        scores: where they are.
        rows: pairs of the block.
        scale: of scores.
        softcap: 0 for none.
        window: positions that a query sees.
        start: the tile's first position.
        ragged: whether some pair does not see all of the tile.
        position: of pair 0.
        pair: the block's first one.
        group: pairs of a row.
        greatest: where the block's 16 greatest scores are.
        totals: where its 16 sums of weights are.
        factors: where to put what sums so far are multiplied by: 16; 32 more are used.
    """
    scales = splat_f32(scale)
    for i in range(rows):
        at = scores + i * TILE
        a, b = load_f32(work, at) * scales, load_f32(work, at + 16) * scales
        c, d = load_f32(work, at + 32) * scales, load_f32(work, at + 48) * scales
        if softcap != 0:
            a, b = capped(a, softcap), capped(b, softcap)
            c, d = capped(c, softcap), capped(d, softcap)
        if ragged:
            p = position + (pair + i) // group
            first = first_seen(p, window)
            a, b = hide(a, start, first, p + 1), hide(b, start + 16, first, p + 1)
            c, d = hide(c, start + 32, first, p + 1), hide(d, start + 48, first, p + 1)
        before = splat_f32(work[greatest + i])
        top = greatest_lane(larger(larger(a, larger(b, before)), larger(c, larger(d, before))))
        most = splat_f32(top)
        a, b, c, d = exp(a - most), exp(b - most), exp(c - most), exp(d - most)
        store(work, at, a)
        store(work, at + 16, b)
        store(work, at + 32, c)
        store(work, at + 48, d)
        work[factors + 16 + i] = top
        work[factors + 32 + i] = sum_of_lanes((a + b) + (c + d))
    risen = load_f32(work, factors + 16)
    shrink = exp(load_f32(work, greatest) - risen)
    store(work, factors, shrink)
    store(work, greatest, risen)
    store(work, totals, fma(load_f32(work, totals), shrink, load_f32(work, factors + 32)))


@part
def first_seen(position: int, window: int) -> int:
    """The first position that a query sees."""
    return max(0, position - window + 1)


def tile_entry(isa: str) -> Compiled:
    """Add a tile to the running sums of some pairs. Not for threads: who calls it has the scratch.

    Arguments: scratch, floats of it, pairs, pairs of a row, head size D, window, scale and softcap (bits),
    position of the first pair; the tile's first position, the first and the one after the last that some pair
    sees, and the position after the last pair's. For entries that load a tile besides: where the op's own
    arguments are; number of the sequence and of the key head; how many tiles were loaded before for these
    pairs; the position where tiles for them end.
    """

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        work = floats_at(a[0], a[1])
        pairs, group, size, window, position = a[2], a[3], a[4], a[5], a[8]
        scale, softcap = float_of_bits(np.int32(a[6])), float_of_bits(np.int32(a[7]))
        start, first, last, end = a[9], a[10], a[11], a[12]
        width = (size + 15) // 16 * 16
        values, scores, factors, queries, states = parts_of(pairs, width)
        greatest = states + pairs * width
        totals = greatest + 16 * blocks_of(pairs)
        ragged = position < start + TILE - 1 or end - window > start
        marred = (last - 1 > position or end - window > first) and not all_finite_rows(
            work, values + (first - start) * width, (last - first) * width
        )
        for pair in range(0, pairs, BLOCK):
            rows, block = min(BLOCK, pairs - pair), pair // BLOCK * 16
            multiply_keys(isa, work, 0, queries + pair * size, size, scores, rows)
            weigh(
                work,
                scores,
                rows,
                scale,
                softcap,
                window,
                start,
                ragged,
                position,
                pair,
                group,
                greatest + block,
                totals + block,
                factors,
            )
            # 0 · inf is NaN: where that can be, every pair meets only what it sees.
            at_once = 1 if marred else rows
            for i in range(rows if marred else 1):
                low, high = first, last
                if marred:
                    p = position + (pair + i) // group
                    low = max(first, first_seen(p, window))
                    high = max(low, min(last, p + 1))
                add_values(
                    isa,
                    work,
                    values,
                    width,
                    scores + i * TILE,
                    low - start,
                    high - start,
                    states + (pair + i) * width,
                    factors + i,
                    at_once,
                )

    return run
