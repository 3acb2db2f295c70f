"""Numbers of sealed blocks, bit for bit as the golden formats give them.

For kernels that read a sealed cache:

``open_rows(role, form, data, start, sizes, head, offset, count, out, at, width)``
    writes positions ``offset`` to ``offset + count - 1`` of one block, of one key head: element d of the i-th
    of them to ``out[at + i · width + d]``, d < D. Nothing else is written.

``role`` is ``"keys"`` or ``"values"`` and ``form`` ``"int8"``, ``"int4"``, ``"float16"`` or ``"float32"``,
all literal; ``data`` are bytes, in which the layer's block begins at ``start``; ``sizes`` are
:class:`BlockSizes`; ``out`` is float32.

A block of integers is steps, centres and codes (SKV-2); a number is ``d · (q + u · c)`` (SKV-3), which
float32 holds exactly, so that the order of its arithmetic does not show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from refengine.quantizer.sealed_kv import VALUE_GROUP
from refengine_numba.kernels.compilation import inlined, part
from refengine_numba.kernels.lanes import (
    floats_of,
    keep_first_i32,
    load_first,
    load_first_f16,
    load_first_i8,
    store_first,
    where_less,
)
from refengine_numba.kernels.vectors import (
    LANES,
    load_f16,
    load_f32,
    load_i8,
    splat_f32,
    splat_i32,
    store,
    to_f32,
)

FORMS = ("int8", "int4", "float16", "float32")
"""Formats of sealed keys, and of values, by name."""

NO_STEP = np.float32(3840)
"""What byte 255 would name, if it did not name NaN."""


class BlockSizes(NamedTuple):
    """Of a layer's sealed blocks.

    Attributes:
        positions: P.
        kv_heads: G.
        size: D.
    """

    positions: int
    kv_heads: int
    size: int


# ------------------------------------------------------------------------------------------- parts of vectors


@part
def put(out: Any, at: int, count: int, numbers: Any) -> None:
    """Write ``count`` lanes of floats."""
    if count == LANES:
        store(out, at, numbers)
    else:
        store_first(out, at, count, numbers)


@part
def get_bytes(data: Any, at: int, count: int) -> Any:
    """``count`` signed bytes; the lanes after them are 0."""
    return load_i8(data, at) if count == LANES else load_first_i8(data, at, count)


def numbers_at(kind: str, data: Any, at: int, count: int) -> Any:
    """``count`` stored floats, ``"float16"`` or ``"float32"`` (literal), at a byte; the others are 0."""
    raise NotImplementedError


@inlined(numbers_at)
def _numbers_at(kind: Any) -> Callable[..., Any]:
    def halves(kind: str, data: Any, at: int, count: int) -> Any:
        return load_f16(data, at) if count == LANES else load_first_f16(data, at, count)

    def singles(kind: str, data: Any, at: int, count: int) -> Any:
        return load_f32(data, at) if count == LANES else load_first(data, at, count)

    return {"float16": halves, "float32": singles}[kind.literal_value]


# --------------------------------------------------------------------------------------- steps and centres


@part
def step_of(byte: Any) -> Any:
    """The step that bytes, 0 to 255, name: the byte, moved, is the upper part of its bits."""
    step = floats_of((byte + splat_i32(107 << 3)) << splat_i32(20))
    return where_less(step, splat_f32(NO_STEP), step, splat_f32(np.float32(np.nan)))


@part
def groups_of(size: int) -> int:
    """Groups of a value's elements."""
    return (size + VALUE_GROUP - 1) // VALUE_GROUP


def scales_at(role: str, data: Any, start: int, sizes: Any, position: int, head: int) -> tuple[int, int]:
    """Where the steps of a head at a position stand, and how far behind them its centres."""
    raise NotImplementedError


@inlined(scales_at)
def _scales_at(role: Any) -> Callable[..., Any]:
    def keys(role: str, data: Any, start: int, sizes: Any, position: int, head: int) -> tuple[int, int]:
        return start + head * sizes.size, sizes.kv_heads * sizes.size

    def values(role: str, data: Any, start: int, sizes: Any, position: int, head: int) -> tuple[int, int]:
        groups = groups_of(sizes.size)
        at = start + (position * sizes.kv_heads + head) * groups
        return at, sizes.positions * sizes.kv_heads * groups

    return {"keys": keys, "values": values}[role.literal_value]


def scales(role: str, data: Any, at: int, element: int, count: int) -> Any:
    """Bytes of the steps, or centres, of ``count`` elements of a head, in their lanes; signed.

    Args:
        role: literal.
        data: bytes.
        at: where those of the head begin.
        element: the first.
        count: one to sixteen.
    """
    raise NotImplementedError


@inlined(scales)
def _scales(role: Any) -> Callable[..., Any]:
    def keys(role: str, data: Any, at: int, element: int, count: int) -> Any:
        return get_bytes(data, at + element, count)

    def values(role: str, data: Any, at: int, element: int, count: int) -> Any:
        group, before = element // VALUE_GROUP, VALUE_GROUP - element % VALUE_GROUP
        first = splat_i32(np.int32(np.int8(data[at + group])))
        if count <= before:
            return first
        return keep_first_i32(first, before, splat_i32(np.int32(np.int8(data[at + group + 1]))))

    return {"keys": keys, "values": values}[role.literal_value]


@part
def steps_and_centres(
    role: str, form: str, data: Any, at: int, centres: int, element: int, count: int
) -> tuple[Any, Any]:
    """Steps, and centres in codes, of some elements; see :func:`scales`. Centres stand ``centres`` behind."""
    unsigned = scales(role, data, at, element, count) & splat_i32(255)
    centre = scales(role, data, at + centres, element, count)
    return step_of(unsigned), centre << splat_i32(4) if form == "int8" else centre


# --------------------------------------------------------------------------------------------------- codes


@part
def row_bytes(form: str, size: int) -> int:
    """Bytes of a head's codes."""
    return size if form == "int8" else (size + 1) // 2


@part
def codes_at(role: str, form: str, start: int, sizes: Any, position: int, head: int) -> int:
    """Where the codes of a head at a position begin."""
    heads = sizes.kv_heads * (sizes.size if role == "keys" else sizes.positions * groups_of(sizes.size))
    row = position * sizes.kv_heads + head
    return int(start + 2 * heads + row * row_bytes(form, sizes.size))


def unpacked(form: str, data: Any, at: int, count: int, high: int) -> Any:
    """``count`` codes of bytes from ``at`` on; of 4 bits, those in the low (0) or the high (1) halves."""
    raise NotImplementedError


@inlined(unpacked)
def _unpacked(form: Any) -> Callable[..., Any]:
    def int8(form: str, data: Any, at: int, count: int, high: int) -> Any:
        return get_bytes(data, at, count)

    def int4(form: str, data: Any, at: int, count: int, high: int) -> Any:
        halves = get_bytes(data, at, count) >> splat_i32(4 * high) & splat_i32(15)
        return halves - splat_i32(8)

    return {"int8": int8, "int4": int4}[form.literal_value]


# ---------------------------------------------------------------------------------------------------- rows


def open_rows(
    role: str,
    form: str,
    data: Any,
    start: int,
    sizes: Any,
    head: int,
    offset: int,
    count: int,
    out: Any,
    at: int,
    width: int,
) -> None:
    """Some positions of one key head of a block as float32.

    Args:
        role: of the block, ``"keys"`` or ``"values"``, literal.
        form: one of :data:`FORMS`, literal.
        data: uint8.
        start: where in ``data`` the block begins.
        sizes: :class:`BlockSizes`.
        head: which.
        offset: of the first position in the block.
        count: of positions.
        out: float32.
        at: where in ``out`` the first row begins.
        width: elements of ``out`` from one row to the next.
    """
    raise NotImplementedError


@inlined(open_rows)
def _open_rows(role: Any, form: Any) -> Callable[..., Any]:
    itemsize = {"float16": 2, "float32": 4}.get(form.literal_value, 0)

    def floats(
        role: str,
        form: str,
        data: Any,
        start: int,
        sizes: Any,
        head: int,
        offset: int,
        count: int,
        out: Any,
        at: int,
        width: int,
    ) -> None:
        for i in range(count):
            row = start + ((offset + i) * sizes.kv_heads + head) * sizes.size * itemsize
            for d in range(0, sizes.size, LANES):
                some = min(LANES, sizes.size - d)
                put(out, at + i * width + d, some, numbers_at(form, data, row + d * itemsize, some))

    def keys(
        role: str,
        form: str,
        data: Any,
        start: int,
        sizes: Any,
        head: int,
        offset: int,
        count: int,
        out: Any,
        at: int,
        width: int,
    ) -> None:
        row = row_bytes(form, sizes.size)
        steps, centres = scales_at(role, data, start, sizes, offset, head)
        first = codes_at(role, form, start, sizes, offset, head)
        for high in range(2):
            for d in range(high * row, min(sizes.size, row + high * row), LANES):
                some = min(LANES, min(sizes.size, row + high * row) - d)
                step, centre = steps_and_centres(role, form, data, steps, centres, d, some)
                for i in range(count):
                    here = first + i * sizes.kv_heads * row + d - high * row
                    code = unpacked(form, data, here, some, high)
                    put(out, at + i * width + d, some, to_f32(code + centre) * step)

    def values(
        role: str,
        form: str,
        data: Any,
        start: int,
        sizes: Any,
        head: int,
        offset: int,
        count: int,
        out: Any,
        at: int,
        width: int,
    ) -> None:
        row = row_bytes(form, sizes.size)
        for i in range(count):
            steps, centres = scales_at(role, data, start, sizes, offset + i, head)
            here = codes_at(role, form, start, sizes, offset + i, head)
            for high in range(2):
                for d in range(high * row, min(sizes.size, row + high * row), LANES):
                    some = min(LANES, min(sizes.size, row + high * row) - d)
                    step, centre = steps_and_centres(role, form, data, steps, centres, d, some)
                    code = unpacked(form, data, here + d - high * row, some, high)
                    put(out, at + i * width + d, some, to_f32(code + centre) * step)

    if itemsize:
        return floats
    return {"keys": keys, "values": values}[role.literal_value]
