"""GPTQ's tensors become rows of integer groups: known integers packed one by one, and any bits read one by one."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from quantizer.integer_groups import Quantized, pack_gptq, quantize, unpack_gptq

from refengine.errors import FormatError, UnsupportedError
from refengine.quantizer import GROUP, LazyTensor, StoredRows, decode, encoding, from_gptq, read_groups

ZERO_POINTS = {"stored_minus_one": 1, "stored": 0}
"""What each has been lessened by."""


def random_matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Of groups of all sizes, some of which have one sign: their zero points are 0 or the greatest."""
    rng = np.random.default_rng([seed, rows, columns])
    numbers = rng.standard_normal((rows, columns)) * np.exp2(rng.integers(-6, 3, (rows, 1)))
    numbers[1::5] = np.abs(numbers[1::5])
    numbers[2::5] = -np.abs(numbers[2::5])
    return numbers


def any_tensors(bits: int, rows: int, weights: int, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """qweight, qzeros and scales of any bits, scales finite."""
    rng = np.random.default_rng([bits, rows, weights, groups])
    per_word = 32 // bits
    qweight = rng.integers(-(2**31), 2**31, (weights // per_word, rows), np.int32)
    qzeros = rng.integers(-(2**31), 2**31, (groups, rows // per_word), np.int32)
    return qweight, qzeros, rng.standard_normal((groups, rows)).astype(np.float16)


def assert_holds(rows: StoredRows, known: Quantized) -> None:
    """Integers, zero points, scales and weights, all of them exactly."""
    count, columns = len(known.q), len(known.q[0])
    integers = np.empty((count, columns), np.float32)
    scales = np.empty((columns // GROUP, count), np.float32)
    read_groups(rows.encoding, rows.data, integers, scales, None)
    expected = [[known.integer(n, k) for k in range(columns)] for n in range(count)]
    assert integers.tolist() == expected
    groups = [[known.d[n][k // known.group] for n in range(count)] for k in range(0, columns, GROUP)]
    assert scales.tolist() == groups
    stored = encoding(rows.encoding)
    zeros = rows.data.reshape(count, -1, stored.block_bytes)[..., 2].tolist()
    assert zeros == [[z for z in row for _ in range(known.group // stored.block_size)] for row in known.z]
    assert np.array_equal(decode(rows.encoding, rows.data), known.weights())


@pytest.mark.parametrize("zero_points", ZERO_POINTS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("group", "size"),
    [(32, 32), (64, 64), (96, 32), (128, 128), (160, 32), (192, 64), (256, 128), (1024, 128)],
)
def test_known_integers_come_back(bits: int, group: int, size: int, zero_points: str) -> None:
    """Quantized and packed here, with groups in blocks of the largest size that divides them."""
    known = quantize(random_matrix(16, group * (2 if group < 256 else 1)), group, bits)
    assert 0 in np.array(known.z)
    assert 2**bits - 1 in np.array(known.z)
    rows = from_gptq(
        *pack_gptq(known, bits, less=ZERO_POINTS[zero_points]), bits=bits, zero_points=zero_points
    )
    assert rows.encoding == f"int{bits}_g{size}"
    assert_holds(rows, known)


@pytest.mark.parametrize("zero_points", ZERO_POINTS)
@pytest.mark.parametrize(
    ("bits", "rows", "weights", "groups"), [(4, 72, 1088, 17), (8, 68, 4224, 33), (4, 8, 8320, 65)]
)
def test_any_bits_are_read_as_the_format_says(
    bits: int, rows: int, weights: int, groups: int, zero_points: str
) -> None:
    """Rows and weights beyond what is laid out at a time; with g_idx, or without."""
    tensors = any_tensors(bits, rows, weights, groups)
    g_idx = np.arange(weights, dtype=np.int32) // np.int32(weights // groups)
    expected = unpack_gptq(*tensors, g_idx, bits, less=ZERO_POINTS[zero_points])
    for given in (None, g_idx):
        found = from_gptq(*tensors, given, bits=bits, zero_points=zero_points)
        tensor = LazyTensor("w", (rows, weights), found.encoding, found.data)
        assert np.array_equal(tensor.decode(), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_zero_point_of_zero_wraps(bits: int) -> None:
    """It is stored as the greatest field; so no zero point is 2 ** bits."""
    qweight, qzeros, scales = any_tensors(bits, 32 // bits, 32, 1)
    rows = from_gptq(
        qweight, np.full_like(qzeros, -1), scales, None, bits=bits, zero_points="stored_minus_one"
    )
    assert not rows.data[:, 2].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_tensors_are_only_read(bits: int) -> None:
    """As a mapped file has them: read-only, and perhaps with gaps."""
    tensors = any_tensors(bits, 32, 256, 2)
    copies = [tensor.copy() for tensor in tensors]
    expected = from_gptq(*copies, None, bits=bits, zero_points="stored_minus_one").data
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(tensors, copies, strict=True))
    gaps = [np.repeat(tensor, 2, axis=1)[:, ::2] for tensor in tensors]
    for tensor in gaps:
        tensor.flags.writeable = False
    found = from_gptq(*gaps, None, bits=bits, zero_points="stored_minus_one").data
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "weights"), [(4096, 4096), (512, 32768)])
def test_memory_beside_the_rows_is_bounded(bits: int, rows: int, weights: int) -> None:
    """2 MiB, for 16 million weights."""
    tensors = any_tensors(bits, rows, weights, weights // 128)
    g_idx = np.arange(weights, dtype=np.int32) // np.int32(128)
    tracemalloc.start()
    try:
        found = from_gptq(*tensors, g_idx, bits=bits, zero_points="stored")
        peak = tracemalloc.get_traced_memory()[1] - found.data.nbytes
    finally:
        tracemalloc.stop()
    assert peak < 2 * 2**20


# ---- what is refused ------------------------------------------------------------------------------------

IN_ORDER = np.repeat(np.arange(4, dtype=np.int32), 32)


def shuffled(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(IN_ORDER).astype(np.int32)


@pytest.mark.parametrize(
    "g_idx",
    [shuffled(), IN_ORDER[::-1].copy(), np.roll(IN_ORDER, 1), np.tile(np.arange(4, dtype=np.int32), 32)],
)
def test_act_order_is_refused(g_idx: np.ndarray) -> None:
    """With its cause, and what to do."""
    with pytest.raises(
        UnsupportedError, match=r"act-order \(desc_act\).*take a checkpoint made with desc_act=false"
    ):
        from_gptq(*any_tensors(4, 8, 128, 4), g_idx, bits=4, zero_points="stored")


def test_groups_of_different_sizes_are_refused() -> None:
    """192 weights in groups of 128 are one of 128 and one of 64."""
    g_idx = np.repeat(np.arange(2, dtype=np.int32), [128, 64])
    with pytest.raises(UnsupportedError, match="groups of different sizes"):
        from_gptq(*any_tensors(4, 8, 192, 2), g_idx, bits=4, zero_points="stored")


@pytest.mark.parametrize(
    ("g_idx", "told"),
    [
        (np.append(IN_ORDER[:-1], np.int32(4)), "names the group 4, and there are 4"),
        (np.append(np.int32(-1), IN_ORDER[1:]), "names the group -1"),
        (IN_ORDER[:-1], r"int32 \[127\], and must be int32 \[128\]"),
        (IN_ORDER[None], r"int32 \[1, 128\], and must be"),
        (IN_ORDER.astype(np.int64), r"int64 \[128\], and must be int32"),
    ],
)
def test_a_malformed_g_idx_is_refused(g_idx: np.ndarray, told: str) -> None:
    """By what is wrong with it."""
    with pytest.raises(FormatError, match=f"g_idx .*{told}"):
        from_gptq(*any_tensors(4, 8, 128, 4), g_idx, bits=4, zero_points="stored")


@pytest.mark.parametrize("bits", [2, 3, 16])
def test_other_bits_are_refused(bits: int) -> None:
    """By their number."""
    with pytest.raises(UnsupportedError, match=f"GPTQ of {bits} bits .* only of 4 and 8"):
        from_gptq(*any_tensors(4, 8, 128, 4), None, bits=bits, zero_points="stored")


def test_other_zero_points_are_refused() -> None:
    """With those that there are."""
    with pytest.raises(UnsupportedError, match="'gptq_v2', and must be one of stored_minus_one, stored"):
        from_gptq(*any_tensors(4, 8, 128, 4), None, bits=4, zero_points="gptq_v2")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weights", "groups", "told"), [(128, 8, "of 16 "), (96, 2, "of 48 "), (64, 3, "of 21.3333 ")]
)
def test_other_groups_are_refused(weights: int, groups: int, told: str) -> None:
    """By their size."""
    with pytest.raises(
        UnsupportedError, match=f"groups {told}weights are not implemented.*take a checkpoint"
    ):
        from_gptq(*any_tensors(4, 8, weights, groups), None, bits=4, zero_points="stored")


QWEIGHT, QZEROS, SCALES = any_tensors(4, 16, 128, 2)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ((QWEIGHT.view(np.uint32), QZEROS, SCALES), r"qweight is uint32 \[16, 16\], and must be int32"),
        ((QWEIGHT[None], QZEROS, SCALES), r"qweight is int32 \[1, 16, 16\], and must be int32 \[\?, \?\]"),
        ((QWEIGHT[:0], QZEROS, SCALES), r"qweight is int32 \[0, 16\]: it holds nothing"),
        (
            (QWEIGHT[:, :12], QZEROS, SCALES),
            "qweight has 12 columns, whose zero points are no whole words of 8",
        ),
        ((QWEIGHT, QZEROS, SCALES[:0]), r"scales is float16 \[0, 16\]: it holds nothing"),
        ((QWEIGHT, QZEROS, SCALES[:, :8]), r"scales is float16 \[2, 8\], and must be float16 \[2, 16\]"),
        ((QWEIGHT, QZEROS, SCALES.astype(np.float32)), r"scales is float32 \[2, 16\], and must be float16"),
        ((QWEIGHT, QZEROS[:1], SCALES), r"qzeros is int32 \[1, 2\], and must be int32 \[2, 2\]"),
        ((QWEIGHT, QZEROS.T.copy()[:, :1], SCALES), r"qzeros is int32 \[2, 1\], and must be int32 \[2, 2\]"),
        ((QWEIGHT, QZEROS.astype(np.int64), SCALES), "qzeros is int64"),
    ],
)
def test_malformed_tensors_are_refused(tensors: tuple[np.ndarray, ...], told: str) -> None:
    """By name, with what it is and what it must be."""
    qweight, qzeros, scales = tensors
    with pytest.raises(FormatError, match=told):
        from_gptq(qweight, qzeros, scales, None, bits=4, zero_points="stored")
