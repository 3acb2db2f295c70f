"""What all entries have in common: their signature, and arrays made of the addresses they are called with.

Under ``NUMBA_BOUNDSCHECK=1`` an entry reports an error and returns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray
from numba.core import types
from numba.extending import intrinsic

from refengine_numba.kernels.compilation import part
from refengine_numba.kernels.vectors import address, is_flat

SIGNATURE = "void(int64, int64, CPointer(int64))"
"""Of every entry."""


@intrinsic
def call(typingctx: Any, function: Any, thread: Any, threads: Any, arguments: Any, at: Any) -> Any:
    """Call the entry at an address, with the arguments that start at element ``at`` of an int64 array."""
    if not (is_flat(arguments) and arguments.dtype == types.int64):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word, word, word.as_pointer()])
        where = address(context, builder, sig.args[3], args[3], args[4], 8)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1], args[2], where])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, arguments, types.int64), codegen


@intrinsic
def call_at(typingctx: Any, function: Any, thread: Any, threads: Any, arguments: Any) -> Any:
    """Call the entry at an address, with the arguments at another."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word, word, word.as_pointer()])
        where = builder.inttoptr(args[3], word.as_pointer())
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1], args[2], where])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def pointer(typingctx: Any, where: Any) -> Any:
    """An address as a pointer."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), codegen


@intrinsic
def address_of(typingctx: Any, arguments: Any) -> Any:
    """The address of an entry's arguments."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.ptrtoint(args[0], ir.IntType(64))

    return types.int64(arguments), codegen


@part
def bytes_at(where: int, length: int) -> Any:
    """A uint8 array there."""
    return carray(pointer(where), (length,), np.uint8)


@part
def words_at(where: int, length: int) -> Any:
    """An int64 array there."""
    return carray(pointer(where), (length,), np.int64)


@part
def floats_at(where: int, length: int) -> Any:
    """A float32 array there."""
    return carray(pointer(where), (length,), np.float32)


@part
def doubles_at(where: int, length: int) -> Any:
    """A float64 array there."""
    return carray(pointer(where), (length,), np.float64)


@part
def ids_at(where: int, length: int) -> Any:
    """An int32 array there."""
    return carray(pointer(where), (length,), np.int32)
