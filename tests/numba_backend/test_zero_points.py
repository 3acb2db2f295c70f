"""Integers around a zero point of their own: at its ends, and at those of integers, scales and shapes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from mixed_products import mixed8_product

from refengine.ops import quantize_a8
from refengine.quantizer import LazyTensor, decode
from refengine.quantizer.finite import fit_float16
from refengine_numba import entries, isa
from refengine_numba.layout import LAYOUTS
from refengine_numba.matrix import TiledMatrix, quantization
from refengine_numba.records import record_bytes
from refengine_numba.repack import pack

U = 2.0**-24
"""Unit roundoff of float32."""

NAMES = [name for name, layout in LAYOUTS.items() if layout.scales == "zero_point"]
PATHS = isa.available(isa.processor_features())
ZEROS = (0, 1, 15, 127, 128, 254, 255)
SCALES = (0.5, -0.5, 2.0**-24, -1023 * 2.0**-24, 65504, -0.0)
"""Of either sign, the least and the greatest subnormal, the greatest there is, and a zero."""

Run = Callable[..., None]


def block(name: str, d: float, z: int, integers: np.ndarray) -> bytes:
    """A stored block, byte by byte."""
    head = struct.pack("<eB", d, z)
    if LAYOUTS[name].bits == 8:
        return head + bytes(integers.tolist())
    pairs = integers.reshape(-1, 2, 16)
    return head + bytes(low | high << 4 for group in pairs.tolist() for low, high in zip(*group, strict=True))


def edges(name: str, blocks: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Stored rows with every zero point and scale above, and their weights as float64.

    A row has a pair of these in its first block, and others in the blocks after it; its integers are all the
    least, all the greatest, or any.
    """
    layout, rows, weights = LAYOUTS[name], [], []
    most = 2**layout.bits - 1
    for i, (z, d) in enumerate(product(ZEROS, SCALES)):
        stored, numbers = b"", []
        for k in range(blocks):
            shift, scale = (z, d) if k == 0 else (ZEROS[(i + k) % len(ZEROS)], SCALES[(i * k) % len(SCALES)])
            low, high = [(0, 0), (most, most), (0, most)][(i + k) % 3]
            integers = rng.integers(low, high, layout.block_size, endpoint=True)
            stored += block(name, scale, shift, integers)
            numbers += [scale * (q - shift) for q in integers.tolist()]
        rows.append(np.frombuffer(stored, np.uint8))
        weights.append(numbers)
    return np.stack(rows), np.array(weights, np.float64)


def tiled(name: str, data: np.ndarray) -> TiledMatrix:
    columns = data.shape[1] // (LAYOUTS[name].cell_bytes // 16) * LAYOUTS[name].block_size
    return TiledMatrix(name, len(data), columns, pack(name, data))


def mixed8(matrix: TiledMatrix, x: np.ndarray, path: str, call: Run) -> np.ndarray:
    records, y = (
        np.empty(record_bytes(*x.shape), np.uint8),
        np.full((len(x), matrix.rows), np.nan, np.float32),
    )
    call(entries.entry("activations.quantize"), quantization(x, records))
    call(entries.entry("products.mixed8", matrix.encoding, path), matrix.product(records, y), 2)
    return y


def activations(columns: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of ordinary numbers, and of codes that are all 127, all -127, and each in turn."""
    x = rng.standard_normal((5, columns)).astype(np.float32)
    x[2:] = 1
    x[3] = -1
    x[4, ::2] = -1
    return x


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_each_weight_is_its_scale_times_a_difference(name: str, blocks: int, call: Run) -> None:
    """Exactly, and in the sign of zero, too, as the golden decoder gives it."""
    data, weights = edges(name, blocks, np.random.default_rng(blocks))
    matrix = tiled(name, data)
    y = np.full(weights.shape, np.nan, np.float32)
    ids = np.arange(len(data), dtype=np.int32)
    call(entries.entry("rows.look_up", name), matrix.look_up(ids, y), 2)
    assert np.array_equal(y.astype(np.float64), weights)
    assert y.tobytes() == decode(name, data).tobytes()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_products_with_codes_are_exact_but_for_their_sum(
    name: str, blocks: int, path: str, call: Run
) -> None:
    """To the bit those of the definition, and near the float64 sums of what codes and weights stand for.

    A group's product has a rounding of d · s and one of each sum that it is in: (G + 1) · u, and its square.
    """
    rng = np.random.default_rng(blocks)
    data, weights = edges(name, blocks, rng)
    x = activations(weights.shape[1], rng)
    y = mixed8(tiled(name, data), x, path, call)
    assert y.tobytes() == mixed8_product(name, data, x).tobytes()
    records = quantize_a8(x)
    for t, n in product(range(len(x)), range(len(data))):
        total = size = 0.0
        for group, record in enumerate(records[t]):
            s = float(record[32:36].view("<f4")[0])
            part = s * float(weights[n, 32 * group : 32 * group + 32] @ record[:32].view(np.int8))
            total, size = total + part, size + abs(part)
        count = records.shape[1] + 1
        assert abs(float(y[t, n]) - total) <= count * U * (1 + count * U) * size


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_products_with_floats_are_within_their_bound(name: str, count: int, call: Run) -> None:
    """(K + 1) · u · Σ|w · x| around the float64 sum, of one row and of more, of few rows of weights and of one."""
    rng = np.random.default_rng(count)
    data, weights = edges(name, 2, rng)
    x = activations(weights.shape[1], rng)[:count]
    for some in (slice(0, 1), slice(0, 17), slice(0, None)):
        y = np.full((count, len(data[some])), np.nan, np.float32)
        call(entries.entry("products.float32", name), tiled(name, data[some]).product(x, y), 2)
        w = weights[some]
        bound = (w.shape[1] + 1) * U * (np.abs(x.astype(np.float64)) @ np.abs(w).T)
        assert (np.abs(y - x.astype(np.float64) @ w.T) <= bound).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("d", "fits"), [(256.75, True), (257, False)])
def test_a_zero_point_alone_may_be_too_much_for_float16(name: str, d: float, fits: bool) -> None:
    """255 · d, with an integer of 0: 65471.25, and 65535, which rounds to infinity."""
    integers = np.full(LAYOUTS[name].block_size, 255 if LAYOUTS[name].bits == 8 else 15)
    integers[-1] = 0
    data = np.frombuffer(block(name, d, 255, integers), np.uint8)[None]
    with np.errstate(over="ignore"):
        assert np.isfinite(decode(name, data).astype(np.float16)).all() == fits
    assert fit_float16(name, data) == fits
    assert TiledMatrix.of(LazyTensor("w", (1, len(integers)), name, data)).rows == 1
