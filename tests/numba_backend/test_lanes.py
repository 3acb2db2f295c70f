"""Parts of vectors: so many elements are read or written, and none beside them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from refengine_numba.kernels import lanes
from refengine_numba.kernels.compilation import entry
from refengine_numba.kernels.entry import SIGNATURE, bytes_at, floats_at
from refengine_numba.kernels.vectors import load_f32, splat_i32, store, to_f32

Run = Callable[..., None]


@entry(SIGNATURE)
def parts(thread, threads, a):
    """Of x, so many elements: as they are, doubled as float16 and as bytes, and back."""
    data, out, count = bytes_at(a[0], 256), bytes_at(a[1], 256), a[2]
    lanes.store_first(out, 3, count, lanes.load_first(data, 3, count))
    lanes.store_first_i8(out, 80, count, lanes.load_first_i8(data, 80, count))
    lanes.store_first_i16(out, 101, count, lanes.load_first_i8(data, 101, count))
    store(out, 140, lanes.load_first_f16(data, 140, count))


@entry(SIGNATURE)
def single(thread, threads, a):
    """One element, known when it is compiled."""
    data, out = bytes_at(a[0], 256), bytes_at(a[1], 256)
    lanes.store_first(out, 3, 1, lanes.load_first(data, 3, 1))
    lanes.store_first_i8(out, 80, 1, lanes.load_first_i8(data, 80, 1) & splat_i32(-1))
    lanes.store_first_i16(out, 101, 1, lanes.load_first_i8(data, 101, 1))
    store(out, 140, lanes.load_first_f16(data, 140, 1))


@entry(SIGNATURE)
def shuffles(thread, threads, a):
    """Of 32 numbers: evens, odds, and these put together again; the sum of the first sixteen."""
    x, y = floats_at(a[0], 32), floats_at(a[1], 80)
    even, odd = lanes.evens(load_f32(x, 0), load_f32(x, 16)), lanes.odds(load_f32(x, 0), load_f32(x, 16))
    store(y, 0, even)
    store(y, 16, odd)
    store(y, 32, lanes.alternating_low(even, odd))
    store(y, 48, lanes.alternating_high(even, odd))
    y[64] = lanes.sum_of_lanes(load_f32(x, 0))
    y[65] = lanes.sum_of_lanes(to_f32(lanes.keep_first_i32(splat_i32(3), a[2], splat_i32(-1))))


@pytest.mark.parametrize("count", range(17))
def test_a_part_of_a_vector_is_what_is_asked_for(call: Run, count: int) -> None:
    """One to sixteen elements at any address; 0 stands for one that the compiler knows of."""
    rng = np.random.default_rng(count)
    data, out = rng.integers(0, 256, 256, dtype=np.uint8), np.full(256, 0xAB, np.uint8)
    data[140:172:2], data[141:172:2] = 1, 0x3C  # float16 numbers, none of them NaN
    expected, count, compiled = out.copy(), count or 1, parts if count else single
    expected[3 : 3 + 4 * count] = data[3 : 3 + 4 * count]
    expected[80 : 80 + count] = data[80 : 80 + count]
    wide = data[101 : 101 + count].view(np.int8).astype("<i2").view(np.uint8)
    expected[101 : 101 + 2 * count] = wide
    halves = np.zeros(16, np.float32)
    halves[:count] = data[140 : 140 + 2 * count].copy().view("<f2")
    expected[140:204] = halves.view(np.uint8)
    call(compiled, SimpleNamespace(words=np.array([data.ctypes.data, out.ctypes.data, count], np.int64)))
    assert np.array_equal(out, expected)


def test_lanes_change_places(call: Run) -> None:
    """Pairs are taken apart and put together; sums are of all lanes."""
    x, y = np.arange(32, dtype=np.float32), np.zeros(80, np.float32)
    call(shuffles, SimpleNamespace(words=np.array([x.ctypes.data, y.ctypes.data, 5], np.int64)))
    assert np.array_equal(y[:32], [*range(0, 32, 2), *range(1, 32, 2)])
    assert np.array_equal(y[32:64], x)
    assert y[64:66].tolist() == [sum(range(16)), 5 * 3 - 11]
