"""Exponential and tangent: within the errors their texts derive, right where numbers end, and alike on every machine.

The reference is NumPy's float64, whose own error (a unit in its last place or so) is 2⁻²⁸ of what is tested.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from refengine_numba.kernels import functions
from refengine_numba.kernels.compilation import entry
from refengine_numba.kernels.entry import SIGNATURE, floats_at
from refengine_numba.kernels.vectors import load_f32, store

U = 2.0**-24
"""Unit roundoff of float32."""

LEAST = 2.0**-149
"""The least number of float32."""

Run = Callable[..., None]


@entry(SIGNATURE)
def exp_entry(thread, threads, a):
    x, y = floats_at(a[0], a[2]), floats_at(a[1], a[2])
    for at in range(0, a[2], 16):
        store(y, at, functions.exp(load_f32(x, at)))


@entry(SIGNATURE)
def tanh_entry(thread, threads, a):
    x, y = floats_at(a[0], a[2]), floats_at(a[1], a[2])
    for at in range(0, a[2], 16):
        store(y, at, functions.tanh(load_f32(x, at)))


def applied(compiled: object, x: np.ndarray, call: Run) -> np.ndarray:
    """The function of every element, whatever their number."""
    padded = np.zeros(-(-len(x) // 16) * 16, np.float32)
    padded[: len(x)] = x
    y = np.full_like(padded, 7)
    words = np.array([padded.ctypes.data, y.ctypes.data, len(padded)], np.int64)
    call(compiled, SimpleNamespace(words=words))
    return y[: len(x)]


def dense(low: float, high: float, count: int = 2**20) -> np.ndarray:
    """Numbers between two bounds: evenly spread, and evenly by their bits, of either sign where both are."""
    even = np.linspace(low, high, count)
    sizes = np.arange(0, np.float32(max(abs(low), abs(high))).view(np.int32), 2**31 // count, dtype=np.int32)
    by_bits = sizes.view(np.float32)
    signed = np.concatenate([even, by_bits, -by_bits]).astype(np.float32)
    return signed[(signed >= low) & (signed <= high)]


def around(points: np.ndarray, reach: int = 40) -> np.ndarray:
    """The nearest numbers on either side of positive points."""
    bits = np.asarray(points, np.float32).view(np.int32)[:, None] + np.arange(
        -reach, reach + 1, dtype=np.int32
    )
    return bits.ravel().view(np.float32)


HALVES = around(np.log(2) * (np.arange(0, 151) + 0.5))
"""Where the multiple of ln 2 changes, and what is left of the argument is greatest."""


def test_exp_errs_by_no_more_than_it_says(call: Run) -> None:
    """1.8u relative where the result is normal; 2⁻¹⁵⁰ more where it is not. Its whole range, 10⁷ numbers."""
    x = np.concatenate([dense(-104, 88.7), HALVES[HALVES < 88.7], -HALVES])
    right = np.exp(x.astype(np.float64))
    error = np.abs(applied(exp_entry, x, call) - right)
    bound = 1.8 * U * right + np.where(right < 2.0**-126, LEAST / 2, 0)
    assert (error <= bound).all()


def test_exp_at_the_edges(call: Run) -> None:
    """1 at both zeros and beside them, 0 and infinity beyond the range, NaN stays; not above 1 below zero."""
    tiny = np.float32(2.0**-26)
    x = np.float32([0, -0.0, LEAST, -LEAST, tiny, -tiny, np.inf, -np.inf, 89, 1e30, -104, -1e30, 3.4e38])
    expected = np.float32([1, 1, 1, 1, 1, 1, np.inf, 0, np.inf, np.inf, 0, 0, np.inf])
    assert np.array_equal(applied(exp_entry, x, call), expected)
    nans = np.array([0x7FC00000, 0x7F800001, -0x400000, -1], np.int64).astype(np.int32).view(np.float32)
    assert np.isnan(applied(exp_entry, nans, call)).all()
    last = np.float32(88.72283)  # the exponential's greatest finite value is here, the next is infinite
    assert np.isfinite(applied(exp_entry, np.float32([last]), call)).all()
    assert np.isposinf(applied(exp_entry, np.nextafter(np.float32([last]), np.float32(90)), call)).all()
    first = np.float32(-103.97208)  # just above half of the least number: log(2⁻¹⁵⁰) = -103.97208
    values = applied(exp_entry, around(-first[None]) * -1, call)
    assert set(values.tolist()) == {0.0, LEAST}
    assert applied(exp_entry, -dense(0, 104), call).max() == 1


def test_tanh_errs_by_no_more_than_it_says(call: Run) -> None:
    """4.5u relative, at 10⁶ numbers of either sign, and where the reduction begins."""
    x = np.concatenate([dense(-12, 12), HALVES[HALVES < 21] / 2, around(np.array([0.25, 0.5, 1, 9.01, 10]))])
    right = np.tanh(x.astype(np.float64))
    y = applied(tanh_entry, x, call)
    assert (np.abs(y - right) <= 4.5 * U * np.abs(right)).all()
    assert (np.abs(y) <= 1).all()
    assert np.array_equal(applied(tanh_entry, -x, call), -y)


def test_tanh_at_the_edges(call: Run) -> None:
    """Zeros keep their sign, subnormal numbers their bits; ±1 from 9.02 on; NaN stays."""
    small = np.arange(0, 2**23, 997, dtype=np.int32).view(np.float32)
    x = np.concatenate([small, -small])
    assert applied(tanh_entry, x, call).tobytes() == x.tobytes()
    ends = np.float32([9.02, 10, 11, 1e4, 3.4e38, np.inf])
    assert np.array_equal(applied(tanh_entry, ends, call), np.ones(6))
    assert np.array_equal(applied(tanh_entry, -ends, call), -np.ones(6))
    nans = np.array([0x7FC00000, 0x7F800001, -0x400000, -1], np.int64).astype(np.int32).view(np.float32)
    assert np.isnan(applied(tanh_entry, nans, call)).all()


BITS = """
import sys, zlib
import numpy as np
sys.path[:0] = {folders!r}
from conftest import run
from test_functions import applied, dense, exp_entry, tanh_entry
x = np.concatenate([dense(-110, 95, 2**14), np.float32([np.inf, -np.inf])])
print(*(zlib.crc32(applied(compiled, x, run).tobytes()) for compiled in (exp_entry, tanh_entry)))
"""


@pytest.mark.parametrize("features", ["+sse2", "+sse2,+sse4.1,+avx,+avx2,+fma"])
def test_every_instruction_set_gives_the_same_bits(features: str, call: Run) -> None:
    """Without vectors of this processor's width, and without its multiply-add, too."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("these are names of x86 features")
    x = np.concatenate([dense(-110, 95, 2**14), np.float32([np.inf, -np.inf])])
    expected = [zlib.crc32(applied(compiled, x, call).tobytes()) for compiled in (exp_entry, tanh_entry)]
    variables = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": features}
    done = subprocess.run(
        [sys.executable, "-c", BITS.format(folders=[str(Path(__file__).parents[i]) for i in (0, 1)])],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [int(word) for word in done.stdout.split()] == expected
