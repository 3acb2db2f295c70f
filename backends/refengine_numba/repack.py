"""Repacking: from stored rows to tiles and back, bit for bit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from refengine.errors import UnsupportedError
from refengine.quantizer import encoding
from refengine_numba.entries import entry
from refengine_numba.layout import GROUP, LAYOUTS, TILE_ROWS, Layout, tiles
from refengine_numba.team import Team

Bytes = NDArray[np.uint8]


def layout_of(name: str) -> Layout:
    """The layout of an encoding.

    Raises:
        UnsupportedError: the encoding has no kernels.
    """
    if name not in LAYOUTS:
        raise UnsupportedError(f"no kernel computes on {name} as stored; there are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def pack(name: str, data: Bytes, out: Bytes | None = None, team: Team | None = None) -> Bytes:
    """Tiles of a stored matrix: uint8 [N, row_bytes] -> uint8 [layout.nbytes(N, K)].

    Args:
        name: the encoding.
        data: rows as stored, C-contiguous or not.
        out: where to write, C-contiguous; new, and aligned to a cache line, if ``None``.
        team: the threads that do it; the caller's alone if ``None``.

    Raises:
        UnsupportedError: the encoding has no kernels.
        ValueError: ``data`` is not uint8 rows of whole blocks, or ``out`` has another size.
    """
    layout, stored = layout_of(name), encoding(name)
    if data.dtype != np.uint8 or data.ndim != 2:
        raise ValueError(f"{name}: data must be uint8 [rows, bytes], not {data.dtype} {list(data.shape)}")
    rows, columns = data.shape[0], stored.row_weights(data.shape[1])
    nbytes = layout.nbytes(rows, columns)
    if out is None:
        out = aligned(nbytes)
    elif out.dtype != np.uint8 or out.shape != (nbytes,) or not out.flags.c_contiguous:
        raise ValueError(
            f"{name}: out must be contiguous uint8 [{nbytes}], not {out.dtype} {list(out.shape)}"
        )
    if data.strides[1] != 1 or data.strides[0] < data.shape[1]:
        data = np.ascontiguousarray(data)
    whole = rows - rows % TILE_ROWS
    if whole:
        _pack_tiles(layout, data[:whole], out[: layout.nbytes(whole, columns)], team)
    if whole < rows:
        last = np.zeros((TILE_ROWS, data.shape[1]), np.uint8)
        last[: rows - whole] = data[whole:]
        _pack_tiles(layout, last, out[layout.nbytes(whole, columns) :], None)
    return out


def unpack(name: str, packed: Bytes, rows: int, columns: int) -> Bytes:
    """The inverse of :func:`pack`: uint8 [N, row_bytes], the stored bytes.

    Raises:
        UnsupportedError: the encoding has no kernels.
        ValueError: ``packed`` is not a matrix of this shape.
    """
    layout, stored = layout_of(name), encoding(name)
    if packed.shape != (layout.nbytes(rows, columns),):
        raise ValueError(f"{name}: {list(packed.shape)} bytes are no tiles of [{rows}, {columns}]")
    blocks = columns // layout.block_size
    cells = packed.reshape(tiles(rows), blocks, layout.cell_bytes)
    result = np.empty((len(cells), TILE_ROWS, blocks, stored.block_bytes), np.uint8)
    _unpack_cells(layout, cells, result.transpose(0, 2, 1, 3))
    return result.reshape(len(cells) * TILE_ROWS, -1)[:rows]


def aligned(nbytes: int) -> Bytes:
    """New bytes that start at a cache line."""
    buffer = np.empty(nbytes + 63, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + nbytes]


def _pack_tiles(layout: Layout, data: Bytes, out: Bytes, team: Team | None) -> None:
    """Whole tiles of rows that need not follow each other closely."""
    words = [data.ctypes.data, data.strides[0], out.ctypes.data, len(data) // TILE_ROWS, data.shape[1]]
    (team or Team(1)).run(entry("packing.pack", layout.encoding), np.array(words, np.int64))


# The way back, in NumPy: cells [tiles, blocks, cell_bytes] to blocks [tiles, blocks, 16 rows, block_bytes].
# ``lead`` below stands for [tiles, blocks], or [tiles, blocks, 8] where a block has eight groups of 32.


def _unpack_cells(layout: Layout, cells: Bytes, blocks: Bytes) -> None:
    lead = blocks.shape[:2]
    scales = cells[..., : layout.scale_bytes]
    match layout.scales:
        case "none":
            blocks[...] = cells.reshape(blocks.shape)
            return
        case "half":
            blocks[..., 0:2] = scales.reshape(*lead, TILE_ROWS, 2)
            fields = blocks[..., 2:]
        case "pair":
            blocks[..., 0:4] = (
                scales.reshape(*lead, 2, TILE_ROWS, 2).swapaxes(-3, -2).reshape(*lead, TILE_ROWS, 4)
            )
            fields = blocks[..., 4:]
        case "zero_point":
            blocks[..., 0:2] = scales[..., :32].reshape(*lead, TILE_ROWS, 2)
            blocks[..., 2] = scales[..., 32:]
            fields = blocks[..., 3:]
        case "six_bit":
            halves = scales[..., :64].reshape(*lead, 2, TILE_ROWS, 2)
            blocks[..., 0:4] = halves.swapaxes(-3, -2).reshape(*lead, TILE_ROWS, 4)
            words = scales[..., 64:].reshape(*lead, 3, TILE_ROWS, 4).swapaxes(-3, -2)
            blocks[..., 4:16] = _scatter_six_bits(words)
            fields = blocks[..., 16:]
        case _:
            blocks[..., 208:210] = scales[..., :32].reshape(*lead, TILE_ROWS, 2)
            pairs = scales[..., 32:].reshape(*lead, 8, TILE_ROWS, 2).swapaxes(-3, -2)
            blocks[..., 192:208] = pairs.reshape(*lead, TILE_ROWS, 16)
            fields = blocks[..., :192]
    integers = cells[..., layout.scale_bytes :]
    if layout.bits in (4, 8) and layout.scales != "six_bit":  # in the order of the stored bytes
        words = integers.reshape(*lead, -1, TILE_ROWS, 4).swapaxes(-3, -2)
        fields[...] = words.reshape(fields.shape) ^ (layout.zero if layout.bits == 8 else 0)
    else:
        _unpack_groups(layout, integers.reshape(*lead, -1, layout.group_bytes), fields)


def _unpack_groups(layout: Layout, groups: Bytes, fields: Bytes) -> None:
    lead = groups.shape[:-1]
    nibbles = groups[..., :256].reshape(*lead, 4, TILE_ROWS, 4).swapaxes(-3, -2).reshape(*lead, TILE_ROWS, 16)
    low = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1).swapaxes(-3, -2)
    high = None
    if layout.bits > 4:
        width = layout.bits - 4
        per_word = 8 // width
        packed = groups[..., 256:].reshape(*lead, 8 // per_word, TILE_ROWS, 4).swapaxes(-3, -2)
        shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
        parts = (packed[..., None, :] >> shifts) & np.uint8((1 << width) - 1)
        high = parts.reshape(*lead, TILE_ROWS, GROUP).swapaxes(-3, -2)
    _store_integers(layout, low, high, fields)


def _store_integers(layout: Layout, low: Bytes, high: Bytes | None, fields: Bytes) -> None:
    match layout.encoding:
        case "q5_0" | "q5_1" if high is not None:
            fields[..., :4] = np.packbits(high[..., 0, :], axis=-1, bitorder="little")
            fields[..., 4:] = low[..., 0, :16] | low[..., 0, 16:] << 4
        case "q4_k":
            fields[...] = _of_runs(low, 32, 4)
        case "q5_k" if high is not None:
            fields[..., :32] = _of_runs(high, 32, 1)
            fields[..., 32:] = _of_runs(low, 32, 4)
        case "q6_k" if high is not None:
            fields[..., :128] = _of_runs(low, 64, 4)
            fields[..., 128:] = _of_runs(high, 32, 2)


def _of_runs(weights: Bytes, run: int, bits: int) -> Bytes:
    """Weights [..., groups, 32] in the order of K-quants, see :mod:`refengine.quantizer.k_quants`."""
    lead = weights.shape[:-2]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    fields = weights.reshape(*lead, -1, 8 // bits, run) << shifts
    stored: Bytes = np.bitwise_or.reduce(fields, axis=-2)
    return stored.reshape(*lead, -1)


def _scatter_six_bits(words: Bytes) -> Bytes:
    """Three words [..., 3, 4] as stored scales and minima [..., 12]."""
    fours = np.array([0, 2, 4, 6], np.uint8)
    six = []
    for word in (0, 1):
        nibbles = words[..., word, :]
        low = np.stack([nibbles & 15, nibbles >> 4], axis=-1).reshape(*nibbles.shape[:-1], 8)
        high = (words[..., 2, 2 * word : 2 * word + 2, None] >> fours) & 3
        six.append(low | high.reshape(low.shape) << 4)
    scales, minima = six
    low = (scales[..., 4:] & 15) | (minima[..., 4:] & 15) << 4
    return np.concatenate(
        [scales[..., :4] | scales[..., 4:] >> 4 << 6, minima[..., :4] | minima[..., 4:] >> 4 << 6, low],
        axis=-1,
    )
