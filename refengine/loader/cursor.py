"""Reading the fields of a mapped file from front to back, each held against the bytes that are left."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.errors import FormatError
from refengine.loader.metadata import StringArray

MAX_LENGTH = 2**30
"""Bytes of a string, elements of an array: llama.cpp's limits."""


class Cursor:
    """Reads little-endian fields, and never past the end.

    Sizes are held against the bytes that are left before anything is allocated or looped over. ``field``
    names what is read, for errors.

    Attributes:
        data: the file.
        bytes: uint8 [file size], a read-only view of it.
        position: where the next field begins.

    Clauses: CKP-8, CKP-9.
    """

    def __init__(self, data: mmap | bytes, path: Path) -> None:
        self.data, self.path, self.position = data, path, 0
        self.bytes = np.frombuffer(data, np.uint8)

    def error(self, problem: str, offset: int) -> FormatError:
        """The error to raise about the field at ``offset``."""
        return FormatError(problem, path=self.path, offset=offset)

    def skip(self, size: int, field: str) -> int:
        """Steps over ``size`` bytes; returns where they begin."""
        start, left = self.position, len(self.data) - self.position
        if size > left:
            raise self.error(f"the file ends too early: {field} takes {size} bytes, {left} are left", start)
        self.position += size
        return start

    def integer(self, size: int, field: str) -> int:
        """An unsigned integer of ``size`` bytes."""
        start = self.skip(size, field)
        return int.from_bytes(self.data[start : self.position], "little")

    def count(self, field: str, item_bytes: int, most: int = MAX_LENGTH) -> int:
        """A u64 that counts items of at least ``item_bytes`` each, all of them still to come in the file."""
        count = self.integer(8, field)
        left = len(self.data) - self.position
        if count > most:
            raise self.error(f"{field} is {count}, more than the {most} allowed", self.position - 8)
        if count * item_bytes > left:
            raise self.error(f"{field} is {count}, too many for the {left} bytes left", self.position - 8)
        return count

    def string(self, field: str, most: int = MAX_LENGTH) -> str:
        """A string of at most ``most`` bytes."""
        start = self.skip(self.count(f"the length of {field}", 1, most), field)
        try:
            return self.data[start : self.position].decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{field} is not UTF-8", start + error.start) from None

    def name(self, field: str, most: int) -> str:
        """A string that can name something in C too: not empty, and without a zero byte."""
        start = self.position
        name = self.string(field, most)
        if not name or "\0" in name:
            raise self.error(f"{field} is {name!r}: empty, or with a zero byte", start)
        return name

    def numbers(self, dtype: np.dtype[Any], count: int, field: str) -> NDArray[Any]:
        """Numbers or booleans, shape [count]: a read-only view of the file, rarely aligned."""
        start = self.skip(count * dtype.itemsize, field)
        stored = self.bytes[start : self.position]
        if dtype.kind == "b" and count and stored.max() > 1:
            raise self.error(f"{field} has a boolean that is neither 0 nor 1", start + int(stored.argmax()))
        return stored.view(dtype)

    def strings(self, count: int, field: str) -> StringArray:
        """Strings, shape [count]: their places are found, nothing is decoded."""
        offsets = np.fromiter(self._string_offsets(count, field), np.int64, count + 1)
        self.position = int(offsets[-1])
        return StringArray(self.data, offsets, name=field, path=self.path)

    def _string_offsets(self, count: int, field: str) -> Iterator[int]:
        # The one loop that decides how fast a file with a large vocabulary opens.
        data, start, end, unpack = self.data, self.position, len(self.data), struct.Struct("<Q").unpack_from
        for index in range(count):
            yield start
            if start + 8 > end:
                raise self.error(f"the file ends too early, before string {index} of {field}", start)
            (length,) = unpack(data, start)
            if length > MAX_LENGTH or length > end - start - 8:
                raise self.error(f"the length of string {index} of {field} is {length}, too much", start)
            start += 8 + length
        yield start
