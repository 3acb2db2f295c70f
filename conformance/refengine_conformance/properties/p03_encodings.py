"""Chapter *Encodings*.

Every encoding is read here once more, weight by weight, as its clause's table says: a ``Formula`` gives the
terms whose sum is weight ``i`` of a block. Each term is exact in a Python float, having no more than 24 bits,
and so is the sum of two, multiples of 2^-24 below 2^28, which is then rounded to float32, once.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from refengine_conformance.bits import check_bits
from refengine_conformance.bounds import check_bound
from refengine_conformance.registry import holds
from refengine_conformance.strategies import activations
from refengine_conformance.subject import Input, Subject, Weight

Bytes = NDArray[np.uint8]
Formula = Callable[[bytes, int], tuple[float, ...]]


@dataclass(frozen=True)
class Layout:
    """The sizes of a block, its formula, and where its binary16 scales lie."""

    weights: int
    bytes: int
    formula: Formula
    scales: tuple[int, ...] = ()


def f32(block: bytes, i: int) -> tuple[float, ...]:
    """ENC-2."""
    return struct.unpack("<f", block)


def f16(block: bytes, i: int) -> tuple[float, ...]:
    """ENC-2."""
    return struct.unpack("<e", block)


def bf16(block: bytes, i: int) -> tuple[float, ...]:
    """ENC-2: the upper half of a binary32."""
    return struct.unpack("<f", b"\0\0" + block)


def q4_0(block: bytes, i: int) -> tuple[float, ...]:
    """ENC-3."""
    return (binary16(block, 0) * (half(block, 2, i) - 8),)


def q4_1(block: bytes, i: int) -> tuple[float, ...]:
    """ENC-4."""
    return binary16(block, 0) * half(block, 4, i), binary16(block, 2)


def q5_0(block: bytes, i: int) -> tuple[float, ...]:
    """ENC-5."""
    fifth = field(block[2 + i // 8], i % 8, bits=1)
    return (binary16(block, 0) * (half(block, 6, i) + 16 * fifth - 16),)


def q5_1(block: bytes, i: int) -> tuple[float, ...]:
    """ENC-5."""
    fifth = field(block[4 + i // 8], i % 8, bits=1)
    return binary16(block, 0) * (half(block, 8, i) + 16 * fifth), binary16(block, 2)


def q8_0(block: bytes, i: int) -> tuple[float, ...]:
    """ENC-6."""
    return (binary16(block, 0) * signed(block[2 + i]),)


def q2_k(block: bytes, i: int) -> tuple[float, ...]:
    """ENC-7."""
    s, m = field(block[i // 16], 0, bits=4), field(block[i // 16], 1, bits=4)
    q = field(block[16 + 32 * (i // 128) + i % 32], i % 128 // 32, bits=2)
    return binary16(block, 80) * s * q, -(binary16(block, 82) * m)


def q3_k(block: bytes, i: int) -> tuple[float, ...]:
    """ENC-8."""
    g = i // 16
    s = field(block[96 + g % 8], g // 8, bits=4) + 16 * field(block[104 + g % 4], g // 4, bits=2)
    low = field(block[32 + 32 * (i // 128) + i % 32], i % 128 // 32, bits=2)
    third = field(block[i % 32], i // 32, bits=1)
    return (binary16(block, 108) * (s - 32) * (low + 4 * third - 4),)


def q4_k(block: bytes, i: int) -> tuple[float, ...]:
    """ENC-9."""
    s, m = six_bits(block, i // 32)
    q = field(block[16 + 32 * (i // 64) + i % 32], i % 64 // 32, bits=4)
    return binary16(block, 0) * s * q, -(binary16(block, 2) * m)


def q5_k(block: bytes, i: int) -> tuple[float, ...]:
    """ENC-10."""
    s, m = six_bits(block, i // 32)
    low = field(block[48 + 32 * (i // 64) + i % 32], i % 64 // 32, bits=4)
    fifth = field(block[16 + i % 32], i // 32, bits=1)
    return binary16(block, 0) * s * (low + 16 * fifth), -(binary16(block, 2) * m)


def q6_k(block: bytes, i: int) -> tuple[float, ...]:
    """ENC-11."""
    low = field(block[64 * (i // 128) + i % 64], i % 128 // 64, bits=4)
    high = field(block[128 + 32 * (i // 128) + i % 32], i % 128 // 32, bits=2)
    return (binary16(block, 208) * signed(block[192 + i // 16]) * (low + 16 * high - 32),)


def iq4_nl(block: bytes, i: int) -> tuple[float, ...]:
    """ENC-12."""
    return (binary16(block, 0) * IQ4_LEVELS[half(block, 2, i)],)


def iq4_xs(block: bytes, i: int) -> tuple[float, ...]:
    """ENC-12."""
    g = i // 32
    high = (block[2] + 256 * block[3]) >> (2 * g) & 3
    s = field(block[4 + g // 2], g % 2, bits=4) + 16 * high
    return (binary16(block, 0) * (s - 32) * IQ4_LEVELS[half(block, 8 + 16 * g, i % 32)],)


def mxfp4(block: bytes, i: int) -> tuple[float, ...]:
    """ENC-13."""
    q = half(block, 1, i)
    level = 0 if q == 8 else MXFP4_LEVELS[q % 8] * (1 - 2 * (q // 8))
    return (math.ldexp(level, block[0] - 128),)


def int4(block: bytes, i: int) -> tuple[float, ...]:
    """ENC-15."""
    return (binary16(block, 0) * (half(block, 3 + 16 * (i // 32), i % 32) - block[2]),)


def int8(block: bytes, i: int) -> tuple[float, ...]:
    """ENC-15."""
    return (binary16(block, 0) * (block[3 + i] - block[2]),)


def half(block: bytes, start: int, i: int) -> int:
    """4 bits of 32: weights 0 to 15 in the low halves of 16 bytes, 16 to 31 in the high ones."""
    return field(block[start + i % 16], i // 16, bits=4)


def field(byte: int, number: int, *, bits: int) -> int:
    """Field ``number`` of a byte that divides into fields of so many bits, the lowest first."""
    return byte >> (number * bits) & ((1 << bits) - 1)


def signed(byte: int) -> int:
    """Two's complement."""
    return byte - 256 if byte > 127 else byte


def six_bits(block: bytes, g: int) -> tuple[int, int]:
    """s and m of a group of Q4_K or Q5_K."""
    if g < 4:
        return block[4 + g] & 63, block[8 + g] & 63
    return (
        field(block[8 + g], 0, bits=4) + 16 * field(block[g], 3, bits=2),
        field(block[8 + g], 1, bits=4) + 16 * field(block[4 + g], 3, bits=2),
    )


def binary16(block: bytes, start: int) -> float:
    """A scale."""
    value: float = struct.unpack_from("<e", block, start)[0]
    return value


IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12)

LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "f32": Layout(1, 4, f32),
        "f16": Layout(1, 2, f16),
        "bf16": Layout(1, 2, bf16),
        "q4_0": Layout(32, 18, q4_0, (0,)),
        "q4_1": Layout(32, 20, q4_1, (0, 2)),
        "q5_0": Layout(32, 22, q5_0, (0,)),
        "q5_1": Layout(32, 24, q5_1, (0, 2)),
        "q8_0": Layout(32, 34, q8_0, (0,)),
        "q2_k": Layout(256, 84, q2_k, (80, 82)),
        "q3_k": Layout(256, 110, q3_k, (108,)),
        "q4_k": Layout(256, 144, q4_k, (0, 2)),
        "q5_k": Layout(256, 176, q5_k, (0, 2)),
        "q6_k": Layout(256, 210, q6_k, (208,)),
        "iq4_nl": Layout(32, 18, iq4_nl, (0,)),
        "iq4_xs": Layout(256, 136, iq4_xs, (0,)),
        "mxfp4": Layout(32, 17, mxfp4),
        "int4_g32": Layout(32, 19, int4, (0,)),
        "int4_g64": Layout(64, 35, int4, (0,)),
        "int4_g128": Layout(128, 67, int4, (0,)),
        "int8_g32": Layout(32, 35, int8, (0,)),
        "int8_g64": Layout(64, 67, int8, (0,)),
        "int8_g128": Layout(128, 131, int8, (0,)),
    }
)

AFFINE = tuple(name for name in LAYOUTS if name.startswith("int"))

SPECIAL_SCALES = (0.0, -0.0, 1.0, -1.0, 2.0**-24, 2.0**-14, 65504.0, math.inf, -math.inf, math.nan)


def weights_of(encoding: str, stored: Bytes) -> NDArray[np.float32]:
    """The weights of rows of blocks, uint8 ``[rows, row_bytes]``, by the formula, one after another."""
    return rounded(terms_of(encoding, stored))


def rounded(terms: NDArray[np.float64]) -> NDArray[np.float32]:
    """Their sums, rounded to float32; minus zero is what adding changes nothing."""
    with np.errstate(over="ignore", invalid="ignore"):
        total: NDArray[np.float64] = terms.sum(axis=-1, initial=-0.0)
        return total.astype(np.float32)


def terms_of(encoding: str, stored: Bytes) -> NDArray[np.float64]:
    """The terms of every weight, ``[rows, row_weights, terms]``."""
    layout = LAYOUTS[encoding]
    blocks = [block.tobytes() for block in stored.reshape(-1, layout.bytes)]
    terms = [layout.formula(block, i) for block in blocks for i in range(layout.weights)]
    return np.array(terms, np.float64).reshape(len(stored), -1, len(terms[0]))


@st.composite
def stored_rows(draw: st.DrawFn, encoding: str, blocks: int = 3) -> Bytes:
    """Rows of up to so many blocks (of 32 times as many plain numbers) of any bytes, with special scales."""
    layout = LAYOUTS[encoding]
    blocks *= 32 if layout.weights == 1 else 1
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, blocks)), layout.bytes)
    stored = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).integers(0, 256, shape, np.uint8)
    for start in layout.scales:
        for special in draw(st.lists(st.sampled_from(SPECIAL_SCALES), max_size=2)):
            row, block = draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))
            stored[row, block, start : start + 2] = np.frombuffer(struct.pack("<e", special), np.uint8)
    return stored.reshape(shape[0], -1)


@st.composite
def finite_rows(draw: st.DrawFn, encoding: str) -> Bytes:
    """Two rows of 64 weights, or of one block where that is longer, all of ordinary size."""
    layout = LAYOUTS[encoding]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (2, max(64 // layout.weights, 1))
    if layout.weights == 1:
        numbers = rng.standard_normal((*shape, 1)).astype("<f2" if encoding == "f16" else "<f4")
        upper = numbers.view(np.uint8)[..., -layout.bytes :]
        return np.ascontiguousarray(upper).reshape(2, -1)
    stored = rng.integers(0, 256, (*shape, layout.bytes), np.uint8)
    for start in layout.scales:
        scales = np.exp2(rng.uniform(-8, 2, (*shape, 1))) * rng.choice([-1, 1], (*shape, 1))
        stored[..., start : start + 2] = scales.astype("<f2").view(np.uint8)
    if encoding == "mxfp4":
        stored[..., 0] = rng.integers(118, 132, shape)
    return stored.reshape(2, -1)


def check_decoding(subject: Subject, data: st.DataObject, encoding: str) -> None:
    """Whatever the bytes, their weights are those of the formula."""
    stored = data.draw(stored_rows(encoding))
    check_bits(subject.decode(encoding, stored), weights_of(encoding, stored))


@holds("ENC-1", "decoder")
def rows_are_whole_blocks(subject: Subject, data: st.DataObject) -> None:
    """Sizes are those of the table, and bytes that cut a block are refused."""
    encoding = data.draw(st.sampled_from(list(LAYOUTS)))
    layout = LAYOUTS[encoding]
    shape = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    blocks = data.draw(st.integers(0, 3))
    decoded = subject.decode(encoding, np.zeros((*shape, blocks * layout.bytes), np.uint8))
    assert decoded.shape == (*shape, blocks * layout.weights)
    cut = data.draw(st.integers(1, layout.bytes - 1))
    try:
        subject.decode(encoding, np.zeros((*shape, blocks * layout.bytes + cut), np.uint8))
    except ValueError:
        return
    raise AssertionError(f"{cut} bytes of a block of {layout.bytes} were accepted")


@holds("ENC-1", "decoder")
def blocks_are_decoded_by_themselves(subject: Subject, data: st.DataObject) -> None:
    """A block's weights are the same alone, in any order of rows and blocks, and with gaps between them."""
    encoding = data.draw(st.sampled_from(list(LAYOUTS)))
    layout = LAYOUTS[encoding]
    stored = data.draw(stored_rows(encoding)).reshape(-1, layout.bytes)
    alone = np.stack([subject.decode(encoding, block[None])[0] for block in stored])
    check_bits(subject.decode(encoding, stored.reshape(1, -1)), alone.reshape(1, -1))
    check_bits(subject.decode(encoding, stored[::-1]), alone[::-1])
    spread = np.repeat(stored[:, None], 2, axis=1)  # blocks [n, 2, bytes], to be seen with the axes exchanged
    check_bits(subject.decode(encoding, spread.swapaxes(0, 1)), np.stack([alone, alone]))


@holds("ENC-2", "decoder")
def plain_numbers_are_themselves(subject: Subject, data: st.DataObject) -> None:
    """F32, F16 and BF16 are their numbers, to the last subnormal."""
    for encoding in ("f32", "f16", "bf16"):
        check_decoding(subject, data, encoding)


@holds("ENC-3", "decoder")
def q4_0_is_four_bits_around_eight(subject: Subject, data: st.DataObject) -> None:
    """Any block of Q4_0 decodes by its formula."""
    check_decoding(subject, data, "q4_0")


@holds("ENC-4", "decoder")
def q4_1_is_four_bits_above_an_offset(subject: Subject, data: st.DataObject) -> None:
    """Any block of Q4_1 decodes by its formula."""
    check_decoding(subject, data, "q4_1")


@holds("ENC-5", "decoder")
def q5_0_and_q5_1_have_a_fifth_bit_apart(subject: Subject, data: st.DataObject) -> None:
    """Any block of Q5_0 and of Q5_1 decodes by its formula."""
    check_decoding(subject, data, "q5_0")
    check_decoding(subject, data, "q5_1")


@holds("ENC-6", "decoder")
def q8_0_is_eight_bits(subject: Subject, data: st.DataObject) -> None:
    """Any block of Q8_0 decodes by its formula."""
    check_decoding(subject, data, "q8_0")


@holds("ENC-7", "decoder")
def q2_k_is_two_bits_in_sixteen_groups(subject: Subject, data: st.DataObject) -> None:
    """Any block of Q2_K decodes by its formula."""
    check_decoding(subject, data, "q2_k")


@holds("ENC-8", "decoder")
def q3_k_is_three_bits_in_sixteen_groups(subject: Subject, data: st.DataObject) -> None:
    """Any block of Q3_K decodes by its formula."""
    check_decoding(subject, data, "q3_k")


@holds("ENC-9", "decoder")
def q4_k_is_four_bits_in_eight_groups(subject: Subject, data: st.DataObject) -> None:
    """Any block of Q4_K decodes by its formula."""
    check_decoding(subject, data, "q4_k")


@holds("ENC-10", "decoder")
def q5_k_is_five_bits_in_eight_groups(subject: Subject, data: st.DataObject) -> None:
    """Any block of Q5_K decodes by its formula."""
    check_decoding(subject, data, "q5_k")


@holds("ENC-11", "decoder")
def q6_k_is_six_bits_in_sixteen_groups(subject: Subject, data: st.DataObject) -> None:
    """Any block of Q6_K decodes by its formula."""
    check_decoding(subject, data, "q6_k")


@holds("ENC-12", "decoder")
def iq4_indexes_sixteen_levels(subject: Subject, data: st.DataObject) -> None:
    """Any block of IQ4_NL and of IQ4_XS decodes by its formula."""
    check_decoding(subject, data, "iq4_nl")
    check_decoding(subject, data, "iq4_xs")


@holds("ENC-13", "decoder")
def mxfp4_is_a_power_of_two_times_a_level(subject: Subject, data: st.DataObject) -> None:
    """Any block of MXFP4 decodes by its formula, with exponents at either end."""
    stored = data.draw(stored_rows("mxfp4"))
    stored[0, 0] = data.draw(st.sampled_from([0, 1, 127, 128, 253, 254, 255]))
    check_bits(subject.decode("mxfp4", stored), weights_of("mxfp4", stored))


@holds("ENC-14", "embedding")
def rows_are_looked_up_exactly(subject: Subject, data: st.DataObject) -> None:
    """In whatever encoding the backend supports, a looked-up row is the decoded one, bit by bit."""
    for encoding in some_supported(subject, data, "embedding"):
        stored = data.draw(finite_rows(encoding), encoding)
        expected = weights_of(encoding, stored)
        result = subject.apply("embedding", Input("token_ids"), Weight(stored, expected.shape, encoding))
        check_bits(result, expected.astype(subject.policy.activations))


@holds("ENC-14", "linear")
def products_are_those_of_the_decoded_weights(subject: Subject, data: st.DataObject) -> None:
    """In whatever encoding the backend supports, each output keeps the clause's bound.

    A product of two float32 numbers is exact in float64, and ``fsum`` rounds their sum once.
    """
    x = data.draw(activations(rows=st.integers(1, 3), width=st.just(256)))
    for encoding in some_supported(subject, data, "linear"):
        stored = data.draw(finite_rows(encoding), encoding)
        terms = terms_of(encoding, stored)
        weights, magnitudes = rounded(terms), np.abs(terms).sum(axis=-1)
        inputs = x[:, : weights.shape[1]].astype(np.float64)
        y = subject.apply("linear", inputs, Weight(stored, weights.shape, encoding))
        exact = [[math.fsum(products) for products in row] for row in (inputs[:, None] * weights).tolist()]
        n = (2 * weights.shape[1] + 3) * subject.unit_roundoff
        check_bound(y, exact, n / (1 - n) * (np.abs(inputs) @ magnitudes.T))


@holds("ENC-15", "decoder")
def integers_have_a_zero_point_per_group(subject: Subject, data: st.DataObject) -> None:
    """Any block of any size decodes by its formula, with zero points at either end."""
    for encoding in AFFINE:
        layout = LAYOUTS[encoding]
        stored = data.draw(stored_rows(encoding))
        stored[0, 2] = data.draw(st.sampled_from([0, 1, 7, 8, 15, 16, 127, 128, 255]), "z")
        edges = data.draw(st.sampled_from([None, 0x00, 0x0F, 0xF0, 0xFF]), "integers of the first block")
        if edges is not None:
            stored[0, 3 : layout.bytes] = edges
        check_bits(subject.decode(encoding, stored), weights_of(encoding, stored))


def some_supported(subject: Subject, data: st.DataObject, op: str) -> list[str]:
    """Up to four encodings in which the backend computes an op; F32 alone, to be refused, if it has none."""
    support = subject.start().support
    reasons = {name: support(op, encoding=name, policy=subject.policy.name) for name in LAYOUTS}
    names = [name for name, reason in reasons.items() if reason is None] or ["f32"]
    return data.draw(st.permutations(names), "encodings")[:4]
