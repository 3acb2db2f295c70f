"""What attention asks of vectors, beside what all kernels do.

Sixteen rows are turned into columns, the greatest lane is found, lanes are hidden; and the two products over
a tile are blocks of sums that stay in registers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from refengine_numba.kernels.attention_sizes import TILE
from refengine_numba.kernels.vectors import (
    F32V,
    I16,
    I32,
    LANES,
    VECTOR_BYTES,
    address,
    is_flat,
    lanes_of,
    of_halves,
    splatted,
)

_NUMBERS = ir.Constant(lanes_of(I32), list(range(LANES)))


def _shuffled(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(lanes_of(I32, len(lanes)), lanes))


def _in_quarters(a: list[int], b: list[int]) -> list[int]:
    """Lanes of a shuffle that does the same in each four lanes: numbers from 4 on are the second vector's."""
    picked = [x for pair in zip(a, b, strict=True) for x in pair]
    return [4 * quarter + (x if x < 4 else x - 4 + LANES) for quarter in range(4) for x in picked]


def _quarters(*numbers: int) -> list[int]:
    """Lanes of a shuffle of whole fours: numbers from 4 on are the second vector's."""
    return [4 * number + lane for number in numbers for lane in range(4)]


def transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Sixteen vectors as columns: single lanes, then pairs, change places within fours, then whole fours."""
    pairs = [
        _shuffled(builder, rows[i], rows[i + 1], lanes)
        for i in range(0, LANES, 2)
        for lanes in (_in_quarters([0, 1], [4, 5]), _in_quarters([2, 3], [6, 7]))
    ]
    fours = [
        _shuffled(builder, pairs[i + which], pairs[i + which + 2], lanes)
        for i in range(0, LANES, 4)
        for which in (0, 1)
        for lanes in (_in_quarters([0, 4], [1, 5]), _in_quarters([2, 6], [3, 7]))
    ]
    columns: list[Any] = [None] * LANES
    even, odd = _quarters(0, 2, 4, 6), _quarters(1, 3, 5, 7)
    for k in range(4):
        a, b, c, d = fours[k], fours[4 + k], fours[8 + k], fours[12 + k]
        for first, lanes in ((0, even), (1, odd)):
            low, high = _shuffled(builder, a, b, lanes), _shuffled(builder, c, d, lanes)
            columns[4 * first + k] = _shuffled(builder, low, high, even)
            columns[4 * (first + 2) + k] = _shuffled(builder, low, high, odd)
    return columns


def _turn(nbytes: int, element: ir.Type) -> Any:
    """An intrinsic that reads sixteen stored numbers of each of sixteen rows, and writes columns."""

    @intrinsic
    def turn(typingctx: Any, pool: Any, rows: Any, at: Any, offset: Any, out: Any, out_at: Any) -> Any:
        if not (is_flat(pool) and is_flat(rows) and is_flat(out)):
            return None

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            kinds = sig.args
            vectors = []
            for i in range(LANES):
                here = builder.add(args[2], args[2].type(i))
                start = builder.load(address(context, builder, kinds[1], args[1], here, 8))
                where = address(
                    context, builder, kinds[0], args[0], builder.add(start, args[3]), LANES * nbytes
                )
                stored = builder.load(builder.bitcast(where, lanes_of(element).as_pointer()), align=1)
                vectors.append(of_halves(builder, stored) if element is I16 else stored)
            for i, column in enumerate(transposed(builder, vectors)):
                here = builder.add(args[5], args[5].type(TILE * i))
                where = address(context, builder, kinds[4], args[4], here, VECTOR_BYTES)
                builder.store(column, builder.bitcast(where, F32V.ir.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(pool, rows, types.int64, types.int64, out, types.int64), codegen

    return turn


turn_f16 = _turn(2, I16)
turn_f32 = _turn(4, F32V.ir.element)


def _one(element: ir.Type, nbytes: int) -> Any:
    """An intrinsic that reads a single stored number at an index of bytes."""

    @intrinsic
    def one(typingctx: Any, pool: Any, at: Any) -> Any:
        if not is_flat(pool):
            return None

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            where = address(context, builder, sig.args[0], args[0], args[1], nbytes)
            stored = builder.load(builder.bitcast(where, element.as_pointer()), align=1)
            if element is not I16:
                return stored
            return builder.extract_element(of_halves(builder, splatted(builder, stored)), I32(0))

        return types.float32(pool, types.int64), codegen

    return one


one_f16 = _one(I16, 2)
one_f32 = _one(F32V.ir.element, 4)


@intrinsic
def greatest_lane(typingctx: Any, vector: Any) -> Any:
    """The greatest lane; none of them is NaN."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector, count = args[0], LANES
        while count > 1:
            count //= 2
            low = _shuffled(builder, vector, vector, list(range(count)))
            high = _shuffled(builder, vector, vector, list(range(count, 2 * count)))
            vector = builder.select(builder.fcmp_ordered(">", low, high), low, high)
        return builder.extract_element(vector, I32(0))

    return types.float32(F32V), codegen


@intrinsic
def hide(typingctx: Any, vector: Any, number: Any, first: Any, last: Any) -> Any:
    """Minus infinity in lanes outside of ``first`` to ``last - 1``, where lane 0 has the given number."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        number, first, last = (splatted(builder, builder.trunc(a, I32)) for a in args[1:])
        here = builder.add(_NUMBERS, number)
        seen = builder.and_(
            builder.icmp_signed(">=", here, first),
            builder.icmp_signed("<", here, last),
        )
        return builder.select(seen, args[0], ir.Constant(F32V.ir, [float("-inf")] * LANES))

    return F32V(F32V, types.int64, types.int64, types.int64), codegen


# ------------------------------------------------------------------------------------------------ products


class _Memory:
    """Loads and stores of one float32 array, by element."""

    def __init__(self, context: Any, builder: Any, kind: Any, array: Any) -> None:
        self._context, self._builder, self._kind, self._array = context, builder, kind, array

    def _where(self, index: Any, nbytes: int) -> Any:
        return address(self._context, self._builder, self._kind, self._array, index, nbytes)

    def _vector(self, index: Any) -> Any:
        return self._builder.bitcast(self._where(index, VECTOR_BYTES), F32V.ir.as_pointer())

    def vector(self, index: Any) -> Any:
        return self._builder.load(self._vector(index), align=4)

    def everywhere(self, index: Any) -> Any:
        return splatted(self._builder, self._builder.load(self._where(index, 4), align=4))

    def put(self, index: Any, vector: Any) -> None:
        self._builder.store(vector, self._vector(index), align=4)


def _plus(builder: Any, index: Any, constant: int) -> Any:
    return builder.add(index, index.type(constant))


def _multiply_add(builder: Any) -> Any:
    kind = ir.FunctionType(F32V.ir, [F32V.ir] * 3)
    return cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.v16f32")


@intrinsic(prefer_literal=True)
def score_block(
    typingctx: Any, work: Any, keys: Any, q: Any, size: Any, scores: Any, rows: Any, vectors: Any
) -> Any:
    """Products of ``rows`` (literal) rows of q with 16 · ``vectors`` (literal) keys: one chain each.

    ``work`` holds keys [size, TILE] from element ``keys`` on, q [size, rows], and scores [rows, TILE].
    """
    if not (is_flat(work) and isinstance(rows, types.IntegerLiteral)):
        return None
    n, width = rows.literal_value, vectors.literal_value

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        memory, fma = _Memory(context, builder, sig.args[0], args[0]), _multiply_add(builder)
        keys, q, size, scores = args[1:5]
        zero = ir.Constant(F32V.ir, [0.0] * LANES)
        sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(width)] for _ in range(n)]
        for row in sums:
            for total in row:
                builder.store(zero, total)
        with cgutils.for_range(builder, size) as loop:
            start = builder.add(keys, builder.mul(loop.index, size.type(TILE)))
            factors = builder.add(q, builder.mul(loop.index, size.type(n)))
            columns = [memory.vector(_plus(builder, start, LANES * v)) for v in range(width)]
            for i, row in enumerate(sums):
                factor = memory.everywhere(_plus(builder, factors, i))
                for column, total in zip(columns, row, strict=True):
                    builder.store(builder.call(fma, [column, factor, builder.load(total)]), total)
        for i, row in enumerate(sums):
            for v, total in enumerate(row):
                memory.put(_plus(builder, scores, TILE * i + LANES * v), builder.load(total))
        return context.get_dummy_value()

    int64 = types.int64
    return types.void(work, int64, int64, int64, int64, rows, vectors), codegen


@intrinsic(prefer_literal=True)
def value_block(
    typingctx: Any,
    work: Any,
    values: Any,
    width: Any,
    weights: Any,
    first: Any,
    last: Any,
    sums: Any,
    factors: Any,
    rows: Any,
    vectors: Any,
) -> Any:
    """Multiply sums by their rows' factors, then add weighted values of keys ``first`` to ``last - 1``.

    ``work`` holds values [TILE, width] from element ``values`` on, weights [rows, TILE], sums [rows, width]
    and factors [rows]. One chain for each of ``rows`` rows and 16 · ``vectors`` columns (literals).
    """
    if not (is_flat(work) and isinstance(rows, types.IntegerLiteral)):
        return None
    n, count = rows.literal_value, vectors.literal_value

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        memory, fma = _Memory(context, builder, sig.args[0], args[0]), _multiply_add(builder)
        values, width, weights, first, last, sums, factors = args[1:8]
        zero = ir.Constant(F32V.ir, [0.0] * LANES)
        places = [builder.add(sums, builder.mul(width, width.type(i))) for i in range(n)]
        totals = [[cgutils.alloca_once_value(builder, zero) for _ in range(count)] for _ in range(n)]
        for i, row in enumerate(totals):
            factor = memory.everywhere(_plus(builder, factors, i))
            for v, total in enumerate(row):
                before = memory.vector(_plus(builder, places[i], LANES * v))
                builder.store(builder.fmul(before, factor), total)
        with cgutils.for_range(builder, last, start=first) as loop:
            start = builder.add(values, builder.mul(loop.index, width))
            columns = [memory.vector(_plus(builder, start, LANES * v)) for v in range(count)]
            for i, row in enumerate(totals):
                weight = memory.everywhere(_plus(builder, builder.add(weights, loop.index), TILE * i))
                for column, total in zip(columns, row, strict=True):
                    builder.store(builder.call(fma, [column, weight, builder.load(total)]), total)
        for i, row in enumerate(totals):
            for v, total in enumerate(row):
                memory.put(_plus(builder, places[i], LANES * v), builder.load(total))
        return context.get_dummy_value()

    int64 = types.int64
    args = (int64, int64, int64, int64, int64, int64, int64, rows, vectors)
    return types.void(work, *args), codegen
