"""Repacked matrices, and the only door from arrays to a kernel's raw arguments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from refengine.quantizer import LazyTensor
from refengine.quantizer.finite import check_finite, check_float16
from refengine_numba import repack
from refengine_numba.arguments import Arguments, check
from refengine_numba.layout import GROUP, TILE_ROWS
from refengine_numba.records import record_bytes
from refengine_numba.team import Team
from refengine_numba.tile_store import TileStore

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

PART_BYTES = 2**22
"""Stored bytes of a matrix that are repacked at once."""


@dataclass(frozen=True, eq=False)
class TiledMatrix:
    """A weight matrix [rows, columns] in tiles.

    Attributes:
        encoding: of the stored weights.
        rows: N.
        columns: K.
        tiles: uint8, as :func:`repack.pack` gives them.

    Raises:
        UnsupportedError: the encoding has no kernels.
        ValueError: ``tiles`` are not those of such a matrix.
    """

    encoding: str
    rows: int
    columns: int
    tiles: Bytes

    def __post_init__(self) -> None:
        nbytes = repack.layout_of(self.encoding).nbytes(self.rows, self.columns)
        check("tiles", self.tiles, np.uint8, (nbytes,))

    @classmethod
    def of(
        cls,
        tensor: LazyTensor,
        *,
        halves: bool = False,
        team: Team | None = None,
        store: TileStore | None = None,
    ) -> TiledMatrix:
        """Repack a stored matrix, or find it repacked.

        A part at a time, whose pages of the file are given back: so a matrix is hardly ever held twice.

        Args:
            halves: whether its weights will be rounded to float16.
            team: the threads that repack; the caller's alone if ``None``.
            store: where repacked matrices are kept, if anywhere.

        Raises:
            UnsupportedError: the encoding has no kernels.
            ValueError: the tensor has not two axes.
            NumericalError: a weight is infinite or NaN, or, for ``halves``, would be.
        """
        if len(tensor.shape) != 2:
            raise ValueError(f"{tensor.name} {list(tensor.shape)} is no matrix")
        nbytes = repack.layout_of(tensor.encoding).nbytes(*tensor.shape)
        kept = store.find(tensor, nbytes) if store else None
        if kept is not None:  # it was found finite when it was repacked
            if halves:
                check_halves(tensor)
            return cls(tensor.encoding, *tensor.shape, kept)
        unfinished = store.new(tensor, nbytes) if store else None
        tiles = unfinished.tiles if unfinished else repack.aligned(nbytes)
        try:
            _repack(tensor, tiles, halves, team)
        except BaseException:
            if unfinished:
                unfinished.discard()
            raise
        if unfinished:
            unfinished.finish()
        return cls(tensor.encoding, *tensor.shape, tiles)

    def product(
        self, x: Floats | Bytes, y: Floats, bias: Floats | None = None, *, rows: str = "T"
    ) -> Arguments:
        """Arguments of ``products.float32`` (x: float32 [T, K]) or ``products.mixed8`` (x: their records).

        Args:
            rows: the symbol of the number of rows of x and y.

        Raises:
            ValueError: a shape, dtype or stride is not what the kernel takes for granted.
        """
        count = len(y)
        check("y", y, np.float32, (count, self.rows))
        if x.dtype == np.uint8:
            if self.columns % GROUP:
                raise ValueError(f"records are groups of {GROUP}; {self.columns} columns are not")
            check("records", x, np.uint8, (record_bytes(count, self.columns),))
        else:
            check("x", x, np.float32, (count, self.columns))
        if bias is not None:
            check("bias", bias, np.float32, (self.rows,))
        if not y.flags.writeable:
            raise ValueError("y is read-only")
        where = 0 if bias is None else bias.ctypes.data
        addresses = [self.tiles.ctypes.data, self.tiles.nbytes, x.ctypes.data, where, y.ctypes.data]
        words = np.array([*addresses, self.rows, self.columns, count], np.int64)
        arrays = (self.tiles, x, y) if bias is None else (self.tiles, x, y, bias)
        return Arguments(words, arrays, {7: rows})

    def product_of_halves(
        self, x: Floats, powers: Floats, y: Floats, bias: Floats | None = None, *, rows: str = "T"
    ) -> Arguments:
        """Arguments of ``products.mixed16``.

        Args:
            x: float32 [T, K], rounded to float16.
            powers: float32 [T], what the rows' sums are multiplied by.
            y: float32 [T, N], the result.
            bias: float32 [N].
            rows: the symbol of T.

        Raises:
            ValueError: a shape, dtype or stride is not what the kernel takes for granted.
        """
        check("x", x, np.float32, (len(y), self.columns))
        check("powers", powers, np.float32, (len(y),))
        plain = self.product(x, y, bias, rows=rows)
        words = np.append(plain.words, powers.ctypes.data)
        return Arguments(words, (*plain.arrays, powers), plain.symbols)

    def look_up(self, ids: NDArray[np.int32], y: Floats, *, rows: str = "T") -> Arguments:
        """Arguments of ``rows.look_up``: int32 [T] -> float32 [T, K].

        Args:
            rows: the symbol of the number of ids.

        Raises:
            ValueError: a shape, dtype or stride is wrong.
            IndexError: an id lies outside of the matrix.
        """
        check("ids", ids, np.int32, (len(y),))
        check("y", y, np.float32, (len(ids), self.columns))
        if len(ids) and not (ids.min() >= 0 and ids.max() < self.rows):
            raise IndexError(f"row {ids.min()} or {ids.max()} lies outside of {self.rows}")
        addresses = [self.tiles.ctypes.data, self.tiles.nbytes, ids.ctypes.data, y.ctypes.data]
        words = np.array([*addresses, len(ids), self.columns], np.int64)
        return Arguments(words, (self.tiles, ids, y), {4: rows})


def _repack(tensor: LazyTensor, tiles: Bytes, halves: bool, team: Team | None) -> None:
    layout, columns = repack.layout_of(tensor.encoding), tensor.shape[1]
    for start, stop, data in _parts(tensor):
        check_finite(tensor, data, halves=halves)
        place = slice(layout.nbytes(start, columns), layout.nbytes(stop, columns))
        repack.pack(tensor.encoding, data, tiles[place], team)


def check_halves(tensor: LazyTensor) -> None:
    """Raise NumericalError unless all weights of a stored matrix are finite in float16."""
    for _, _, data in _parts(tensor):
        check_float16(tensor, data)


def _parts(tensor: LazyTensor) -> Iterator[tuple[int, int, Bytes]]:
    """Whole tiles of stored rows, from one to before another; their pages are given back after each."""
    count, row_bytes = tensor.shape[0], tensor.data.shape[1]
    step = max(1, PART_BYTES // (row_bytes * TILE_ROWS)) * TILE_ROWS
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield start, stop, tensor.data[start:stop]
        tensor.pages.release(start * row_bytes, stop * row_bytes)


def rounding(x: Floats, rounded: Floats, powers: Floats, *, rows: str = "T") -> Arguments:
    """Arguments of ``halves.round``: float32 [T, K] -> float32 [T, K], and a power of two for each row.

    Args:
        rows: the symbol of the number of rows.

    Raises:
        ValueError: a shape, dtype or stride is wrong.
    """
    count, columns = x.shape
    check("x", x, np.float32, (count, columns))
    check("rounded", rounded, np.float32, (count, columns), written=True)
    check("powers", powers, np.float32, (count,), written=True)
    return Arguments.of(x, rounded, powers, count, columns, symbols={3: rows})


def quantization(x: Floats, records: Bytes, *, rows: str = "T") -> Arguments:
    """Arguments of ``activations.quantize``: float32 [T, K] -> records.

    Args:
        rows: the symbol of the number of rows.

    Raises:
        ValueError: a shape, dtype or stride is wrong, or K is not whole groups of 32.
    """
    count, columns = x.shape
    if columns % GROUP:
        raise ValueError(f"activations are quantized by {GROUP}; {columns} columns are not whole groups")
    check("x", x, np.float32, (count, columns))
    check("records", records, np.uint8, (record_bytes(count, columns),))
    words = np.array([x.ctypes.data, records.ctypes.data, count, columns], np.int64)
    return Arguments(words, (x, records), {2: rows})
