"""Repacking loses no bit, and adds no byte but those of rows that fill a tile."""

from __future__ import annotations

import numpy as np
import pytest

from refengine.errors import UnsupportedError
from refengine.quantizer import ENCODINGS
from refengine_numba import repack
from refengine_numba.layout import LAYOUTS, TILE_ROWS, tiles


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (16, 512), (17, 768), (100, 256)])
def test_unpacking_gives_the_stored_bytes(name: str, rows: int, columns: int) -> None:
    """Whatever the bytes are: NaN scales and all."""
    data = np.random.default_rng(rows).integers(
        0, 256, (rows, ENCODINGS[name].row_bytes(columns)), dtype=np.uint8
    )
    packed = repack.pack(name, data)
    assert np.array_equal(repack.unpack(name, packed, rows, columns), data)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_repacked_matrix_has_the_bytes_of_the_stored_one(name: str) -> None:
    """Rows are rounded up to sixteen; there is no other overhead."""
    row_bytes = ENCODINGS[name].row_bytes(512)
    for rows in (16, 48, 49):
        packed = repack.pack(name, np.zeros((rows, row_bytes), np.uint8))
        assert packed.nbytes == LAYOUTS[name].nbytes(rows, 512) == tiles(rows) * TILE_ROWS * row_bytes


@pytest.mark.parametrize("name", LAYOUTS)
def test_tiles_are_independent(name: str) -> None:
    """A tile's bytes come from its own sixteen rows: a matrix can be repacked in parts."""
    data = np.random.default_rng(0).integers(0, 256, (48, ENCODINGS[name].row_bytes(256)), dtype=np.uint8)
    parts = [repack.pack(name, data[i : i + 16]) for i in (0, 16, 32)]
    assert np.array_equal(repack.pack(name, data), np.concatenate(parts))


def test_dense_weights_need_no_whole_groups() -> None:
    """Encodings without blocks take any number of columns."""
    data = np.arange(18 * 37 * 2, dtype=np.uint16).view(np.uint8)[: 18 * 74].reshape(18, 74)
    assert np.array_equal(repack.unpack("f16", repack.pack("f16", data), 18, 37), data)


def test_rows_need_not_be_contiguous() -> None:
    """A slice of a mapped file will do, and ``out`` is filled in place."""
    wide = np.random.default_rng(0).integers(0, 256, (32, 400), dtype=np.uint8)
    out = np.empty(LAYOUTS["q4_0"].nbytes(32, 256), np.uint8)
    assert repack.pack("q4_0", wide[:, 7 : 7 + 144], out) is out
    assert np.array_equal(out, repack.pack("q4_0", wide[:, 7 : 7 + 144].copy()))


def test_tiles_start_at_a_cache_line() -> None:
    """Vectors of whole tiles then do not straddle lines."""
    assert repack.pack("f32", np.zeros((16, 64), np.uint8)).ctypes.data % 64 == 0


def test_what_cannot_be_repacked_is_refused() -> None:
    """An unknown encoding, other bytes, half blocks, a wrong place."""
    with pytest.raises(UnsupportedError, match="no kernel computes on iq4_nl"):
        repack.pack("iq4_nl", np.zeros((1, 18), np.uint8))
    with pytest.raises(ValueError, match="must be uint8"):
        repack.pack("q4_0", np.zeros((1, 18), np.int8))
    with pytest.raises(ValueError, match="whole blocks"):
        repack.pack("q4_0", np.zeros((1, 17), np.uint8))
    with pytest.raises(ValueError, match="contiguous uint8"):
        repack.pack("q4_0", np.zeros((1, 18), np.uint8), np.zeros(18, np.uint8))
    with pytest.raises(ValueError, match="no tiles"):
        repack.unpack("q4_0", np.zeros(18, np.uint8), 1, 32)
