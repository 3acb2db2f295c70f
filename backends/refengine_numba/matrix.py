"""Repacked matrices, and the only door from arrays to a kernel's raw arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.errors import NumericalError
from refengine.quantizer import LazyTensor
from refengine_numba import repack
from refengine_numba.activations import record_bytes
from refengine_numba.finite import all_finite
from refengine_numba.layout import GROUP

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Arguments:
    """Of one call of an entry.

    Attributes:
        words: int64, what the entry reads: addresses and sizes.
        arrays: whose addresses these are; kept alive with them.
    """

    words: NDArray[np.int64]
    arrays: tuple[NDArray[Any], ...]


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
        _check("tiles", self.tiles, np.uint8, (nbytes,))

    @classmethod
    def of(cls, tensor: LazyTensor, out: Bytes | None = None) -> TiledMatrix:
        """Repack a stored matrix, into ``out`` if given.

        Raises:
            UnsupportedError: the encoding has no kernels.
            ValueError: the tensor has not two axes, or ``out`` is not of its size.
            NumericalError: a weight is infinite or NaN.
        """
        if len(tensor.shape) != 2:
            raise ValueError(f"{tensor.name} {list(tensor.shape)} is no matrix")
        repack.layout_of(tensor.encoding)
        if not all_finite(tensor.encoding, tensor.data):
            raise NumericalError(
                f"tensor {tensor.name} holds NaN or infinity: the file is damaged, "
                "or was quantized from damaged weights; get it again or use another one"
            )
        return cls(tensor.encoding, *tensor.shape, repack.pack(tensor.encoding, tensor.data, out))

    def product(self, x: Floats | Bytes, y: Floats, bias: Floats | None = None) -> Arguments:
        """Arguments of ``float32_entry`` (x: float32 [T, K]) or ``mixed8_entry`` (x: their records).

        Raises:
            ValueError: a shape, dtype or stride is not what the kernel takes for granted.
        """
        count = len(y)
        _check("y", y, np.float32, (count, self.rows))
        if x.dtype == np.uint8:
            if self.columns % GROUP:
                raise ValueError(f"records are groups of {GROUP}; {self.columns} columns are not")
            _check("records", x, np.uint8, (record_bytes(count, self.columns),))
        else:
            _check("x", x, np.float32, (count, self.columns))
        if bias is not None:
            _check("bias", bias, np.float32, (self.rows,))
        if not y.flags.writeable:
            raise ValueError("y is read-only")
        where = 0 if bias is None else bias.ctypes.data
        addresses = [self.tiles.ctypes.data, self.tiles.nbytes, x.ctypes.data, where, y.ctypes.data]
        words = np.array([*addresses, self.rows, self.columns, count], np.int64)
        return Arguments(words, (self.tiles, x, y) if bias is None else (self.tiles, x, y, bias))

    def look_up(self, ids: NDArray[np.int32], y: Floats) -> Arguments:
        """Arguments of ``rows_entry``: int32 [T] -> float32 [T, K].

        Raises:
            ValueError: a shape, dtype or stride is wrong.
            IndexError: an id lies outside of the matrix.
        """
        _check("ids", ids, np.int32, (len(y),))
        _check("y", y, np.float32, (len(ids), self.columns))
        if len(ids) and not (ids.min() >= 0 and ids.max() < self.rows):
            raise IndexError(f"row {ids.min()} or {ids.max()} lies outside of {self.rows}")
        addresses = [self.tiles.ctypes.data, self.tiles.nbytes, ids.ctypes.data, y.ctypes.data]
        return Arguments(np.array([*addresses, len(ids), self.columns], np.int64), (self.tiles, ids, y))


def quantization(x: Floats, records: Bytes) -> Arguments:
    """Arguments of ``quantize_entry``: float32 [T, K] -> records.

    Raises:
        ValueError: a shape, dtype or stride is wrong, or K is not whole groups of 32.
    """
    rows, columns = x.shape
    if columns % GROUP:
        raise ValueError(f"activations are quantized by {GROUP}; {columns} columns are not whole groups")
    _check("x", x, np.float32, (rows, columns))
    _check("records", records, np.uint8, (record_bytes(rows, columns),))
    words = np.array([x.ctypes.data, records.ctypes.data, rows, columns], np.int64)
    return Arguments(words, (x, records))


def _check(name: str, array: NDArray[np.generic], dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(
            f"{name} must be C-contiguous {np.dtype(dtype).name} {list(shape)}, "
            f"not {array.dtype.name} {list(array.shape)}"
        )
