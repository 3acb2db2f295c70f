"""Row-wise ops: within the bounds of the specification, which hold for every size, row by row and in place."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal, localcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba_backend.row_ops import RowOps, checksum

from refengine import ops as golden
from refengine_numba import entries, row_arguments
from refengine_numba.matrix import quantization
from refengine_numba.records import record_bytes

U = 2.0**-24
"""Unit roundoff of float32."""

LEAST_NORMAL = 2.0**-126

MOST = float(np.finfo(np.float32).max)

Run = Callable[..., None]

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 150)
rows = st.integers(1, 5)
threads = st.integers(1, 5)
quick = settings(max_examples=40, deadline=None)


def numbers(seed: int, *shape: int, spread: int = 6) -> np.ndarray:
    """Of either sign, from 2**-spread to 2**spread in size; every ninth or so is a zero."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp2(rng.uniform(-spread, spread, shape))
    return np.where(rng.random(shape) < 0.1, 0, x).astype(np.float32)


@given(seeds, rows, sizes, threads, st.booleans(), st.sampled_from([1e-6, 1e-5, 1.0]))
@quick
def test_rms_norm_is_within_its_bound(
    call: Run, seed: int, count: int, size: int, team: int, in_place: bool, eps: float
) -> None:
    """OPS-8, around a loop in float64."""
    x, weight = numbers(seed, count, size), numbers(seed + 1, size)
    y = RowOps(call, team, in_place).rms_norm(x, weight, eps=eps)
    for row, got in zip(x.tolist(), y.tolist(), strict=True):
        root = math.sqrt(eps + math.fsum(v * v for v in row) / size)
        for v, w, result in zip(row, weight.tolist(), got, strict=True):
            right = v / root * w
            small = LEAST_NORMAL * (1 + abs(w)) * (2 + math.sqrt(size) + 2 / math.sqrt(eps))
            assert abs(result - right) <= (size / 2 + 12) * U * abs(right) + small


def test_rms_norm_takes_every_head_alone(call: Run) -> None:
    """Heads of a row are rows of their own."""
    x, weight = numbers(0, 5, 3, 37), numbers(1, 37)
    heads = RowOps(call, 2).rms_norm(x, weight, eps=1e-6)
    flat = RowOps(call, 3).rms_norm(x.reshape(15, 37), weight, eps=1e-6)
    assert heads.tobytes() == flat.tobytes()


@given(seeds, rows, sizes, threads, st.booleans())
@quick
def test_add_and_scale_round_once(
    call: Run, seed: int, count: int, size: int, team: int, in_place: bool
) -> None:
    """OPS-6: the float64 sum or product of float32 numbers, rounded once more, is that of the exact one.

    A product is exact in float64; a sum of two is rounded twice without harm, since 53 > 2 · 24 + 1 bits
    (Figueroa, 1995).
    """
    x, y = numbers(seed, count, size, spread=60), numbers(seed + 1, count, size, spread=60)
    ops = RowOps(call, team, in_place)
    total = (x.astype(np.float64) + y).astype(np.float32)
    assert np.array_equal(ops.elementwise("add", x, y), total)
    factor = float(np.random.default_rng(seed).standard_normal())
    product = (x.astype(np.float64) * float(np.float32(factor))).astype(np.float32)
    assert np.array_equal(ops.elementwise("scale", x, factor=factor), product)


def test_add_and_scale_overflow_to_infinity(call: Run) -> None:
    """With its sign, never the largest number."""
    x = np.array([[MOST, -MOST, 1, -0.0]], np.float32)
    assert RowOps(call).elementwise("add", x, x).tolist() == [[math.inf, -math.inf, 2, 0]]
    assert RowOps(call).elementwise("scale", x, factor=-2.0).tolist() == [[-math.inf, math.inf, -2, 0]]


@given(seeds, rows, sizes, threads, st.booleans(), st.sampled_from([0.5, 30.0, 50.0]))
@quick
def test_softcap_is_within_its_bound(
    call: Run, seed: int, count: int, size: int, team: int, in_place: bool, cap: float
) -> None:
    """OPS-13, and never beyond the cap."""
    x = numbers(seed, count, size, spread=12)
    y = RowOps(call, team, in_place).elementwise("softcap", x, factor=cap)
    right = cap * np.tanh(x.astype(np.float64) / cap)
    assert (np.abs(y - right) <= 12 * U * np.abs(right) + LEAST_NORMAL * (2 + cap)).all()
    assert (np.abs(y) <= np.float32(cap)).all()


def gated_right(name: str, g: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """OPS-12: the results in float64, and how far off they may be."""
    g, v = g.astype(np.float64), v.astype(np.float64)
    small = LEAST_NORMAL * (1 + np.abs(g)) * (2 + np.abs(v))
    if name == "silu":
        with np.errstate(over="ignore"):
            right = g / (1 + np.exp(-g)) * v
        return right, (12 + 4 * np.abs(g)) * U * np.abs(right) + small
    z = math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)
    slope = 1 - np.tanh(z) ** 2
    return g / 2 * (1 + np.tanh(z)) * v, np.abs(g * v) / 2 * U * (14 + 12 * np.abs(z) * slope) + small


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
@given(seeds, rows, sizes, threads, st.booleans())
@quick
def test_gates_are_within_their_bounds(
    call: Run, name: str, seed: int, count: int, size: int, team: int, in_place: bool
) -> None:
    """OPS-12, of ordinary gates and of large ones."""
    g, v = numbers(seed, count, size, spread=8), numbers(seed + 1, count, size)
    y = RowOps(call, team, in_place).elementwise(name, g, v)
    right, bound = gated_right(name, g, v)
    assert (np.abs(y - right) <= bound).all()


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_gates_at_the_ends(call: Run, name: str) -> None:
    """Where the exponential or the cube overflows, the limit; no NaN for a finite gate; NaN stays."""
    g = np.array([[-MOST, -1e20, -100, -88.8, -0.0, 0, 88.8, 1e20, MOST / 4, np.nan]], np.float32)
    v = np.full_like(g, 2)
    y = RowOps(call).elementwise(name, g, v)
    right, bound = gated_right(name, g[:, :9], v[:, :9])
    assert (np.abs(y[:, :9] - right) <= bound).all()
    assert np.isnan(y[0, 9])


@pytest.mark.parametrize("pairing", row_arguments.PAIRINGS)
@given(seeds, rows, st.integers(1, 3), st.integers(1, 70), st.integers(0, 20), threads, st.booleans())
@quick
def test_rope_turns_pairs_and_leaves_the_rest(
    call: Run,
    pairing: str,
    seed: int,
    count: int,
    heads: int,
    half: int,
    beyond: int,
    team: int,
    in_place: bool,
) -> None:
    """OPS-10, around a loop in float64; elements beyond the table's dims keep their bits."""
    x = numbers(seed, count, heads, 2 * half + beyond)
    table = numbers(seed + 1, count, 2 * half, spread=1)
    y = RowOps(call, team, in_place).rope(x, table, pairing=pairing)
    for t in range(count):
        for h in range(heads):
            for i in range(half):
                j, k = (2 * i, 2 * i + 1) if pairing == "interleaved" else (i, i + half)
                a, b, c, s = (float(n) for n in (x[t, h, j], x[t, h, k], table[t, i], table[t, half + i]))
                small = LEAST_NORMAL * (abs(a) + abs(b) + abs(c) + abs(s) + 3)
                for at, first, second in ((j, a * c, -b * s), (k, b * c, a * s)):
                    bound = 2 * U * (abs(first) + abs(second)) + small
                    assert abs(float(y[t, h, at]) - (first + second)) <= bound
    assert y[..., 2 * half :].tobytes() == x[..., 2 * half :].tobytes()


def test_moved_numbers_keep_their_bits(call: Run) -> None:
    """Copied, taken, or beyond the dims of a table: every kind of NaN, too."""
    bits = np.random.default_rng(0).integers(0, 2**32, (7, 61), dtype=np.uint32)
    bits[:, :4] = 0x7F800001, 0xFFC12345, 0x80000000, 1
    x = bits.view(np.float32)
    ids = np.array([6, 0, 6, 3], np.int32)
    for team in (1, 2, 5):
        ops = RowOps(call, team)
        assert ops.take_rows(x, ids).tobytes() == x[ids].tobytes()
        for pairing in row_arguments.PAIRINGS:
            turned = ops.rope(x[:, None], np.ones((7, 2), np.float32), pairing=pairing)
            assert turned[:, 0, 2:].tobytes() == x[:, 2:].tobytes()


def circle() -> Decimal:
    """2π to the context's precision: Machin's π/4 = 4 arctan 1/5 - arctan 1/239."""

    def arctan(inverse: int) -> Decimal:
        total, power, n = Decimal(0), Decimal(1) / inverse, 1
        while abs(power) > Decimal(10) ** -60:
            total += power / n if n % 4 == 1 else -power / n
            power, n = power / inverse**2, n + 2
        return total

    return 8 * (4 * arctan(5) - arctan(239))


def cosine_and_sine(angle: Decimal, turn: Decimal) -> tuple[float, float]:
    """By the power series, after whole turns are taken away."""
    rest, results = angle % turn, []
    for start in (0, 1):
        total, n = Decimal(0), start
        term = rest**start if start else Decimal(1)
        while abs(term) > Decimal(10) ** -40:
            total += term
            term, n = -term * rest * rest / ((n + 1) * (n + 2)), n + 2
        results.append(float(total))
    return results[0], results[1]


@pytest.mark.parametrize("magnitude", [1.0, 1.3])
def test_a_rope_table_is_as_exact_far_out_as_at_the_start(call: Run, magnitude: float) -> None:
    """OPS-9, around 60 decimal digits, up to the last position of an int32."""
    positions = np.array([0, 1, 2, 4095, 100_000, 131_071, 1_000_000, 2**31 - 1], np.int32)
    frequencies = tuple(float(500_000.0 ** (-i / 7)) for i in range(7))
    table = RowOps(call, 3).rope_table(positions, frequencies, magnitude)
    with localcontext() as context:
        context.prec = 60
        turn = circle()
        for t, position in enumerate(positions.tolist()):
            for i, frequency in enumerate(frequencies):
                angle = position * Decimal(frequency)
                for at, value in zip((i, 7 + i), cosine_and_sine(angle, turn), strict=True):
                    bound = magnitude * (U + (float(angle) + 4) * 2.0**-53) + LEAST_NORMAL
                    assert abs(float(table[t, at]) - magnitude * value) <= bound


# Rows


def results(ops: RowOps, x: np.ndarray, y: np.ndarray, positions: np.ndarray) -> list[np.ndarray]:
    """Every op of rows x and y [T, 2 · 37]."""
    table = ops.rope_table(positions, tuple(np.exp2(-np.arange(20.0))), 1.0)
    return [
        ops.rms_norm(x, y[0], eps=1e-5),
        *(ops.elementwise(name, x, y) for name in ("add", "silu", "gelu_tanh")),
        *(ops.elementwise(name, x, factor=3.0) for name in ("scale", "softcap")),
        *(ops.rope(x.reshape(-1, 2, 41), table, pairing=pairing) for pairing in row_arguments.PAIRINGS),
    ]


def test_a_row_depends_on_its_own_row_alone(call: Run) -> None:
    """OPS-2: alone, among others, beside NaN and infinity, by one to five threads, in place: the same bits."""
    x, y, positions = numbers(0, 11, 82), numbers(1, 11, 82), np.arange(11, dtype=np.int32) * 999
    y[1:] = y[0]
    together = results(RowOps(call), x, y, positions)
    for team in range(1, 6):
        for in_place in (False, True):
            again = results(RowOps(call, team, in_place), x, y, positions)
            assert [a.tobytes() for a in again] == [a.tobytes() for a in together]
    for first, last in ((0, 1), (10, 11), (3, 8)):
        some = results(RowOps(call, 2), x[first:last], y[first:last], positions[first:last])
        assert [a.tobytes() for a in some] == [a[first:last].tobytes() for a in together]
    marred = x.copy()
    marred[::2, 5], marred[::4, 80] = np.nan, np.inf
    beside = results(RowOps(call, 3), marred, y, positions)
    assert [a[1::2].tobytes() for a in beside] == [a[1::2].tobytes() for a in together]
    assert all(np.isnan(a[::2]).reshape(6, -1).any(axis=1).all() for a in beside)


def test_a_step_with_fewer_rows_leaves_the_others_alone(call: Run) -> None:
    """The sizes named in ``symbols`` may be made smaller before a run."""
    x, y, out = numbers(0, 9, 40), numbers(1, 9, 40), np.full((9, 40), 7, np.float32)
    table, heads = np.ones((9, 40), np.float32), (9, 1, 40)
    ids, records = np.array([2, 1, 0] * 3, np.int32), np.full(record_bytes(9, 32), 7, np.uint8)
    x32 = np.ascontiguousarray(x[:, :32])
    made = {
        entries.entry("norm.rms_norm"): row_arguments.rms_norm(x, y[0], out, eps=1.0, rows="A"),
        entries.entry("elementwise.elementwise", "add"): row_arguments.elementwise(
            "add", x, y, out, rows="A"
        ),
        entries.entry("rope.rope", "halves"): row_arguments.rope(
            x.reshape(heads), table, out.reshape(heads), rows="A"
        ),
        entries.entry("rope.rope_table"): row_arguments.rope_table(
            ids, out, frequencies=(1.0,) * 20, rows="A"
        ),
        entries.entry("copy.take_rows"): row_arguments.take_rows(x, ids, out, rows="B", taken="A"),
        entries.entry("activations.quantize"): quantization(x32, records, rows="A"),
    }
    for compiled, arguments in made.items():
        out[...] = 7
        assert {arguments.words[at] for at in arguments.symbols} == {9}
        assert "A" in arguments.symbols.values()
        for at in arguments.symbols:
            arguments.words[at] = 4
        call(compiled, arguments, 3)
        if compiled is not entries.entry("activations.quantize"):
            assert (out[4:] == 7).all()
            assert (out[:4] != 7).any(axis=1).all()
    assert records[: 4 * 48].tobytes() == golden.quantize_a8(x32[:4]).tobytes()
    assert (records[4 * 48 :] == 7).all()


def test_threads_quantize_their_own_rows(call: Run) -> None:
    """Of five rows, two threads write two and three."""
    records = np.zeros((2, 5, 48), np.uint8)
    arguments = quantization(numbers(0, 5, 64), records.reshape(-1))
    pointer = arguments.words.ctypes.data_as(ctypes.POINTER(ctypes.c_int64))
    entries.entry("activations.quantize").function(1, 2, pointer)
    assert records.any(axis=(0, 2)).tolist() == [False, False, True, True, True]
    entries.entry("activations.quantize").function(0, 2, pointer)
    assert records.any(axis=(0, 2)).all()


# Machines


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from numba_backend.conftest import run
from numba_backend.row_ops import checksum
print(checksum(run))
"""


def in_another_process(**variables: str) -> subprocess.CompletedProcess[str]:
    code = SCRIPT.format(folder=str(Path(__file__).parents[1]))
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"NUMBA_BOUNDSCHECK": "1"},
        {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"},
        {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2,+sse4.1,+avx,+avx2,+fma"},
    ],
    ids=["cached", "checked", "sse2", "avx2"],
)
def test_every_process_and_instruction_set_gives_the_same_bits(variables: dict[str, str], call: Run) -> None:
    """From the cache, with bounds checked and nothing found, and on lesser processors."""
    if "NUMBA_CPU_NAME" in variables and os.uname().machine != "x86_64":
        pytest.skip("these are names of x86 features")
    expected = checksum(call, 5)
    done = in_another_process(**variables)
    assert (done.returncode, done.stdout) == (0, f"{expected}\n"), done.stderr
    assert "Error" not in done.stderr  # of a kernel that leaves its arrays


# The door


def test_arrays_that_do_not_fit_are_refused() -> None:
    """Shapes, dtypes, strides, read-only results, and operands too many or too few."""
    x, y, table = np.zeros((3, 8), np.float32), np.zeros((3, 8), np.float32), np.zeros((3, 4), np.float32)
    heads, ids = np.zeros((3, 2, 4), np.float32), np.zeros(3, np.int32)
    refused: list[Callable[[], object]] = [
        lambda: row_arguments.rms_norm(x, x[0, :7], y, eps=1.0),
        lambda: row_arguments.rms_norm(x, x[0], y[:2], eps=1.0),
        lambda: row_arguments.rms_norm(x.T, x[:, 0].copy(), y.T, eps=1.0),
        lambda: row_arguments.rms_norm(x.astype(np.float64), x[0], y, eps=1.0),
        lambda: row_arguments.elementwise("add", x, y[:2], y),
        lambda: row_arguments.elementwise("add", x, y, y.astype(np.float16)),
        lambda: row_arguments.rope(heads, table[:2], heads),
        lambda: row_arguments.rope(heads, table, heads[:2]),
        lambda: row_arguments.rope_table(ids, table, frequencies=(1.0,)),
        lambda: row_arguments.rope_table(ids[:2], table, frequencies=(1.0, 2.0)),
        lambda: row_arguments.rope_table(ids.astype(np.int64), table, frequencies=(1.0, 2.0)),
        lambda: row_arguments.take_rows(x, ids[:2], y),
        lambda: row_arguments.take_rows(x, ids.astype(np.int64), y),
    ]
    for make in refused:
        with pytest.raises(ValueError, match="must be C-contiguous"):
            make()
    for wide in (np.zeros((3, 6), np.float32), np.zeros((3, 3), np.float32)):
        with pytest.raises(ValueError, match="turns pairs of heads"):
            row_arguments.rope(heads, wide, heads)
    for name, second in (("add", None), ("scale", y)):
        with pytest.raises(ValueError, match="operand"):
            row_arguments.elementwise(name, x, second, y)
    y.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        row_arguments.rms_norm(x, x[0], y, eps=1.0)
    for unknown in (
        lambda: entries.entry("rope.rope", "quarters"),
        lambda: entries.entry("elementwise.elementwise", "relu"),
    ):
        with pytest.raises(KeyError):
            unknown()


def test_where_the_golden_ops_round_so_do_these(call: Run) -> None:
    """Sums, products and turns are the golden ones bit for bit."""
    x, y, table = numbers(0, 5, 80), numbers(1, 5, 80), numbers(2, 5, 36)
    ops, heads = RowOps(call), x.reshape(5, 2, 40)
    assert ops.elementwise("add", x, y).tobytes() == golden.add(x, y).tobytes()
    assert ops.elementwise("scale", x, factor=0.3).tobytes() == golden.scale(x, factor=0.3).tobytes()
    for pairing in row_arguments.PAIRINGS:
        expected = golden.rope(heads, table, pairing=pairing)
        assert ops.rope(heads, table, pairing=pairing).tobytes() == expected.tobytes()
