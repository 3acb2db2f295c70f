"""Paged attention: the order of its arithmetic, and the kernels that keep it.

A *pair* is a row of q and one of its heads. Pairs of one key head are treated together, whether they are
the group of a single row or many rows of a prompt: the arithmetic is the same code. For a pair, the context
is cut at multiples of ``TILE`` positions into tiles, and what is computed depends on positions alone:

- a score is one chain of fused multiply-adds from zero over the elements of the head, times the scale; with a
  softcap ``c``, then ``c · tanh(score / c)``
- *running sums* are the greatest score so far, the sum of weights, and the sums of weighted values. A tile's
  greatest score may raise the first; then both others are multiplied by the exponential of the difference.
  Weights ``exp(score - greatest)`` are summed in 16 chains by position modulo 16, and the chains as a tree;
  values in one chain for each element, in order of position
- running sums begin anew at multiples of :data:`PARTITION` positions. Finished ones are folded four by four,
  in order: partitions to stretches of 1,024 positions, these to 4,096, and so on up to 65,536; of these, all
  there are are folded in order. What is folded is brought to the greater of both greatest scores

Sums over nothing (greatest score: the lowest number; zeros) change nothing when folded, bit by bit. So it
does not matter which partitions are left out because nobody sees them, nor where a thread begins: finished
sums of a stretch are the same whoever computes them, and threads can share out the context of a single row.

Tiles are loaded by an entry called by address (``load_entry`` in :mod:`attention_loading`), which leaves a
tile's keys and values as float32 in scratch, whatever they are stored as; all arithmetic is that of
``tile_entry`` in :mod:`attention_arithmetic`. Both take the words told there. In a scratch ``work``:

- element d of the key at position ``start + i`` goes to ``work[d · TILE + i]``, for i < TILE
- element d of its value to ``work[values + i · width + d]``, ``values`` being the first of :func:`parts_of`,
  for ``first <= start + i < last``; zeros for ``size <= d < width``

Of positions outside of ``first`` to ``last - 1``, which nobody sees, keys may be anything.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from refengine_numba.kernels.attention_arithmetic import first_seen
from refengine_numba.kernels.attention_sizes import (
    BLOCK,
    PAIRS,
    SLOTS,
    TILE,
    TOP,
    Sizes,
    parts_of,
    scratch_size,
    sums_size,
)
from refengine_numba.kernels.attention_sums import carry, clear
from refengine_numba.kernels.compilation import part
from refengine_numba.kernels.entry import call

PARTITION = 256
"""Positions whose running sums are computed by one thread, whatever else is shared out."""


class Step(NamedTuple):
    """A step's own arrays and sizes.

    Attributes:
        rows: T.
        starts: int32 [S + 1].
        contexts: int32 [S].
    """

    rows: int
    starts: Any
    contexts: Any


# ---------------------------------------------------------------------------------------- shares of a step


@part
def rows_at_once(rows: int, sizes: Sizes, threads: int) -> int:
    """Rows of one sequence treated together: few enough that all threads have work."""
    most = max(1, PAIRS // (sizes.heads // sizes.kv_heads))
    count = min(most, max(1, rows * sizes.kv_heads // (4 * threads)))
    while sizes.cut % count != 0:
        count -= 1
    return count


@part
def shares_contexts(rows: int, sizes: Sizes, threads: int) -> bool:
    """Whether there are so few rows that their contexts are shared out."""
    return threads > 1 and rows * sizes.kv_heads < 4 * threads


@part
def level_of(first: int, last: int, shared: bool) -> int:
    """At which level partitions ``first`` to ``last`` are shared out; :data:`TOP`: not at all."""
    if not shared:
        return TOP
    level = 0
    while level < TOP and (last >> 2 * level) - (first >> 2 * level) >= SLOTS:
        level += 1
    return level


@part
def stretches(first: int, last: int, level: int) -> int:
    """How many there are at that level."""
    return 1 if level == TOP else (last >> 2 * level) - (first >> 2 * level) + 1


# ------------------------------------------------------------------------------------------------- kernels


@part
def slot_at(sizes: Sizes, threads: int, row: int, kv_head: int, number: int) -> int:
    """Where the sums of a row's stretch wait to be folded."""
    size = sums_size(sizes.heads // sizes.kv_heads, sizes.width)
    at: int = threads * scratch_size(sizes) + ((row * sizes.kv_heads + kv_head) * SLOTS + number) * size
    return at


@part
def pack_queries(
    q: Any, row: int, kv_head: int, pairs: int, group: int, sizes: Sizes, work: Any, at: int
) -> None:
    """Copy pairs block by block, in a block element by element."""
    for block in range(0, pairs, BLOCK):
        rows = min(BLOCK, pairs - block)
        for i in range(rows):
            t, h = row + (block + i) // group, kv_head * group + (block + i) % group
            source = (t * sizes.heads + h) * sizes.size
            target = at + block * sizes.size + i
            for d in range(sizes.size):
                work[target + d * rows] = q[source + d]


@part
def attend(
    load: int,
    add: int,
    q: Any,
    sizes: Sizes,
    sequence: int,
    row: int,
    position: int,
    count: int,
    kv_head: int,
    first_partition: int,
    last_partition: int,
    work: Any,
    scratch: int,
    words: Any,
) -> int:
    """Sums of ``count`` rows and one key head over some partitions.

    Args:
        load: the address of an entry that loads a tile.
        add: the address of ``tile_entry``.
        q: float32 [T · H · D].
        sizes: of the op.
        sequence: whose rows.
        row: the first of q.
        position: its position.
        count: how many rows.
        kv_head: which key head.
        first_partition: of the context.
        last_partition: of the context.
        work: float32, the whole workspace.
        scratch: where this thread's begins.
        words: int64 [TILE_WORDS], arguments of both entries, of which those that stay are there.

    Returns:
        Where in ``work`` the sums are.
    """
    group = sizes.heads // sizes.kv_heads
    pairs, width = count * group, sizes.width
    _, _, factors, queries, states = parts_of(pairs, width)
    factors, states, stride = scratch + factors, scratch + states, sums_size(pairs, width)
    end, level = position + count, 0
    seen = first_seen(position, sizes.window)
    words[2], words[8], words[12], words[14], words[15], words[16] = (
        pairs,
        position,
        end,
        sequence,
        kv_head,
        0,
    )
    pack_queries(q, row, kv_head, pairs, group, sizes, work, scratch + queries)
    for partition in range(first_partition, last_partition + 1):
        clear(work, states, pairs, width)
        first_tile = max(partition * PARTITION, seen // TILE * TILE)
        for start in range(first_tile, min(end, (partition + 1) * PARTITION), TILE):
            words[9], words[10], words[11] = start, max(start, seen), min(start + TILE, end)
            words[17] = min(end, (last_partition + 1) * PARTITION)
            call(load, 0, 0, words, 0)
            call(add, 0, 0, words, 0)
            words[16] += 1
        level = carry(
            work, states, stride, pairs, width, 0, partition, first_partition, last_partition, factors
        )
    at: int = states + level * stride
    return at
