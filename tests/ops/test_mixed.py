"""Products of the mixed policies against rational arithmetic, and laws they obey."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from mixed_products import mixed8_product, stored_matrix

from refengine import ops
from refengine.errors import NumericalError
from refengine.ops.linear import tile_rows
from refengine.quantizer import GROUP, GROUPED, decode, encoding, has_offsets, read_groups

U = 2.0**-24


def stored(name: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Stored bytes of ordinary weights: any integers, scales and offsets about one in size."""
    rng = np.random.default_rng([seed, rows, columns])
    data = rng.integers(0, 256, (rows, encoding(name).row_bytes(columns)), np.uint8)
    blocks = data.reshape(rows, -1, encoding(name).block_bytes)
    for at in [208] if name == "q6_k" else [0, 2] if has_offsets(name) else [0]:
        blocks[..., at : at + 2] = rng.standard_normal((*blocks.shape[:2], 1)).astype("<f2").view(np.uint8)
    return data


def activations(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, rows, columns]).standard_normal((rows, columns)).astype(np.float32)


def parts(records: np.ndarray) -> tuple[np.ndarray, ...]:
    """Codes, scales, scaled sums, sums and second sums, read as the op's text says."""
    fields = np.ascontiguousarray(records[..., 32:])
    floats, integers = fields.view("<f4"), fields.view("<i4")
    codes = np.ascontiguousarray(records[..., :32]).view(np.int8)
    return codes, floats[..., 0], floats[..., 1], integers[..., 2], integers[..., 3]


def codes_of(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes, scales, *_ = parts(ops.quantize_a8(x))
    return codes, scales


def test_codes_in_words() -> None:
    """Ties go to the even neighbour; the greatest becomes 127; zeros stay; what is not finite shows in the
    scale."""
    x = np.zeros((1, 32), np.float32)
    x[0, :6] = 127, 0.5, 1.5, 2.5, -0.5, -126.6
    codes, scales = codes_of(x)
    assert scales[0, 0] == 1
    assert codes[0, 0, :7].tolist() == [127, 0, 2, 2, 0, -127, 0]
    assert not ops.quantize_a8(np.zeros((1, 32), np.float32)).any()
    for bad in (np.nan, np.inf, -np.inf):
        x[0, 9] = bad
        codes, scales = codes_of(x)
        assert not np.isfinite(scales[0, 0])
        assert (codes == 1).all()


def test_codes_stay_within_half_a_scale() -> None:
    """Of what they stand for, and the roundings of scale and quotient: |x - code · scale| <= scale / 2 + 2u ·
    |x|."""
    x = activations(50, 256)
    codes, scales = codes_of(x)
    groups = x.reshape(50, 8, 32).astype(np.float64)
    steps = scales.astype(np.float64)[..., None]
    assert (np.abs(groups - codes * steps) <= steps / 2 + 2 * U * np.abs(groups)).all()


def test_a_record_sums_its_codes() -> None:
    """All, and the second half; the first sum also times the scale. Sizes from subnormal to huge, many
    tiles."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 320)) * np.exp2(rng.integers(-149, 128, (500, 10)).repeat(32, axis=1))
    x = np.clip(x, -3.4e38, 3.4e38).astype(np.float32)
    codes, scales, scaled, sums, second = parts(ops.quantize_a8(x))
    assert np.abs(codes.astype(int)).max() == 127
    assert np.array_equal(sums, codes.sum(axis=2, dtype=np.int64))
    assert np.array_equal(second, codes[..., 16:].sum(axis=2, dtype=np.int64))
    with np.errstate(over="ignore"):
        assert np.array_equal(scaled, scales * sums.astype(np.float32))


@pytest.mark.parametrize("name", GROUPED)
def test_a_product_is_what_codes_stand_for(name: str) -> None:
    """Against rational arithmetic: integers times codes, scales and offsets, within the roundings counted.

    Each group rounds d · s and s · sum once and adds one sum or two, so no term is rounded more than 2 G + 2
    times (a bias once more).
    """
    rows, columns = 3, max(512, encoding(name).block_size)
    data, x = stored(name, rows, columns), activations(2, columns)
    bias = np.linspace(-2, 2, rows).astype(np.float32)
    codes, scales = codes_of(x)
    groups = columns // GROUP
    integers = np.empty((rows, columns), np.float32)
    d, m = np.empty((groups, rows), np.float32), np.zeros((groups, rows), np.float32)
    read_groups(name, data, integers, d, m if has_offsets(name) else None)
    y = mixed8_product(name, data, x, bias)
    for t in range(2):
        for n in range(rows):
            exact, size = Fraction(float(bias[n])), abs(Fraction(float(bias[n])))
            for g in range(groups):
                s = Fraction(float(scales[t, g]))
                w = [int(v) for v in integers[n, g * GROUP : (g + 1) * GROUP]]
                q = [int(c) for c in codes[t, g]]
                product = Fraction(float(d[g, n])) * s * sum(a * b for a, b in zip(w, q, strict=True))
                offset = Fraction(float(m[g, n])) * s * sum(q)
                exact += product + offset
                size += abs(product) + abs(offset)
            assert abs(Fraction(float(y[t, n])) - exact) <= (2 * groups + 3) * Fraction(1.01 * U) * size


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q6_k"])
def test_a_rows_bits_depend_on_nothing_else(name: str) -> None:
    """Alone or among up to 300, beside NaN; and a weight's row in any tile."""
    columns = 512
    rows = tile_rows((1, columns)) + 50
    data, x = stored(name, rows, columns), activations(300, columns)
    together = mixed8_product(name, data, x)
    assert np.isfinite(together).all()
    for first, last in [(0, 1), (299, 300), (127, 129), (3, 8)]:
        assert np.array_equal(mixed8_product(name, data, x[first:last]), together[first:last])
    order = np.random.default_rng(0).permutation(rows)[:23]
    assert np.array_equal(mixed8_product(name, data[order], x), together[:, order])
    marred = x.copy()
    marred[::2, 7] = np.nan
    marred[2::4, 300] = np.inf
    beside = mixed8_product(name, data, marred)
    assert np.array_equal(beside[1::2], together[1::2])
    assert not np.isfinite(beside[::2]).any()


def test_many_groups_of_zero_weights_give_zero() -> None:
    """Sums start at plus zero, and stay there."""
    y = mixed8_product("q8_0", np.zeros((4, 34 * 9), np.uint8), -np.abs(activations(2, 32 * 9)))
    assert not y.any()
    assert not np.signbit(y).any()


# Float16


def rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float64)


@pytest.mark.parametrize("columns", [1, 33, 576, 3000])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_products_of_float16_are_within_their_bound(columns: int, tokens: int) -> None:
    """(K + 1) · u · Σ|w' · x'| around the float64 sum of the rounded numbers, bias included."""
    x, w = activations(tokens, columns), activations(50, columns, seed=1)
    bias = np.linspace(-2, 2, 50).astype(np.float32)
    exact = rounded(x) @ rounded(w).T + bias
    bound = (columns + 1) * U * (np.abs(rounded(x)) @ np.abs(rounded(w)).T + np.abs(bias))
    assert (np.abs(ops.linear_a16(x, w, bias) - exact) <= bound).all()


@pytest.mark.parametrize("largest", [2.0**15, 40000.0, 2.0**16, 65520.0, 1e6, 3.4e38])
def test_large_rows_are_scaled_alone(largest: float) -> None:
    """By a power of two, from above 2¹⁵ on; a row beside them keeps its bits."""
    x, w = activations(4, 64), activations(5, 64, seed=1) * np.float32(0.01)
    alone = ops.linear_a16(x, w)
    x[2] *= np.float32(0.2)
    x[2, 5] = largest
    power = 0
    while largest / 2**power > 2**15:
        power += 1
    expected = rounded(x[2] * np.float32(2.0**-power)) @ rounded(w).T * 2.0**power
    bound = 65 * U * (np.abs(rounded(x[2] * np.float32(2.0**-power))) @ np.abs(rounded(w)).T) * 2.0**power
    y = ops.linear_a16(x, w)
    assert (np.abs(y[2] - expected) <= bound).all()
    assert np.array_equal(y[[0, 1, 3]], alone[[0, 1, 3]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_spoils_itself_alone(bad: float) -> None:
    """No result of it can be taken for a number."""
    x, w = activations(4, 64), activations(5, 64, seed=1)
    alone = ops.linear_a16(x, w)
    x[1, 7] = bad
    y = ops.linear_a16(x, w)
    assert not np.isfinite(y[1]).any()
    assert np.array_equal(y[[0, 2, 3]], alone[[0, 2, 3]])


def test_a_weight_beyond_float16_is_refused() -> None:
    """Not rounded to infinity."""
    w = activations(5, 64)
    w[3, 3] = 65519.99
    assert np.isfinite(ops.linear_a16(activations(2, 64), w)).all()
    w[3, 3] = 65520
    with pytest.raises(NumericalError, match="choose the policy float32"):
        ops.linear_a16(activations(2, 64), w)


@pytest.mark.parametrize("name", ["q4_k", "f16", "bf16"])
def test_a_stored_matrix_gives_the_bits_of_its_numbers(name: str) -> None:
    """Decoded beforehand or tile by tile."""
    columns, rows = 512, tile_rows((1, 512)) + 7
    data = stored("q4_k", rows, columns)
    if name != "q4_k":
        halves = activations(rows, columns)
        data = (
            halves.astype("<f2").view(np.uint8)
            if name == "f16"
            else halves.view(np.uint16)[:, 1::2].copy().view(np.uint8)
        )
    x = activations(3, columns)
    assert np.array_equal(ops.linear_a16(x, stored_matrix(name, data)), ops.linear_a16(x, decode(name, data)))


def test_a_scale_that_is_not_finite_is_refused() -> None:
    """When its rows are read for the first time, and the error names the tensor."""
    data = stored("q4_1", 4, 64)
    data[2, 22:24] = np.array([np.inf], "<f2").view(np.uint8)
    with pytest.raises(NumericalError, match="tensor w holds NaN or infinity"):
        mixed8_product("q4_1", data, activations(1, 64))
