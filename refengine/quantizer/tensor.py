"""A tensor in its stored encoding: a view of bytes that nobody has read yet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from refengine.quantizer.decode import decode
from refengine.quantizer.encodings import encoding
from refengine.quantizer.mapping import Pages


@dataclass(frozen=True, eq=False, repr=False)
class LazyTensor:
    """A named tensor whose bytes are decoded when asked for, and not before.

    Attributes:
        name: the tensor's name in its file.
        shape: its shape in weights, in NumPy order: the slowest axis first (GGUF's ``ne`` reversed).
        encoding: a name in :data:`refengine.quantizer.ENCODINGS`.
        data: uint8 [*shape[:-1], row_bytes], a read-only view of the mapped file.

    Raises:
        UnsupportedError: no encoding has this name.
        ValueError: ``data`` is not uint8 of the shape that ``shape`` and ``encoding`` ask for.

    Clauses: CKP-10.
    """

    name: str
    shape: tuple[int, ...]
    encoding: str
    data: NDArray[np.uint8]

    def __post_init__(self) -> None:
        if not self.shape:
            raise ValueError(f"{self.name}: a tensor needs at least one axis")
        expected = (*self.shape[:-1], encoding(self.encoding).row_bytes(self.shape[-1]))
        if self.data.dtype != np.uint8 or self.data.shape != expected:
            raise ValueError(
                f"{self.name}: {self.encoding} {list(self.shape)} is stored as uint8 {list(expected)}, "
                f"not {self.data.dtype} {list(self.data.shape)}"
            )

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.data.nbytes

    @cached_property
    def pages(self) -> Pages:
        """The pages of the mapped file beneath ``data``."""
        return Pages(self.data)

    def decode(self) -> NDArray[np.float32]:
        """The whole tensor, float32 ``shape``: a new array."""
        return decode(self.encoding, self.data)

    def __getitem__(self, rows: NDArray[np.integer] | int) -> NDArray[np.float32]:
        """Rows of the first axis, decoding no others: integers [n] -> float32 [n, *shape[1:]], a new array.

        Raises:
            IndexError: a row is negative or past the end; ``rows`` are not integers; the tensor has one axis.
        """
        rows = np.asarray(rows)
        if len(self.shape) == 1:
            raise IndexError(f"{self.name}: a tensor with one axis has no rows to take")
        if rows.dtype.kind not in "iu":
            raise IndexError(f"{self.name}: rows must be integers, not {rows.dtype}")
        outside = rows[(rows < 0) | (rows >= self.shape[0])]
        if outside.size:
            raise IndexError(f"{self.name}: no row {outside[0]} among {self.shape[0]}")
        return decode(self.encoding, self.data[rows])

    def __repr__(self) -> str:
        return f"LazyTensor({self.name!r}, {self.encoding} {list(self.shape)}, {self.nbytes:,} bytes)"
