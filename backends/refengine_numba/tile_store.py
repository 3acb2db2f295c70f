"""Repacked matrices on disk, for models that are started again and again, or by several processes.

``REFENGINE_NUMBA_TILES`` names a folder. What was repacked once is mapped from there: later starts repack
nothing, and processes that run one model share its pages. Without the variable nothing is written, since the
folder grows by as much as the model's file.

A matrix belongs to a place in a file as it was when it was read: device, inode, size and time of the last
change are part of its name. So is the text of the modules that say how tiles lie.
"""

from __future__ import annotations

import hashlib
import logging
import os
from functools import cache
from mmap import ACCESS_READ, ACCESS_WRITE, mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from refengine.quantizer import LazyTensor

VARIABLE = "REFENGINE_NUMBA_TILES"
"""The environment variable that names the folder; empty or not there: tiles are not kept."""

Bytes = NDArray[np.uint8]


class TileStore:
    """A folder of repacked matrices.

    Args:
        root: where; made when the first matrix is kept.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._closed = False  # once something cannot be kept, nothing more is tried

    @classmethod
    def chosen(cls) -> TileStore | None:
        """The one that the environment names, if any."""
        root = os.environ.get(VARIABLE)
        return cls(Path(root)) if root else None

    def find(self, tensor: LazyTensor, nbytes: int) -> Bytes | None:
        """A matrix that was kept, of so many bytes; ``None`` if there is none."""
        path = self._path(tensor)
        if path is None:
            return None
        try:
            with path.open("rb") as file:
                kept = np.frombuffer(mmap(file.fileno(), 0, access=ACCESS_READ), np.uint8)
            return kept if kept.nbytes == nbytes else None
        except (OSError, ValueError):
            return None

    def new(self, tensor: LazyTensor, nbytes: int) -> Unfinished | None:
        """Room for a matrix of so many bytes, all zero; ``None``, and a word why, where there is none."""
        path = self._path(tensor)
        if path is None or nbytes == 0 or self._closed:
            return None
        try:
            return Unfinished(path, nbytes)
        except OSError as error:
            self._closed = True
            logging.getLogger("refengine").warning(
                "repacked weights cannot be kept in %s (%s); they are in memory", self._root, error.strerror
            )
            return None

    def _path(self, tensor: LazyTensor) -> Path | None:
        place = tensor.pages.place
        if place is None:  # of no file, or of one that cannot be recognised
            return None
        *file, at = place
        name = "-".join(map(str, (*file, _tiles_text())))
        shape = "x".join(map(str, tensor.shape))
        return self._root / hashlib.sha256(name.encode()).hexdigest()[:16] / f"{at}-{tensor.encoding}-{shape}"


class Unfinished:
    """Tiles that are being written, under a name that nobody looks for.

    Args:
        path: what they will be called.
        nbytes: of them.

    Attributes:
        tiles: uint8 [nbytes], to be written.

    Raises:
        OSError: there is no such folder, or no room.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self._path, self._written = path, path.with_name(f"{path.name}.{os.getpid()}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._written.open("w+b") as file:
                _reserve(file.fileno(), nbytes)
                self.tiles = np.frombuffer(mmap(file.fileno(), 0, access=ACCESS_WRITE), np.uint8)
        except OSError:
            self.discard()
            raise

    def finish(self) -> None:
        """From now on they are found; those of another process that was faster are replaced by the same."""
        self._written.replace(self._path)

    def discard(self) -> None:
        """They are not to be found; where they are in use, they are there for as long."""
        self._written.unlink(missing_ok=True)


def _reserve(descriptor: int, nbytes: int) -> None:
    """Take the room now: to write to a mapped page for which there is none ends the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, nbytes)
    else:
        zeros = bytes(2**20)
        for start in range(0, nbytes, len(zeros)):
            os.write(descriptor, zeros[: nbytes - start])


@cache
def _tiles_text() -> str:
    here = Path(__file__).parent
    text = b"".join((here / name).read_bytes() for name in ("layout.py", "kernels/packing.py"))
    return hashlib.sha256(text).hexdigest()
