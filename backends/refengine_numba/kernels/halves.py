"""Numbers rounded to float16, as float32: what the policy ``mixed16`` multiplies.

Rows of activations are rounded once, before a product reads them. One with an element above 2¹⁵ is first
made smaller by the power of two that ``refengine.ops.linear_a16`` defines.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from refengine_numba.isa import has_half_conversion
from refengine_numba.kernels.activations import INFINITE
from refengine_numba.kernels.compilation import Compiled, entry, part
from refengine_numba.kernels.entry import SIGNATURE, floats_at
from refengine_numba.kernels.lanes import load_first, store_first
from refengine_numba.kernels.share import share
from refengine_numba.kernels.vectors import (
    F16,
    F32V,
    I32V,
    LANES,
    bits_of,
    float_of_bits,
    greater,
    greatest,
    lanes_of,
    load_f32,
    splat_f32,
    splat_i32,
    store,
    store_one_f32,
)

LARGEST_BITS = int(np.float32(2.0**15).view(np.int32))
"""Of the largest element of a row that is rounded as it is."""

SHIFT = 127 + 14
"""The exponent field of numbers from 2¹⁴ on."""


def emitted_nearest(builder: Any, vector: Any) -> Any:
    """LLVM code of the nearest float16 numbers, ties to even, as float32.

    Where the machine has no instruction for it, 1.5 · 2¹³ · 2ᵉ, with the exponent e of a number, is added to
    it and taken away: its last place is the one of float16. This has no end at 65504, loses the sign of zero,
    and makes NaN of infinity: in a product, none of these is seen.
    """
    if has_half_conversion():
        return builder.fpext(builder.fptrunc(vector, lanes_of(F16)), F32V.ir)

    def every(word: int) -> Any:
        return ir.Constant(I32V.ir, [word] * LANES)

    power = builder.and_(builder.bitcast(vector, I32V.ir), every(INFINITE))
    least = every((127 - 14) << 23)  # below 2⁻¹⁴, float16 keeps its last place
    kind = ir.FunctionType(I32V.ir, [I32V.ir] * 2)
    maximum = cgutils.get_or_insert_function(builder.module, kind, "llvm.smax.v16i32")
    power = builder.bitcast(builder.call(maximum, [power, least]), F32V.ir)
    anchor = builder.fmul(power, ir.Constant(F32V.ir, [1.5 * 2.0**13] * LANES))
    return builder.fsub(builder.fadd(vector, anchor), anchor)


@intrinsic
def nearest_half(typingctx: Any, vector: Any) -> Any:
    """The nearest float16 numbers, ties to even, as float32; see :func:`emitted_nearest`."""
    return F32V(F32V), lambda context, builder, sig, args: emitted_nearest(builder, args[0])


@part
def largest_bits(x: Any, at: int, size: int) -> int:
    """The bits of the largest absolute value of a row; those of NaN are above those of infinity."""
    unsigned = splat_i32(0x7FFFFFFF)
    largest = splat_i32(0)
    end = at + size // LANES * LANES
    for k in range(at, end, LANES):
        largest = greater(bits_of(load_f32(x, k)) & unsigned, largest)
    if end < at + size:
        largest = greater(bits_of(load_first(x, end, at + size - end)) & unsigned, largest)
    return int(greatest(largest))


@part
def round_rows(thread: int, threads: int, x: Any, rounded: Any, powers: Any, rows: int, size: int) -> None:
    """Write a thread's share of rows, rounded, and the power of two that each was divided by.

    Args:
        thread: from 0.
        threads: how many share the work.
        x: float32 [rows · size].
        rounded: float32 [rows · size].
        powers: float32 [rows]; 1 but for rows with a finite element above 2¹⁵, and none that is not finite.
        rows: of activations.
        size: elements of a row.
    """
    first, last = share(rows, thread, threads)
    for t in range(first, last):
        at = t * size
        largest = largest_bits(x, at, size)
        # Powers of two themselves belong to the exponent below: 2¹⁵ is as large as a result may be.
        exponent = ((largest - 1) >> 23) - SHIFT if LARGEST_BITS < largest < INFINITE else 0
        store_one_f32(powers, t, float_of_bits(np.int32((127 + exponent) << 23)))
        factor = splat_f32(float_of_bits(np.int32((127 - exponent) << 23)))
        end = at + size // LANES * LANES
        for k in range(at, end, LANES):
            store(rounded, k, nearest_half(load_f32(x, k) * factor))
        if end < at + size:
            count = at + size - end
            store_first(rounded, end, count, nearest_half(load_first(x, end, count) * factor))


def round_entry() -> Compiled:
    """Activations to rows rounded to float16, by rows. Arguments: x, rounded, powers, rows T, columns K."""

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        rows, size = a[3], a[4]
        round_rows(
            thread,
            threads,
            floats_at(a[0], rows * size),
            floats_at(a[1], rows * size),
            floats_at(a[2], rows),
            rows,
            size,
        )

    return run
