"""How much memory attention takes, and how a thread's scratch is cut up."""

from __future__ import annotations

from typing import NamedTuple

TILE = 64
"""Positions whose keys and values are multiplied at once."""

BLOCK = 6
"""Pairs multiplied at once."""

PAIRS = 96
"""Pairs of one key head treated together at most, or one row, where its group is larger."""


SLOTS = 32
"""Stretches at most, into which the context of a row is shared out."""

TOP = 5
"""The level whose stretches are not cut any more: all of 4⁴ partitions are folded in order."""

TILE_WORDS = 24
"""Words of arguments of entries that load a tile, and of :func:`tile_entry`, and some more."""


OWN = 19
"""Where among attention's arguments those begin that only the loading entry reads."""


class Sizes(NamedTuple):
    """What does not change from step to step.

    Attributes:
        heads: H.
        kv_heads: G.
        size: D.
        width: D rounded up to whole vectors.
        window: positions that a query sees; a number larger than any position for all.
        cut: rows treated together lie in one stretch of so many positions; 0: wherever.
    """

    heads: int
    kv_heads: int
    size: int
    width: int
    window: int
    cut: int


def blocks_of(pairs: int) -> int:
    """Blocks of pairs."""
    return (pairs + BLOCK - 1) // BLOCK


def sums_size(pairs: int, width: int) -> int:
    """Floats of running sums.

    ``width`` for each pair; for each block of pairs 16 greatest scores; 16 sums of weights for each.
    """
    blocks: int = blocks_of(pairs)
    return pairs * width + 32 * blocks


def parts_of(pairs: int, width: int) -> tuple[int, int, int, int, int]:
    """Where in a thread's scratch values, scores, factors, q and running sums begin, after the keys."""
    scores = 2 * TILE * width
    queries = scores + BLOCK * TILE + 64
    return TILE * width, scores, scores + BLOCK * TILE, queries, queries + pairs * width


def scratch_size(sizes: Sizes) -> int:
    """Floats of a thread: keys, values, scores, factors, q, sums of every level, and where rows lie."""
    group = sizes.heads // sizes.kv_heads
    pairs = max(1, PAIRS // group) * group
    _, _, _, _, states = parts_of(pairs, sizes.width)
    size: int = states + (TOP + 1) * sums_size(pairs, sizes.width) + 2 * (2 * TILE + TILE_WORDS)
    return size


def slot_rows(sizes: Sizes, threads: int) -> int:
    """Rows at most, whose contexts are shared out."""
    return (4 * threads - 1) // sizes.kv_heads if threads > 1 else 0


def workspace_bytes(tokens: int, heads: int, kv_heads: int, head_size: int, threads: int) -> int:
    """Working memory of attention for steps of up to so many tokens and threads, whatever the contexts."""
    width = -(-head_size // 16) * 16
    sizes = Sizes(heads, kv_heads, head_size, width, 1, 0)
    slots = min(tokens, slot_rows(sizes, threads)) * kv_heads * SLOTS
    floats: int = threads * scratch_size(sizes) + slots * sums_size(heads // kv_heads, width)
    return 4 * floats
