"""Products: right, the same in every schedule and on every instruction set, and what the definition says."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from mixed_products import mixed8_product

from refengine.errors import NumericalError
from refengine.ops import quantize_a8
from refengine.quantizer import LazyTensor, decode
from refengine_numba import entries, isa
from refengine_numba.kernels.share import share
from refengine_numba.layout import LAYOUTS
from refengine_numba.matrix import TiledMatrix, quantization
from refengine_numba.records import CHUNK, record_bytes
from refengine_numba.repack import pack

U = 2.0**-24
"""Unit roundoff of float32."""

SIZES = [(50, 256), (16, 576), (33, 1536), (48, 2048), (7, 32)]
"""Rows and columns; whole blocks of 256 only where an encoding asks for them."""

PATHS = isa.available(isa.processor_features())
BLOCKS = [name for name, layout in LAYOUTS.items() if layout.bits]
DENSE = [name for name, layout in LAYOUTS.items() if not layout.bits]

Run = Callable[..., None]
Matrix = Callable[..., np.ndarray]


def sizes(name: str) -> list[tuple[int, int]]:
    extra = [(17, 37), (3, 1)] if LAYOUTS[name].bits == 0 else []
    return [(n, k) for n, k in SIZES if k % LAYOUTS[name].block_size == 0] + extra


def case(name: str, rows: int, columns: int, count: int, matrix: Matrix) -> tuple[TiledMatrix, ...]:
    data = matrix(name, rows, columns)
    x = np.random.default_rng([rows, columns, count]).standard_normal((count, columns)).astype(np.float32)
    return TiledMatrix(name, rows, columns, pack(name, data)), data, x


def records_of(x: np.ndarray, call: Run, threads: int = 1) -> np.ndarray:
    records = np.full(record_bytes(*x.shape), 0xAA, np.uint8)
    call(entries.entry("activations.quantize"), quantization(x, records), threads)
    return records


def float32(tiled: TiledMatrix, x: np.ndarray, call: Run, threads: int = 1, **kws: object) -> np.ndarray:
    y = np.full((len(x), tiled.rows), np.nan, np.float32)
    call(entries.entry("products.float32", tiled.encoding), tiled.product(x, y, **kws), threads)
    return y


def mixed8(
    tiled: TiledMatrix, x: np.ndarray, path: str, call: Run, threads: int = 1, **kws: object
) -> np.ndarray:
    y = np.full((len(x), tiled.rows), np.nan, np.float32)
    arguments = tiled.product(records_of(x, call, threads), y, **kws)
    call(entries.entry("products.mixed8", tiled.encoding, path), arguments, threads)
    return y


@pytest.mark.parametrize("name", LAYOUTS)
def test_float32_is_within_the_bound_of_linear(name: str, call: Run, matrix: Matrix) -> None:
    """(K + 1) · u · Σ|w · x| around the float64 sum of golden weights, bias included."""
    for rows, columns in sizes(name):
        tiled, data, x = case(name, rows, columns, 3, matrix)
        bias = np.linspace(-2, 2, rows).astype(np.float32)
        w, x64 = decode(name, data).astype(np.float64), x.astype(np.float64)
        bound = (columns + 1) * U * (np.abs(x64) @ np.abs(w.T) + np.abs(bias))
        error = np.abs(float32(tiled, x, call, bias=bias) - (x64 @ w.T + bias))
        assert (error <= bound).all()
        assert (np.abs(float32(tiled, x, call) - x64 @ w.T) <= bound).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", BLOCKS)
def test_mixed8_gives_the_bits_of_its_definition(name: str, path: str, call: Run, matrix: Matrix) -> None:
    """On every instruction set, with a bias and without."""
    for rows, columns in sizes(name):
        tiled, data, x = case(name, rows, columns, 3, matrix)
        bias = np.linspace(-2, 2, rows).astype(np.float32)
        defined = mixed8_product(name, data, x, bias)
        assert mixed8(tiled, x, path, call, bias=bias).tobytes() == defined.tobytes()
        defined = mixed8_product(name, data, x)
        assert mixed8(tiled, x, path, call).tobytes() == defined.tobytes()


@pytest.mark.parametrize("name", BLOCKS)
def test_extreme_weights_and_codes_stay_exact(name: str, call: Run) -> None:
    """All bits set or clear in the integers, all codes 127 or -127: where 16-bit sums would overflow first."""
    stored = LAYOUTS[name].block_size
    for fill in (0x00, 0xFF, 0x80, 0x7F, 0x0F, 0xF0):
        data = np.full((16, LAYOUTS[name].cell_bytes // 16), fill, np.uint8)
        for at in {"q6_k": [208]}.get(name, [0, 2] if LAYOUTS[name].scales in ("pair", "six_bit") else [0]):
            data[:, at : at + 2] = np.array([0.5], "<f2").view(np.uint8)
        tiled = TiledMatrix(name, 16, stored, pack(name, data))
        x = np.ones((3, stored), np.float32)
        x[1], x[2, ::2] = -1, -1
        defined = mixed8_product(name, data, x)
        for path in PATHS:
            assert mixed8(tiled, x, path, call).tobytes() == defined.tobytes(), (fill, path)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q6_k", "int4_g128", "f16"])
def test_an_elements_bits_depend_on_its_own_rows(name: str, call: Run, matrix: Matrix) -> None:
    """Alone, anywhere among up to 300 rows, by one, two or three threads, beside NaN: the same bits."""
    tiled, _, x = case(name, 50, 512, 300, matrix)
    products = [lambda x, threads: float32(tiled, x, call, threads)]
    if name in BLOCKS:
        products += [
            lambda x, threads, path=path: mixed8(tiled, x, path, call, threads) for path in PATHS[:2]
        ]
    for product in products:
        together = product(x, 1)
        assert np.isfinite(together).all()
        for threads in (2, 3):
            assert product(x, threads).tobytes() == together.tobytes()
        for first, last in [(0, 1), (299, 300), (127, 129), (3, 8), (100, 300)]:
            assert product(x[first:last].copy(), 2).tobytes() == together[first:last].tobytes()
        marred = x.copy()
        marred[::2, 7] = np.nan
        marred[2::4, 300] = np.inf
        beside = product(marred, 1)
        assert beside[1::2].tobytes() == together[1::2].tobytes()
        assert np.isnan(beside[::2]).all()


@pytest.mark.parametrize("name", ["q4_1", "q4_k"])
def test_a_matrix_rows_do_not_mix(name: str, call: Run, matrix: Matrix) -> None:
    """A row of the matrix gives the same bits in any place of any tile."""
    data = matrix(name, 50, 512)
    x = np.random.default_rng(0).standard_normal((2, 512)).astype(np.float32)
    order = np.random.default_rng(1).permutation(50)[:23]
    whole, some = (TiledMatrix(name, len(d), 512, pack(name, d)) for d in (data, data[order]))
    assert np.array_equal(float32(whole, x, call)[:, order], float32(some, x, call))
    path = PATHS[0]
    assert np.array_equal(mixed8(whole, x, path, call)[:, order], mixed8(some, x, path, call))


def test_threads_at_once_give_the_bits_of_threads_in_turn(matrix: Matrix, call: Run) -> None:
    """No thread writes what another reads or writes."""
    tiled, _, x = case("q4_1", 500, 512, 5, matrix)
    y = np.zeros((5, 500), np.float32)
    call(entries.entry("products.float32", "q4_1"), tiled.product(x, y), 2, at_once=True)
    assert y.tobytes() == float32(tiled, x, call).tobytes()


@pytest.mark.parametrize("name", LAYOUTS)
def test_looked_up_rows_are_the_golden_decoders(name: str, call: Run, matrix: Matrix) -> None:
    """Bit for bit, in any order, any number of times, by two threads."""
    rows, columns = 50, 256 if LAYOUTS[name].bits else 67
    data = matrix(name, rows, columns)
    ids = np.array([49, 0, 15, 16, 16, 31, 48, 7], np.int32)
    y = np.full((len(ids), columns), np.nan, np.float32)
    tiled = TiledMatrix(name, rows, columns, pack(name, data))
    call(entries.entry("rows.look_up", name), tiled.look_up(ids, y), 2)
    assert y.tobytes() == decode(name, data)[ids].tobytes()


# Activations


def in_rows(records: np.ndarray, rows: int, groups: int) -> np.ndarray:
    """Records [rows, groups, 48], row by row, read as the text says."""
    found = np.empty((rows, groups, 48), np.uint8)
    for first in range(0, rows, CHUNK):
        width = min(CHUNK, rows - first)
        chunk = records[first * groups * 48 : (first + width) * groups * 48].reshape(groups, width, 48)
        found[first : first + width] = chunk.swapaxes(0, 1)
    return found


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 3, 128, 130])
def test_records_are_the_golden_ones(rows: int, threads: int, call: Run) -> None:
    """All 48 bytes of each. Sizes from subnormal to huge."""
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, 160)) * np.exp2(rng.integers(-149, 128, (rows, 5)).repeat(32, axis=1))
    x = np.clip(x, -3.4e38, 3.4e38).astype(np.float32)
    assert in_rows(records_of(x, call, threads), rows, 5).tobytes() == quantize_a8(x).tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_finite_shows_in_all_its_row(bad: float, path: str, call: Run, matrix: Matrix) -> None:
    """One bad activation, and no result of its row is a number that could be taken for one."""
    tiled, _, x = case("q4_0", 50, 256, 2, matrix)
    x[1, 77] = bad
    y = mixed8(tiled, x, path, call)
    assert np.isfinite(y[0]).all()
    assert not np.isfinite(y[1]).any()


# The door


def test_only_arrays_of_the_right_kind_reach_a_kernel(matrix: Matrix) -> None:
    """Shapes, dtypes, strides and ids are checked before an address is formed."""
    tiled, _, x = case("q4_0", 50, 256, 2, matrix)
    y = np.zeros((2, 50), np.float32)
    for wrong_x, wrong_y, bias in [
        (x[:, :-1].copy(), y, None),
        (x.astype(np.float64), y, None),
        (x[::-1], y, None),
        (x[:1], y, None),
        (x, y[:, ::-1], None),
        (x, y[:, :-1].copy(), None),
        (x, y, np.zeros(49, np.float32)),
        (x, y, np.zeros(50)),
        (np.zeros(record_bytes(2, 256) - 1, np.uint8), y, None),
    ]:
        with pytest.raises(ValueError, match="must be C-contiguous"):
            tiled.product(wrong_x, wrong_y, bias)
    y.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        tiled.product(x, y)
    with pytest.raises(ValueError, match="must be C-contiguous"):
        TiledMatrix("q4_0", 50, 256, np.zeros(50, np.uint8))
    with pytest.raises(ValueError, match="whole groups"):
        quantization(np.zeros((1, 40), np.float32), np.zeros(48, np.uint8))
    for ids in ([50], [-1]):
        with pytest.raises(IndexError, match="outside"):
            tiled.look_up(np.array(ids, np.int32), np.zeros((1, 256), np.float32))


def test_every_size_of_share_covers_all_once() -> None:
    """Threads' shares meet end to end, more threads than items included."""
    for items in (0, 1, 7, 100):
        for threads in (1, 2, 3, 8):
            ends = [share(items, t, threads) for t in range(threads)]
            assert [e for _, e in ends[:-1]] == [s for s, _ in ends[1:]]
            assert (ends[0][0], ends[-1][1]) == (0, items)
            assert max(e - s for s, e in ends) <= math.ceil(items / threads)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_weight_that_is_no_number_is_found_before_any_product(name: str, matrix: Matrix) -> None:
    """Infinity or NaN in any place that holds a float; integers may have any bits."""
    data = matrix(name, 20, 512).copy()
    halves = {"q6_k": [208]}.get(name, [0, 2] if LAYOUTS[name].scales in ("pair", "six_bit") else [0])
    bad = {"f32": b"\x00\x00\x80\x7f", "bf16": b"\x81\xff"}.get(name, b"\x00\xfc")
    assert TiledMatrix.of(LazyTensor("w", (20, 512), name, data)).rows == 20
    for at in halves:
        damaged = data.copy()
        start = LAYOUTS[name].cell_bytes // 16 + at
        damaged[19, start : start + len(bad)] = np.frombuffer(bad, np.uint8)
        assert not np.isfinite(decode(name, damaged)).all()
        with pytest.raises(NumericalError, match="tensor w holds NaN or infinity"):
            TiledMatrix.of(LazyTensor("w", (20, 512), name, damaged))
