"""Reading the fields of a mapped file from front to back, each held against the bytes that are left."""

from __future__ import annotations

import struct
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.errors import FormatError
from refengine.loader.metadata import LENGTH_BYTES, StringArray

MAX_LENGTH = 2**30
"""Bytes of a string, elements of an array: llama.cpp's limits."""

WINDOW_BYTES = 2**16
"""What is searched for strings at a time."""

MANY = 2**8
"""Strings that pay for such a search."""


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
        offsets = np.empty(count + 1, np.int64)
        offsets[0] = self.position
        done = 0
        while done < count:
            start, left = int(offsets[done]), count - done
            ends = self._ends_of_short_strings(start)[:left] if left >= MANY else offsets[:0]
            if len(ends) < MANY:  # few, or not such as vocabularies have
                ends = self._ends_of_strings(start, range(done, done + min(left, 4 * MANY)), field)
            offsets[done + 1 : done + 1 + len(ends)] = ends
            done += len(ends)
        self.position = int(offsets[-1])
        return StringArray(self.data, offsets, name=field, path=self.path)

    def _ends_of_short_strings(self, start: int) -> NDArray[np.integer[Any]]:
        """Where strings from ``start`` on end, up to one that is empty, over 255 bytes or has a zero byte.

        In all others, the first byte of the length tells it, and its other seven are the only zeros. So every
        seventh zero is where a string must begin, which is then checked.
        """
        window = self.bytes[start : start + WINDOW_BYTES]
        places = np.flatnonzero(window == 0)
        zeros = places[: len(places) // 7 * 7].reshape(-1, 7)
        starts = zeros[:, 0] - 1
        ends = starts + LENGTH_BYTES + window[starts]
        follows = starts == np.concatenate(([0], ends))[:-1]
        known = follows & (zeros[:, 6] == starts + 7) & (ends <= len(self.bytes) - start)
        return start + ends[: len(known) if known.all() else int(known.argmin())]

    def _ends_of_strings(self, start: int, indices: range, field: str) -> NDArray[np.integer[Any]]:
        """The same, one by one and for any strings."""
        data, end, unpack = self.data, len(self.data), struct.Struct("<Q").unpack_from
        ends = list[int]()
        for index in indices:
            if start + LENGTH_BYTES > end:
                raise self.error(f"the file ends too early, before string {index} of {field}", start)
            (length,) = unpack(data, start)
            if length > MAX_LENGTH or length > end - start - LENGTH_BYTES:
                raise self.error(f"the length of string {index} of {field} is {length}, too much", start)
            start += LENGTH_BYTES + length
            ends.append(start)
        return np.array(ends, np.int64)
