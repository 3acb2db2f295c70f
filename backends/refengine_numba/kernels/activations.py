"""Activations as codes, for products of the policy ``mixed8``: what ``refengine.ops.quantize_a8`` defines.

Only the places of its records, of 48 bytes each, are others: they lie by chunks of at most :data:`CHUNK`
rows; in a chunk group by group, in a group row by row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refengine_numba.kernels.compilation import Compiled, entry, part
from refengine_numba.kernels.entry import SIGNATURE, bytes_at, floats_at
from refengine_numba.kernels.share import share
from refengine_numba.kernels.vectors import (
    bits_of,
    clamp,
    float_of_bits,
    greater,
    greatest,
    load_f32,
    rint,
    splat_f32,
    splat_i32,
    store_i8,
    store_one_f32,
    store_one_i32,
    to_i32,
    total,
)
from refengine_numba.layout import GROUP
from refengine_numba.records import CHUNK, RECORD_BYTES

INFINITE = 0x7F800000
"""The bits of float32 infinity."""


@part
def record_at(row: int, group: int, rows: int, groups: int) -> int:
    """Where the record of a row's group starts."""
    chunk = row // CHUNK * CHUNK
    width = min(CHUNK, rows - chunk)
    return (chunk * groups + group * width + row - chunk) * RECORD_BYTES


@part
def quantize_groups(thread: int, threads: int, x: Any, records: Any, rows: int, groups: int) -> None:
    """Write the records of a thread's share of rows.

    Args:
        thread: from 0.
        threads: how many share the work.
        x: float32 [rows · groups · 32].
        records: uint8 [record_bytes(rows, groups · 32)].
        rows: of activations.
        groups: of a row.
    """
    first, last = share(rows, thread, threads)
    for item in range(first * groups, last * groups):
        row, group = item // groups, item % groups
        low, high = load_f32(x, item * GROUP), load_f32(x, item * GROUP + 16)
        unsigned = splat_i32(0x7FFFFFFF)
        greatest_bits = greatest(greater(bits_of(low) & unsigned, bits_of(high) & unsigned))
        scale = float_of_bits(greatest_bits) / np.float32(127)
        if greatest_bits >= INFINITE:  # as integers, the bits of NaN are above those of infinity
            a = splat_i32(1)
            b = splat_i32(1)
        elif scale == np.float32(0):
            a = splat_i32(0)
            b = splat_i32(0)
        else:
            a = clamp(to_i32(rint(low / splat_f32(scale))), splat_i32(-127), splat_i32(127))
            b = clamp(to_i32(rint(high / splat_f32(scale))), splat_i32(-127), splat_i32(127))
        at = record_at(row, group, rows, groups)
        second = total(b)
        both = np.int32(total(a) + second)
        store_i8(records, at, a)
        store_i8(records, at + 16, b)
        store_one_f32(records, at + 32, scale)
        store_one_f32(records, at + 36, scale * np.float32(both))
        store_one_i32(records, at + 40, both)
        store_one_i32(records, at + 44, second)


def quantize_entry() -> Compiled:
    """Activations to records. Arguments: x, records, rows T, columns K."""

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        rows, groups = a[2], a[3] // GROUP
        quantize_groups(
            thread,
            threads,
            floats_at(a[0], rows * groups * GROUP),
            bytes_at(a[1], rows * groups * RECORD_BYTES),
            rows,
            groups,
        )

    return run
