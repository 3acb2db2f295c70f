"""Every block format, against loops over single weights written from the description of its bytes.

These loops are Python integers and float64; ``f32`` marks each rounding to float32. In float64, a product of
two float32 factors is exact (24 + 24 bits fit in 53), and a sum of two float32 terms, rounded to float64 and
then to float32, is the float32 sum (53 >= 2 * 24 + 2; Figueroa, "When is double rounding innocuous?", 1995).
So each ``f32`` is one float32 operation.
"""

from __future__ import annotations

import math
import struct
from functools import partial

import numpy as np
import pytest
from quantizer.integer_groups import BLOCKS, weight_at

from refengine.quantizer import ENCODINGS, decode

IQ4_LEVELS = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


def f32(value):
    """``value`` rounded to the nearest float32."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def f16(block, offset):
    return struct.unpack_from("<e", block, offset)[0]


def nibble(block, offset, index):
    """The index-th four-bit number of 32: sixteen low halves, then sixteen high halves."""
    return block[offset + index % 16] >> (4 * (index // 16)) & 15


def q4_0(block, w):
    return f32(f16(block, 0) * (nibble(block, 2, w) - 8))


def q4_1(block, w):
    return f32(f32(f16(block, 0) * nibble(block, 4, w)) + f16(block, 2))


def q5_0(block, w):
    fifth = int.from_bytes(block[2:6], "little") >> w & 1
    return f32(f16(block, 0) * (nibble(block, 6, w) + 16 * fifth - 16))


def q5_1(block, w):
    fifth = int.from_bytes(block[4:8], "little") >> w & 1
    return f32(f32(f16(block, 0) * (nibble(block, 8, w) + 16 * fifth)) + f16(block, 2))


def q8_0(block, w):
    return f32(f16(block, 0) * struct.unpack_from("b", block, 2 + w)[0])


def q2_k(block, w):
    half, within = divmod(w, 128)
    field, byte = divmod(within, 32)
    q = block[16 + 32 * half + byte] >> (2 * field) & 3
    pair = block[w // 16]
    return f32(f32(f32(f16(block, 80) * (pair & 15)) * q) - f32(f16(block, 82) * (pair >> 4)))


def q3_k(block, w):
    half, within = divmod(w, 128)
    field, byte = divmod(within, 32)
    q = block[32 + 32 * half + byte] >> (2 * field) & 3
    if not block[byte] >> (w // 32) & 1:
        q -= 4
    group = w // 16
    low = block[96 + group] & 15 if group < 8 else block[96 + group - 8] >> 4
    high = block[104 + group % 4] >> (2 * (group // 4)) & 3
    return f32(f32(f16(block, 108) * (low + 16 * high - 32)) * q)


def scale_and_minimum(packed, j):
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    return (
        packed[j + 4] & 15 | (packed[j - 4] >> 6) << 4,
        packed[j + 4] >> 4 | (packed[j] >> 6) << 4,
    )


def q4_k(block, w):
    group, byte = divmod(w, 32)
    q = block[16 + 32 * (group // 2) + byte] >> (4 * (group % 2)) & 15
    scale, minimum = scale_and_minimum(block[4:16], group)
    return f32(f32(f32(f16(block, 0) * scale) * q) - f32(f16(block, 2) * minimum))


def q5_k(block, w):
    group, byte = divmod(w, 32)
    q = block[48 + 32 * (group // 2) + byte] >> (4 * (group % 2)) & 15
    q += 16 * (block[16 + byte] >> group & 1)
    scale, minimum = scale_and_minimum(block[4:16], group)
    return f32(f32(f32(f16(block, 0) * scale) * q) - f32(f16(block, 2) * minimum))


def q6_k(block, w):
    half, within = divmod(w, 128)
    quarter, byte = divmod(within, 32)
    q = block[64 * half + 32 * (quarter % 2) + byte] >> (4 * (quarter // 2)) & 15
    q += 16 * (block[128 + 32 * half + byte] >> (2 * quarter) & 3)
    scale = struct.unpack_from("b", block, 192 + w // 16)[0]
    return f32(f32(f16(block, 208) * scale) * (q - 32))


def iq4_nl(block, w):
    return f32(f16(block, 0) * IQ4_LEVELS[nibble(block, 2, w)])


def iq4_xs(block, w):
    group, within = divmod(w, 32)
    low = block[4 + group // 2] >> (4 * (group % 2)) & 15
    high = int.from_bytes(block[2:4], "little") >> (2 * group) & 3
    scale = f32(f16(block, 0) * (low + 16 * high - 32))
    return f32(scale * IQ4_LEVELS[nibble(block, 8 + 16 * group, within)])


def mxfp4(block, w):
    """OCP's arithmetic: an E2M1 number times a power of two; a zero has no sign."""
    code = nibble(block, 1, w)
    exponent, fraction = code >> 1 & 3, code & 1
    element = (1 + fraction / 2) * 2 ** (exponent - 1) if exponent else fraction / 2
    sign = -1 if code & 8 and element else 1
    return f32(sign * element * 2.0 ** (block[0] - 127))


LOOPS = {
    loop.__name__: loop
    for loop in (q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, iq4_xs, mxfp4)
} | {name: partial(weight_at, name) for name in BLOCKS}


def test_every_block_format_has_a_loop():
    """Only the formats without blocks are missing here."""
    assert set(ENCODINGS) - set(LOOPS) == {"f32", "f16", "bf16"}


@pytest.mark.parametrize("name", LOOPS)
def test_each_weight_is_what_the_format_says(name):
    """Weight by weight, random blocks decode to the bits of the loop; a NaN to a NaN."""
    stored = ENCODINGS[name]
    blocks = np.random.default_rng(1).integers(0, 256, (24, stored.block_bytes), dtype=np.uint8)
    expected = [LOOPS[name](block.tobytes(), w) for block in blocks for w in range(stored.block_size)]
    for actual, wanted in zip(decode(name, blocks).ravel().tolist(), expected, strict=True):
        if math.isnan(wanted):
            assert math.isnan(actual)
        else:
            assert struct.pack("<f", actual) == struct.pack("<f", wanted)


def bits(values, dtype):
    return np.array(values, dtype).view(np.uint8)


def test_f32_keeps_its_bits():
    """Every float32 is itself: zeros of both signs, subnormals, infinities and NaN payloads."""
    patterns = [0, 1 << 31, 1, 0x3F800000, 0x7F800000, 0xFF800000, 0x7FC01234, 0x7F800001]
    assert decode("f32", bits(patterns, "<u4")).view(np.uint32).tolist() == patterns


def test_f16_is_exact_for_every_number():
    """All 65,536 bit patterns widen to the value IEEE 754 gives them."""
    patterns = np.arange(65536, dtype="<u2")
    for pattern, weight in zip(
        patterns.tolist(), decode("f16", patterns.view(np.uint8)).tolist(), strict=True
    ):
        sign, exponent, fraction = -1 if pattern >> 15 else 1, pattern >> 10 & 31, pattern & 1023
        if exponent == 31:
            assert math.isnan(weight) if fraction else weight == sign * math.inf
        else:
            value = math.ldexp(fraction + (1024 if exponent else 0), max(exponent, 1) - 25)
            assert weight == value * sign
            assert math.copysign(1, weight) == sign


def test_bf16_is_the_upper_half_of_a_float32():
    """All 65,536 bit patterns, NaNs included, keep their bits and gain sixteen zeros."""
    patterns = np.arange(65536, dtype="<u2")
    assert decode("bf16", patterns.view(np.uint8)).view(np.uint32).tolist() == [p << 16 for p in range(65536)]


def test_mxfp4_scales_reach_the_subnormals_exactly():
    """The smallest exponent byte, 0, is 2 ** -127: half of it is still a float32."""
    block = np.array([[0, *[0x21] * 16]], np.uint8)
    assert decode("mxfp4", block).tolist() == [[2.0**-128] * 16 + [2.0**-127] * 16]


def test_mxfp4_reads_the_exponent_byte_255_as_ggml_does():
    """OCP calls the byte 255 NaN; ggml and refengine read 2 ** 128, so a half is finite and a one is not."""
    block = np.array([[255, *[0x21] * 16]], np.uint8)
    assert decode("mxfp4", block).tolist() == [[2.0**127] * 16 + [math.inf] * 16]
