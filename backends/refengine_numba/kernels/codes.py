"""A group's products with records: 32 weights of sixteen rows with codes of activations.

As ``refengine.ops.linear_a8`` defines it, bit for bit. With a record's codes q and scale s, the encoding's
integers w, scale d, zero z and offset m, a group's sum I of (w - z) · q is exact, and its product is added by
one fused multiply-add, ``(d · s) · I``, and where there are offsets by one more, ``m · (s · sum of q)``. In
``q6_k`` I is the sum of both sixteens' integer sums, times their integer scales. The d and m of K-quants are
``d · scale`` and ``-(dmin · minimum)``, both exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.extending import intrinsic

from refengine_numba.kernels.compilation import inlined, part
from refengine_numba.kernels.intrinsics import centred_dot
from refengine_numba.kernels.unpacking import byte_pair, group_at, integers, layout_of, scales, zero_points
from refengine_numba.kernels.vectors import (
    I32,
    I32V,
    address,
    broadcast_f32,
    fma,
    load_f16,
    peek,
    poke,
    splatted,
    to_f32,
)
from refengine_numba.records import RECORD_BYTES


@part
def add_codes(
    isa: str, encoding: str, tiles: Any, cell: int, group: int, records: Any, at: int, width: int, sums: Any
) -> None:
    """Add a group's products with ``width`` records, the first at ``at``, to as many vectors of ``sums``."""
    d, other = numbers(encoding, tiles, cell, group)
    words = integers(encoding, tiles, group_at(encoding, cell, group))
    for t in range(width):
        r = at + RECORD_BYTES * t
        dot = to_f32(exact_dot(isa, encoding, words, other, records, r))
        total = fma(d * broadcast_f32(records, r + 32), dot, peek(sums, t))
        poke(sums, t, with_offset(encoding, other, records, r, total))


def numbers(encoding: str, tiles: Any, cell: int, group: int) -> Any:
    """A group's scale, and what else it has: offsets, zero points, or the integer scales of both sixteens."""
    raise NotImplementedError


@inlined(numbers)
def _numbers(encoding: Any) -> Callable[..., Any]:
    def scale_and_zero(encoding: str, tiles: Any, cell: int, group: int) -> Any:
        return load_f16(tiles, cell), zero_points(tiles, cell)

    def scale_and_sixteens(encoding: str, tiles: Any, cell: int, group: int) -> Any:
        return load_f16(tiles, cell), byte_pair(tiles, cell + 32 + 32 * group)

    def scale_and_offset(encoding: str, tiles: Any, cell: int, group: int) -> Any:
        return scales(encoding, tiles, cell, group)

    kinds = {"zero_point": scale_and_zero, "eight_bit": scale_and_sixteens}
    return kinds.get(layout_of(encoding).scales, scale_and_offset)


def exact_dot(isa: str, encoding: str, words: Any, other: Any, records: Any, at: int) -> Any:
    """The integer sums of a group with the record at ``at``."""
    raise NotImplementedError


@inlined(exact_dot)
def _exact_dot(encoding: Any) -> Callable[..., Any]:
    layout = layout_of(encoding)
    bits, zero = layout.bits, layout.zero

    def around_one(isa: str, encoding: str, words: Any, other: Any, records: Any, at: int) -> Any:
        return centred_dot(isa, bits, zero, words, records, at, at + 40)

    def around_each(isa: str, encoding: str, words: Any, other: Any, records: Any, at: int) -> Any:
        return centred_dot(isa, bits, other, words, records, at, at + 40)

    def sixteens(isa: str, encoding: str, words: Any, other: Any, records: Any, at: int) -> Any:
        low = centred_dot(isa, bits, 0, words[:4], records, at, at + 40)
        high = centred_dot(isa, bits, zero, words[4:], records, at + 16, at + 44)
        return other[0] * (low - first_sum(records, at, zero)) + other[1] * high

    return {"zero_point": around_each, "eight_bit": sixteens}.get(layout.scales, around_one)


@intrinsic(prefer_literal=True)
def first_sum(typingctx: Any, records: Any, at: Any, zero: Any) -> Any:
    """``zero`` times the sum of a record's first 16 codes, in all lanes."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where = address(context, builder, records, args[0], args[1], RECORD_BYTES)
        words = builder.bitcast(where, I32.as_pointer())
        both, second = (builder.load(builder.gep(words, [I32(i)]), align=4) for i in (10, 11))
        return splatted(builder, builder.mul(builder.sub(both, second), I32(zero.literal_value)))

    return I32V(records, types.int64, zero), codegen


def with_offset(encoding: str, other: Any, records: Any, at: int, total: Any) -> Any:
    """``total``, and the group's offsets times the record's scaled sum, where there are offsets."""
    raise NotImplementedError


@inlined(with_offset)
def _with_offset(encoding: Any) -> Callable[..., Any]:
    if layout_of(encoding).scales in ("pair", "six_bit"):
        return lambda encoding, other, records, at, total: fma(other, broadcast_f32(records, at + 36), total)
    return lambda encoding, other, records, at, total: total
