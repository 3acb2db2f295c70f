"""Products of the policy ``mixed16``: of rounded numbers, the same in every schedule and on every processor."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from refengine.errors import NumericalError
from refengine.quantizer import LazyTensor, decode
from refengine_numba import entries
from refengine_numba.layout import LAYOUTS
from refengine_numba.matrix import TiledMatrix, rounding
from refengine_numba.repack import pack
from refengine_numba.weights import TiledWeights

U = 2.0**-24
"""Unit roundoff of float32."""

SIZES = [(50, 256), (16, 576), (33, 1536), (7, 32)]
"""Rows and columns; whole blocks of 256 only where an encoding asks for them."""

BLOCKS = [name for name, layout in LAYOUTS.items() if layout.bits]

Run = Callable[..., None]
Matrix = Callable[..., np.ndarray]


def sizes(name: str) -> list[tuple[int, int]]:
    extra = [(17, 37), (3, 1)] if LAYOUTS[name].bits == 0 else []
    return [(n, k) for n, k in SIZES if k % LAYOUTS[name].block_size == 0] + extra


def case(name: str, rows: int, columns: int, count: int, matrix: Matrix) -> tuple[TiledMatrix, ...]:
    data = matrix(name, rows, columns)
    x = np.random.default_rng([rows, columns, count]).standard_normal((count, columns)).astype(np.float32)
    return TiledMatrix(name, rows, columns, pack(name, data)), data, x


def stored(weights: np.ndarray) -> TiledMatrix:
    """A matrix of float32 numbers."""
    return TiledMatrix("f32", *weights.shape, pack("f32", weights.astype("<f4").view(np.uint8)))


def round_rows(x: np.ndarray, call: Run, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rounded, powers = np.full(x.shape, np.nan, np.float32), np.full(len(x), np.nan, np.float32)
    call(entries.entry("halves.round"), rounding(x, rounded, powers), threads)
    return rounded, powers


def mixed16(tiled: TiledMatrix, x: np.ndarray, call: Run, threads: int = 1, **kws: object) -> np.ndarray:
    y = np.full((len(x), tiled.rows), np.nan, np.float32)
    arguments = tiled.product_of_halves(*round_rows(x, call, threads), y, **kws)
    call(entries.entry("products.mixed16", tiled.encoding), arguments, threads)
    return y


def power_of(row: np.ndarray) -> float:
    """The least power of two, 1 or above, that brings a row's largest element to 2¹⁵ or below."""
    power = Fraction(1)
    while Fraction(float(np.abs(row).max())) / power > 2**15:
        power *= 2
    return float(power)


def defined(weights: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact products of rounded numbers, rounded to float64, and the sums of their absolute values."""
    w = weights.astype(np.float16).astype(np.float64)
    y, size = np.empty((2, len(x), len(w)))
    for t, row in enumerate(x.astype(np.float64)):
        power = power_of(row)
        products = w * ((row / power).astype(np.float16).astype(np.float64) * power)
        y[t], size[t] = [math.fsum(p) for p in products], np.abs(products).sum(axis=1)
    return y, size


# Rounding


def test_rows_are_rounded_to_the_nearest_float16(call: Run) -> None:
    """Every float16 up to 2¹⁵, the ties between them and their float32 neighbours, of either sign, to the bit."""
    halves = np.arange(np.array(2.0**15, "<f2").view("<u2") + 1, dtype="<u2").view("<f2").astype(np.float32)
    ties = (halves[1:] + halves[:-1]) / np.float32(2)
    x = np.concatenate([halves, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9))])
    for row in (x[None], -x[None]):
        rounded, powers = round_rows(row, call)
        assert np.array_equal(rounded, row.astype(np.float16).astype(np.float32))
        assert powers.tolist() == [1]


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_rows_power_is_the_least_that_makes_it_fit(columns: int, threads: int, call: Run) -> None:
    """Around every power of two; the largest element anywhere in the row, of either sign."""
    largest = [np.float32(2.0**e) for e in range(10, 128)]
    largest = [
        n for e in largest for n in (np.nextafter(e, np.float32(0)), e, np.nextafter(e, np.float32(np.inf)))
    ]
    largest.append(np.finfo(np.float32).max)
    x = np.random.default_rng(columns).uniform(-1, 1, (len(largest), columns)).astype(np.float32)
    x *= np.array(largest, np.float32)[:, None]
    for t, n in enumerate(largest):
        x[t, t % columns] = n if t % 2 else -n
    rounded, powers = round_rows(x, call, threads)
    assert powers.tolist() == [power_of(row) for row in x]
    scaled = x.astype(np.float64) / powers[:, None]
    assert np.array_equal(rounded, scaled.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_weight_is_rounded_to_float16(name: str, call: Run, matrix: Matrix) -> None:
    """Products with a single one show each weight to the bit: many rows at a time, and alone."""
    tiled, data, _ = case(name, 18, 256, 1, matrix)
    expected = decode(name, data).astype(np.float16).astype(np.float32)
    ones = np.eye(256, dtype=np.float32)
    assert np.array_equal(mixed16(tiled, ones, call).T, expected)
    assert np.array_equal(
        np.concatenate([mixed16(tiled, ones[k : k + 1], call) for k in range(256)]).T, expected
    )


def test_weights_that_float16_barely_has_are_not_taken_for_zero(call: Run) -> None:
    """Subnormal float16, ties between them, and what rounds to zero; whole groups and a rest."""
    weights = (np.arange(-74, 74).reshape(4, 37) * 2.0**-26).astype(np.float32)
    weights[0, :3] = 65504, -65519, 2.0**-14 * (1 - 2.0**-12)
    assert np.array_equal(
        mixed16(stored(weights), np.eye(37, dtype=np.float32), call).T,
        weights.astype(np.float16).astype(np.float32),
    )


# Sums


@pytest.mark.parametrize("name", LAYOUTS)
def test_products_are_within_the_bound(name: str, call: Run, matrix: Matrix) -> None:
    """(K + 1) · u · Σ|w' · x'| around the exact sum of rounded numbers, a bias included; rows large and small."""
    for rows, columns in sizes(name):
        tiled, data, x = case(name, rows, columns, 4, matrix)
        x *= np.float32([[1], [1e5], [1e-3], [1e30]])
        bias = np.linspace(-2, 2, rows).astype(np.float32)
        y, size = defined(decode(name, data), x)
        bound = (columns + 1) * U * size
        assert (np.abs(mixed16(tiled, x, call) - y) <= bound).all()
        biased = np.abs(mixed16(tiled, x, call, bias=bias) - (y + bias))
        assert (biased <= bound + (columns + 1) * U * np.abs(bias)).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_sums_are_those_of_float32_of_rounded_numbers(name: str, call: Run, matrix: Matrix) -> None:
    """Bit for bit, in the same order, of one row and of many."""
    rows, columns = sizes(name)[0]
    tiled, data, x = case(name, rows, columns, 5, matrix)
    rounded = stored(decode(name, data).astype(np.float16))
    for some in (x, x[:1].copy()):
        y = np.empty((len(some), rows), np.float32)
        halves = some.astype(np.float16).astype(np.float32)
        call(entries.entry("products.float32", "f32"), rounded.product(halves, y))
        assert mixed16(tiled, some, call).tobytes() == y.tobytes()


def test_a_bias_is_added_after_the_power(call: Run) -> None:
    """A row of 2¹⁶ is halved, and the bias is not; a result beyond float32 is infinite, of its sign."""
    x = np.array([[2.0**16, 0], [1, 0], [2.0**127, 0]], np.float32)
    y = mixed16(stored(np.array([[1, 0], [-4, 0]])), x, call, bias=np.array([0.5, 3], np.float32))
    assert y.tolist() == [[65536.5, -262141], [1.5, -1], [2.0**127, -np.inf]]


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q6_k", "f16", "f32"])
def test_an_elements_bits_depend_on_its_own_rows(name: str, call: Run, matrix: Matrix) -> None:
    """Alone, anywhere among up to 300 rows, by one, two or three threads, beside NaN and infinity: the same bits."""
    tiled, _, x = case(name, 50, 512, 300, matrix)
    x[::7] *= np.float32(1e6)
    together = mixed16(tiled, x, call)
    assert np.isfinite(together).all()
    for threads in (2, 3):
        assert mixed16(tiled, x, call, threads).tobytes() == together.tobytes()
    for first, last in [(0, 1), (299, 300), (127, 129), (3, 8), (100, 300)]:
        assert mixed16(tiled, x[first:last].copy(), call, 2).tobytes() == together[first:last].tobytes()
    marred = x.copy()
    marred[::2, 7] = np.nan
    marred[2::4, 300] = np.inf
    beside = mixed16(tiled, marred, call)
    assert beside[1::2].tobytes() == together[1::2].tobytes()
    assert not np.isfinite(beside[::2]).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("columns", [37, 64])
def test_what_is_not_finite_shows_in_all_its_row(bad: float, columns: int, call: Run) -> None:
    """In any column, also beside large numbers and before weights of zero."""
    weights = np.random.default_rng(0).standard_normal((20, columns))
    weights[3] = 0
    for k in range(columns):
        x = np.ones((2, columns), np.float32)
        x[1, 0], x[1, k] = 1e30, bad
        y = mixed16(stored(weights), x, call)
        assert np.isfinite(y[0]).all()
        assert not np.isfinite(y[1]).any()


def test_a_matrix_rows_do_not_mix(call: Run, matrix: Matrix) -> None:
    """A row of the matrix gives the same bits in any place of any tile."""
    data = matrix("q4_k", 50, 512)
    x = np.random.default_rng(0).standard_normal((2, 512)).astype(np.float32)
    order = np.random.default_rng(1).permutation(50)[:23]
    whole, some = (TiledMatrix("q4_k", len(d), 512, pack("q4_k", d)) for d in (data, data[order]))
    assert np.array_equal(mixed16(whole, x, call)[:, order], mixed16(some, x, call))


# Other processes


def checksum(call: Run, matrix: Matrix) -> str:
    """Of products of one row and of several."""
    digest = hashlib.sha256()
    for name, columns in [("q4_1", 256), ("q6_k", 256), ("int8_g64", 256), ("f16", 37), ("f32", 37)]:
        tiled, _, x = case(name, 33, columns, 5, matrix)
        x *= np.float32([[1], [1e6], [1e-6], [1e30], [2.0**-20]])
        for some in (x, x[1:2].copy()):
            digest.update(mixed16(tiled, some, call, 2).tobytes())
    return digest.hexdigest()


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from numba_backend.conftest import run, stored_matrix
from numba_backend.test_product_a16 import checksum
print(checksum(run, stored_matrix))
"""


@pytest.mark.parametrize(
    "variables",
    [
        {"NUMBA_BOUNDSCHECK": "1"},
        {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"},
        {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2,+sse4.1,+avx,+avx2,+fma,+f16c"},
    ],
    ids=["checked", "sse2", "avx2"],
)
def test_every_process_and_instruction_set_gives_the_same_bits(
    variables: dict[str, str], call: Run, matrix: Matrix
) -> None:
    """With bounds checked and nothing found, and on processors with and without conversion of float16."""
    if "NUMBA_CPU_NAME" in variables and os.uname().machine != "x86_64":
        pytest.skip("these are names of x86 features")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(folder=str(Path(__file__).parents[1]))],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"{checksum(call, matrix)}\n"), done.stderr
    assert "Error" not in done.stderr  # of a kernel that leaves its arrays


# The door


def test_only_arrays_of_the_right_kind_reach_a_kernel(matrix: Matrix) -> None:
    """Shapes, dtypes and strides are checked before an address is formed."""
    tiled, _, x = case("q4_0", 50, 256, 2, matrix)
    y, powers = np.zeros((2, 50), np.float32), np.ones(2, np.float32)
    for wrong_x, wrong_powers in [
        (x[:1].copy(), powers),
        (x.astype(np.float16), powers),
        (np.zeros(2 * 256 // 32 * 48, np.uint8), powers),
        (x, powers[:1]),
        (x, powers.astype(np.float64)),
        (x, np.ones(4, np.float32)[::2]),
    ]:
        with pytest.raises(ValueError, match="must be C-contiguous"):
            tiled.product_of_halves(wrong_x, wrong_powers, y)
    for rounded, wrong_powers in [(x[:1].copy(), powers), (x.copy(), powers[:1])]:
        with pytest.raises(ValueError, match="must be C-contiguous"):
            rounding(x, rounded, wrong_powers)
    powers.flags.writeable = False
    with pytest.raises(ValueError, match="powers is read-only"):
        rounding(x, x.copy(), powers)


REFUSAL = "tensor w holds a weight that is too large for float16.*choose the policy float32"


def with_scales(name: str, largest: float, rng: np.random.Generator) -> np.ndarray:
    """Stored rows [20, ...] of 512 weights whose largest absolute value lies near ``largest``."""
    if name in ("f32", "bf16"):
        weights = rng.uniform(-1, 1, (20, 512)).astype(np.float32)
        weights[19, 300] = largest
        if name == "f32":
            return weights.view(np.uint8)
        return np.ascontiguousarray(weights.view(np.uint16)[:, 1::2]).view(np.uint8)
    data = rng.integers(
        0, 256, (20, LAYOUTS[name].cell_bytes // 16 * (512 // LAYOUTS[name].block_size)), np.uint8
    )
    blocks = data.reshape(20, -1, LAYOUTS[name].cell_bytes // 16)
    halves = {"q6_k": [208]}.get(name, [0, 2] if LAYOUTS[name].scales in ("pair", "six_bit") else [0])
    for at in halves:
        blocks[..., at : at + 2] = np.array([0.01], "<f2").view(np.uint8)
    last = blocks[19, -1]
    for at, of_largest in zip(halves, (1, 0.1), strict=False):
        last[at : at + 2] = np.array([0.01 * of_largest], "<f2").view(np.uint8)
    found = np.abs(decode(name, last[None])).max()
    for at, of_largest in zip(halves, (1, 0.1), strict=False):
        last[at : at + 2] = np.array([0.01 * of_largest * largest / found], "<f2").view(np.uint8)
    return data


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "f16"])
def test_a_weight_that_float16_does_not_have_is_found(name: str) -> None:
    """From 65520 on, what the decoder gives and NumPy's conversion say; where it is multiplied, and only there."""
    outcomes = set()
    for seed, largest in enumerate([100, 60000, 65400, 65500, 65519.99, 65520, 65560, 66000, 1e5]):
        data = with_scales(name, largest, np.random.default_rng(seed))
        with np.errstate(over="ignore"):
            fits = bool(np.isfinite(decode(name, data).astype(np.float16)).all())
        outcomes.add(fits)
        tensor = LazyTensor("w", (20, 512), name, data)
        assert TiledMatrix.of(tensor).rows == 20
        if fits:
            assert TiledMatrix.of(tensor, halves=True).rows == 20
            continue
        with pytest.raises(NumericalError, match=REFUSAL):
            TiledMatrix.of(tensor, halves=True)
    assert outcomes == {False, True}


def test_a_table_may_hold_what_a_product_may_not() -> None:
    """Looked up, any float32 will do; when the table is also multiplied with, it is refused, each time."""
    data = np.full((20, 32), 1e6, np.float32).view(np.uint8)
    weights = TiledWeights({"table": LazyTensor("w", (20, 32), "f32", data)})
    assert weights.matrix("table").rows == 20
    for _ in range(2):
        with pytest.raises(NumericalError, match=REFUSAL):
            weights.matrix("table", halves=True)
    assert weights.matrix("table").rows == 20
