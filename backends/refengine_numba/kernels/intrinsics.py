"""Instructions that neither Numba nor NumPy names: dot products of bytes, prefetch, atomics, giving way.

A dot product takes weights as unsigned bytes, four consecutive columns of one row to a lane, and codes of
activations as signed bytes, -127 to 127, four to a 32-bit word that all lanes share. Its sum is exact in 32
bits on every path, so the paths give the same numbers.
"""

from __future__ import annotations

import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from refengine_numba.kernels.vectors import I8, I16, I32, I32V, LANES, address, is_flat, lanes_of, splatted

PAIRS_PER_SUM = {4: 8, 5: 4, 6: 2}
"""How many sums of two products of weight and code fit signed 16 bits: (2**15 - 1) // (2 · max · 127)."""


def _declared(builder: Any, name: str, result: Any, *args: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _half(builder: Any, vector: Any, which: int) -> Any:
    """Lanes 0 to 7, or 8 to 15."""
    lanes = ir.Constant(lanes_of(I32, 8), list(range(8 * which, 8 * which + 8)))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), lanes)


def _joined(builder: Any, low: Any, high: Any) -> Any:
    return builder.shuffle_vector(low, high, ir.Constant(lanes_of(I32), list(range(LANES))))


def _as_bytes(builder: Any, vector: Any) -> Any:
    return builder.bitcast(vector, lanes_of(I8, 4 * vector.type.count))


def _vnni(builder: Any, words: list[Any], codes: list[Any], lanes: int) -> Any:
    """One VPDPBUSD a word: Intel SDM, "multiply and add unsigned and signed bytes"."""
    total = ir.Constant(lanes_of(I32, lanes), [0] * lanes)
    for word, code in zip(words, codes, strict=True):
        total = _declared(
            builder,
            f"llvm.x86.avx512.vpdpbusd.{32 * lanes}",
            total.type,
            total,
            _as_bytes(builder, word),
            _as_bytes(builder, splatted(builder, code, lanes)),
        )
    return total


def _maddubs(builder: Any, words: list[Any], codes: list[Any], bits: int) -> Any:
    """VPMADDUBSW sums two products in 16 bits, and several of its sums still fit; VPMADDWD widens them."""
    total = ir.Constant(lanes_of(I32, 8), [0] * 8)
    ones = ir.Constant(lanes_of(I16), [1] * 16)
    step = PAIRS_PER_SUM[bits]
    for start in range(0, len(words), step):
        pairs = None
        for word, code in zip(words[start : start + step], codes[start : start + step], strict=True):
            products = _declared(
                builder,
                "llvm.x86.avx2.pmadd.ub.sw",
                ones.type,
                _as_bytes(builder, word),
                _as_bytes(builder, splatted(builder, code, 8)),
            )
            pairs = products if pairs is None else builder.add(pairs, products)
        total = builder.add(total, _declared(builder, "llvm.x86.avx2.pmadd.wd", total.type, pairs, ones))
    return total


def _signed_maddubs(builder: Any, words: list[Any], codes: list[Any]) -> Any:
    """Bytes around 128: |w| times x with the sign of w. 2 · 128 · 127 fits into 16 bits with a sign."""
    total = ir.Constant(lanes_of(I32, 8), [0] * 8)
    ones = ir.Constant(lanes_of(I16), [1] * 16)
    middle = ir.Constant(lanes_of(I8, 32), [-128] * 32)
    for word, code in zip(words, codes, strict=True):
        weight = builder.xor(_as_bytes(builder, word), middle)
        size = _declared(builder, "llvm.abs.v32i8", weight.type, weight, ir.IntType(1)(0))
        signed = _declared(
            builder,
            "llvm.x86.avx2.psign.b",
            weight.type,
            _as_bytes(builder, splatted(builder, code, 8)),
            weight,
        )
        pairs = _declared(builder, "llvm.x86.avx2.pmadd.ub.sw", ones.type, size, signed)
        total = builder.add(total, _declared(builder, "llvm.x86.avx2.pmadd.wd", total.type, pairs, ones))
    return total


def _portable(builder: Any, words: list[Any], codes: list[Any]) -> Any:
    """Byte by byte in 32 bits: what every machine has."""
    total = ir.Constant(I32V.ir, [0] * LANES)
    low_byte = ir.Constant(I32V.ir, [255] * LANES)
    for word, code in zip(words, codes, strict=True):
        for byte in range(4):
            weight = builder.and_(builder.lshr(word, ir.Constant(I32V.ir, [8 * byte] * LANES)), low_byte)
            factor = builder.ashr(builder.shl(code, I32(24 - 8 * byte)), I32(24))
            total = builder.add(total, builder.mul(weight, splatted(builder, factor)))
    return total


def uncentred_products(builder: Any, isa: str, bits: int, words: Any, codes: Any) -> tuple[Any, int]:
    """LLVM code of sum (weight - middle) · code, over words of four columns, and the middle: 0 or 128."""
    middle = 0
    if isa == "avx512-vnni":
        total = _vnni(builder, words, codes, 16)
    elif isa in ("avx-vnni", "avx2"):
        halves = []
        for which in (0, 1):
            part = [_half(builder, word, which) for word in words]
            if isa == "avx-vnni":
                halves.append(_vnni(builder, part, codes, 8))
            elif bits == 8:
                halves.append(_signed_maddubs(builder, part, codes))
                middle = 128
            else:
                halves.append(_maddubs(builder, part, codes, bits))
        total = _joined(builder, *halves)
    else:
        total = _portable(builder, words, codes)
    return total, middle


@intrinsic(prefer_literal=True)
def centred_dot(
    typingctx: Any, isa: Any, bits: Any, zero: Any, words: Any, records: Any, codes_at: Any, sum_at: Any
) -> Any:
    """sum over columns of (weight - zero) · code, for every lane; exact.

    Args:
        isa: an instruction set, literal.
        bits: of a weight, literal.
        zero: the weight that stands for nothing: literal, or one for each lane.
        words: as many vectors as there are words of four columns.
        records: bytes of quantized activations.
        codes_at: where the codes start in them.
        sum_at: where the codes' sum is, an int32.
    """
    if not (isinstance(words, types.UniTuple) and is_flat(records) and isinstance(isa, types.StringLiteral)):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        parts = cgutils.unpack_tuple(builder, args[3])
        where = address(context, builder, records, args[4], args[5], 4 * len(parts))
        pointer = builder.bitcast(where, I32.as_pointer())
        codes = [builder.load(builder.gep(pointer, [I32(i)]), align=4) for i in range(len(parts))]
        total, middle = uncentred_products(builder, isa.literal_value, bits.literal_value, parts, codes)
        if isinstance(zero, types.IntegerLiteral) and zero.literal_value == middle:
            return total
        there = address(context, builder, records, args[4], args[6], 4)
        sums = builder.load(builder.bitcast(there, I32.as_pointer()), align=4)
        if isinstance(zero, types.IntegerLiteral):
            rest = splatted(builder, builder.mul(sums, I32(zero.literal_value - middle)))
        else:
            beyond = builder.sub(args[2], ir.Constant(I32V.ir, [middle] * LANES))
            rest = builder.mul(beyond, splatted(builder, sums))
        return builder.sub(total, rest)

    return I32V(isa, bits, zero, words, records, types.int64, types.int64), codegen


@intrinsic
def prefetch(typingctx: Any, array: Any, at: Any) -> Any:
    """Ask for the cache line of an element; one outside the array is no error, nothing is read."""
    if not is_flat(array):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        view = context.make_array(sig.args[0])(context, builder, args[0])
        where = builder.bitcast(builder.gep(view.data, [args[1]]), I8.as_pointer())
        # read, keep in all levels, data
        _declared(builder, "llvm.prefetch.p0", ir.VoidType(), where, I32(0), I32(3), I32(1))
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


# ------------------------------------------------------------------------------------------------- threads


def _slot(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return address(context, builder, kind, array, index, 8)


@intrinsic
def atomic_add(typingctx: Any, array: Any, at: Any, amount: Any) -> Any:
    """Add to a word of an int64 array and return what was there; orders all memory around it."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where = _slot(context, builder, sig.args[0], args[0], args[1])
        return builder.atomic_rmw("add", where, args[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), codegen


@intrinsic
def atomic_load(typingctx: Any, array: Any, at: Any) -> Any:
    """A word of an int64 array; what others wrote before they stored it is seen after it."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where = _slot(context, builder, sig.args[0], args[0], args[1])
        return builder.load_atomic(where, "acquire", 8)

    return types.int64(array, types.int64), codegen


@intrinsic
def atomic_store(typingctx: Any, array: Any, at: Any, word: Any) -> Any:
    """Write a word of an int64 array; who loads it sees what was written before."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where = _slot(context, builder, sig.args[0], args[0], args[1])
        builder.store_atomic(args[2], where, "release", 8)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), codegen


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tell the core that this is a loop that waits; nothing on machines without such an instruction."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        triple = builder.module.triple
        if triple.startswith(("x86_64", "i686")):
            _declared(builder, "llvm.x86.sse2.pause", ir.VoidType())
        elif triple.startswith(("aarch64", "arm64")):
            _declared(builder, "llvm.aarch64.hint", ir.VoidType(), I32(1))  # YIELD
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def give_way(typingctx: Any) -> Any:
    """Let another thread have this core, if one waits for it."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _declared(builder, "SwitchToThread" if sys.platform == "win32" else "sched_yield", I32)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def doze(typingctx: Any) -> Any:
    """Sleep for some fifty microseconds (a millisecond on Windows), whoever waits for this core."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if sys.platform == "win32":
            _declared(builder, "Sleep", ir.VoidType(), I32(1))
        else:
            _declared(builder, "usleep", I32, I32(50))
        return context.get_dummy_value()

    return types.void(), codegen
