"""What lanes do beside arithmetic: being chosen, summed, interleaved, and only some of them stored.

The last vector of a row is often a part of one. Its lanes are computed as all others are, so an element has
the same bits wherever in a vector it lies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from refengine_numba.kernels.vectors import (
    F32V,
    I8,
    I16,
    I32,
    I32V,
    LANES,
    Vector,
    address,
    is_flat,
    lanes_of,
    of_halves,
    splatted,
)

NUMBERS = ir.Constant(I32V.ir, list(range(LANES)))
"""Every lane's own number."""


def _first(builder: Any, count: Any) -> Any:
    """The mask of the first ``count`` lanes."""
    return builder.icmp_signed("<", NUMBERS, splatted(builder, builder.trunc(count, I32)))


@intrinsic
def floats_of(typingctx: Any, bits: Any) -> Any:
    """The floats that have these bits."""
    return F32V(I32V), lambda context, builder, sig, args: builder.bitcast(args[0], F32V.ir)


@intrinsic
def where_less(typingctx: Any, a: Any, b: Any, yes: Any, no: Any) -> Any:
    """``yes`` in lanes where a < b, else ``no``: also where either is NaN."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return F32V(F32V, F32V, F32V, F32V), codegen


def _keep_first(kind: Vector) -> Any:
    """An intrinsic: a vector's first ``count`` lanes, and the others of another vector."""

    @intrinsic
    def keep(typingctx: Any, vector: Any, count: Any, others: Any) -> Any:
        return kind(kind, types.int64, kind), lambda context, builder, sig, args: builder.select(
            _first(builder, args[1]), args[0], args[2]
        )

    return keep


keep_first_f32, keep_first_i32 = _keep_first(F32V), _keep_first(I32V)


def _shuffled(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(lanes_of(I32, len(lanes)), lanes))


@intrinsic
def sum_of_lanes(typingctx: Any, vector: Any) -> Any:
    """The sum of all lanes, halves added to each other until one is left."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector, count = args[0], LANES
        while count > 1:
            count //= 2
            low, high = list(range(count)), list(range(count, 2 * count))
            vector = builder.fadd(
                _shuffled(builder, vector, vector, low), _shuffled(builder, vector, vector, high)
            )
        return builder.extract_element(vector, I32(0))

    return types.float32(F32V), codegen


def _pick(lanes: list[int]) -> Any:
    """An intrinsic that takes sixteen of the 32 lanes of two vectors."""

    @intrinsic
    def pick(typingctx: Any, a: Any, b: Any) -> Any:
        return F32V(F32V, F32V), lambda context, builder, sig, args: _shuffled(
            builder, args[0], args[1], lanes
        )

    return pick


evens = _pick(list(range(0, 2 * LANES, 2)))
odds = _pick(list(range(1, 2 * LANES, 2)))
alternating_low = _pick([lane for i in range(LANES // 2) for lane in (i, LANES + i)])
alternating_high = _pick([lane for i in range(LANES // 2, LANES) for lane in (i, LANES + i)])


# ------------------------------------------------------------------------------------------------- memory


def _declared(builder: Any, name: str, result: Any, *args: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _checked(context: Any, builder: Any, kind: Any, nbytes: int, array: Any, at: Any, count: Any) -> Any:
    """Where ``count`` stored elements of so many bytes begin; they must lie inside the array."""
    if context.enable_boundscheck:
        step = nbytes // context.get_abi_sizeof(context.get_data_type(kind.dtype))
        others = builder.mul(builder.sub(count, at.type(1)), at.type(step))
        address(context, builder, kind, array, builder.add(at, others), nbytes)
    return address(context, builder, kind, array, at, nbytes)


@intrinsic
def load_first(typingctx: Any, array: Any, at: Any, count: Any) -> Any:
    """Load ``count`` float32 numbers, one to sixteen, into the first lanes; the others are 0."""
    if not is_flat(array):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where = _checked(context, builder, sig.args[0], 4, *args)
        where = builder.bitcast(where, F32V.ir.as_pointer())
        mask, zeros = _first(builder, args[2]), ir.Constant(F32V.ir, None)
        return _declared(builder, "llvm.masked.load.v16f32.p0", F32V.ir, where, I32(1), mask, zeros)

    return F32V(array, types.int64, types.int64), codegen


@intrinsic
def store_first(typingctx: Any, array: Any, at: Any, count: Any, vector: Any) -> Any:
    """Write the first ``count`` lanes, one to sixteen of them."""
    if not is_flat(array):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where = _checked(context, builder, sig.args[0], 4, *args[:3])
        where = builder.bitcast(where, F32V.ir.as_pointer())
        mask = _first(builder, args[2])
        _declared(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), args[3], where, I32(1), mask)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64, F32V), codegen


# Narrower elements go through the frame: LLVM 22 makes a masked store that narrows four bytes wide, where it
# knows that the mask has one lane.


def _load_first(element: ir.Type, nbytes: int, kind: Vector, widen: Callable[[Any, Any], Any]) -> Any:
    """An intrinsic that loads ``count`` elements, one to sixteen, into the first lanes; the others are 0."""

    @intrinsic
    def load(typingctx: Any, array: Any, at: Any, count: Any) -> Any:
        if not is_flat(array):
            return None

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            where = _checked(context, builder, sig.args[0], nbytes, *args)
            frame = cgutils.alloca_once(builder, lanes_of(element))
            builder.store(ir.Constant(lanes_of(element), None), frame)
            cgutils.raw_memcpy(builder, frame, where, args[2], nbytes)
            return widen(builder, builder.load(frame))

        return kind(array, types.int64, types.int64), codegen

    return load


load_first_f16 = _load_first(I16, 2, F32V, of_halves)
load_first_i8 = _load_first(I8, 1, I32V, lambda builder, stored: builder.sext(stored, I32V.ir))


def _store_first(element: ir.Type, nbytes: int) -> Any:
    """An intrinsic that writes the low bits of the first ``count`` lanes, one to sixteen of them."""

    @intrinsic
    def store(typingctx: Any, array: Any, at: Any, count: Any, vector: Any) -> Any:
        if not is_flat(array):
            return None

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            where = _checked(context, builder, sig.args[0], nbytes, *args[:3])
            frame = cgutils.alloca_once(builder, lanes_of(element))
            builder.store(builder.trunc(args[3], lanes_of(element)), frame)
            cgutils.raw_memcpy(builder, where, frame, args[2], nbytes)
            return context.get_dummy_value()

        return types.void(array, types.int64, types.int64, I32V), codegen

    return store


store_first_i16 = _store_first(I16, 2)
store_first_i8 = _store_first(I8, 1)
