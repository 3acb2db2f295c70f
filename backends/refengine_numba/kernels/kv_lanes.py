"""float32 numbers as float16, with integers: the same on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.core import types
from numba.extending import intrinsic

from refengine.quantizer.finite import TOO_LARGE
from refengine_numba.kernels.compilation import part
from refengine_numba.kernels.lanes import floats_of, where_less
from refengine_numba.kernels.vectors import (
    I16,
    I32V,
    LANES,
    address,
    bits_of,
    is_flat,
    lanes_of,
    splat_f32,
    splat_i32,
)

LEAST_NORMAL = np.float32(2.0**-14)
"""Below it, float16 has a fixed unit: 2⁻²⁴, that of float32 numbers from ½ to 1."""

HALF_BITS = int(np.float32(0.5).view(np.int32))

NAN = 0x7E00


@part
def halves_of(x: Any) -> Any:
    """The bits of the nearest float16, ties to even, in 16 of each lane's bits; NaN where it is infinite."""
    bits = bits_of(x)
    sign = (bits >> splat_i32(16)) & splat_i32(0x8000)
    bits = bits & splat_i32(0x7FFFFFFF)
    size = floats_of(bits)
    odd = (bits >> splat_i32(13)) & splat_i32(1)
    # The exponent's bias is 112 less; a fraction that rounds up to 1 carries into the exponent.
    normal = ((bits + splat_i32(0xFFF) + odd) >> splat_i32(13)) - splat_i32(112 << 10)
    small = bits_of(size + splat_f32(np.float32(0.5))) - splat_i32(HALF_BITS)
    known = where_less(size, splat_f32(LEAST_NORMAL), floats_of(small), floats_of(normal))
    known = where_less(size, splat_f32(TOO_LARGE), known, floats_of(splat_i32(NAN)))
    return bits_of(known) | sign


@intrinsic
def lane_bits(typingctx: Any, vector: Any, index: Any) -> Any:
    """One lane of integers."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.extract_element(args[0], args[1])

    return types.int32(I32V, types.int64), codegen


@intrinsic
def store_i16(typingctx: Any, array: Any, at: Any, vector: Any) -> Any:
    """Write the low 16 bits of each of sixteen lanes."""
    if not is_flat(array):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where = address(context, builder, sig.args[0], args[0], args[1], 2 * LANES)
        narrow = builder.trunc(args[2], lanes_of(I16))
        builder.store(narrow, builder.bitcast(where, lanes_of(I16).as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(array, types.int64, I32V), codegen
