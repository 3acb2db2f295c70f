"""New keys and values into their slots: kernel, entry and arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from refengine_numba.kernels.compilation import Compiled, entry, inlined, part
from refengine_numba.kernels.entry import SIGNATURE, bytes_at, floats_at, ids_at
from refengine_numba.kernels.kv_lanes import halves_of, lane_bits, store_i16
from refengine_numba.kernels.share import share
from refengine_numba.kernels.vectors import LANES, load_f32, splat_f32, store, store_one_f32


def write_row(kind: str, x: Any, at: int, count: int, pool: Any, to: int) -> None:
    """Numbers ``x[at]`` to ``x[at + count - 1]`` to bytes of the pool from ``to`` on."""
    raise NotImplementedError


@inlined(write_row)
def _write_row(kind: Any) -> Callable[..., Any]:
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


def kv_write_entry(kind: str) -> Compiled:
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
