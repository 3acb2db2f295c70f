"""Repacked matrices on disk: found again, belonging to one state of one file, and never half written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refengine.errors import NumericalError
from refengine.quantizer import LazyTensor
from refengine.quantizer.mapping import MappedFile
from refengine_numba import matrix as matrices
from refengine_numba import tile_store
from refengine_numba.matrix import TiledMatrix
from refengine_numba.repack import pack
from refengine_numba.tile_store import TileStore

ROWS, COLUMNS, AT = 35, 256, 64


@pytest.fixture
def data(matrix: Callable[..., np.ndarray]) -> np.ndarray:
    return matrix("q4_1", ROWS, COLUMNS)


def stored_in(path: Path, data: np.ndarray) -> LazyTensor:
    """A tensor whose bytes begin at byte 64 of a new file."""
    path.write_bytes(bytes(AT) + data.tobytes())
    return mapped(path, data.shape)


def mapped(path: Path, shape: tuple[int, ...], at: int = AT) -> LazyTensor:
    with path.open("rb") as file:
        content = np.frombuffer(MappedFile.of(file), np.uint8)
    stored = content[at : at + shape[0] * shape[1]].reshape(shape)
    return LazyTensor("blk.0.ffn_up.weight", (ROWS, COLUMNS), "q4_1", stored)


def never(*arguments: Any) -> None:
    raise RuntimeError("repacked")


def test_a_second_start_repacks_nothing(
    data: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiles of the first one are mapped; they are those that packing gives."""
    store = TileStore(tmp_path / "kept")
    first = TiledMatrix.of(stored_in(tmp_path / "model", data), store=store)
    monkeypatch.setattr(matrices, "_repack", never)
    second = TiledMatrix.of(mapped(tmp_path / "model", data.shape), store=store)
    expected = pack("q4_1", data)
    assert first.tiles.tobytes() == second.tiles.tobytes() == expected.tobytes()
    assert not second.tiles.flags.writeable  # nor need its folder be
    assert (second.rows, second.columns, second.encoding) == (ROWS, COLUMNS, "q4_1")


@pytest.mark.parametrize("what", ["time", "bytes", "place", "layout"])
def test_what_was_kept_for_another_is_not_taken(
    data: np.ndarray, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that changed since, another tensor of it, or tiles that lie otherwise."""
    store, path = TileStore(tmp_path / "kept"), tmp_path / "model"
    TiledMatrix.of(stored_in(path, data), store=store)
    match what:
        case "time":
            os.utime(path, ns=(0, 0))
        case "bytes":
            path.write_bytes(path.read_bytes() + b"\0")
            os.utime(path, ns=(1, 1))
        case "layout":
            monkeypatch.setattr(tile_store, "_tiles_text", lambda: "another")
    tensor = mapped(path, data.shape, AT - 20 if what == "place" else AT)
    assert store.find(tensor, pack("q4_1", data).nbytes) is None


def test_a_file_of_another_size_is_not_taken(data: np.ndarray, tmp_path: Path) -> None:
    """It is written anew."""
    store = TileStore(tmp_path / "kept")
    tensor = stored_in(tmp_path / "model", data)
    expected = TiledMatrix.of(tensor, store=store).tiles.tobytes()
    (kept,) = (tmp_path / "kept").glob("*/*")
    kept.write_bytes(kept.read_bytes()[:-1])
    again = mapped(tmp_path / "model", data.shape)
    assert TiledMatrix.of(again, store=store).tiles.tobytes() == expected
    assert kept.stat().st_size == len(expected)


def test_without_room_tiles_stay_in_memory(
    data: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk is noticed before anything is written to a mapped page, and said."""

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tile_store, "_reserve", full)
    store = TileStore(tmp_path / "kept")
    made = TiledMatrix.of(stored_in(tmp_path / "model", data), store=store)
    assert made.tiles.tobytes() == pack("q4_1", data).tobytes()
    assert "No space left on device" in caplog.text
    assert not list((tmp_path / "kept").glob("*/*"))


def test_a_folder_that_is_a_file_keeps_nothing(
    data: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The model runs, and a warning says why the next start will not be faster."""
    (tmp_path / "kept").touch()
    store = TileStore(tmp_path / "kept")
    for _ in range(2):  # said once, however many matrices there are
        made = TiledMatrix.of(stored_in(tmp_path / "model", data), store=store)
        assert made.tiles.tobytes() == pack("q4_1", data).tobytes()
    assert len(caplog.records) == 1
    assert "they are in memory" in caplog.text


def test_a_damaged_matrix_leaves_nothing(data: np.ndarray, tmp_path: Path) -> None:
    """What is refused half way is not found by the next start."""
    data[-1, :2] = 0x00, 0x7C  # a scale that is infinite
    store = TileStore(tmp_path / "kept")
    with pytest.raises(NumericalError, match="NaN or infinity"):
        TiledMatrix.of(stored_in(tmp_path / "model", data), store=store)
    assert not list((tmp_path / "kept").glob("*/*"))


def test_tensors_of_no_file_are_not_kept(data: np.ndarray, tmp_path: Path) -> None:
    """There would be no telling whose tiles these are."""
    tensor = LazyTensor("w", (ROWS, COLUMNS), "q4_1", data)
    made = TiledMatrix.of(tensor, store=TileStore(tmp_path / "kept"))
    assert made.tiles.tobytes() == pack("q4_1", data).tobytes()
    assert not (tmp_path / "kept").exists()


def test_nothing_is_written_unasked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the variable there is no store; with it, the folder it names."""
    monkeypatch.delenv(tile_store.VARIABLE, raising=False)
    assert TileStore.chosen() is None
    monkeypatch.setenv(tile_store.VARIABLE, str(tmp_path))
    assert TileStore.chosen() is not None
