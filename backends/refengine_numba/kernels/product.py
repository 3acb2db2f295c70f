"""Products of repacked matrices with activations: y[t, n] = sum over k of weight[n, k] · x[t, k], plus bias.

The kernels serve decoding (one row of activations) and prefill (hundreds) alike: a tile's group of 32
columns is unpacked once and multiplied with every row of activations in a chunk, whose sums wait on the
stack. So a weight is read once for up to :data:`activations.CHUNK` rows, and what is computed for an
element of y, and in which order, depends on nothing but its row of x and its row of the matrix: not on
other rows, nor on threads.

``float32``: in each group of 32 columns four chains of fused multiply-adds from zero, chain c over columns
c, c + 4, …, c + 28; then (0 + 1) + (2 + 3); the groups' sums added from left to right. Weights are the golden
decoder's bits. A last group of fewer columns has shorter chains.

``mixed16``: as ``float32``, of rows that :func:`halves.round_rows` has rounded, and of weights that are
rounded to float16 as they are decoded; a row's sums are multiplied by its power of two before the bias is
added.

``mixed8``: as ``refengine.ops.linear_a8`` defines it, bit for bit; see :mod:`codes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from refengine_numba.kernels.codes import add_codes
from refengine_numba.kernels.compilation import inlined, part
from refengine_numba.kernels.halves import emitted_nearest, nearest_half
from refengine_numba.kernels.intrinsics import prefetch
from refengine_numba.kernels.share import share
from refengine_numba.kernels.unpacking import (
    anchored_zero,
    emitted_weights,
    group_at,
    integers,
    layout_of,
    scales,
    weights,
)
from refengine_numba.kernels.vectors import (
    F32V,
    VECTOR_BYTES,
    Stack,
    address,
    broadcast_f32,
    fma,
    is_flat,
    load_bf16,
    load_f16,
    load_f32,
    peek,
    poke,
    splat_f32,
    splatted,
    stack_f32,
    store,
)
from refengine_numba.layout import GROUP, TILE_ROWS
from refengine_numba.records import CHUNK, RECORD_BYTES

LINE = 64
"""Bytes of a cache line."""

AHEAD = 8192
"""How many bytes ahead of the ones it reads a kernel asks for."""


# ---------------------------------------------------------------------------------------------- one group


@intrinsic(prefer_literal=True)
def chains(typingctx: Any, stack: Any, x: Any, at: Any, stride: Any, count: Any) -> Any:
    """A group's float32 sums with ``count`` (literal) rows of x, the first at ``at``, ``stride`` apart."""
    if not (isinstance(stack, Stack) and is_flat(x) and isinstance(count, types.IntegerLiteral)):
        return None
    rows = count.literal_value
    result = types.UniTuple(F32V, rows)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        weights = (
            builder.load(builder.gep(args[0], [ir.IntType(64)(k)]), align=VECTOR_BYTES) for k in range(GROUP)
        )
        starts = [builder.add(args[2], builder.mul(args[3], args[3].type(t))) for t in range(rows)]
        pointers = [address(context, builder, x, args[1], start, 4 * GROUP) for start in starts]
        return context.make_tuple(builder, result, emitted_chains(builder, weights, pointers))

    return result(stack, x, types.int64, types.int64, count), codegen


def emitted_chains(builder: Any, weights: Iterable[Any], pointers: list[Any]) -> list[Any]:
    """LLVM code of a group's sums with the rows at ``pointers``: four chains each, then their sum."""
    kind = ir.FunctionType(F32V.ir, [F32V.ir] * 3)
    multiply_add = cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.v16f32")
    zero = ir.Constant(F32V.ir, [0.0] * TILE_ROWS)
    sums = [[zero] * 4 for _ in pointers]
    for k, weight in enumerate(weights):
        for chain, pointer in zip(sums, pointers, strict=True):
            factor = builder.load(builder.gep(pointer, [ir.IntType(64)(k)]), align=4)
            chain[k % 4] = builder.call(multiply_add, [weight, splatted(builder, factor), chain[k % 4]])
    return [builder.fadd(builder.fadd(a, b), builder.fadd(c, d)) for a, b, c, d in sums]


@intrinsic(prefer_literal=True)
def chain_of_one(
    typingctx: Any,
    precision: Any,
    words: Any,
    zero: Any,
    first: Any,
    second: Any,
    affine: Any,
    x: Any,
    at: Any,
) -> Any:
    """:func:`unpacking.spread` and :func:`chains` for a single row of x, without a way over the stack."""
    if not is_flat(x):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        parts = cgutils.unpack_tuple(builder, args[1])
        weights = emitted_weights(builder, parts, args[2], args[3], args[4], bool(affine.literal_value))
        if precision.literal_value == "float16":
            weights = (emitted_nearest(builder, weight) for weight in weights)
        pointer = address(context, builder, x, args[6], args[7], 4 * GROUP)
        return emitted_chains(builder, weights, [pointer])[0]

    return F32V(precision, words, F32V, F32V, F32V, affine, x, types.int64), codegen


def group_of_one(encoding: str, precision: str, tiles: Any, cell: int, group: int, x: Any, at: int) -> Any:
    """A group's sum with a single row of x."""
    raise NotImplementedError


@inlined(group_of_one)
def _group_of_one(encoding: Any) -> Callable[..., Any]:
    layout = layout_of(encoding)
    affine = 1 if layout.scales in ("pair", "six_bit") else 0

    def blocks(encoding: str, precision: str, tiles: Any, cell: int, group: int, x: Any, at: int) -> Any:
        first, second = scales(encoding, tiles, cell, group)
        words = integers(encoding, tiles, group_at(encoding, cell, group))
        zero = anchored_zero(encoding, tiles, cell)
        return chain_of_one(precision, words, zero, first, second, affine, x, at)

    def dense(encoding: str, precision: str, tiles: Any, cell: int, group: int, x: Any, at: int) -> Any:
        return columns_sum(encoding, precision, tiles, cell, GROUP, x, at)

    return blocks if layout.bits else dense


@part
def add_floats(stack: Any, x: Any, at: int, stride: int, width: int, sums: Any) -> None:
    """Add a group's products with ``width`` rows of x, the first at ``at``, to as many vectors."""
    t = 0
    while t + 4 <= width:
        a, b, c, d = chains(stack, x, at + t * stride, stride, 4)
        poke(sums, t, peek(sums, t) + a)
        poke(sums, t + 1, peek(sums, t + 1) + b)
        poke(sums, t + 2, peek(sums, t + 2) + c)
        poke(sums, t + 3, peek(sums, t + 3) + d)
        t += 4
    while t < width:
        (one,) = chains(stack, x, at + t * stride, stride, 1)
        poke(sums, t, peek(sums, t) + one)
        t += 1


def add_rest(
    encoding: str,
    precision: str,
    tiles: Any,
    cell: int,
    length: int,
    x: Any,
    at: int,
    stride: int,
    width: int,
    sums: Any,
) -> None:
    """The same for a last group of fewer than 32 columns, of encodings without blocks."""
    raise NotImplementedError


@inlined(add_rest)
def _add_rest(encoding: Any) -> Callable[..., Any]:
    if layout_of(encoding).bits:  # whole blocks, and no rest
        return lambda encoding, precision, tiles, cell, length, x, at, stride, width, sums: None

    def some(
        encoding: str,
        precision: str,
        tiles: Any,
        cell: int,
        length: int,
        x: Any,
        at: int,
        stride: int,
        width: int,
        sums: Any,
    ) -> None:
        for t in range(width):
            total = columns_sum(encoding, precision, tiles, cell, length, x, at + t * stride)
            poke(sums, t, peek(sums, t) + total)

    return some


@part
def columns_sum(encoding: str, precision: str, tiles: Any, cell: int, length: int, x: Any, at: int) -> Any:
    """The sum of up to 32 columns of an encoding without blocks, in four chains."""
    a = b = c = d = splat_f32(0.0)
    for k in range(0, length, 4):
        a = fma(rounded_column(encoding, precision, tiles, cell, k), broadcast_f32(x, at + k), a)
        if k + 1 < length:
            b = fma(rounded_column(encoding, precision, tiles, cell, k + 1), broadcast_f32(x, at + k + 1), b)
        if k + 2 < length:
            c = fma(rounded_column(encoding, precision, tiles, cell, k + 2), broadcast_f32(x, at + k + 2), c)
        if k + 3 < length:
            d = fma(rounded_column(encoding, precision, tiles, cell, k + 3), broadcast_f32(x, at + k + 3), d)
    return (a + b) + (c + d)


def column(encoding: str, tiles: Any, cell: int, k: int) -> Any:
    """Weights of one column, of encodings without blocks."""
    raise NotImplementedError


@inlined(column)
def _column(encoding: Any) -> Callable[..., Any]:
    return {
        "f16": lambda encoding, tiles, cell, k: load_f16(tiles, cell + 32 * k),
        "bf16": lambda encoding, tiles, cell, k: load_bf16(tiles, cell + 32 * k),
        "f32": lambda encoding, tiles, cell, k: load_f32(tiles, cell + 64 * k),
    }[encoding.literal_value]


# ------------------------------------------------------------------------------------------------ rounding


def rounded_column(encoding: str, precision: str, tiles: Any, cell: int, k: int) -> Any:
    """Weights of one column, of encodings without blocks, as they are multiplied."""
    raise NotImplementedError


@inlined(rounded_column)
def _rounded_column(encoding: Any, precision: Any) -> Callable[..., Any]:
    if _is_rounded(encoding, precision):
        return lambda encoding, precision, tiles, cell, k: nearest_half(column(encoding, tiles, cell, k))
    return lambda encoding, precision, tiles, cell, k: column(encoding, tiles, cell, k)


def round_weights(encoding: str, precision: str, stack: Any) -> None:
    """Round a group's decoded weights to what is multiplied."""
    raise NotImplementedError


@inlined(round_weights)
def _round_weights(encoding: Any, precision: Any) -> Callable[..., Any]:
    def none(encoding: str, precision: str, stack: Any) -> None:
        pass

    def each(encoding: str, precision: str, stack: Any) -> None:
        for k in range(GROUP):
            poke(stack, k, nearest_half(peek(stack, k)))

    return each if _is_rounded(encoding, precision) else none


def _is_rounded(encoding: Any, precision: Any) -> bool:
    rounded: bool = precision.literal_value == "float16" and encoding.literal_value != "f16"
    return rounded


# ------------------------------------------------------------------------------------------------- results


@intrinsic
def lane(typingctx: Any, vector: Any, index: Any) -> Any:
    """One lane."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.extract_element(args[0], args[1])

    return types.float32(F32V, types.int64), codegen


@part
def scale_back(sums: Any, width: int, powers: Any, start: int) -> None:
    """Multiply the sums of each row, from ``start``, by its power of two."""
    for t in range(width):
        poke(sums, t, peek(sums, t) * broadcast_f32(powers, start + t))


@part
def finish(sums: Any, width: int, bias: Any, y: Any, start: int, tile: int, rows: int) -> None:
    """Add the bias, if there is one, and write a tile of results: rows from ``start``, up to 16 columns."""
    n = tile * TILE_ROWS
    for t in range(width):
        total = peek(sums, t)
        at = (start + t) * rows + n
        if n + TILE_ROWS <= rows:
            if bias.size > 0:
                total = total + load_f32(bias, n)
            store(y, at, total)
        else:
            for i in range(rows - n):
                y[at + i] = lane(total, i) + bias[n + i] if bias.size > 0 else lane(total, i)


# ------------------------------------------------------------------------------------------------- kernels


@part
def multiply_codes(
    isa: str,
    encoding: str,
    thread: int,
    threads: int,
    tiles: Any,
    records: Any,
    bias: Any,
    y: Any,
    rows: int,
    groups: int,
    columns: int,
) -> None:
    """``mixed8``; see :mod:`products` for the arguments."""
    sums = stack_f32(CHUNK)
    first, last = share((rows + TILE_ROWS - 1) // TILE_ROWS, thread, threads)
    per_cell, cell_bytes = cell_size(encoding)
    for start in range(0, columns, CHUNK):
        width = min(CHUNK, columns - start)
        chunk = start * groups * RECORD_BYTES
        for tile in range(first, last):
            for t in range(width):
                poke(sums, t, splat_f32(0.0))
            begin, at = tile * (groups // per_cell) * cell_bytes, chunk
            for index in range(groups):
                cell, group = begin + index // per_cell * cell_bytes, index % per_cell
                ask_for(encoding, tiles, cell, group)
                add_codes(isa, encoding, tiles, cell, group, records, at, width, sums)
                at += width * RECORD_BYTES
            finish(sums, width, bias, y, start, tile, rows)


@part
def multiply_floats(
    encoding: str,
    precision: str,
    thread: int,
    threads: int,
    tiles: Any,
    x: Any,
    powers: Any,
    bias: Any,
    y: Any,
    rows: int,
    size: int,
    columns: int,
) -> None:
    """``float32`` and ``mixed16``; see :mod:`products` for the arguments, and :func:`sum_tile`.

    ``powers`` is empty where rows were not scaled.
    """
    sums, decoded = stack_f32(CHUNK), stack_f32(GROUP)
    first, last = share((rows + TILE_ROWS - 1) // TILE_ROWS, thread, threads)
    for start in range(0, columns, CHUNK):
        width = min(CHUNK, columns - start)
        for tile in range(first, last):
            sum_tile(encoding, precision, tiles, tile, x, start, size, width, decoded, sums)
            if powers.size > 0:
                scale_back(sums, width, powers, start)
            finish(sums, width, bias, y, start, tile, rows)


@part
def sum_tile(
    encoding: str,
    precision: str,
    tiles: Any,
    tile: int,
    x: Any,
    start: int,
    size: int,
    width: int,
    decoded: Any,
    sums: Any,
) -> None:
    """Write a tile's sums with ``width`` rows of x, from ``start``, to as many vectors.

    Args:
        encoding: literal.
        precision: literal; ``float16`` where weights are rounded to it, or ``float32``.
        tiles: uint8, a repacked matrix.
        tile: which.
        x: float32, rows of ``size`` columns.
        start: the first row.
        size: columns.
        width: rows.
        decoded: a stack of 32 vectors to work in.
        sums: a stack.
    """
    for t in range(width):
        poke(sums, t, splat_f32(0.0))
    per_cell, cell_bytes = cell_size(encoding)
    groups = size // GROUP
    begin, at = tile * tile_size(encoding, size), start * size
    for index in range(groups):
        cell, group = begin + index // per_cell * cell_bytes, index % per_cell
        ask_for(encoding, tiles, cell, group)
        if width == 1:
            poke(sums, 0, peek(sums, 0) + group_of_one(encoding, precision, tiles, cell, group, x, at))
        else:
            weights(encoding, tiles, cell, group, decoded)
            round_weights(encoding, precision, decoded)
            add_floats(decoded, x, at, size, width, sums)
        at += GROUP
    if size % GROUP:
        rest = begin + groups * cell_bytes
        add_rest(encoding, precision, tiles, rest, size % GROUP, x, at, size, width, sums)


def cell_size(encoding: str) -> tuple[int, int]:
    """Groups of 32 columns that a cell (for encodings without blocks: 32 of them) holds, and its bytes."""
    raise NotImplementedError


@inlined(cell_size)
def _cell_size(encoding: Any) -> Callable[..., Any]:
    layout = layout_of(encoding)
    cells = max(1, GROUP // layout.block_size)
    per_cell, nbytes = max(1, layout.block_size // GROUP), cells * layout.cell_bytes
    return lambda encoding: (per_cell, nbytes)


def ask_for(encoding: str, tiles: Any, cell: int, group: int) -> None:
    """Prefetch what is read some groups later: alone, the hardware keeps too few lines on their way."""
    raise NotImplementedError


@inlined(ask_for)
def _ask_for(encoding: Any) -> Callable[..., Any]:
    layout = layout_of(encoding)
    cells = max(1, GROUP // layout.block_size)
    step = cells * layout.cell_bytes // max(1, layout.block_size // GROUP)
    lines = -(-step // LINE)
    distance = AHEAD

    def ask(encoding: str, tiles: Any, cell: int, group: int) -> None:
        at = cell + group * step + distance
        for line in range(lines):
            prefetch(tiles, at + LINE * line)

    return ask


def tile_size(encoding: str, size: int) -> int:
    """Bytes of a tile with ``size`` columns."""
    raise NotImplementedError


@inlined(tile_size)
def _tile_size(encoding: Any) -> Callable[..., Any]:
    layout = layout_of(encoding)
    block_size, nbytes = layout.block_size, layout.cell_bytes
    return lambda encoding, size: size // block_size * nbytes
