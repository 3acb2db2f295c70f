"""The golden ops against naive float64 loops, and laws they obey."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refengine import ops

U = 2.0**-24
FLOATS = st.floats(-100, 100, width=32)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 40)), elements=FLOATS))
@settings(deadline=None)
def test_rms_norm(x: np.ndarray) -> None:
    """x / √(mean x² + eps) · w: a sum of N squares (N·u relative), then five roundings."""
    weight = np.linspace(0.5, 2, x.shape[1], dtype=np.float32)
    for row, result in zip(x, ops.rms_norm(x, weight, eps=1e-5), strict=True):
        mean = math.fsum(float(v) ** 2 for v in row) / len(row)
        for value, factor, y in zip(row, weight, result, strict=True):
            expected = float(value) / math.sqrt(mean + float(np.float32(1e-5))) * float(factor)
            assert abs(y - expected) <= (len(row) + 6) * U * abs(expected) + 2.0**-149


def test_linear_adds_the_bias() -> None:
    """y = W x + b, within (K + 1)·u of the sum of magnitudes."""
    x, weight, bias = random(5, 33), random(7, 33, seed=1), random(7, seed=2)
    for t in range(5):
        for n in range(7):
            terms = [float(w) * float(v) for w, v in zip(weight[n], x[t], strict=True)]
            expected = math.fsum([*terms, float(bias[n])])
            bound = 34 * U * (math.fsum(map(abs, terms)) + abs(float(bias[n])))
            assert abs(ops.linear(x, weight, bias)[t, n] - expected) <= bound


@pytest.mark.parametrize("pairing", ["interleaved", "halves"])
@pytest.mark.parametrize("dims", [8, 4])
def test_rope_rotates_complex_numbers(pairing: str, dims: int) -> None:
    """Each pair is a complex number turned by its angle; what lies beyond the dims stays."""
    x, positions, frequencies = random(6, 2, 8), np.array([0, 1, 2, 50, 1000, 131071]), (1.0, 0.5, 0.01, 1e-4)
    table = ops.rope_table(positions, frequencies=frequencies[: dims // 2], dims=dims)
    y = ops.rope(x, table, pairing=pairing)
    for t, position in enumerate(positions):
        for h in range(2):
            for i, frequency in enumerate(frequencies[: dims // 2]):
                a, b = (2 * i, 2 * i + 1) if pairing == "interleaved" else (i, i + dims // 2)
                turned = complex(x[t, h, a], x[t, h, b]) * complex(
                    math.cos(position * frequency), math.sin(position * frequency)
                )
                got = complex(y[t, h, a], y[t, h, b])
                assert abs(got - turned) <= 4 * U * abs(turned)  # two rounded factors, a product, a sum
    assert np.array_equal(y[..., dims:], x[..., dims:])


def test_rope_makes_scores_depend_on_distance_only() -> None:
    """Rotating q at m and k at n gives a score that depends on m - n (the law RoPE was made for)."""
    q, k = random(1, 1, 64).astype(np.float64), random(1, 1, 64, seed=1).astype(np.float64)
    frequencies = tuple(10000 ** (-np.arange(32) / 32))

    def score(m: int, n: int) -> float:
        rotated = [
            ops.rope(v, ops.rope_table(np.array([p]), frequencies=frequencies, dims=64), pairing="halves")
            for v, p in ((q, m), (k, n))
        ]
        return float((rotated[0] * rotated[1]).sum())

    angle_error = 2.0**-53 * 1050 * np.abs(q).sum() * np.abs(k).max() * 64
    assert abs(score(1007, 1000) - score(7, 0)) <= angle_error


@given(hnp.arrays(np.float32, (2, 5), elements=st.floats(-200, 200, width=32)))
@settings(deadline=None)
def test_gated_activations(gate: np.ndarray) -> None:
    """silu and tanh-gelu as their formulas say.

    exp, tanh and the products err by a few u each; where 1 + tanh cancels, that error is relative to 1. Where
    exp overflows or a result is subnormal, it may be flushed to zero: tiny, times the factors still to come.
    """
    up = np.full_like(gate, 1.5)
    silu = ops.gated(gate, up, activation="silu")
    gelu = ops.gated(gate, up, activation="gelu_tanh")
    for g, s, ge in zip(gate.ravel().tolist(), silu.ravel(), gelu.ravel(), strict=True):
        tiny = 2.0**-126 * (1 + abs(g)) * (2 + 1.5)
        sigmoid = 1 / (1 + math.exp(-g)) if g > -700 else 0.0
        assert abs(s - 1.5 * g * sigmoid) <= (8 + abs(g)) * U * abs(1.5 * g * sigmoid) + tiny
        inner = math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)
        slope = (1 - math.tanh(inner) ** 2) * abs(inner) * 8 * U  # the argument's own error
        assert abs(ge - 0.75 * g * (1 + math.tanh(inner))) <= 0.75 * abs(g) * (8 * U + slope) + tiny


@given(hnp.arrays(np.float32, (3, 4), elements=FLOATS), st.sampled_from([1.0, 30.0, 50.0]))
@settings(deadline=None)
def test_softcap_and_scale(x: np.ndarray, cap: float) -> None:
    """cap·tanh(x / cap) within 8 u relative (tanh amplifies no relative error), never beyond the cap."""
    y = ops.softcap(x, cap=cap)
    expected = cap * np.tanh(x.astype(np.float64) / cap)
    assert (np.abs(y - expected) <= 8 * U * np.abs(expected) + 2.0**-126).all()
    assert (np.abs(y) <= cap).all()
    assert np.array_equal(ops.scale(x, factor=0.1), x * np.float32(0.1))


def test_moving_ops_move_exactly() -> None:
    """Embedding, head views, take_rows and add are exact, or correctly rounded."""
    table = random(10, 6)
    x = ops.embedding(np.array([3, 0, 3]), table)
    assert np.array_equal(x, table[[3, 0, 3]])
    heads = ops.split_heads(x, heads=3)
    assert heads.shape == (3, 3, 2)
    assert np.shares_memory(heads, x)
    assert np.array_equal(ops.merge_heads(heads), x)
    assert np.array_equal(ops.take_rows(x, np.array([2, 0])), x[[2, 0]])
    assert np.array_equal(ops.add(x, x), 2 * x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_op_changes_the_dtype_or_its_inputs(dtype: type) -> None:
    """What goes in as float32 comes out as float32, and nothing is written but ``out``."""
    x = random(3, 8).astype(dtype)
    kept = x.copy()
    table = ops.rope_table(np.arange(3), frequencies=(1.0, 0.5), dims=4)
    results = [
        ops.rms_norm(x, np.ones(8, dtype), eps=1e-6),
        ops.linear(x, np.ones((4, 8), dtype)),
        ops.rope(x.reshape(3, 2, 4), table, pairing="halves"),
        ops.gated(x, x, activation="silu"),
        ops.gated(x, x, activation="gelu_tanh"),
        ops.softcap(x, cap=3.0),
        ops.scale(x, factor=0.3),
    ]
    assert {result.dtype for result in results} == {np.dtype(dtype)}
    assert np.array_equal(x, kept)


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_rows_do_not_see_each_other(rows: int) -> None:
    """A row's norm, activation and projection have the bits they have in any other batch."""
    x, weight = random(64, 96), random(48, 96, seed=1)
    ones = np.ones(96, np.float32)
    for whole, part in [
        (ops.rms_norm(x, ones, eps=1e-6), ops.rms_norm(x[:rows], ones, eps=1e-6)),
        (ops.linear(x, weight), ops.linear(x[:rows], weight)),
        (ops.gated(x, x, activation="silu"), ops.gated(x[:rows], x[:rows], activation="silu")),
        (ops.gated(x, x, activation="gelu_tanh"), ops.gated(x[:rows], x[:rows], activation="gelu_tanh")),
    ]:
        assert np.array_equal(whole[:rows], part)
