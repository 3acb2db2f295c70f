"""From stored rows to tiles, in compiled code; :mod:`layout` says what goes where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from refengine.quantizer import encoding as encoding_named
from refengine_numba.kernels.compilation import Compiled, entry, inlined, part
from refengine_numba.kernels.entry import SIGNATURE, bytes_at
from refengine_numba.kernels.share import share
from refengine_numba.layout import LAYOUTS, TILE_ROWS


@part
def pack_tiles(
    encoding: str, thread: int, threads: int, data: Any, stride: int, tiles: Any, count: int, blocks: int
) -> None:
    """Write a thread's share of ``count`` tiles.

    Args:
        encoding: literal.
        thread: from 0.
        threads: how many share the work.
        data: uint8, 16 · count rows as stored.
        stride: bytes from one row to the next.
        tiles: uint8.
        count: of tiles.
        blocks: of a row.
    """
    block_bytes = block_size(encoding)
    first, last = share(count, thread, threads)
    for tile in range(first, last):
        for block in range(blocks):
            cell = (tile * blocks + block) * TILE_ROWS * block_bytes
            for lane in range(TILE_ROWS):
                at = (tile * TILE_ROWS + lane) * stride + block * block_bytes
                pack_block(encoding, data, at, tiles, cell, lane)


def block_size(encoding: str) -> int:
    """Bytes of a stored block."""
    raise NotImplementedError


@inlined(block_size)
def _block_size(encoding: Any) -> Callable[..., Any]:
    nbytes = encoding_named(encoding.literal_value).block_bytes
    return lambda encoding: nbytes


def pack_block(encoding: str, data: Any, at: int, tiles: Any, cell: int, lane: int) -> None:
    """Write one row's block from ``at`` to its lane of a cell."""
    raise NotImplementedError


@inlined(pack_block)
def _pack_block(encoding: Any) -> Callable[..., Any]:
    layout = LAYOUTS[encoding.literal_value]
    scale_bytes, group_bytes, five = layout.scale_bytes, layout.group_bytes, layout.bits == 5
    integer_bytes = (layout.cell_bytes - scale_bytes) // TILE_ROWS

    def dense(encoding: str, data: Any, at: int, tiles: Any, cell: int, lane: int) -> None:
        width = group_bytes // TILE_ROWS
        for i in range(width):
            tiles[cell + width * lane + i] = data[at + i]

    def eight_bits(encoding: str, data: Any, at: int, tiles: Any, cell: int, lane: int) -> None:
        copy(data, at, tiles, cell + 2 * lane, 2)
        for i in range(32):
            tiles[lane_byte(cell + 32, i, lane)] = data[at + 2 + i] ^ 128

    def classic(encoding: str, data: Any, at: int, tiles: Any, cell: int, lane: int) -> None:
        halves = scale_bytes // 32
        for i in range(halves):
            copy(data, at + 2 * i, tiles, cell + 32 * i + 2 * lane, 2)
        at, to = at + 2 * halves, cell + scale_bytes
        if five:
            for j in range(4):
                fifth = 0
                for i in range(8):
                    fifth |= (data[at + i // 2] >> (4 * i % 8 + j) & 1) << i
                tiles[lane_byte(to + 256, j, lane)] = fifth
            at += 4
        for i in range(16):
            tiles[lane_byte(to, i, lane)] = data[at + i]

    def zero_points(encoding: str, data: Any, at: int, tiles: Any, cell: int, lane: int) -> None:
        copy(data, at, tiles, cell + 2 * lane, 2)
        tiles[cell + 32 + lane] = data[at + 2]
        for i in range(integer_bytes):
            tiles[lane_byte(cell + scale_bytes, i, lane)] = data[at + 3 + i]

    def six_bit_scales(encoding: str, data: Any, at: int, tiles: Any, cell: int, lane: int) -> None:
        copy(data, at, tiles, cell + 2 * lane, 2)
        copy(data, at + 2, tiles, cell + 32 + 2 * lane, 2)
        pack_six_bits(data, at + 4, tiles, cell + 64, lane)
        low = at + 48 if five else at + 16
        for group in range(8):
            to = cell + scale_bytes + group * group_bytes
            shift = 4 * (group % 2)
            for i in range(16):
                first = data[low + group // 2 * 32 + i] >> shift & 15
                second = data[low + group // 2 * 32 + 16 + i] >> shift & 15
                tiles[lane_byte(to, i, lane)] = first | second << 4
            if five:
                for j in range(4):
                    fifth = 0
                    for i in range(8):
                        fifth |= (data[at + 16 + 4 * i + j] >> group & 1) << i
                    tiles[lane_byte(to + 256, j, lane)] = fifth

    def eight_bit_scales(encoding: str, data: Any, at: int, tiles: Any, cell: int, lane: int) -> None:
        copy(data, at + 208, tiles, cell + 2 * lane, 2)
        for group in range(8):
            copy(data, at + 192 + 2 * group, tiles, cell + 32 + 32 * group + 2 * lane, 2)
            to = cell + scale_bytes + group * group_bytes
            low, shift = at + group // 4 * 64 + group % 2 * 32, group // 2 % 2 * 4
            for i in range(16):
                first, second = data[low + i] >> shift & 15, data[low + 16 + i] >> shift & 15
                tiles[lane_byte(to, i, lane)] = first | second << 4
            high, shift = at + 128 + group // 4 * 32, group % 4 * 2
            for h in range(2):
                for j in range(4):
                    pairs = 0
                    for i in range(4):
                        pairs |= (data[high + 16 * h + 4 * i + j] >> shift & 3) << 2 * i
                    tiles[lane_byte(to + 256, 4 * h + j, lane)] = pairs

    if layout.bits == 0:
        return dense
    if layout.scales == "half" and layout.bits == 8:
        return eight_bits
    return {
        "half": classic,
        "pair": classic,
        "zero_point": zero_points,
        "six_bit": six_bit_scales,
        "eight_bit": eight_bit_scales,
    }[layout.scales]


@part
def copy(data: Any, at: int, tiles: Any, to: int, count: int) -> None:
    """Some bytes."""
    for i in range(count):
        tiles[to + i] = data[at + i]


@part
def lane_byte(vectors: int, i: int, lane: int) -> int:
    """Where byte ``i`` of a lane's words is, in vectors that start at ``vectors``."""
    return vectors + i // 4 * 64 + 4 * lane + i % 4


@part
def pack_six_bits(data: Any, at: int, tiles: Any, to: int, lane: int) -> None:
    """Twelve bytes of scales and minima, s[0..7] and m[0..7] of six bits each, to three words."""
    for i in range(4):  # byte i of the first word holds low halves of s[2i] and s[2i + 1], of the second m's
        for minimum in range(2):
            both = 0
            for k in range(2):
                j = 2 * i + k
                byte = data[at + j + 4 * minimum] if j < 4 else data[at + j + 4] >> 4 * minimum
                both |= (byte & 15) << 4 * k
            tiles[lane_byte(to, 4 * minimum + i, lane)] = both
    for minimum in range(2):
        for half in range(2):  # their bits 4 and 5: those of s[j + 4] are bits 6 and 7 of s[j]'s byte
            high = 0
            for k in range(4):
                high |= (data[at + 4 * minimum + k] >> (4 + 2 * half) & 3) << 2 * k
            tiles[lane_byte(to, 8 + 2 * minimum + half, lane)] = high


def pack_entry(encoding: str) -> Compiled:
    """Stored rows to whole tiles.

    Arguments: rows, bytes from one to the next, tiles, number of tiles, bytes of a row.
    """
    block_bytes = encoding_named(encoding).block_bytes

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        rows = TILE_ROWS * a[3]
        pack_tiles(
            encoding,
            thread,
            threads,
            bytes_at(a[0], (rows - 1) * a[1] + a[4]),
            a[1],
            bytes_at(a[2], rows * a[4]),
            a[3],
            a[4] // block_bytes,
        )

    return run
