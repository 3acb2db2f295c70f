"""New keys and values into their slots: kernel, entry and arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.ops import LayerCache
from refengine_numba.arguments import Arguments, check
from refengine_numba.compilation import entry, inlined, part
from refengine_numba.entry import SIGNATURE, bytes_at, floats_at, ids_at
from refengine_numba.kv_lanes import halves_of, lane_bits, store_i16
from refengine_numba.kv_pool import pool_of
from refengine_numba.share import share
from refengine_numba.vectors import LANES, load_f32, splat_f32, store, store_one_f32


def write_row(kind: str, x: Any, at: int, count: int, pool: Any, to: int) -> None:
    """Numbers ``x[at]`` to ``x[at + count - 1]`` to bytes of the pool from ``to`` on."""
    raise NotImplementedError


@inlined(write_row)
def _write_row(kind: Any, x: Any, at: Any, count: Any, pool: Any, to: Any) -> Callable[..., Any]:
    def halves(kind: str, x: Any, at: int, count: int, pool: Any, to: int) -> None:
        whole = count // LANES * LANES
        for i in range(0, whole, LANES):
            store_i16(pool, to + 2 * i, halves_of(load_f32(x, at + i)))
        for i in range(whole, count):
            bits = lane_bits(halves_of(splat_f32(x[at + i])), 0)
            pool[to + 2 * i] = bits & 255
            pool[to + 2 * i + 1] = bits >> 8

    def singles(kind: str, x: Any, at: int, count: int, pool: Any, to: int) -> None:
        whole = count // LANES * LANES
        for i in range(0, whole, LANES):
            store(pool, to + 4 * i, load_f32(x, at + i))
        for i in range(whole, count):
            store_one_f32(pool, to + 4 * i, x[at + i])

    return {"f16": halves, "f32": singles}[kind.literal_value]


@part
def write_slots(
    kind: str,
    thread: int,
    threads: int,
    k: Any,
    v: Any,
    keys: Any,
    values: Any,
    slots: Any,
    count: int,
    block_size: int,
    stride: int,
    slot_bytes: int,
) -> None:
    """Write a thread's share of rows.

    Args:
        kind: of stored numbers, literal.
        thread: from 0.
        threads: how many share the work.
        k: float32 [T · count].
        v: float32 [T · count].
        keys: bytes of the pool from the layer's keys on.
        values: from its values on.
        slots: int32 [T].
        count: numbers of a row.
        block_size: positions of a block.
        stride: bytes from one block to the next.
        slot_bytes: of a slot's keys, or values.
    """
    first, last = share(slots.size, thread, threads)
    for t in range(first, last):
        slot = slots[t]
        to = slot // block_size * stride + slot % block_size * slot_bytes
        write_row(kind, k, t * count, count, keys, to)
        write_row(kind, v, t * count, count, values, to)


@cache
def kv_write_entry(kind: str) -> Any:
    """Keys and values into a cache of numbers of a kind (``kv_pool.KINDS``); work is shared by rows.

    Arguments: k, v, keys, values, bytes of the pool, slots (int32), rows T, numbers of a row, positions of a
    block, bytes from one block to the next, bytes of a slot.
    """

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        rows, count = a[6], a[7]
        write_slots(
            kind,
            thread,
            threads,
            floats_at(a[0], rows * count),
            floats_at(a[1], rows * count),
            bytes_at(a[2], a[4]),
            bytes_at(a[3], a[4]),
            ids_at(a[5], rows),
            count,
            a[8],
            a[9],
            a[10],
        )

    return run


def kv_write_arguments(
    cache: LayerCache,
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    slot_mapping: NDArray[np.int32],
    rows: str = "T",
) -> Arguments:
    """Arguments of :func:`kv_write_entry`; its kind is that of ``pool_of(cache)``.

    Args:
        cache: the layer's blocks.
        k: float32 [T, G, D].
        v: float32 [T, G, D].
        slot_mapping: int32 [T]; what a step puts there must have been checked.
        rows: the symbol of T.

    Raises:
        ValueError: a shape, dtype or stride is wrong.
        UnsupportedError: there are no kernels for the cache's dtype.
    """
    pool = pool_of(cache)
    shape = (len(slot_mapping), pool.kv_heads, pool.head_size)
    check("k", k, np.float32, shape)
    check("v", v, np.float32, shape)
    check("slot_mapping", slot_mapping, np.int32, shape[:1])
    if not (cache.keys.flags.writeable and cache.values.flags.writeable):
        raise ValueError("the cache is read-only")
    count = pool.kv_heads * pool.head_size
    return Arguments.of(
        k,
        v,
        cache.keys,
        cache.values,
        pool.nbytes,
        slot_mapping,
        len(slot_mapping),
        count,
        pool.block_size,
        pool.stride,
        count * cache.keys.itemsize,
        symbols={6: rows},
    )
