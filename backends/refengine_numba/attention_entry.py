"""Entries of attention, and the only door from arrays to their arguments."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.ops import LayerCache
from refengine_numba.arguments import Arguments, check, float32_word
from refengine_numba.attention import (
    PARTITION,
    SLOTS,
    Sizes,
    Step,
    attend,
    level_of,
    rows_at_once,
    scratch_size,
    shares_contexts,
    slot_at,
    slot_rows,
    stretches,
)
from refengine_numba.attention_arithmetic import TILE_WORDS, first_seen, tile_entry
from refengine_numba.attention_loading import load_entry
from refengine_numba.attention_sums import carry, copy, finish, sums_size
from refengine_numba.compilation import entry, part
from refengine_numba.entry import SIGNATURE, address_of, floats_at, ids_at, words_at
from refengine_numba.intrinsics import atomic_add
from refengine_numba.kv_pool import pool_of
from refengine_numba.share import share

EVERYTHING = 2**40
"""A window that shows all positions."""

COUNTER_WORDS = 16
"""Words beside the counter of items, so that nothing else shares its cache line."""


@part
def sizes_of(a: Any) -> Any:
    """What is in all arguments."""
    return Sizes(a[8], a[9], a[10], (a[10] + 15) // 16 * 16, a[11], a[5])


@part
def step_of(a: Any) -> Any:
    """What an executor puts there."""
    return Step(a[2], ids_at(a[6], a[3] + 1), ids_at(a[7], a[3]))


@cache
def attention_entry() -> Any:
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


@cache
def merge_entry() -> Any:
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


def workspace_bytes(tokens: int, heads: int, kv_heads: int, head_size: int, threads: int) -> int:
    """Working memory of attention for steps of up to so many tokens and threads, whatever the contexts."""
    width = -(-head_size // 16) * 16
    sizes = Sizes(heads, kv_heads, head_size, width, 1, 0)
    slots = min(tokens, slot_rows(sizes, threads)) * kv_heads * SLOTS
    floats: int = threads * scratch_size(sizes) + slots * sums_size(heads // kv_heads, width)
    return 4 * floats


def attention_arguments(
    q: NDArray[np.float32],
    cache: LayerCache,
    block_tables: NDArray[np.int32],
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
) -> Arguments:
    """Arguments of :func:`attention_entry` and :func:`merge_entry`.

    Args:
        q: float32 [T, H, D].
        cache: the layer's blocks.
        block_tables: int32 [S, M], one row after the other with the step's own M. What is in it and in the
            next two is the step's own, and must have been checked.
        query_starts: int32 [S + 1].
        context_lens: int32 [S].
        y: float32 [T, H, D], the result.
        workspace: :func:`workspace_bytes` of it.
        isa: the instruction set to compile for.
        threads: that share the work at most.
        scale: of scores.
        window: positions that a query sees, or all.
        softcap: of scores, or none.
        rows: the symbol of T.
        sequences: the symbol of S.
        columns: the symbol of M.

    Raises:
        ValueError: a shape, dtype or stride is wrong, or the workspace too small.
        UnsupportedError: there are no kernels for the cache's dtype.
    """
    pool = pool_of(cache)
    check("block_tables", block_tables, np.int32, (len(context_lens), block_tables.shape[-1]))
    common = common_arguments(
        q,
        (pool.kv_heads, pool.head_size),
        query_starts,
        context_lens,
        y,
        workspace,
        columns=block_tables.shape[1],
        load=load_entry(pool.kind),
        cut=0,
        isa=isa,
        threads=threads,
        scale=scale,
        window=window,
        softcap=softcap,
    )
    own = (cache.keys, cache.values, pool.nbytes, pool.stride, pool.block_size, block_tables)
    return Arguments.of(*common, *own, symbols={2: rows, 3: sequences, 4: columns})


def common_arguments(
    q: NDArray[np.float32],
    kv_shape: tuple[int, int],
    query_starts: NDArray[np.int32],
    context_lens: NDArray[np.int32],
    y: NDArray[np.float32],
    workspace: NDArray[np.uint8],
    *,
    columns: int,
    load: Any,
    cut: int,
    isa: str,
    threads: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[NDArray[Any] | int, ...]:
    """The arguments of both entries, whatever tiles are loaded from; see :func:`attention_arguments`.

    Args:
        kv_shape: key heads, and elements of a head.
        columns: of the block tables.
        load: the entry that loads tiles.
        cut: see ``Sizes``.
    """
    rows, heads, size = q.shape
    kv_heads = kv_shape[0]
    check("q", q, np.float32, (rows, heads, kv_shape[1]))
    check("y", y, np.float32, q.shape, written=True)
    check("context_lens", context_lens, np.int32, (len(context_lens),))
    check("query_starts", query_starts, np.int32, (len(context_lens) + 1,))
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads do not share {kv_heads} key heads evenly")
    needed = workspace_bytes(rows, heads, kv_heads, size, threads)
    check("workspace", workspace, np.uint8, (workspace.size,), written=True)
    if workspace.size < needed or workspace.ctypes.data % 8:
        raise ValueError(
            f"the workspace has {workspace.size} bytes; it must have {needed}, at a multiple of 8"
        )
    return (
        q,
        y,
        rows,
        len(context_lens),
        columns,
        cut,
        query_starts,
        context_lens,
        heads,
        kv_heads,
        size,
        EVERYTHING if window is None else window,
        float32_word(scale),
        float32_word(softcap or 0.0),
        workspace,
        workspace.size // 4,
        np.zeros(COUNTER_WORDS, np.int64),
        int(tile_entry(isa).address),
        int(load.address),
    )
