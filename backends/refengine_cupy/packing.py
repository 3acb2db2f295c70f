"""How weight matrices lie for the kernels: planes of tiles of sixteen rows.

A matrix [N, K] stored in blocks is cut into tiles of 16 rows and groups of 32 columns; N is rounded up to
whole tiles, with rows of zeros. The place of a row's group is *item* ``(tile · groups + group) · 16 + row``:
rows that stand beside each other are read by threads that do. Integers, their high bits and scales lie apart,
each item's bytes in a plane of their own:

- ``codes``: 16 bytes; byte ``j`` of word ``i`` has weight ``4i + j`` in its low half, ``16 + 4i + j`` in its
  high half. In ``q8_0`` two such planes interleaved tile by tile: a group's first 16 weights of 16 rows, then
  its second.
- ``high``: of five-bit integers 4 bytes, bit ``8j + i`` being the fifth bit of weight ``4i + j``; of six-bit
  integers two words, bits ``8j + 2i`` and ``8j + 2i + 1`` of word ``h`` being the upper bits of weight ``16h
  + 4i + j``.
- ``scales``: d, or d and m, float16; of K-quants the two small integers of the group; of int4 and int8, whose
  own groups have one, two or four of these, for each of them d of 16 rows, float16, then z of 16 rows, uint8.
- ``blocks``: of K-quants what eight groups share: d, or d and dmin, float16.

The integers are those of :mod:`refengine.quantizer`, with the encoding's zero added where they would be
negative; of int4 and int8, q as it is stored, less 128 where it has eight bits. So nothing is lost. Other
encodings keep their rows as stored, or have them decoded to float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from refengine.quantizer import GROUP, GROUPED, decode, encoding

TILE = 16
"""Rows of a tile."""

PLAIN = ("f32", "f16", "bf16")
"""Encodings whose rows lie as they are stored."""

ALIGNMENT = 256
"""Planes begin at multiples of so many bytes."""

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Layout:
    """Bytes in each plane, and of how many groups.

    Attributes:
        bits: of an integer.
        zero: added to integers that may be negative.
        codes, high: per group.
        scales: per ``sharing`` groups.
        blocks: per eight groups.
        sharing: consecutive groups of a row that have the same scale.
    """

    bits: int
    zero: int
    codes: int
    high: int
    scales: int
    blocks: int = 0
    sharing: int = 1


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "q4_0": Layout(4, 8, 16, 0, 2),
        "q4_1": Layout(4, 0, 16, 0, 4),
        "q5_0": Layout(5, 16, 16, 4, 2),
        "q5_1": Layout(5, 0, 16, 4, 4),
        "q8_0": Layout(8, 0, 32, 0, 2),
        "q4_k": Layout(4, 0, 16, 0, 2, 4),
        "q5_k": Layout(5, 0, 16, 4, 2, 4),
        "q6_k": Layout(6, 32, 16, 8, 2, 2),
        "int4_g32": Layout(4, 0, 16, 0, 3),
        "int4_g64": Layout(4, 0, 16, 0, 3, sharing=2),
        "int4_g128": Layout(4, 0, 16, 0, 3, sharing=4),
        "int8_g32": Layout(8, 0, 32, 0, 3),
        "int8_g64": Layout(8, 0, 32, 0, 3, sharing=2),
        "int8_g128": Layout(8, 0, 32, 0, 3, sharing=4),
    }
)
"""Of the encodings that kernels read by groups."""


def held_as(name: str) -> str:
    """The encoding in which a matrix lies on the device: its own, or float32 for want of kernels."""
    return name if name in LAYOUTS or name in PLAIN else "f32"


def plane_bytes(name: str, rows: int, columns: int) -> dict[str, int]:
    """Bytes of the planes of a matrix stored as ``name``, in their order."""
    if name not in LAYOUTS:
        return {"codes": rows * columns * encoding(held_as(name)).block_bytes}
    layout, items = LAYOUTS[name], -(-rows // TILE) * TILE * (columns // GROUP)
    planes = {
        "codes": items * layout.codes,
        "high": items * layout.high,
        "scales": items // layout.sharing * layout.scales,
        "blocks": items // 8 * layout.blocks,
    }
    return {plane: nbytes for plane, nbytes in planes.items() if nbytes}


def packed_bytes(name: str, rows: int, columns: int) -> int:
    """Bytes of a matrix on the device, with what aligns its planes."""
    return sum(-(-nbytes // ALIGNMENT) * ALIGNMENT for nbytes in plane_bytes(name, rows, columns).values())


def pack(name: str, data: Bytes, columns: int) -> dict[str, Bytes]:
    """Planes of stored rows.

    Args:
        name: of the encoding.
        data: uint8 [N, row_bytes], N a multiple of 16 unless these are a matrix's last rows.
        columns: weights of a row.

    Returns:
        By plane, uint8 [tiles, bytes of a tile].
    """
    if name not in LAYOUTS:
        rows = data if name in PLAIN else decode(name, data).reshape(len(data), columns).view(np.uint8)
        return {"codes": rows}
    missing = -len(data) % TILE
    if missing:
        data = np.concatenate([data, np.zeros((missing, data.shape[1]), np.uint8)])
    layout, stored, groups = LAYOUTS[name], encoding(name), columns // GROUP
    blocks = data.reshape(len(data) // TILE, TILE, -1, stored.block_bytes)
    if name in ("q4_0", "q4_1"):  # their halves lie as they should
        planes = {"codes": blocks[..., layout.scales :], "scales": blocks[..., : layout.scales]}
    elif name.startswith(("int4", "int8")):
        planes = _around_zeros(layout, blocks)
    else:
        integers = GROUPED[name](np.ascontiguousarray(data).reshape(-1, stored.block_bytes)).integers
        shaped = integers.reshape(len(blocks), TILE, groups, GROUP)
        planes = _integers(layout, (shaped + np.int8(layout.zero)).view(np.uint8)) | _scales(name, blocks)
    return {
        plane: np.ascontiguousarray(_by_tile(values)).reshape(len(blocks), -1)
        for plane, values in planes.items()
    }


def _by_tile(values: Bytes) -> Bytes:
    """[tiles, 16, groups, …] -> [tiles, groups, …, 16, bytes]."""
    return np.moveaxis(values, 1, -2)


def _integers(layout: Layout, integers: Bytes) -> dict[str, Bytes]:
    """Planes of unsigned integers [tiles, 16, groups, 32]."""
    lead = integers.shape[:-1]
    if layout.bits == 8:
        return {"codes": integers.reshape(*lead, 2, GROUP // 2)}
    low = integers & np.uint8(15)
    codes: Bytes = low[..., :16] | low[..., 16:] << np.uint8(4)
    planes = {"codes": codes}
    if layout.bits == 5:
        bits = (integers >> 4).reshape(*lead, 8, 4) << np.arange(8, dtype=np.uint8)[:, None]
        planes["high"] = np.bitwise_or.reduce(bits, axis=-2)
    if layout.bits == 6:
        pairs = (integers >> 4).reshape(*lead, 2, 4, 4) << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
        planes["high"] = np.bitwise_or.reduce(pairs, axis=-2).reshape(*lead, 8)
    return planes


def _around_zeros(layout: Layout, blocks: Bytes) -> dict[str, Bytes]:
    """Planes of stored blocks of d, z and integers [tiles, 16, blocks, bytes]: scales lie as they should."""
    tiles, _, count, _ = blocks.shape
    scales, zeros, stored = blocks[..., 0:2], blocks[..., 2:3], blocks[..., 3:]
    together = [_by_tile(part).reshape(tiles, count, -1) for part in (scales, zeros)]
    planes = {"scales": np.concatenate(together, axis=-1)[:, None]}
    if layout.bits == 4:  # their halves lie as they should
        return planes | {"codes": stored.reshape(tiles, TILE, -1, GROUP // 2)}
    signed = stored ^ np.uint8(128)
    return planes | _integers(layout, signed.reshape(tiles, TILE, -1, GROUP))


def _scales(name: str, blocks: Bytes) -> dict[str, Bytes]:
    """Planes of scales of stored blocks [tiles, 16, blocks, bytes]."""
    match name:
        case "q5_0" | "q8_0":
            return {"scales": blocks[..., 0:2]}
        case "q5_1":
            return {"scales": blocks[..., 0:4]}
        case "q6_k":
            lead = blocks.shape[:2]
            return {"scales": blocks[..., 192:208].reshape(*lead, -1, 2), "blocks": blocks[..., 208:210]}
        case _:
            small = _six_bits(blocks[..., 4:16])
            return {"scales": small.reshape(*blocks.shape[:2], -1, 2), "blocks": blocks[..., 0:4]}


def _six_bits(packed: Bytes) -> Bytes:
    """Scales and minima of K-quants [..., 12] -> pairs [..., 8, 2]; see ``refengine.quantizer.k_quants``."""
    s, m, low = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate([s & 63, (low & 15) | (s >> 6 << 4)], axis=-1)
    minima = np.concatenate([m & 63, (low >> 4) | (m >> 6 << 4)], axis=-1)
    return np.stack([scales, minima], axis=-1)
