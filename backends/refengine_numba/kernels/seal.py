"""Sealing: blocks of the KV cache that a step completes, quantized from their exact copies.

Bytes are the golden formats' (SKV-1 to SKV-4). Those take quotients in float64; here float32 is enough. What
decides is whether ``x / d`` lies below, at or above some ``h``: the middle of two codes, or a step. ``h · d``
has at most 17 significant bits, so float32 holds it, and its neighbours are farther away than one part in
2²⁴. None of their quotients rounds to ``h``: half a unit in its last place is no more than that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refengine.quantizer.sealed_kv import VALUE_GROUP
from refengine_numba.kernels.attention_lanes import greatest_lane
from refengine_numba.kernels.compilation import Compiled, entry, inlined, part
from refengine_numba.kernels.entry import SIGNATURE, bytes_at, ids_at
from refengine_numba.kernels.kv_lanes import halves_of
from refengine_numba.kernels.lanes import (
    floats_of,
    keep_first_f32,
    keep_first_i32,
    store_first_i8,
    store_first_i16,
    where_less,
)
from refengine_numba.kernels.share import share
from refengine_numba.kernels.unseal import (
    FORMS,
    BlockSizes,
    codes_at,
    numbers_at,
    put,
    row_bytes,
    scales_at,
    step_of,
    steps_and_centres,
)
from refengine_numba.kernels.vectors import (
    LANES,
    bits_of,
    clamp,
    greater,
    greatest,
    rint,
    splat_f32,
    splat_i32,
    store_i8,
    to_i32,
)

NOWHERE = np.float32(2**20)
"""Beyond all codes and centres: what stands for the quotient by a step of NaN, with a minus."""

INFINITE = np.float32(np.inf)

Ids = NDArray[np.int32]


class Head(NamedTuple):
    """A head of a block that is sealed.

    Attributes:
        exact: bytes of exact copies.
        source: where the block's begins.
        itemsize: bytes of an exact number.
        data: bytes of sealed blocks.
        start: where the block begins.
        sizes: of a block.
        head: which key head.
    """

    exact: Any
    source: int
    itemsize: int
    data: Any
    start: int
    sizes: BlockSizes
    head: int


@part
def exact_at(kind: str, block: Any, position: int, element: int, count: int) -> Any:
    """``count`` exact numbers, float16 or float32 (``kind``, literal), of a head at a position."""
    index = (position * block.sizes.kv_heads + block.head) * block.sizes.size + element
    return numbers_at(kind, block.exact, block.source + index * block.itemsize, count)


@part
def put_bytes(data: Any, at: int, count: int, vector: Any) -> None:
    """Write the low byte of ``count`` lanes."""
    if count == LANES:
        store_i8(data, at, vector)
    else:
        store_first_i8(data, at, count, vector)


# ------------------------------------------------------------------------------------------ steps and codes


@part
def half_range(form: str) -> int:
    """h: codes go from -h to h - 1."""
    return 128 if form == "int8" else 8


@part
def least_step(size: Any, multiple: int) -> Any:
    """Bytes of the least steps whose multiples reach sizes, float32 of either sign; 255 where there is none.

    The quotient, rounded up to four significant bits: the bytes that name steps are a part of their bits.
    """
    bits = bits_of(size / splat_f32(np.float32(multiple))) & splat_i32(0x7FFFFFFF)
    byte = ((bits + splat_i32(0xFFFFF)) >> splat_i32(20)) - splat_i32(107 << 3)
    return clamp(byte, splat_i32(0), splat_i32(255))


@part
def nearest(x: Any, step: Any) -> Any:
    """``x / step`` rounded to the nearest integer, ties to even; where the step is NaN, -2²⁰."""
    quotient = rint(x / step)
    return to_i32(where_less(quotient, splat_f32(NOWHERE), quotient, splat_f32(-NOWHERE)))


@part
def step_and_centre(form: str, low: Any, high: Any, size: Any) -> tuple[Any, Any]:
    """Bytes of the step and the centre of numbers from ``low`` to ``high``; ``size`` has the greatest's bits.

    Where some number is not finite, ``size`` tells, and ``low`` and ``high`` may be anything.
    """
    h = half_range(form)
    unit = h // 8
    spread = least_step(high - low, 2 * h - unit)
    step = greater(spread, least_step(floats_of(size), 127 * unit + h - 1))
    centre = nearest(low, step_of(step)) + splat_i32(h)
    if form == "int8":  # the floor of a quotient, of numbers moved above zero
        centre = (centre + splat_i32(1 << 24) >> splat_i32(4)) - splat_i32(1 << 20)
    return step, clamp(centre, splat_i32(-128), splat_i32(127))


def write_scales(role: str, form: str, kind: str, block: Any) -> None:
    """Choose and write the steps and centres of a :class:`Head`; the first three are those of seal_head."""
    raise NotImplementedError


@inlined(write_scales)
def _write_scales(role: Any) -> Callable[..., None]:
    def keys(role: str, form: str, kind: str, block: Any) -> None:
        at, centres = scales_at(role, block.data, block.start, block.sizes, 0, block.head)
        for d in range(0, block.sizes.size, LANES):
            some = min(LANES, block.sizes.size - d)
            low = high = exact_at(kind, block, 0, d, some)
            size = bits_of(low) & splat_i32(0x7FFFFFFF)
            for position in range(1, block.sizes.positions):
                x = exact_at(kind, block, position, d, some)
                low, high = where_less(x, low, x, low), where_less(high, x, x, high)
                size = greater(size, bits_of(x) & splat_i32(0x7FFFFFFF))
            step, centre = step_and_centre(form, low, high, size)
            put_bytes(block.data, at + d, some, step)
            put_bytes(block.data, at + centres + d, some, centre)

    def values(role: str, form: str, kind: str, block: Any) -> None:
        for position in range(block.sizes.positions):
            at, centres = scales_at(role, block.data, block.start, block.sizes, position, block.head)
            for d in range(0, block.sizes.size, VALUE_GROUP):
                some, more = min(LANES, block.sizes.size - d), min(LANES, block.sizes.size - d - LANES)
                a = b = exact_at(kind, block, position, d, some)
                if more > 0:
                    b = exact_at(kind, block, position, d + LANES, more)
                unsigned = splat_i32(0x7FFFFFFF)
                size = greatest(greater(bits_of(a) & unsigned, bits_of(b) & unsigned))
                # Lanes without an element must not count.
                least, most = splat_f32(-INFINITE), splat_f32(INFINITE)
                low, high = keep_first_f32(b, more, most), keep_first_f32(b, more, least)
                a_low, a_high = keep_first_f32(a, some, most), keep_first_f32(a, some, least)
                low, high = where_less(a_low, low, a_low, low), where_less(high, a_high, a_high, high)
                low_lane = -greatest_lane(splat_f32(np.float32(0)) - low)
                step, centre = step_and_centre(
                    form, splat_f32(low_lane), splat_f32(greatest_lane(high)), splat_i32(size)
                )
                store_first_i8(block.data, at + d // VALUE_GROUP, 1, step)
                store_first_i8(block.data, at + centres + d // VALUE_GROUP, 1, centre)

    return {"keys": keys, "values": values}[role.literal_value]


@part
def quantized(role: str, form: str, kind: str, block: Any, position: int, d: int, some: int) -> Any:
    """Codes of ``some`` elements of a head from ``d`` on; its steps and centres are written."""
    steps, centres = scales_at(role, block.data, block.start, block.sizes, position, block.head)
    step, centre = steps_and_centres(role, form, block.data, steps, centres, d, some)
    h = half_range(form)
    code = nearest(exact_at(kind, block, position, d, some), step) - centre
    return clamp(code, splat_i32(-h), splat_i32(h - 1))


# ------------------------------------------------------------------------------------------------ one head


def seal_head(role: str, form: str, kind: str, block: Any) -> None:
    """Seal a head of a block.

    Args:
        role: ``"keys"`` or ``"values"``, literal.
        form: of the sealed block, literal.
        kind: of the exact numbers, ``"float16"`` or ``"float32"``, literal.
        block: a :class:`Head`.
    """
    raise NotImplementedError


@inlined(seal_head)
def _seal_head(form: Any) -> Callable[..., None]:
    def halves(role: str, form: str, kind: str, block: Any) -> None:
        for position in range(block.sizes.positions):
            row = block.start + 2 * block.sizes.size * (position * block.sizes.kv_heads + block.head)
            for d in range(0, block.sizes.size, LANES):
                some = min(LANES, block.sizes.size - d)
                bits = halves_of(exact_at(kind, block, position, d, some))
                store_first_i16(block.data, row + 2 * d, some, bits)

    def singles(role: str, form: str, kind: str, block: Any) -> None:
        for position in range(block.sizes.positions):
            row = block.start + 4 * block.sizes.size * (position * block.sizes.kv_heads + block.head)
            for d in range(0, block.sizes.size, LANES):
                some = min(LANES, block.sizes.size - d)
                x = exact_at(kind, block, position, d, some)
                kept = where_less(x - x, splat_f32(np.float32(1)), x, splat_f32(np.float32(np.nan)))
                put(block.data, row + 4 * d, some, kept)

    def bytes_each(role: str, form: str, kind: str, block: Any) -> None:
        write_scales(role, form, kind, block)
        for position in range(block.sizes.positions):
            codes = codes_at(role, form, block.start, block.sizes, position, block.head)
            for d in range(0, block.sizes.size, LANES):
                some = min(LANES, block.sizes.size - d)
                code = quantized(role, form, kind, block, position, d, some)
                put_bytes(block.data, codes + d, some, code)

    def four_bits_each(role: str, form: str, kind: str, block: Any) -> None:
        write_scales(role, form, kind, block)
        row = row_bytes(form, block.sizes.size)
        for position in range(block.sizes.positions):
            codes = codes_at(role, form, block.start, block.sizes, position, block.head)
            for d in range(0, row, LANES):
                some, above = min(LANES, row - d), min(LANES, block.sizes.size - row - d)
                both = quantized(role, form, kind, block, position, d, some) + splat_i32(8)
                if above > 0:
                    high = quantized(role, form, kind, block, position, row + d, above) + splat_i32(8)
                    both = both | keep_first_i32(high << splat_i32(4), above, splat_i32(0))
                put_bytes(block.data, codes + d, some, both)

    kernels = {"float16": halves, "float32": singles, "int8": bytes_each, "int4": four_bits_each}
    return kernels[form.literal_value]


# ------------------------------------------------------------------------------------------------- a step


class Pools(NamedTuple):
    """Blocks of a layer's keys, or values: exact copies and sealed ones.

    Attributes:
        exact: bytes of exact copies.
        exact_stride: from one to the next.
        itemsize: bytes of an exact number.
        data: bytes of sealed blocks.
        stride: from one to the next.
        sizes: of a block.
    """

    exact: Any
    exact_stride: int
    itemsize: int
    data: Any
    stride: int
    sizes: BlockSizes


class Places(NamedTuple):
    """Of a step's sequences.

    Attributes:
        tables: int32 [S · columns], blocks of the sealed pool.
        columns: of these.
        exact_tables: int32 [S · exact_columns], blocks of the pool of exact copies.
        exact_columns: of these.
        starts: int32 [S + 1], first rows.
        contexts: int32 [S].
    """

    tables: Any
    columns: int
    exact_tables: Any
    exact_columns: int
    starts: Any
    contexts: Any


@part
def completed(places: Any, sequence: int, positions: int) -> tuple[int, int]:
    """A sequence's first block whose last position is one of the step's, and the one after the last."""
    context = np.int64(places.contexts[sequence])
    rows = np.int64(places.starts[sequence + 1]) - np.int64(places.starts[sequence])
    return int((context - rows) // positions), int(context // positions)


@part
def heads_completed(places: Any, sizes: Any) -> int:
    """Heads of all blocks that a step completes."""
    total = 0
    for sequence in range(places.contexts.size):
        first, last = completed(places, sequence, sizes.positions)
        total += (last - first) * sizes.kv_heads
    return total


@part
def seal_some(role: str, form: str, kind: str, pools: Any, places: Any, begin: int, end: int) -> None:
    """Seal heads ``begin`` to ``end``, not included, of :func:`heads_completed`."""
    before = 0
    for sequence in range(places.contexts.size):
        first, last = completed(places, sequence, pools.sizes.positions)
        count = (last - first) * pools.sizes.kv_heads
        for item in range(max(0, begin - before), min(count, end - before)):
            index, head = first + item // pools.sizes.kv_heads, item % pools.sizes.kv_heads
            source = np.int64(places.exact_tables[sequence * places.exact_columns + index])
            target = np.int64(places.tables[sequence * places.columns + index])
            block = Head(
                pools.exact,
                source * pools.exact_stride,
                pools.itemsize,
                pools.data,
                target * pools.stride,
                pools.sizes,
                head,
            )
            seal_head(role, form, kind, block)
        before += count


def kv_seal_entry(keys: str, values: str, kind: str) -> Compiled:
    """Sealing what a step completes.

    Args:
        keys: the format of sealed keys, by name.
        values: that of sealed values.
        kind: of exact numbers, ``"float16"`` or ``"float32"``.

    Work is shared freely. The entry's arguments are those of :func:`kv_seal_arguments`.
    """
    itemsize = {"float16": 2, "float32": 4}[kind]
    if not {keys, values} <= set(FORMS):
        raise KeyError((keys, values))

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        sizes, sequences = BlockSizes(a[10], a[11], a[12]), a[19]
        places = Places(
            ids_at(a[13], sequences * a[14]),
            a[14],
            ids_at(a[15], sequences * a[16]),
            a[16],
            ids_at(a[17], sequences + 1),
            ids_at(a[18], sequences),
        )
        total = heads_completed(places, sizes)
        begin, end = share(2 * total, thread, threads)
        pools = Pools(bytes_at(a[0], a[2]), a[3], itemsize, bytes_at(a[4], a[5]), a[6], sizes)
        seal_some("keys", keys, kind, pools, places, begin, min(end, total))
        pools = Pools(bytes_at(a[1], a[2]), a[3], itemsize, bytes_at(a[7], a[8]), a[9], sizes)
        seal_some("values", values, kind, pools, places, begin - total, end - total)

    return run
