"""Faults of decoding: a block's bytes are changed before the golden decoder reads them, or weights after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from refengine.backend.numpy_backend import NumpyBackend
from refengine.backend.weights import WeightPlan
from refengine.backend.weights import Weights as HeldWeights
from refengine.program import Policy
from refengine.quantizer import ENCODINGS, LazyTensor, decode
from refengine_conformance.faults.fault import Fault
from refengine_conformance.subject import Subject

Blocks = NDArray[np.uint8]
Weights = NDArray[np.float32]
Misreading = Callable[[Blocks], Weights]
"""Wrong weights ``[n, block_size]`` of blocks ``[n, block_bytes]``, which are its own to change."""


def _misread(encoding: str, wrong: Misreading) -> Callable[..., Weights]:
    """A decoder that is wrong in one encoding."""

    def suspect(name: str, data: Blocks) -> Weights:
        if name != encoding or data.size == 0 or data.shape[-1] % ENCODINGS[name].block_bytes:
            return decode(name, data)
        right = decode(name, data)
        return wrong(data.reshape(-1, ENCODINGS[name].block_bytes).copy()).reshape(right.shape)

    return suspect


def _decoder(encoding: str, wrong: Misreading) -> Callable[[], Subject]:
    return partial(Subject, NumpyBackend, decode=_misread(encoding, wrong))


def _backend(encoding: str, wrong: Misreading) -> Callable[[], Subject]:
    """A subject whose backend decodes one encoding wrongly when it takes the weights."""
    suspect = _misread(encoding, wrong)

    class Suspect(NumpyBackend):
        name = "suspect"

        def upload(
            self, weights: Mapping[str, LazyTensor], policy: Policy, plan: WeightPlan | None = None
        ) -> HeldWeights:
            decoded = {
                role: LazyTensor(
                    t.name, t.shape, "f32", suspect(t.encoding, t.data).astype("<f4").view(np.uint8)
                )
                for role, t in weights.items()
            }
            return super().upload(decoded, policy, plan)

    return partial(Subject, Suspect)


def _memory_order(name: str, data: Blocks) -> Weights:
    in_memory = np.ravel(data, order="K").reshape(data.shape)
    return decode(name, in_memory)


def _bfloat16_shifted(blocks: Blocks) -> Weights:
    return (blocks.view("<u2").astype(np.uint32) << 15).view(np.float32)


def _f16_subnormals_flushed(blocks: Blocks) -> Weights:
    weights = decode("f16", blocks)
    return np.where(np.abs(weights) < 2**-14, 0 * weights, weights)


def _q4_0_swapped_halves(blocks: Blocks) -> Weights:
    blocks[:, 2:] = blocks[:, 2:] >> 4 | blocks[:, 2:] << 4
    return decode("q4_0", blocks)


def _q4_0_interleaved(blocks: Blocks) -> Weights:
    weights = decode("q4_0", blocks)
    return weights.reshape(-1, 2, 16).swapaxes(1, 2).reshape(-1, 32)


def _q4_0_around_seven(blocks: Blocks) -> Weights:
    return decode("q4_0", blocks) + blocks[:, :2].view("<f2").astype(np.float32)


def _q4_1_minimum_first(blocks: Blocks) -> Weights:
    blocks[:, :4] = blocks[:, [2, 3, 0, 1]]
    return decode("q4_1", blocks)


def _q4_1_rounded_to_half(blocks: Blocks) -> Weights:
    return decode("q4_1", blocks).astype(np.float16).astype(np.float32)


def _q5_0_big_endian_bits(blocks: Blocks) -> Weights:
    blocks[:, 2:6] = blocks[:, 5:1:-1]
    return decode("q5_0", blocks)


def _q5_1_bits_interleaved(blocks: Blocks) -> Weights:
    bits = np.unpackbits(blocks[:, 4:8], axis=1, bitorder="little")
    pairs = bits.reshape(-1, 16, 2).swapaxes(1, 2).reshape(-1, 32)
    blocks[:, 4:8] = np.packbits(pairs, axis=1, bitorder="little")
    return decode("q5_1", blocks)


def _q8_0_bfloat16_scale(blocks: Blocks) -> Weights:
    quants = blocks[:, 2:].view(np.int8).astype(np.float32)
    return quants * _bfloat16(blocks[:, :2])


def _bfloat16(field: Blocks) -> Weights:
    return (np.ascontiguousarray(field).view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q8_0_neighbours_scale(blocks: Blocks) -> Weights:
    blocks[1:, :2] = blocks[:-1, :2].copy()
    return decode("q8_0", blocks)


def _q2_k_scale_for_minimum(blocks: Blocks) -> Weights:
    blocks[:, :16] = blocks[:, :16] >> 4 | blocks[:, :16] << 4
    return decode("q2_k", blocks)


def _q3_k_third_bit_inverted(blocks: Blocks) -> Weights:
    blocks[:, :32] ^= 0xFF
    return decode("q3_k", blocks)


def _q4_k_no_minimum(blocks: Blocks) -> Weights:
    blocks[:, 2:4] = 0
    return decode("q4_k", blocks)


def _q4_k_short_scales(blocks: Blocks) -> Weights:
    blocks[:, 4:12] &= 0x3F
    return decode("q4_k", blocks)


def _q5_k_bits_by_run(blocks: Blocks) -> Weights:
    bits = np.unpackbits(blocks[:, 16:48], axis=1, bitorder="little").reshape(-1, 32, 8)
    by_run = np.packbits(bits.reshape(-1, 256), axis=1, bitorder="little")
    moved = np.unpackbits(by_run, axis=1, bitorder="little").reshape(-1, 8, 32).swapaxes(1, 2)
    blocks[:, 16:48] = np.packbits(moved.reshape(-1, 256), axis=1, bitorder="little")
    return decode("q5_k", blocks)


def _q6_k_unsigned_scales(blocks: Blocks) -> Weights:
    unsigned = blocks[:, 192:208].astype(np.float32)
    blocks[:, 192:208] = 1
    weights = decode("q6_k", blocks).reshape(-1, 16, 16) * unsigned[..., None]
    return weights.reshape(-1, 256)


def _q6_k_next_groups_scale(blocks: Blocks) -> Weights:
    blocks[:, 192:208] = np.roll(blocks[:, 192:208], 1, axis=1)
    return decode("q6_k", blocks)


def _iq4_nl_reversed(blocks: Blocks) -> Weights:
    blocks[:, 2:] ^= 0xFF
    return decode("iq4_nl", blocks)


def _iq4_xs_without_zero_point(blocks: Blocks) -> Weights:
    blocks[:, 2:4] ^= 0xAA  # the highest bit of every scale: s - 32 becomes s, or s - 64
    return decode("iq4_xs", blocks)


def _mxfp4_exponent_off(blocks: Blocks) -> Weights:
    return decode("mxfp4", blocks) * np.float32(2)


def _int4_interleaved(blocks: Blocks) -> Weights:
    weights = decode("int4_g64", blocks)
    return weights.reshape(-1, 2, 2, 16).swapaxes(2, 3).reshape(-1, 64)


def _int4_halves_of_the_block(blocks: Blocks) -> Weights:
    weights = decode("int4_g128", blocks)
    return weights.reshape(-1, 4, 2, 16).swapaxes(1, 2).reshape(-1, 128)


def _int4_zero_points_of_four_bits(blocks: Blocks) -> Weights:
    blocks[:, 2] &= 15
    return decode("int4_g32", blocks)


def _int4_folded_zero_points(blocks: Blocks) -> Weights:
    scales, zeros = blocks[:, :2].view("<f2"), blocks[:, 2:3].astype(np.float16)
    with np.errstate(all="ignore"):
        offsets = scales * zeros
        blocks[:, 2] = 0
        return decode("int4_g128", blocks) - offsets.astype(np.float32)


def _int8_signed(blocks: Blocks) -> Weights:
    quants = blocks[:, 3:].view(np.int8).astype(np.float32)
    with np.errstate(all="ignore"):
        return (quants - blocks[:, 2:3]) * _scales(blocks)


def _int8_difference_wraps(blocks: Blocks) -> Weights:
    differences = (blocks[:, 3:] - blocks[:, 2:3]).view(np.int8)
    with np.errstate(all="ignore"):
        return differences.astype(np.float32) * _scales(blocks)


def _scales(blocks: Blocks) -> Weights:
    scales: Weights = blocks[:, :2].view("<f2").astype(np.float32)
    return scales


FAULTS: tuple[Fault, ...] = (
    Fault(
        "rows are taken as they lie in memory",
        "ENC-1",
        "A decoder that gets a view with its axes exchanged, and takes its address.",
        partial(Subject, NumpyBackend, decode=_memory_order),
    ),
    Fault(
        "BF16 shifted by 15",
        "ENC-2",
        "The sign bit counted twice.",
        _decoder("bf16", _bfloat16_shifted),
    ),
    Fault(
        "F16 subnormals are flushed",
        "ENC-2",
        "A bit trick for widening float16 that forgets the exponent zero.",
        _decoder("f16", _f16_subnormals_flushed),
    ),
    Fault("Q4_0 halves swapped", "ENC-3", "High half first.", _decoder("q4_0", _q4_0_swapped_halves)),
    Fault(
        "Q4_0 weights interleaved",
        "ENC-3",
        "Two neighbours per byte, as most other formats have them.",
        _decoder("q4_0", _q4_0_interleaved),
    ),
    Fault(
        "Q4_0 around seven",
        "ENC-3",
        "Half of the largest integer, 15, rounded down.",
        _decoder("q4_0", _q4_0_around_seven),
    ),
    Fault(
        "Q4_1 offset before scale",
        "ENC-4",
        "Two float16 fields in the other order.",
        _decoder("q4_1", _q4_1_minimum_first),
    ),
    Fault(
        "Q4_1 computed in float16",
        "ENC-4",
        "Scales are float16, so the sum is taken in float16 too.",
        _decoder("q4_1", _q4_1_rounded_to_half),
    ),
    Fault(
        "Q5_0 fifth bits read big-endian",
        "ENC-5",
        "Four bytes copied into an integer on another kind of machine.",
        _decoder("q5_0", _q5_0_big_endian_bits),
    ),
    Fault(
        "Q5_1 fifth bits in pairs",
        "ENC-5",
        "Bits 2 j and 2 j + 1 taken for byte j, as its halves are.",
        _decoder("q5_1", _q5_1_bits_interleaved),
    ),
    Fault(
        "Q8_0 scale read as bfloat16",
        "ENC-6",
        "Two sixteen-bit types, one name: half.",
        _decoder("q8_0", _q8_0_bfloat16_scale),
    ),
    Fault(
        "Q8_0 scale of the block before",
        "ENC-6",
        "A pointer advanced after its use instead of before it.",
        _decoder("q8_0", _q8_0_neighbours_scale),
    ),
    Fault(
        "Q2_K scale and minimum exchanged",
        "ENC-7",
        "Which half is which.",
        _decoder("q2_k", _q2_k_scale_for_minimum),
    ),
    Fault(
        "Q3_K third bit inverted",
        "ENC-8",
        "ggml subtracts four where the bit is clear; it reads as if it did where it is set.",
        _decoder("q3_k", _q3_k_third_bit_inverted),
    ),
    Fault("Q4_K without minima", "ENC-9", "Q4_K taken for symmetric.", _decoder("q4_k", _q4_k_no_minimum)),
    Fault(
        "Q4_K scales of four bits",
        "ENC-9",
        "The high bits of the last four groups, which lie in other groups' bytes, are lost.",
        _decoder("q4_k", _q4_k_short_scales),
    ),
    Fault(
        "Q5_K fifth bits in a row",
        "ENC-10",
        "Bit i of 256 for weight i, as Q5_0 has it.",
        _decoder("q5_k", _q5_k_bits_by_run),
    ),
    Fault(
        "Q6_K scales unsigned",
        "ENC-11",
        "uint8 in place of int8.",
        _decoder("q6_k", _q6_k_unsigned_scales),
    ),
    Fault(
        "Q6_K scale of the next group",
        "ENC-11",
        "An index that counts groups from one.",
        _decoder("q6_k", _q6_k_next_groups_scale),
    ),
    Fault(
        "IQ4_NL levels reversed",
        "ENC-12",
        "The table copied in descending order.",
        _decoder("iq4_nl", _iq4_nl_reversed),
    ),
    Fault(
        "IQ4_XS zero point lost",
        "ENC-12",
        "A six-bit scale read as two's complement.",
        _decoder("iq4_xs", _iq4_xs_without_zero_point),
    ),
    Fault(
        "MXFP4 exponent off by one",
        "ENC-13",
        "OCP's bias with ggml's doubled levels.",
        _decoder("mxfp4", _mxfp4_exponent_off),
    ),
    Fault(
        "INT4 weights interleaved",
        "ENC-15",
        "Two neighbours per byte, as the words of GPTQ have them.",
        _decoder("int4_g64", _int4_interleaved),
    ),
    Fault(
        "INT4 halves of a whole block",
        "ENC-15",
        "Low halves for the first 64 of 128 weights, not for 16 of each 32.",
        _decoder("int4_g128", _int4_halves_of_the_block),
    ),
    Fault(
        "INT4 zero points of four bits",
        "ENC-15",
        "No GPTQ checkpoint has a zero point beyond 15, and no test had one.",
        _decoder("int4_g32", _int4_zero_points_of_four_bits),
    ),
    Fault(
        "INT4 zero points folded into float16 offsets",
        "ENC-15",
        "weight = d * q - (d * z), the bracket computed beforehand and stored like d.",
        _decoder("int4_g128", _int4_folded_zero_points),
    ),
    Fault(
        "INT8 read as two's complement",
        "ENC-15",
        "A decoder of Q8_0, and the zero point subtracted.",
        _decoder("int8_g64", _int8_signed),
    ),
    Fault(
        "INT8 difference in eight bits",
        "ENC-15",
        "The integers of a dot product have eight bits, so q - z was given eight.",
        _decoder("int8_g32", _int8_difference_wraps),
    ),
    Fault(
        "a backend repacks Q4_K without minima",
        "ENC-14",
        "A kernel written for the symmetric encodings and reused.",
        _backend("q4_k", _q4_k_no_minimum),
    ),
    Fault(
        "a backend swaps the halves of Q4_0",
        "ENC-14",
        "Repacking for a vector unit, whose lanes come out in another order.",
        _backend("q4_0", _q4_0_swapped_halves),
    ),
    Fault(
        "a backend computes Q4_1 in float16",
        "ENC-14",
        "Weights decoded to the dtype of their scales.",
        _backend("q4_1", _q4_1_rounded_to_half),
    ),
)
