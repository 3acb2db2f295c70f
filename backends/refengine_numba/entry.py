"""Kernels as addresses: what an executor calls without knowing which kernel it is.

A step's instructions run inside one parallel region, whose code is compiled once. So every kernel has an
entry of one C signature, ``void (int64 thread, int64 threads, const int64 *arguments)``; the arguments are
addresses and sizes, in an order that each entry states. Nothing is checked: :mod:`matrix` makes arguments
out of arrays that it has checked. An entry raises nothing; under ``NUMBA_BOUNDSCHECK=1`` it reports an
error and returns.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray
from numba.core import types
from numba.extending import intrinsic

from refengine.quantizer import encoding as encoding_named
from refengine_numba.activations import RECORD_BYTES, quantize_groups
from refengine_numba.compilation import entry, part
from refengine_numba.halves import round_rows
from refengine_numba.layout import GROUP, LAYOUTS, TILE_ROWS
from refengine_numba.packing import pack_tiles
from refengine_numba.product import multiply_codes, multiply_floats, multiply_halves
from refengine_numba.rows import look_up
from refengine_numba.vectors import address, is_flat

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


@cache
def mixed8_entry(encoding: str, isa: str) -> Any:
    """The product with quantized activations; ``.address`` is what :func:`call` takes.

    Arguments: tiles, bytes of tiles, records, bias (0: none), y, rows N, columns K, rows of activations T.
    """
    LAYOUTS[encoding]

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        rows, groups, count = a[5], a[6] // GROUP, a[7]
        multiply_codes(
            isa,
            encoding,
            thread,
            threads,
            bytes_at(a[0], a[1]),
            bytes_at(a[2], count * groups * RECORD_BYTES),
            floats_at(a[3], rows if a[3] != 0 else 0),
            floats_at(a[4], count * rows),
            rows,
            groups,
            count,
        )

    return run


@cache
def float32_entry(encoding: str) -> Any:
    """The product with float32 activations.

    Arguments: tiles, bytes of tiles, x, bias (0: none), y, rows N, columns K, rows of activations T.
    """
    LAYOUTS[encoding]

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        rows, size, count = a[5], a[6], a[7]
        multiply_floats(
            encoding,
            thread,
            threads,
            bytes_at(a[0], a[1]),
            floats_at(a[2], count * size),
            floats_at(a[3], rows if a[3] != 0 else 0),
            floats_at(a[4], count * rows),
            rows,
            size,
            count,
        )

    return run


@cache
def mixed16_entry(encoding: str) -> Any:
    """The product with rows rounded to float16.

    Arguments: tiles, bytes of tiles, rounded rows, bias (0: none), y, rows N, columns K, rows of activations
    T, their powers of two.
    """
    LAYOUTS[encoding]

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        rows, size, count = a[5], a[6], a[7]
        multiply_halves(
            encoding,
            thread,
            threads,
            bytes_at(a[0], a[1]),
            floats_at(a[2], count * size),
            floats_at(a[8], count),
            floats_at(a[3], rows if a[3] != 0 else 0),
            floats_at(a[4], count * rows),
            rows,
            size,
            count,
        )

    return run


@cache
def rows_entry(encoding: str) -> Any:
    """Rows of a table. Arguments: tiles, bytes of tiles, ids (int32), y, number of ids T, columns K."""
    LAYOUTS[encoding]

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        look_up(
            encoding,
            thread,
            threads,
            bytes_at(a[0], a[1]),
            ids_at(a[2], a[4]),
            floats_at(a[3], a[4] * a[5]),
            a[5],
        )

    return run


@cache
def quantize_entry() -> Any:
    """Activations to records. Arguments: x, records, rows T, columns K."""

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        rows, groups = a[2], a[3] // GROUP
        quantize_groups(
            thread,
            threads,
            floats_at(a[0], rows * groups * GROUP),
            bytes_at(a[1], rows * groups * RECORD_BYTES),
            rows,
            groups,
        )

    return run


@cache
def round_entry() -> Any:
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


@cache
def pack_entry(encoding: str) -> Any:
    """Stored rows to whole tiles.

    Arguments: rows, bytes from one to the next, tiles, number of tiles, bytes of a row.
    """
    block_bytes = encoding_named(encoding).block_bytes

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        rows = TILE_ROWS * a[3]
        pack_tiles(
            encoding,
            thread,
            threads,
            bytes_at(a[0], (rows - 1) * a[1] + a[4]),
            a[1],
            bytes_at(a[2], rows * a[4]),
            a[3],
            a[4] // block_bytes,
        )

    return run
