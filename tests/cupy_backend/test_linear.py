"""Products in float32 lie within the bound of what they sum, and a row has its bits in any company."""

from __future__ import annotations

import numpy as np
import pytest
from cupy_backend.emulation import EmulatedBackend, EmulatedRuntime
from stored_matrices import stored_matrix

from refengine.quantizer import GROUP, decode, has_offsets, read_groups
from refengine_conformance.subject import Subject, Weight
from refengine_cupy.backend import CupyBackend
from refengine_cupy.packing import LAYOUTS, PLAIN


def magnitudes(name: str, data: np.ndarray, columns: int) -> np.ndarray:
    """The sums of the magnitudes of each weight's terms, as ENC-14 has them."""
    if name in PLAIN:
        return np.abs(decode(name, data)).astype(np.float64)
    integers = np.empty((len(data), columns), np.float32)
    scales, offsets = (np.zeros((columns // GROUP, len(data)), np.float32) for _ in range(2))
    read_groups(name, data, integers, scales, offsets if has_offsets(name) else None)
    spread = [np.abs(values.T.astype(np.float64)).repeat(GROUP, axis=1) for values in (scales, offsets)]
    return spread[0] * np.abs(integers) + spread[1]


@pytest.mark.parametrize("name", [*LAYOUTS, *PLAIN])
@pytest.mark.parametrize("tokens", [1, 9, 37])
def test_a_product_lies_within_the_bound_of_its_sum(name: str, tokens: int) -> None:
    """That of ENC-14, and a rounding more for the bias."""
    rows, columns = 43, 1280 if name in LAYOUTS else 1291
    data = stored_matrix(name, rows, columns)
    rng = np.random.default_rng(tokens)
    x, bias = (rng.standard_normal(size).astype(np.float32) for size in ((tokens, columns), rows))
    y = Subject(EmulatedBackend).apply("linear", x, Weight(data, (rows, columns), name), Weight(bias))
    weights = decode(name, data).reshape(rows, columns).astype(np.float64)
    n, exact = 2 * columns + 4, x.astype(np.float64)
    terms = np.abs(exact) @ magnitudes(name, data, columns).T + np.abs(bias)
    bound = n * 2.0**-24 / (1 - n * 2.0**-24) * terms
    assert (np.abs(y - (exact @ weights.T + bias)) <= bound).all()


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        *((name, columns) for name in PLAIN for columns in (31, 100, 1291)),
        *((name, 1280) for name in ("q4_1", "int4_g64", "int8_g128")),
    ],
)
def test_a_row_has_its_bits_in_any_company(name: str, columns: int) -> None:
    """Alone, among a few, and in tiles of rows and tokens, whichever tile it falls into."""
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((41, columns)).astype(np.float32)
    weight = Weight(stored_matrix(name, 43, columns), (43, columns), name)
    runtimes = []

    def start() -> CupyBackend:
        runtimes.append(EmulatedRuntime())
        return CupyBackend(runtimes[-1])

    found = {tokens: Subject(start).apply("linear", x[:tokens], weight) for tokens in (1, 7, 9, 16, 41)}
    assert all(found[41][:tokens].tobytes() == y.tobytes() for tokens, y in found.items())
    kernels = {kernel for runtime in runtimes for kernel in runtime.launched if kernel.startswith("linear")}
    assert kernels == {f"linear_{name}", *([f"linear_tiles_{name}"] if name in PLAIN else [])}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 33])
def test_a_weight_row_has_its_bits_in_any_company(name: str, rows: int) -> None:
    x = np.random.default_rng(rows).standard_normal((12, 100)).astype(np.float32)
    data, subject = stored_matrix(name, 33, 100), Subject(EmulatedBackend)
    whole = subject.apply("linear", x, Weight(data, (33, 100), name))
    some = subject.apply("linear", x, Weight(data[:rows], (rows, 100), name))
    assert np.ascontiguousarray(whole[:, :rows]).tobytes() == some.tobytes()


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("tokens", [1, 12])
def test_the_order_of_a_plain_row_is_the_stated_one(name: str, tokens: int) -> None:
    """Every 32nd weight in order, fused; then the 32 sums pairwise, halves first."""
    columns = 75
    data = stored_matrix(name, 8, columns)
    x = np.random.default_rng(5).standard_normal((tokens, columns)).astype(np.float32)
    weights = decode(name, data).reshape(8, columns)
    sums = np.zeros((tokens, 8, 32), np.float32)
    for k in range(columns):
        # exact in float64 but for the sum's last bits, which decide nothing in numbers of these sizes
        exact = x[:, None, k].astype(np.float64) * weights[None, :, k] + sums[:, :, k % 32]
        sums[:, :, k % 32] = exact
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    y = Subject(EmulatedBackend).apply("linear", x, Weight(data, (8, columns), name))
    assert y.tobytes() == sums[..., 0].tobytes()
