"""Random weights, made in their stored form at the speed of memory.

To draw and quantize billions of numbers would take hours. So two small pools of blocks are drawn, and a
tensor is made of them: its block i is ``base[i mod n] XOR noise[i mod (n - 1)]``, counted from a place of
its own.
``base`` has everything that a block has, ``noise`` has zeros for scales and random bits for the quantized
integers, so that their XOR is as evenly distributed as either. As n and n - 1 have no common divisor, a pair
comes again only after n (n - 1) blocks, which is billions of weights: no two rows of a tensor are equal, and
the quantized integers of any two are independent. About 1 MiB of ``base`` is enough for that; rows at a
distance of n blocks share their scales and nothing else.

Weights are even within what a block's scale reaches, have mean 0, and the standard deviation that is asked
for. No sampling function of NumPy is used, only PCG64's raw output and exact arithmetic, so that a seed gives
the same bytes with every version and on every machine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from refengine.quantizer import ENCODINGS, iq4, mxfp4

POOL_BYTES = 2**20

SCALES = tuple((8.5 + i) / 16 for i in range(16))
"""What a block's scale is multiplied with, each as often as the other: 0.53 to 1.47."""

Blocks = NDArray[np.uint8]


@dataclass(frozen=True)
class Form:
    """How an encoding's blocks are filled.

    Attributes:
        quants: where the bytes of the quantized integers are, free to take any value.
        levels: what the integers stand for, in units of the scale.
        scale: where the float16 scale d is.
        groups: the values that a group's own integer scale takes, evenly.
        minimum: where the float16 m is that centres the levels, and m / d; or ``None``.
        tidy: makes a random block one with the values above.
    """

    quants: slice
    levels: Sequence[float]
    scale: int
    groups: Sequence[int] = (1,)
    minimum: tuple[int, float] | None = None
    tidy: Callable[[Blocks], None] = lambda blocks: None

    @property
    def deviation(self) -> float:
        """The standard deviation of weights where d = 1 for every block."""
        return math.sqrt(_mean_square(self.levels) * _mean_square(self.groups))


def _mean_square(values: Sequence[float]) -> float:
    return sum(value**2 for value in values) / len(values)


def _around_zero(count: int) -> tuple[float, ...]:
    return tuple(i - (count - 1) / 2 for i in range(count))


def _seven_bits(blocks: Blocks) -> None:
    """Quants within -64 .. 63: no XOR of them is -128, which a quantizer never writes."""
    quants = blocks[:, 2:34]
    quants[...] = (quants & 0x7F) | (quants << 1 & 0x80)


def _equal_halves(blocks: Blocks) -> None:
    """Each group's minimum is its scale."""
    low = blocks[:, 0:16] & 15
    blocks[:, 0:16] = low | low << 4


def _equal_pairs(blocks: Blocks) -> None:
    """Each group's minimum is its scale; for where they lie, see ``k_quants``."""
    blocks[:, 8:12] = blocks[:, 4:8]
    low = blocks[:, 12:16] & 15
    blocks[:, 12:16] = low | low << 4


FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "q4_0": Form(slice(2, 18), range(-8, 8), scale=0),
        "q4_1": Form(slice(4, 20), _around_zero(16), scale=0, minimum=(2, -7.5)),
        "q5_0": Form(slice(2, 22), range(-16, 16), scale=0),
        "q5_1": Form(slice(4, 24), _around_zero(32), scale=0, minimum=(2, -15.5)),
        "q8_0": Form(slice(2, 34), range(-64, 64), scale=0, tidy=_seven_bits),
        "q2_k": Form(
            slice(16, 80), _around_zero(4), scale=80, groups=range(16), minimum=(82, 1.5), tidy=_equal_halves
        ),
        "q3_k": Form(slice(0, 96), range(-4, 4), scale=108, groups=range(-32, 32)),
        "q4_k": Form(
            slice(16, 144), _around_zero(16), scale=0, groups=range(64), minimum=(2, 7.5), tidy=_equal_pairs
        ),
        "q5_k": Form(
            slice(16, 176), _around_zero(32), scale=0, groups=range(64), minimum=(2, 15.5), tidy=_equal_pairs
        ),
        "q6_k": Form(slice(0, 192), range(-32, 32), scale=208, groups=range(-128, 128)),
        "iq4_nl": Form(slice(2, 18), iq4.LEVELS, scale=0),
        "iq4_xs": Form(slice(8, 136), iq4.LEVELS, scale=0, groups=range(-32, 32)),
    }
)
"""Of every block encoding with a float16 scale."""

FLOATS: Mapping[str, tuple[str, int]] = MappingProxyType(
    {"f32": ("<u4", 0x8000_0FFF), "f16": ("<u2", 0x800F), "bf16": ("<u2", 0x8001)}
)
"""Encodings without blocks: an unsigned integer of their size, and its bits that noise flips: the sign, and
fraction bits so low that the deviation stays."""


class RandomWeights:
    """An endless source of weights in one encoding.

    Args:
        encoding: a name in ``FORMS`` or ``FLOATS``, or ``mxfp4``.
        deviation: the weights' standard deviation.
        seed: the same seed gives the same weights.
    """

    def __init__(self, encoding: str, deviation: float, seed: int) -> None:
        self._block_bytes = ENCODINGS[encoding].block_bytes
        self._count = POOL_BYTES // self._block_bytes
        base_bits = RawBits("base", encoding, deviation, seed)
        noise_bits = RawBits("noise", encoding, deviation, seed)
        if encoding in FLOATS:
            base, noise = _float_pools(encoding, deviation, self._count, base_bits, noise_bits)
        elif encoding == "mxfp4":
            base, noise = _mxfp4_pools(deviation, self._count, base_bits, noise_bits)
        else:
            base, noise = _pools(encoding, deviation, self._count, base_bits, noise_bits)
        self._base, self._noise = base.reshape(-1), noise.reshape(-1)[: -self._block_bytes]

    def chunks(self, n_bytes: int, start: int) -> Iterator[NDArray[np.uint8]]:
        """``n_bytes`` of blocks from block ``start`` on, in pieces of at most a pool."""
        here = start * self._block_bytes
        end = here + n_bytes
        while here < end:
            in_base, in_noise = here % len(self._base), here % len(self._noise)
            size = min(len(self._base) - in_base, len(self._noise) - in_noise, end - here)
            yield self._base[in_base : in_base + size] ^ self._noise[in_noise : in_noise + size]
            here += size

    def place(self, name: str, seed: int) -> int:
        """The block at which the tensor of this name begins."""
        return RawBits("place", name, seed).below(self._count * (self._count - 1))


class RawBits:
    """PCG64's raw output, seeded with anything that has a text."""

    def __init__(self, *what: object) -> None:
        digest = hashlib.sha256("\0".join(map(str, what)).encode()).digest()
        self._source = np.random.PCG64(int.from_bytes(digest, "little"))

    def take(self, *shape: int, dtype: str = "u1") -> NDArray[np.unsignedinteger]:
        """Random unsigned integers, shape [*shape]; little-endian, so that machines agree."""
        count = math.prod(shape)
        n_bytes = count * np.dtype(dtype).itemsize
        words = self._source.random_raw(-(-n_bytes // 8)).astype("<u8")
        return words.view(np.uint8)[:n_bytes].view(dtype).reshape(shape)

    def below(self, limit: int) -> int:
        """A random integer from 0 to ``limit - 1``; ``limit`` is far below 2 ** 64."""
        return int(self._source.random_raw()) % limit


def _pools(
    encoding: str, deviation: float, count: int, base_bits: RawBits, noise_bits: RawBits
) -> tuple[Blocks, Blocks]:
    form, block_bytes = FORMS[encoding], ENCODINGS[encoding].block_bytes
    base = base_bits.take(count, block_bytes).astype(np.uint8)
    noise = noise_bits.take(count, block_bytes).astype(np.uint8)
    form.tidy(base)
    form.tidy(noise)
    kept = np.zeros(block_bytes, np.uint8)
    kept[form.quants] = 0xFF
    noise &= kept

    unit = deviation / (form.deviation * math.sqrt(_mean_square(SCALES)))
    chosen = base_bits.take(count)
    scales = np.array(SCALES)[chosen & 15] * unit
    if form.minimum is None:  # levels that reach further down than up do so in half of the blocks only
        scales = np.where(chosen & 16, -scales, scales)
    d = scales.astype("<f2")
    base[:, form.scale : form.scale + 2] = d[:, None].view(np.uint8)
    if form.minimum is not None:
        at, ratio = form.minimum
        base[:, at : at + 2] = (d.astype(np.float64) * ratio).astype("<f2")[:, None].view(np.uint8)
    return base, noise


def _mxfp4_pools(
    deviation: float, count: int, base_bits: RawBits, noise_bits: RawBits
) -> tuple[Blocks, Blocks]:
    """Scales are powers of two: two neighbours, in the proportion whose mean square is the one wanted."""
    square = deviation**2 / _mean_square(mxfp4.LEVELS)
    exponent = math.floor(math.log2(square) / 2)
    share = (square / 4.0**exponent - 1) / 3  # of blocks with the larger one
    base = base_bits.take(count, 17).astype(np.uint8)
    noise = noise_bits.take(count, 17).astype(np.uint8)
    larger = base_bits.take(count, dtype="<u4") < share * 2**32
    base[:, 0] = 128 + exponent + larger
    noise[:, 0] = 0
    return base, noise


def _float_pools(
    encoding: str, deviation: float, count: int, base_bits: RawBits, noise_bits: RawBits
) -> tuple[Blocks, Blocks]:
    """Even between plus and minus the square root of 3 deviations."""
    dtype, flipped = FLOATS[encoding]
    even = (base_bits.take(count, dtype="<u4") + 0.5) / 2**31 - 1
    values = even * (deviation * math.sqrt(3))
    if encoding == "f16":
        stored = values.astype("<f2").view(dtype)
    else:
        stored = values.astype("<f4").view("<u4")
        if encoding == "bf16":
            stored = ((stored + 0x8000) >> 16).astype(dtype)  # rounded
    noise = noise_bits.take(count, dtype=dtype) & np.array(flipped, dtype)
    return stored.view(np.uint8), noise.view(np.uint8)
