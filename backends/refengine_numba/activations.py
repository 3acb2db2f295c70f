"""Activations as codes: the policy ``mixed8``, its definition in NumPy and its kernel.

A row of activations is cut into groups of 32. A group becomes 32 integers from -127 to 127, the *codes*, and
one float32 *scale*. All arithmetic is float32 with one rounding per operation:

- ``scale = max |x| / 127``
- ``code = x / scale`` rounded to the nearest integer, ties to even, and moved into -127 to 127 (below the
  normal numbers, where a scale is inexact, the quotient can be greater)
- where the scale is 0, all codes are 0
- where ``max |x|`` is infinite or some x is NaN, the scale is infinite or NaN, and all codes are 1: so every
  product with the group is NaN or infinite, and what cannot be computed shows.

For kernels, a group is a *record* of 48 bytes: 32 codes; then float32 scale; float32 ``scale · sum`` of its
codes; int32 sum of its codes; int32 sum of the second 16. Records lie by chunks of at most :data:`CHUNK`
rows; in a chunk group by group, in a group row by row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine_numba.compilation import part
from refengine_numba.layout import GROUP
from refengine_numba.share import share
from refengine_numba.vectors import (
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

RECORD_BYTES = 48
"""Of a record."""

CHUNK = 128
"""Rows of activations that a kernel takes at a time: their records stay in the second-level cache."""

INFINITE = 0x7F800000
"""The bits of float32 infinity."""


def record_bytes(rows: int, columns: int) -> int:
    """Bytes of all records of activations [rows, columns]."""
    return rows * (columns // GROUP) * RECORD_BYTES


def codes_of(x: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The definition: float32 [T, K] -> codes int8 [T, K / 32, 32] and scales float32 [T, K / 32]."""
    groups = x.reshape(len(x), -1, GROUP)
    with np.errstate(all="ignore"):
        scales = np.abs(groups).max(axis=2) / np.float32(127)
        usable = ((scales > 0) & (scales < np.inf))[..., None]
        quotients = groups / np.where(usable, scales[..., None], np.float32(1))
        codes = np.clip(np.rint(quotients), -127, 127)
        finite = np.isfinite(scales)[..., None]
        return np.where(usable, codes, np.where(finite, 0, 1)).astype(np.int8), scales


@part
def record_at(row: int, group: int, rows: int, groups: int) -> int:
    """Where the record of a row's group starts."""
    chunk = row // CHUNK * CHUNK
    width = min(CHUNK, rows - chunk)
    return (chunk * groups + group * width + row - chunk) * RECORD_BYTES


@part
def quantize_groups(thread: int, threads: int, x: Any, records: Any, rows: int, groups: int) -> None:
    """Write the records of a thread's share of groups.

    Args:
        thread: from 0.
        threads: how many share the work.
        x: float32 [rows · groups · 32].
        records: uint8 [record_bytes(rows, groups · 32)].
        rows: of activations.
        groups: of a row.
    """
    first, last = share(rows * groups, thread, threads)
    for item in range(first, last):
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
