"""From a cell's bytes to integers, scales and weights in vectors; :mod:`layout` says how they lie.

Functions here are named by what they give. Their bodies in Python are never run: compiled code takes, for
each encoding, the one that :func:`compilation.inlined` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from refengine_numba.kernels.compilation import inlined, part
from refengine_numba.kernels.vectors import (
    F32V,
    I32V,
    LANES,
    VECTOR_BYTES,
    load_bf16,
    load_f16,
    load_f32,
    load_i16,
    load_i32,
    load_u8,
    poke,
    splat_f32,
    splat_i32,
    to_f32,
)
from refengine_numba.layout import GROUP, LAYOUTS, Layout

ANCHOR = 2.0**23
"""An integer below this in the low bits of this float is this plus the integer: no conversion."""


def layout_of(encoding: Any) -> Layout:
    """The layout named by a literal's Numba type."""
    return LAYOUTS[encoding.literal_value]


def integers(encoding: str, tiles: Any, at: int) -> Any:
    """The unsigned integers of 32 weights: eight vectors of words, from the group's bytes at ``at``."""
    raise NotImplementedError


@part
def zero_points(tiles: Any, cell: int) -> Any:
    """The integers that stand for nothing, one for each row, where the cell at ``cell`` stores them."""
    return load_u8(tiles, cell + 32)


def anchored_zero(encoding: str, tiles: Any, cell: int) -> Any:
    """:data:`ANCHOR` plus the integers that stand for nothing, as floats."""
    raise NotImplementedError


def scales(encoding: str, tiles: Any, at: int, group: int) -> Any:
    """Scale and offset of 32 weights, or scales of twice 16 for ``q6_k``; the cell starts at ``at``.

    Each is exact, or as the golden decoder rounds it.
    """
    raise NotImplementedError


def group_at(encoding: str, cell: int, group: int) -> int:
    """Where the bytes of a cell's group start, for :func:`integers`."""
    raise NotImplementedError


def weights(encoding: str, tiles: Any, cell: int, group: int, stack: Any) -> None:
    """Write 32 columns' weights, bit for bit those of the golden decoder, to a stack of 32 vectors."""
    raise NotImplementedError


# ------------------------------------------------------------------------------------------------ integers


@inlined(group_at)
def _group_at(encoding: Any) -> Callable[..., Any]:
    layout = layout_of(encoding)
    scale_bytes, group_bytes = layout.scale_bytes, layout.group_bytes
    return lambda encoding, cell, group: cell + scale_bytes + group * group_bytes


@inlined(integers)
def _integers(encoding: Any) -> Callable[..., Any]:
    return {4: _four_bits, 5: _five_bits, 6: _six_bits, 8: _eight_bits}[layout_of(encoding).bits]


def _four_bits(encoding: str, tiles: Any, at: int) -> Any:
    low, four = splat_i32(0x0F0F0F0F), splat_i32(4)
    a, b = load_i32(tiles, at), load_i32(tiles, at + 64)
    c, d = load_i32(tiles, at + 128), load_i32(tiles, at + 192)
    return (
        a & low,
        b & low,
        c & low,
        d & low,
        (a >> four) & low,
        (b >> four) & low,
        (c >> four) & low,
        (d >> four) & low,
    )


def _five_bits(encoding: str, tiles: Any, at: int) -> Any:
    low, four, fifth = splat_i32(0x0F0F0F0F), splat_i32(4), splat_i32(0x10101010)
    a, b = load_i32(tiles, at), load_i32(tiles, at + 64)
    c, d = load_i32(tiles, at + 128), load_i32(tiles, at + 192)
    high = load_i32(tiles, at + 256)
    return (
        (a & low) | ((high << four) & fifth),
        (b & low) | ((high << splat_i32(3)) & fifth),
        (c & low) | ((high << splat_i32(2)) & fifth),
        (d & low) | ((high << splat_i32(1)) & fifth),
        ((a >> four) & low) | (high & fifth),
        ((b >> four) & low) | ((high >> splat_i32(1)) & fifth),
        ((c >> four) & low) | ((high >> splat_i32(2)) & fifth),
        ((d >> four) & low) | ((high >> splat_i32(3)) & fifth),
    )


def _six_bits(encoding: str, tiles: Any, at: int) -> Any:
    low, four, two, above = splat_i32(0x0F0F0F0F), splat_i32(4), splat_i32(2), splat_i32(0x30303030)
    a, b = load_i32(tiles, at), load_i32(tiles, at + 64)
    c, d = load_i32(tiles, at + 128), load_i32(tiles, at + 192)
    high, higher = load_i32(tiles, at + 256), load_i32(tiles, at + 320)
    return (
        (a & low) | ((high << four) & above),
        (b & low) | ((high << two) & above),
        (c & low) | (high & above),
        (d & low) | ((high >> two) & above),
        ((a >> four) & low) | ((higher << four) & above),
        ((b >> four) & low) | ((higher << two) & above),
        ((c >> four) & low) | (higher & above),
        ((d >> four) & low) | ((higher >> two) & above),
    )


def _eight_bits(encoding: str, tiles: Any, at: int) -> Any:
    return (
        load_i32(tiles, at),
        load_i32(tiles, at + 64),
        load_i32(tiles, at + 128),
        load_i32(tiles, at + 192),
        load_i32(tiles, at + 256),
        load_i32(tiles, at + 320),
        load_i32(tiles, at + 384),
        load_i32(tiles, at + 448),
    )


# -------------------------------------------------------------------------------------------------- scales


@inlined(scales)
def _scales(encoding: Any) -> Callable[..., Any]:
    kinds = {"half": _half, "zero_point": _half, "pair": _pair, "six_bit": _six_bit, "eight_bit": _eight_bit}
    return kinds[layout_of(encoding).scales]


def _half(encoding: str, tiles: Any, at: int, group: int) -> Any:
    scale = load_f16(tiles, at)
    return scale, scale


def _pair(encoding: str, tiles: Any, at: int, group: int) -> Any:
    return load_f16(tiles, at), load_f16(tiles, at + 32)


def _six_bit(encoding: str, tiles: Any, at: int, group: int) -> Any:
    low, two, up = splat_i32(15), splat_i32(3), splat_i32(4)
    nibble, pair = splat_i32(4 * group), splat_i32(2 * group)
    high = load_i32(tiles, at + 192) >> pair
    s = ((load_i32(tiles, at + 64) >> nibble) & low) | ((high & two) << up)
    m = ((load_i32(tiles, at + 128) >> nibble) & low) | (((high >> splat_i32(16)) & two) << up)
    # d has 11 bits and s has 6: products are exact. The minimum is taken away, so it counts as its negative.
    return load_f16(tiles, at) * to_f32(s), load_f16(tiles, at + 32) * to_f32(m) * splat_f32(-1.0)


def _eight_bit(encoding: str, tiles: Any, at: int, group: int) -> Any:
    d, (low, high) = load_f16(tiles, at), byte_pair(tiles, at + 32 + 32 * group)
    return d * to_f32(low), d * to_f32(high)


@intrinsic
def byte_pair(typingctx: Any, tiles: Any, at: Any) -> Any:
    """Two signed bytes for each lane, from 32 bytes."""
    pair = types.UniTuple(I32V, 2)
    load = load_i16._defn(typingctx, tiles, at)[1]

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        both = load(context, builder, I32V(*sig.args), args)
        by = ir.Constant(I32V.ir, [24] * LANES)
        low = builder.ashr(builder.shl(both, by), by)
        high = builder.ashr(both, ir.Constant(I32V.ir, [8] * LANES))
        return context.make_tuple(builder, pair, [low, high])

    return pair(tiles, types.int64), codegen


# ------------------------------------------------------------------------------------------------- weights


def emitted_weights(
    builder: Any, words: Any, zero: Any, first: Any, second: Any, affine: bool
) -> Iterator[Any]:
    """LLVM code of 32 weights, one after the other; see :func:`spread` for the arguments."""
    anchor = ir.Constant(I32V.ir, [int(np.float32(ANCHOR).view(np.int32))] * LANES)
    low_byte = ir.Constant(I32V.ir, [255] * LANES)
    kind = ir.FunctionType(F32V.ir, [F32V.ir] * 3)
    fma = cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.v16f32")
    for i, word in enumerate(words):
        for j in range(4):
            byte = builder.lshr(word, ir.Constant(I32V.ir, [8 * j] * LANES)) if j else word
            byte = builder.and_(byte, low_byte) if j < 3 else byte
            number = builder.fsub(builder.bitcast(builder.or_(byte, anchor), F32V.ir), zero)
            if affine:  # integer times scale is exact: one rounding, as in decode
                yield builder.call(fma, [number, first, second])
            else:
                yield builder.fmul(number, first if i < 4 else second)


@intrinsic(prefer_literal=True)
def spread(typingctx: Any, words: Any, zero: Any, first: Any, second: Any, affine: Any, stack: Any) -> Any:
    """Write 32 weights from their integers.

    Args:
        words: eight vectors.
        zero: taken from each integer, as :func:`anchored_zero` gives it.
        first: the scale of weights 0 to 15, or of all where ``affine``.
        second: the scale of weights 16 to 31, or the offset of all where ``affine``.
        affine: literal.
        stack: of 32 vectors.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        parts = cgutils.unpack_tuple(builder, args[0])
        all_weights = emitted_weights(builder, parts, args[1], args[2], args[3], bool(affine.literal_value))
        for k, weight in enumerate(all_weights):
            builder.store(weight, builder.gep(args[5], [ir.IntType(64)(k)]), align=VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(words, F32V, F32V, F32V, affine, stack), codegen


@inlined(anchored_zero)
def _anchored_zero(encoding: Any) -> Callable[..., Any]:
    layout = layout_of(encoding)
    anchor, anchored = ANCHOR, ANCHOR + layout.zero
    if layout.scales == "zero_point":
        return lambda encoding, tiles, cell: to_f32(zero_points(tiles, cell)) + splat_f32(anchor)
    return lambda encoding, tiles, cell: splat_f32(anchored)


@inlined(weights)
def _weights(encoding: Any) -> Callable[..., Any]:
    layout = layout_of(encoding)
    if layout.bits == 0:
        return {"f16": _f16, "bf16": _bf16, "f32": _f32}[layout.encoding]
    affine = 1 if layout.scales in ("pair", "six_bit") else 0

    def decoded(encoding: str, tiles: Any, cell: int, group: int, stack: Any) -> None:
        first, second = scales(encoding, tiles, cell, group)
        words = integers(encoding, tiles, group_at(encoding, cell, group))
        spread(words, anchored_zero(encoding, tiles, cell), first, second, affine, stack)

    return decoded


def _f16(encoding: str, tiles: Any, cell: int, group: int, stack: Any) -> None:
    for k in range(GROUP):
        poke(stack, k, load_f16(tiles, cell + 32 * k))


def _bf16(encoding: str, tiles: Any, cell: int, group: int, stack: Any) -> None:
    for k in range(GROUP):
        poke(stack, k, load_bf16(tiles, cell + 32 * k))


def _f32(encoding: str, tiles: Any, cell: int, group: int, stack: Any) -> None:
    for k in range(GROUP):
        poke(stack, k, load_f32(tiles, cell + 64 * k))
