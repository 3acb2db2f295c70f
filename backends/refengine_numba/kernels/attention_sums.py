"""Running sums of attention: how they lie in memory, and how finished ones are folded."""

from __future__ import annotations

from typing import Any

import numpy as np

from refengine_numba.kernels.attention_sizes import BLOCK, TOP, blocks_of, sums_size
from refengine_numba.kernels.compilation import part
from refengine_numba.kernels.functions import exp
from refengine_numba.kernels.lanes import store_first, where_less
from refengine_numba.kernels.vectors import fma, load_f32, splat_f32, store

FANOUT = 4
"""Finished sums that are folded into one of the next level."""

LOWEST = np.float32(np.finfo(np.float32).min)
"""The greatest score of nothing."""


@part
def clear(work: Any, at: int, pairs: int, width: int) -> None:
    """Sums over nothing."""
    for i in range(0, pairs * width, 16):
        store(work, at + i, splat_f32(0.0))
    greatest = at + pairs * width
    for i in range(0, 16 * blocks_of(pairs), 16):
        store(work, greatest + i, splat_f32(LOWEST))
        store(work, greatest + 16 * blocks_of(pairs) + i, splat_f32(0.0))


@part
def copy(work: Any, source: int, target: int, pairs: int, width: int) -> None:
    """Running sums to another place."""
    for i in range(0, sums_size(pairs, width), 16):
        store(work, target + i, load_f32(work, source + i))


@part
def fold(work: Any, source: int, target: int, pairs: int, width: int, factors: int) -> None:
    """Fold sums at ``source`` into those at ``target``, which come before; 32 floats from ``factors`` on."""
    blocks = blocks_of(pairs)
    for block in range(blocks):
        here = pairs * width + 16 * block
        old, new = load_f32(work, target + here), load_f32(work, source + here)
        greatest = where_less(old, new, new, old)
        shrink, weight = exp(old - greatest), exp(new - greatest)
        here_sum = here + 16 * blocks
        total = fma(load_f32(work, source + here_sum), weight, load_f32(work, target + here_sum) * shrink)
        store(work, target + here, greatest)
        store(work, target + here_sum, total)
        store(work, factors, shrink)
        store(work, factors + 16, weight)
        for pair in range(block * BLOCK, min(pairs, block * BLOCK + BLOCK)):
            a = splat_f32(work[factors + pair - block * BLOCK])
            b = splat_f32(work[factors + 16 + pair - block * BLOCK])
            for i in range(pair * width, (pair + 1) * width, 16):
                store(
                    work,
                    target + i,
                    fma(load_f32(work, source + i), b, load_f32(work, target + i) * a),
                )


@part
def carry(
    work: Any,
    states: int,
    stride: int,
    pairs: int,
    width: int,
    level: int,
    child: int,
    first: int,
    last: int,
    factors: int,
) -> int:
    """Fold the finished sums of a ``level``'s stretch ``child`` into the levels above, as far as they go.

    The sums of level l are at ``states + l · stride``; stretches are ``first`` to ``last``, in turn.

    Returns:
        After the last one, the level that holds the sums of all.
    """
    while first != last and level < TOP:
        source = states + level * stride
        if child == first or (level + 1 < TOP and child % FANOUT == 0):
            copy(work, source, source + stride, pairs, width)
        else:
            fold(work, source, source + stride, pairs, width, factors)
        if child != last and not (level + 1 < TOP and child % FANOUT == FANOUT - 1):
            break
        child, first, last, level = child // FANOUT, first // FANOUT, last // FANOUT, level + 1
    return level


@part
def finish(work: Any, at: int, pairs: int, group: int, sizes: Any, row: int, kv_head: int, y: Any) -> None:
    """Divide sums of values by sums of weights, and write them; pair i is of row ``row + i // group``."""
    width = sizes.width
    totals = at + pairs * width + 16 * blocks_of(pairs)
    for i in range(pairs):
        total = splat_f32(work[totals + i // BLOCK * 16 + i % BLOCK])
        where = ((row + i // group) * sizes.heads + kv_head * group + i % group) * sizes.size
        for d in range(0, sizes.size, 16):
            # Zeros that were added or not must not show: zero has one sign.
            mean = load_f32(work, at + i * width + d) / total + splat_f32(0.0)
            store_first(y, where + d, min(16, sizes.size - d), mean)
