"""Vectors of sixteen lanes as values of compiled code: the type, its arithmetic, and its ways to memory.

A kernel is written once, over vectors of sixteen float32 or int32 lanes. LLVM cuts them to the width of the
machine: one register of AVX-512, two of AVX2, four of Neon. So lanes mean the same everywhere (rows of the
weight matrix), and so do the bits of a result: each lane's arithmetic is IEEE 754 with one rounding per
operation, and nothing is contracted or reassociated.

Memory is reached through one-dimensional C-contiguous arrays, at an index in elements of that array. There
is no check, except where Numba's own bounds checking is on (``NUMBA_BOUNDSCHECK=1``): then all sixteen
lanes must lie inside.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, register_model

from refengine_numba.isa import has_half_conversion

LANES = 16
"""Lanes of a vector: rows of a tile."""

VECTOR_BYTES = 4 * LANES
"""Bytes of a vector."""

I8, I16, I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
F16, F32 = ir.HalfType(), ir.FloatType()

IR_ELEMENTS = {"i32": I32, "f32": F32}


def lanes_of(element: ir.Type, count: int = LANES) -> ir.VectorType:
    """LLVM's vector type."""
    return ir.VectorType(element, count)


class Vector(types.Type):
    """Sixteen lanes of ``i32`` or ``f32``: a type of compiled code, with no form in Python."""

    def __init__(self, element: str) -> None:
        self.element = element
        super().__init__(name=f"Vector({element})")

    @property
    def ir(self) -> ir.VectorType:
        """As LLVM knows it."""
        return lanes_of(IR_ELEMENTS[self.element])


class Stack(types.Type):
    """A few vectors in a compiled function's own frame."""

    def __init__(self, element: str, count: int) -> None:
        self.element, self.count = element, count
        super().__init__(name=f"Stack({element}, {count})")


I32V, F32V = Vector("i32"), Vector("f32")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, kind.ir)


@register_model(Stack)
class _StackModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Stack) -> None:
        super().__init__(manager, kind, lanes_of(IR_ELEMENTS[kind.element]).as_pointer())


# ---------------------------------------------------------------------------------------------- arithmetic


def _operator(function: Any, emitters: dict[str, str]) -> None:
    """Give a Python operator its meaning on vectors: an LLVM instruction by element."""

    @infer_global(function)
    class _Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and args[0] == args[1] and isinstance(args[0], Vector):
                return signature(args[0], *args) if args[0].element in emitters else None
            return None

    for kind in (I32V, F32V):
        if kind.element in emitters:
            emit = emitters[kind.element]

            def lowered(context: Any, builder: Any, sig: Any, args: Any, emit: str = emit) -> Any:
                return getattr(builder, emit)(*args)

            lower_builtin(function, kind, kind)(lowered)


for _function, _emitters in {
    operator.add: {"i32": "add", "f32": "fadd"},
    operator.sub: {"i32": "sub", "f32": "fsub"},
    operator.mul: {"i32": "mul", "f32": "fmul"},
    operator.truediv: {"f32": "fdiv"},
    operator.and_: {"i32": "and_"},
    operator.or_: {"i32": "or_"},
    operator.xor: {"i32": "xor"},
    operator.lshift: {"i32": "shl"},
    operator.rshift: {"i32": "lshr"},
}.items():
    _operator(_function, _emitters)


def splatted(builder: Any, scalar: Any, count: int = LANES) -> Any:
    """The LLVM value with ``scalar`` in every lane."""
    vector = lanes_of(scalar.type, count)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(
        first, ir.Constant(vector, ir.Undefined), ir.Constant(lanes_of(I32, count), [0] * count)
    )


@intrinsic
def splat_i32(typingctx: Any, scalar: Any) -> Any:
    """An integer in every lane."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return splatted(builder, context.cast(builder, args[0], sig.args[0], types.int32))

    return I32V(types.int64 if isinstance(scalar, types.IntegerLiteral) else scalar), codegen


@intrinsic
def splat_f32(typingctx: Any, scalar: Any) -> Any:
    """A float in every lane."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return splatted(builder, context.cast(builder, args[0], sig.args[0], types.float32))

    return F32V(scalar), codegen


@intrinsic
def to_f32(typingctx: Any, vector: Any) -> Any:
    """Signed integers as floats, rounded to nearest even where they have more than 24 bits."""
    return F32V(I32V), lambda context, builder, sig, args: builder.sitofp(args[0], F32V.ir)


@intrinsic
def to_i32(typingctx: Any, vector: Any) -> Any:
    """Floats that are integers of 32 bits as such."""
    return I32V(F32V), lambda context, builder, sig, args: builder.fptosi(args[0], I32V.ir)


@intrinsic
def bits_of(typingctx: Any, vector: Any) -> Any:
    """The bits of floats."""
    return I32V(F32V), lambda context, builder, sig, args: builder.bitcast(args[0], I32V.ir)


def _call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [a.type for a in args]), name
    )
    return builder.call(function, args)


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    return F32V(F32V, F32V, F32V), lambda context, builder, sig, args: _call(
        builder, "llvm.fma.v16f32", F32V.ir, *args
    )


@intrinsic
def rint(typingctx: Any, vector: Any) -> Any:
    """The nearest integer, ties to even, as a float."""
    return F32V(F32V), lambda context, builder, sig, args: _call(
        builder, "llvm.roundeven.v16f32", F32V.ir, args[0]
    )


@intrinsic
def greater(typingctx: Any, a: Any, b: Any) -> Any:
    """The greater of two signed integers."""
    return I32V(I32V, I32V), lambda context, builder, sig, args: _call(
        builder, "llvm.smax.v16i32", I32V.ir, *args
    )


@intrinsic
def clamp(typingctx: Any, vector: Any, low: Any, high: Any) -> Any:
    """Signed integers, those outside of low to high moved to the nearer end."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(
            builder,
            "llvm.smin.v16i32",
            I32V.ir,
            _call(builder, "llvm.smax.v16i32", I32V.ir, *args[:2]),
            args[2],
        )

    return I32V(I32V, I32V, I32V), codegen


@intrinsic
def greatest(typingctx: Any, vector: Any) -> Any:
    """The greatest lane."""
    return types.int32(I32V), lambda context, builder, sig, args: _call(
        builder, "llvm.vector.reduce.smax.v16i32", I32, args[0]
    )


@intrinsic
def total(typingctx: Any, vector: Any) -> Any:
    """The sum of all lanes, modulo 2**32."""
    return types.int32(I32V), lambda context, builder, sig, args: _call(
        builder, "llvm.vector.reduce.add.v16i32", I32, args[0]
    )


@intrinsic
def float_of_bits(typingctx: Any, bits: Any) -> Any:
    """The float32 that has these 32 bits."""
    return types.float32(types.int32), lambda context, builder, sig, args: builder.bitcast(args[0], F32)


# -------------------------------------------------------------------------------------------------- memory


def address(context: Any, builder: Any, kind: Any, array: Any, index: Any, nbytes: int) -> Any:
    """Where element ``index`` of an array lies; under bounds checking ``nbytes`` from there are its own."""
    view = context.make_array(kind)(context, builder, array)
    itemsize = context.get_abi_sizeof(context.get_data_type(kind.dtype))
    if context.enable_boundscheck:
        length = cgutils.unpack_tuple(builder, view.shape)[0]
        start = builder.mul(index, index.type(itemsize))
        end = builder.mul(length, length.type(itemsize))
        outside = builder.or_(
            builder.icmp_signed("<", index, index.type(0)),
            builder.icmp_signed(">", builder.add(start, start.type(nbytes)), end),
        )
        with builder.if_then(outside, likely=False):
            context.call_conv.return_user_exc(builder, IndexError, ("a vector reaches outside of its array",))
    return builder.gep(view.data, [index])


def is_flat(array: Any) -> bool:
    """Whether a Numba type is that of a one-dimensional C-contiguous array."""
    return isinstance(array, types.Array) and array.ndim == 1 and array.layout == "C"


def _pointer(builder: Any, where: Any, element: ir.Type) -> Any:
    return builder.bitcast(where, element.as_pointer())


def _load(element: ir.Type, kind: Vector, widen: Callable[[Any, Any], Any]) -> Any:
    """An intrinsic that loads sixteen stored elements and widens each to a lane."""
    nbytes = {I8: 1, I16: 2, I32: 4, F32: 4}[element] * LANES

    @intrinsic
    def load(typingctx: Any, array: Any, at: Any) -> Any:
        if not is_flat(array):
            return None

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            where = address(context, builder, sig.args[0], args[0], args[1], nbytes)
            stored = builder.load(_pointer(builder, where, lanes_of(element)), align=1)
            return widen(builder, stored)

        return kind(array, types.int64), codegen

    return load


load_i32 = _load(I32, I32V, lambda builder, stored: stored)
load_f32 = _load(F32, F32V, lambda builder, stored: stored)
load_i8 = _load(I8, I32V, lambda builder, stored: builder.sext(stored, I32V.ir))
load_u8 = _load(I8, I32V, lambda builder, stored: builder.zext(stored, I32V.ir))
load_i16 = _load(I16, I32V, lambda builder, stored: builder.sext(stored, I32V.ir))


def of_halves(builder: Any, stored: Any) -> Any:
    """float16 as float32, exactly; with integers where the machine has no instruction for it."""
    if has_half_conversion():
        return builder.fpext(builder.bitcast(stored, lanes_of(F16)), F32V.ir)

    def every(word: int) -> Any:
        return ir.Constant(I32V.ir, [word] * LANES)

    bits = builder.zext(stored, I32V.ir)
    sign = builder.shl(builder.and_(bits, every(0x8000)), every(16))
    size = builder.shl(builder.and_(bits, every(0x7FFF)), every(13))  # as a float: 2**112 too small
    scaled = builder.fmul(builder.bitcast(size, F32V.ir), ir.Constant(F32V.ir, [2.0**112] * LANES))
    special = builder.icmp_unsigned(">=", size, every(0x7C00 << 13))
    finite_or_not = builder.select(
        special, builder.or_(size, every(0x7F800000)), builder.bitcast(scaled, I32V.ir)
    )
    return builder.bitcast(builder.or_(sign, finite_or_not), F32V.ir)


load_f16 = _load(I16, F32V, of_halves)
load_bf16 = _load(
    I16,
    F32V,
    lambda builder, stored: builder.bitcast(
        builder.shl(builder.zext(stored, I32V.ir), ir.Constant(I32V.ir, [16] * LANES)), F32V.ir
    ),
)


def _broadcast(element: ir.Type, kind: Vector) -> Any:
    """An intrinsic that loads one element into all lanes."""

    @intrinsic
    def broadcast(typingctx: Any, array: Any, at: Any) -> Any:
        if not is_flat(array):
            return None

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            where = address(context, builder, sig.args[0], args[0], args[1], 4)
            return splatted(builder, builder.load(_pointer(builder, where, element), align=1))

        return kind(array, types.int64), codegen

    return broadcast


broadcast_i32 = _broadcast(I32, I32V)
broadcast_f32 = _broadcast(F32, F32V)


@intrinsic
def store(typingctx: Any, array: Any, at: Any, vector: Any) -> Any:
    """Write sixteen lanes."""
    if not (is_flat(array) and isinstance(vector, Vector)):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where = address(context, builder, sig.args[0], args[0], args[1], VECTOR_BYTES)
        builder.store(args[2], _pointer(builder, where, args[2].type), align=1)
        return context.get_dummy_value()

    return types.void(array, types.int64, vector), codegen


@intrinsic
def store_i8(typingctx: Any, array: Any, at: Any, vector: Any) -> Any:
    """Write the low byte of each of sixteen lanes."""
    if not is_flat(array):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where = address(context, builder, sig.args[0], args[0], args[1], LANES)
        narrow = builder.trunc(args[2], lanes_of(I8))
        builder.store(narrow, _pointer(builder, where, narrow.type), align=1)
        return context.get_dummy_value()

    return types.void(array, types.int64, I32V), codegen


def _store_scalar(element: ir.Type, kind: Any) -> Any:
    @intrinsic
    def store_scalar(typingctx: Any, array: Any, at: Any, scalar: Any) -> Any:
        if not is_flat(array):
            return None

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            where = address(context, builder, sig.args[0], args[0], args[1], 4)
            builder.store(args[2], _pointer(builder, where, element), align=1)
            return context.get_dummy_value()

        return types.void(array, types.int64, kind), codegen

    return store_scalar


store_one_i32 = _store_scalar(I32, types.int32)
store_one_f32 = _store_scalar(F32, types.float32)


# --------------------------------------------------------------------------------------------------- frame


def _stack(element: str) -> Any:
    @intrinsic(prefer_literal=True)
    def stack(typingctx: Any, count: Any) -> Any:
        if not isinstance(count, types.IntegerLiteral):
            return None
        kind = Stack(element, count.literal_value)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            vector = lanes_of(IR_ELEMENTS[element])
            frame = cgutils.alloca_once(builder, ir.ArrayType(vector, kind.count))
            frame.align = VECTOR_BYTES
            return builder.bitcast(frame, vector.as_pointer())

        return kind(count), codegen

    return stack


stack_f32 = _stack("f32")


def _inside(context: Any, builder: Any, kind: Stack, index: Any) -> None:
    if context.enable_boundscheck:
        with builder.if_then(builder.icmp_unsigned(">=", index, index.type(kind.count)), likely=False):
            context.call_conv.return_user_exc(builder, IndexError, ("no such vector on the stack",))


@intrinsic
def peek(typingctx: Any, stack: Any, index: Any) -> Any:
    """Vector ``index`` of a stack."""
    if not isinstance(stack, Stack):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _inside(context, builder, stack, args[1])
        return builder.load(builder.gep(args[0], [args[1]]), align=VECTOR_BYTES)

    return Vector(stack.element)(stack, types.int64), codegen


@intrinsic
def poke(typingctx: Any, stack: Any, index: Any, vector: Any) -> Any:
    """Write vector ``index`` of a stack."""
    if not isinstance(stack, Stack):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _inside(context, builder, stack, args[1])
        builder.store(args[2], builder.gep(args[0], [args[1]]), align=VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(stack, types.int64, Vector(stack.element)), codegen
