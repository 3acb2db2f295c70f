"""AWQ's tensors become rows of integer groups: known integers packed one by one, and any bits read one by one."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from quantizer.integer_groups import pack_awq, pack_gptq, quantize, unpack_awq

from refengine.errors import FormatError, UnsupportedError
from refengine.quantizer import LazyTensor, from_awq, from_gptq


def any_tensors(rows: int, weights: int, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """qweight, qzeros and scales of any bits, scales finite."""
    rng = np.random.default_rng([rows, weights, groups])
    qweight = rng.integers(-(2**31), 2**31, (weights, rows // 8), np.int32)
    qzeros = rng.integers(-(2**31), 2**31, (groups, rows // 8), np.int32)
    return qweight, qzeros, rng.standard_normal((groups, rows)).astype(np.float16)


@pytest.mark.parametrize(("group", "size"), [(32, 32), (64, 64), (96, 32), (128, 128), (192, 64), (512, 128)])
def test_known_integers_come_back(group: int, size: int) -> None:
    """Those that GPTQ's tensors of the same matrix give, and the weights that they stand for."""
    matrix = np.random.default_rng(group).standard_normal((24, 2 * group))
    matrix[1::5] = np.abs(matrix[1::5])
    known = quantize(matrix, group, bits=4)
    rows = from_awq(*pack_awq(known))
    assert rows.encoding == f"int4_g{size}"
    assert np.array_equal(LazyTensor("w", matrix.shape, rows.encoding, rows.data).decode(), known.weights())
    for less, zero_points in enumerate(["stored", "stored_minus_one"]):
        same = from_gptq(*pack_gptq(known, 4, less=less), bits=4, zero_points=zero_points)  # type: ignore[arg-type]
        assert same.encoding == rows.encoding
        assert np.array_equal(same.data, rows.data)


@pytest.mark.parametrize(
    ("rows", "weights", "groups"), [(8, 32, 1), (72, 1088, 17), (8, 8320, 65), (136, 64, 2)]
)
def test_any_bits_are_read_as_the_format_says(rows: int, weights: int, groups: int) -> None:
    """Rows and weights beyond what is laid out at a time."""
    tensors = any_tensors(rows, weights, groups)
    found = from_awq(*tensors)
    decoded = LazyTensor("w", (rows, weights), found.encoding, found.data).decode()
    assert np.array_equal(decoded, unpack_awq(*tensors))


def test_tensors_are_only_read() -> None:
    """As a mapped file has them: read-only, and perhaps with gaps."""
    tensors = any_tensors(32, 256, 2)
    copies = [tensor.copy() for tensor in tensors]
    expected = from_awq(*copies).data
    assert all(np.array_equal(a, b) for a, b in zip(tensors, copies, strict=True))
    gaps = [np.repeat(tensor, 2, axis=1)[:, ::2] for tensor in tensors]
    for tensor in gaps:
        tensor.flags.writeable = False
    assert np.array_equal(from_awq(*gaps).data, expected)


@pytest.mark.parametrize(("rows", "weights"), [(4096, 4096), (512, 32768)])
def test_memory_beside_the_rows_is_bounded(rows: int, weights: int) -> None:
    """2 MiB, for 16 million weights."""
    tensors = any_tensors(rows, weights, weights // 128)
    tracemalloc.start()
    try:
        found = from_awq(*tensors)
        peak = tracemalloc.get_traced_memory()[1] - found.data.nbytes
    finally:
        tracemalloc.stop()
    assert peak < 2 * 2**20


QWEIGHT, QZEROS, SCALES = any_tensors(16, 128, 2)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ((QWEIGHT.view(np.uint32), QZEROS, SCALES), r"qweight is uint32 \[128, 2\], and must be int32"),
        ((QWEIGHT.ravel(), QZEROS, SCALES), r"qweight is int32 \[256\], and must be int32 \[\?, \?\]"),
        ((QWEIGHT[:, :0], QZEROS, SCALES), r"qweight is int32 \[128, 0\]: it holds nothing"),
        ((QWEIGHT[:, :1], QZEROS, SCALES), r"scales is float16 \[2, 16\], and must be float16 \[2, 8\]"),
        ((QWEIGHT, QZEROS, SCALES.astype(np.float64)), "scales is float64"),
        ((QWEIGHT, QZEROS[:1], SCALES), r"qzeros is int32 \[1, 2\], and must be int32 \[2, 2\]"),
        ((QWEIGHT, QZEROS.astype(np.int8), SCALES), "qzeros is int8"),
    ],
)
def test_malformed_tensors_are_refused(tensors: tuple[np.ndarray, ...], told: str) -> None:
    """By name, with what it is and what it must be."""
    with pytest.raises(FormatError, match=told):
        from_awq(*tensors)


def test_other_bits_and_groups_are_refused() -> None:
    """By their numbers."""
    with pytest.raises(UnsupportedError, match="AWQ of 8 bits is not implemented, only of 4"):
        from_awq(QWEIGHT, QZEROS, SCALES, bits=8)
    with pytest.raises(UnsupportedError, match="groups of 16 weights are not implemented"):
        from_awq(*any_tensors(8, 128, 8))
