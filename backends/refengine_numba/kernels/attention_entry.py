"""Entries of attention: what is shared out among threads, and in which order it is put together."""

from __future__ import annotations

from typing import Any

import numpy as np

from refengine_numba.kernels.attention import (
    PARTITION,
    Step,
    attend,
    level_of,
    rows_at_once,
    shares_contexts,
    slot_at,
    stretches,
)
from refengine_numba.kernels.attention_arithmetic import first_seen
from refengine_numba.kernels.attention_sizes import TILE_WORDS, Sizes, scratch_size, sums_size
from refengine_numba.kernels.attention_sums import carry, copy, finish
from refengine_numba.kernels.compilation import Compiled, entry, part
from refengine_numba.kernels.entry import SIGNATURE, address_of, floats_at, ids_at, words_at
from refengine_numba.kernels.intrinsics import atomic_add
from refengine_numba.kernels.share import share


@part
def sizes_of(a: Any) -> Any:
    """What is in all arguments."""
    return Sizes(a[8], a[9], a[10], (a[10] + 15) // 16 * 16, a[11], a[5])


@part
def step_of(a: Any) -> Any:
    """What an executor puts there."""
    return Step(a[2], ids_at(a[6], a[3] + 1), ids_at(a[7], a[3]))


def attention_entry() -> Compiled:
    """Attention, but for what :func:`merge_entry` does after it: items are taken until none is left.

    An item is some rows of a sequence and one key head, or a stretch of their context; work is shared freely.
    Rows whose contexts are shared out leave their sums in slots, others are finished.

    Arguments: q, y, rows T, sequences S, columns M of block tables, ``Sizes.cut``, query starts and context
    lengths (int32), heads H, key heads G, head size D, window, scale and softcap (bits), workspace, floats of
    it, counter of items, addresses of ``tile_entry`` and of an entry that loads tiles; then what that reads.
    """

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        sizes, step = sizes_of(a), step_of(a)
        scratch, group = thread * scratch_size(sizes), sizes.heads // sizes.kv_heads
        q = floats_at(a[0], step.rows * sizes.heads * sizes.size)
        y = floats_at(a[1], step.rows * sizes.heads * sizes.size)
        work, counter = floats_at(a[14], a[15]), words_at(a[16], 1)
        words = words_at(a[14] + 4 * (scratch + scratch_size(sizes)) - 8 * TILE_WORDS, TILE_WORDS)
        words[0], words[1], words[13] = a[14] + 4 * scratch, scratch_size(sizes), address_of(a)
        words[3], words[4], words[5], words[6], words[7] = group, sizes.size, sizes.window, a[12], a[13]
        at_once, shared = rows_at_once(step.rows, sizes, threads), shares_contexts(step.rows, sizes, threads)
        item, before = atomic_add(counter, 0, 1), 0
        for sequence in range(step.contexts.size):
            start, stop = np.int64(step.starts[sequence]), np.int64(step.starts[sequence + 1])
            if start == stop:
                continue
            begin, end = step.contexts[sequence] - (stop - start), np.int64(step.contexts[sequence])
            for tile in range((end - 1) // at_once, begin // at_once - 1, -1):  # long contexts first
                position, until = max(begin, tile * at_once), min(end, (tile + 1) * at_once)
                row, rows = start + position - begin, until - position
                first, last = first_seen(position, sizes.window) // PARTITION, (until - 1) // PARTITION
                level = level_of(first, last, shared)
                count = stretches(first, last, level)
                while item < before + count * sizes.kv_heads:
                    number, kv_head = (item - before) // sizes.kv_heads, (item - before) % sizes.kv_heads
                    a_first, a_last = first, last
                    if count > 1:
                        here = (first >> 2 * level) + number
                        a_first = max(first, here << 2 * level)
                        a_last = min(last, ((here + 1) << 2 * level) - 1)
                    sums = attend(
                        a[18],
                        a[17],
                        q,
                        sizes,
                        sequence,
                        row,
                        position,
                        rows,
                        kv_head,
                        a_first,
                        a_last,
                        work,
                        scratch,
                        words,
                    )
                    if count > 1:
                        slot = slot_at(sizes, threads, row, kv_head, number)
                        copy(work, sums, slot, group, sizes.width)
                    else:
                        finish(work, sums, rows * group, group, sizes, row, kv_head, y)
                    item = atomic_add(counter, 0, 1)
                before += count * sizes.kv_heads

    return run


def merge_entry() -> Compiled:
    """The rest of attention, with the same arguments, after all threads are through :func:`attention_entry`.

    Folds what waits in slots and finishes it; then every item can be taken again. Work is shared by rows.
    """

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        if thread == 0:
            words_at(a[16], 1)[0] = 0
        sizes, step = sizes_of(a), step_of(a)
        if not shares_contexts(step.rows, sizes, threads):
            return
        group, width = sizes.heads // sizes.kv_heads, sizes.width
        y, work = floats_at(a[1], step.rows * sizes.heads * sizes.size), floats_at(a[14], a[15])
        stride = sums_size(group, width)
        factors = thread * scratch_size(sizes)
        states = factors + 64
        mine, not_mine = share(step.rows, thread, threads)
        for sequence in range(step.contexts.size):
            start, stop = np.int64(step.starts[sequence]), np.int64(step.starts[sequence + 1])
            for row in range(max(mine, start), min(not_mine, stop)):
                position = step.contexts[sequence] - (stop - row)
                first, last = first_seen(position, sizes.window) // PARTITION, position // PARTITION
                level = level_of(first, last, True)
                count = stretches(first, last, level)
                a_first, a_last = first >> 2 * level, last >> 2 * level
                for item in range(count * sizes.kv_heads if count > 1 else 0):
                    kv_head, number = item // count, item % count
                    slot = slot_at(sizes, threads, row, kv_head, number)
                    copy(work, slot, states + level * stride, group, width)
                    top = carry(
                        work, states, stride, group, width, level, a_first + number, a_first, a_last, factors
                    )
                    if number == count - 1:
                        finish(work, states + top * stride, group, group, sizes, row, kv_head, y)

    return run
