"""Chapter *Encodings*, where it tells of tensors that other formats keep apart.

Every integer is taken once more out of the bits that its clause names, and blocks are written byte by byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from refengine.errors import RefengineError, UnsupportedError
from refengine.quantizer import StoredRows
from refengine_conformance.registry import holds
from refengine_conformance.subject import Subject

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)

GPTQ_ZEROS = {"stored_minus_one": 1, "stored": 0}
"""What is added to a stored zero point, by what it is said to be."""

Field = Callable[[int, int], int]


@dataclass(frozen=True)
class Tensors:
    """The tensors of a matrix [N, K], named as checkpoints name them."""

    qweight: NDArray[Any]
    qzeros: NDArray[Any]
    scales: NDArray[Any]


def field(word: np.int32, number: int, bits: int) -> int:
    """Of a word that divides into fields of so many bits, the lowest first."""
    return int(word) >> (number * bits) & ((1 << bits) - 1)


def expected_rows(
    bits: int, weights: int, scales: NDArray[np.float16], q: Field, z: Field
) -> tuple[str, list[bytes]]:
    """ENC-16 and ENC-17: the encoding and its rows, of ``q(k, n)`` and ``z(g, n)``."""
    groups, rows = scales.shape
    group = weights // groups
    size = next(size for size in (128, 64, 32) if group % size == 0)
    stored = []
    for n in range(rows):
        row = b""
        for start in range(0, weights, size):
            g = start // group
            quants = [q(k, n) for k in range(start, start + size)]
            packed = bytes(quants) if bits == 8 else in_halves(quants)
            row += scales[g, n].astype("<f2").tobytes() + bytes([z(g, n)]) + packed
        stored.append(row)
    return f"int{bits}_g{size}", stored


def in_halves(quants: list[int]) -> bytes:
    """4 bits of 32, again and again: 0 to 15 in the low halves of 16 bytes, 16 to 31 in the high ones."""
    return bytes(
        quants[start + i] + 16 * quants[start + 16 + i]
        for start in range(0, len(quants), 32)
        for i in range(16)
    )


def check_rows(found: StoredRows, expected: tuple[str, list[bytes]]) -> None:
    """The same encoding, and the same bytes."""
    name, rows = expected
    assert found.encoding == name, f"{found.encoding}, where {name} is the largest that fits"
    assert found.data.dtype == np.uint8, f"rows of {found.data.dtype}"
    assert found.data.shape == (len(rows), len(rows[0])), f"rows of the shape {found.data.shape}"
    for n, row in enumerate(rows):
        assert found.data[n].tobytes() == row, f"row {n} is {found.data[n].tobytes().hex()}, not {row.hex()}"


@st.composite
def tensors(draw: st.DrawFn, *, awq: bool, bits: int) -> tuple[Tensors, int]:
    """Tensors of any bits, and K: up to three groups of any size that there is, up to 80 rows."""
    group = 32 * draw(st.sampled_from([1, 2, 3, 4, 5, 8]), "group")
    groups = draw(st.integers(1, 3 if group <= 64 else 2), "groups")
    words = draw(st.integers(1, 3) | st.sampled_from([9, 20] if group * groups <= 64 else [2]), "words of z")
    per_word, weights = 32 // bits, group * groups
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def any_words(*shape: int) -> NDArray[np.int32]:
        return rng.integers(-(2**31), 2**31, shape, np.int32)

    rows = words * per_word
    return Tensors(
        any_words(weights, words) if awq else any_words(weights // per_word, rows),
        any_words(groups, words),
        rng.integers(0, 2**16, (groups, rows), np.uint16).view(np.float16),
    ), weights


def damaged(found: Tensors, data: st.DataObject) -> Tensors:
    """One of them without its last row or column, or of another dtype."""
    name = data.draw(st.sampled_from(["qweight", "qzeros", "scales"]), "of which")
    tensor = getattr(found, name)
    match data.draw(st.sampled_from(["row", "column", "axis", "dtype"]), "what is wrong"):
        case "row":
            changed = tensor[:-1]
        case "column":
            changed = tensor[:, :-1]
        case "axis":
            changed = tensor[None]
        case _:
            changed = tensor.astype(np.float32)
    return replace(found, **{name: changed})


def check_refused(relay: Callable[[], StoredRows]) -> None:
    """By an error of the engine's own."""
    try:
        rows = relay()
    except RefengineError:
        return
    raise AssertionError(f"malformed tensors were taken for {rows.encoding} {rows.data.shape}")


@holds("ENC-16", "relayout")
def gptq_keeps_every_bit(subject: Subject, data: st.DataObject) -> None:
    """Whatever the tensors hold, in either format; with the groups given, or left to their order."""
    bits = data.draw(st.sampled_from([4, 8]), "bits")
    zero_points = data.draw(st.sampled_from(sorted(GPTQ_ZEROS)), "zero points")
    found, weights = data.draw(tensors(awq=False, bits=bits))
    per_word = 32 // bits

    def q(k: int, n: int) -> int:
        return field(found.qweight[k // per_word, n], k % per_word, bits)

    def z(g: int, n: int) -> int:
        stored = field(found.qzeros[g, n // per_word], n % per_word, bits)
        return (stored + GPTQ_ZEROS[zero_points]) & ((1 << bits) - 1)

    in_order = np.array([k * len(found.scales) // weights for k in range(weights)], np.int32)
    g_idx = in_order if data.draw(st.booleans(), "g_idx given") else None
    rows = subject.from_gptq(
        found.qweight, found.qzeros, found.scales, g_idx, bits=bits, zero_points=zero_points
    )
    check_rows(rows, expected_rows(bits, weights, found.scales, q, z))


@holds("ENC-16", "relayout")
def gptq_in_another_order_is_refused(subject: Subject, data: st.DataObject) -> None:
    """Two weights exchanged between groups are enough; and the text says what the order comes from."""
    bits, groups = data.draw(st.sampled_from([4, 8]), "bits"), data.draw(st.integers(2, 4), "groups")
    weights, per_word = 32 * groups, 32 // bits
    g_idx = np.repeat(np.arange(groups, dtype=np.int32), 32)
    first = data.draw(st.integers(0, groups - 2), "first")
    a, b = (data.draw(st.integers(0, 31), "weight") + 32 * g for g in (first, first + 1))
    g_idx[[a, b]] = g_idx[[b, a]]
    words = np.zeros((weights // per_word, per_word), np.int32), np.zeros((groups, 1), np.int32)
    try:
        subject.from_gptq(
            *words, np.ones((groups, per_word), np.float16), g_idx, bits=bits, zero_points="stored"
        )
    except UnsupportedError as error:
        assert "desc_act" in str(error), f"{error} does not name desc_act"
    else:
        raise AssertionError(f"g_idx {g_idx.tolist()} was taken for one in order")


@holds("ENC-16", "relayout")
def malformed_tensors_of_gptq_are_refused(subject: Subject, data: st.DataObject) -> None:
    """Of another dtype, with a row or a column less; of other bits, groups or a g_idx that names too many."""
    bits = data.draw(st.sampled_from([4, 8]), "bits")
    found, weights = data.draw(tensors(awq=False, bits=bits))
    groups, g_idx = len(found.scales), None
    match data.draw(st.sampled_from(["tensor", "bits", "groups", "g_idx"]), "where"):
        case "tensor":
            found = damaged(found, data)
        case "bits":
            bits = data.draw(st.sampled_from([0, 2, 3, 5, 16]), "other bits")
        case "groups":  # of 32 weights and some more, or less
            found = replace(found, qweight=np.concatenate([found.qweight, found.qweight[:1]]))
        case _:
            g_idx = np.repeat(np.arange(groups, dtype=np.int32), weights // groups)
            g_idx[-1] = data.draw(st.sampled_from([-1, groups]), "group")
    check_refused(
        lambda: subject.from_gptq(
            found.qweight, found.qzeros, found.scales, g_idx, bits=bits, zero_points="stored"
        )
    )


@holds("ENC-17", "relayout")
def awq_keeps_every_bit(subject: Subject, data: st.DataObject) -> None:
    """Whatever the tensors hold."""
    found, weights = data.draw(tensors(awq=True, bits=4))

    def q(k: int, n: int) -> int:
        return field(found.qweight[k, n // 8], AWQ_COLUMNS.index(n % 8), 4)

    def z(g: int, n: int) -> int:
        return field(found.qzeros[g, n // 8], AWQ_COLUMNS.index(n % 8), 4)

    rows = subject.from_awq(found.qweight, found.qzeros, found.scales)
    check_rows(rows, expected_rows(4, weights, found.scales, q, z))


@holds("ENC-17", "relayout")
def malformed_tensors_of_awq_are_refused(subject: Subject, data: st.DataObject) -> None:
    """Of another dtype, with a row or a column less, of other bits."""
    found, _ = data.draw(tensors(awq=True, bits=4))
    bits = data.draw(st.sampled_from([4, 4, 3, 8]), "bits")
    if bits == 4:
        found = damaged(found, data)
    check_refused(lambda: subject.from_awq(found.qweight, found.qzeros, found.scales, bits=bits))
