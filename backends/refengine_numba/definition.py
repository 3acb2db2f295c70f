"""The products of :mod:`product` under ``mixed8`` in NumPy: what the kernels must give, bit for bit.

Nothing here knows how tiles lie. Integers and scales are read off the golden decoder: with scales of one
and no offsets it gives the integers, less their zero; with integers of zero the offsets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from refengine.quantizer import decode, encoding
from refengine_numba.activations import codes_of
from refengine_numba.layout import GROUP

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Fields:
    """What a matrix of block-encoded weights is made of, for G groups of 32 columns.

    Attributes:
        integers: int64 [N, G, 32], each less the encoding's zero; in ``q6_k`` times its 16's integer scale.
        scales: float32 [N, G].
        offsets: float32 [N, G], or ``None`` where the encoding has none.
    """

    integers: NDArray[np.int64]
    scales: Floats
    offsets: Floats | None


def fields_of(name: str, data: NDArray[np.uint8]) -> Fields:
    """Integers, scales and offsets of stored rows, uint8 [N, row_bytes]."""
    stored = encoding(name)
    blocks = data.reshape(len(data), -1, stored.block_bytes)
    per_block = stored.block_size // GROUP
    one, zero = np.array([1, 0], "<f2").view(np.uint8).reshape(2, 2)

    def decoded(edited: NDArray[np.uint8]) -> Floats:
        return decode(name, edited.reshape(len(data), -1)).reshape(len(data), -1, GROUP)

    def half(at: int) -> Floats:
        field = np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0].astype(np.float32)
        return field.repeat(per_block, axis=1)

    unit = blocks.copy()
    offsets = None
    if name in ("q4_0", "q5_0", "q8_0"):
        unit[..., 0:2] = one
        scales = half(0)
    elif name in ("q4_1", "q5_1"):
        unit[..., 0:2], unit[..., 2:4] = one, zero
        scales, offsets = half(0), half(2)
    elif name in ("q4_k", "q5_k"):
        low, ones = blocks.copy(), blocks.copy()
        low[..., 16:] = 0
        offsets = decoded(low)[..., 0]
        ones[..., 16:], ones[..., 2:4] = 0, zero
        ones[..., -128:] = 0x11  # every integer is one
        scales = decoded(ones)[..., 0]
        unit[..., 0:2], unit[..., 2:4] = one, zero
        unit[..., 4:16] = np.repeat(np.array([1, 0, 1], np.uint8), 4)  # all scales one, all minima zero
    else:
        unit[..., 208:210] = one
        scales = half(208)
    return Fields(decoded(unit).astype(np.int64), scales, offsets)


def mixed8_product(name: str, data: NDArray[np.uint8], x: Floats, bias: Floats | None = None) -> Floats:
    """y [T, N] of stored rows [N, row_bytes] and float32 activations [T, K]."""
    fields = fields_of(name, data)
    codes, scales = codes_of(x)
    sums = np.einsum("ngk,tgk->tgn", fields.integers, codes.astype(np.int64)).astype(np.float32)
    y = np.zeros((len(x), len(data)), np.float32)
    with np.errstate(all="ignore"):
        code_sums = scales * codes.sum(axis=2, dtype=np.int64).astype(np.float32)
        for group in range(codes.shape[1]):
            product = fields.scales[:, group] * scales[:, group, None] * sums[:, group]
            if fields.offsets is not None:
                product = product + fields.offsets[:, group] * code_sums[:, group, None]
            y = y + product
        return y if bias is None else y + bias
