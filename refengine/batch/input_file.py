"""The input of a batch: read twice, and never held as a whole."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from refengine.batch.row import DIGEST_BYTES, Row, parse_row, too_long
from refengine.errors import RequestError

MAX_LINE_BYTES = 2**24


class InputFile:
    """A file of rows, one per line; lines with nothing in them are no rows.

    To make one reads the file once. Of each row 40 bytes are kept: its line, its key and its digest.

    Args:
        path: of the file.

    Attributes:
        path: the same.
        lines: [rows], the line of each row, from 1.

    Raises:
        RequestError: two rows have one custom_id; the text names their lines. Or it is no regular file.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_file():
            raise RequestError(f"{path} is not a regular file: a batch's input is read twice")
        lines, keys, digests = array("Q"), bytearray(), bytearray()
        for row in self._read():
            lines.append(row.line)
            keys += row.key
            digests += row.digest
        self.lines = np.frombuffer(lines, np.uint64)
        self._keys, self._digests = _halves(keys), _halves(digests)
        self._order = np.lexsort((self._keys[:, 1], self._keys[:, 0]))
        self._sorted = self._keys[self._order, 0]
        self._refuse_duplicates()

    def __len__(self) -> int:
        return len(self.lines)

    def rows(self) -> Iterator[tuple[int, Row]]:
        """The rows with their numbers, from 0, in order.

        Raises:
            RequestError: they are no longer what they were.
        """
        number = -1
        for number, row in enumerate(self._read()):
            if number >= len(self) or not self.says(number, row.digest):
                raise self._changed(row.line)
            yield number, row
        if number + 1 != len(self):
            raise self._changed(int(self.lines[number + 1]))

    def find(self, key: bytes) -> int | None:
        """The number of the row with a key."""
        high, low = _halves(key)[0]
        at = int(np.searchsorted(self._sorted, high))
        while at < len(self) and self._sorted[at] == high:
            if self._keys[self._order[at], 1] == low:
                return int(self._order[at])
            at += 1
        return None

    def says(self, number: int, digest: bytes) -> bool:
        """Whether a row has a digest."""
        return bytes(self._digests[number].data) == digest

    def _read(self) -> Iterator[Row]:
        with self.path.open("rb") as file:
            line = 0
            while data := file.readline(MAX_LINE_BYTES + 1):
                line += 1
                if len(data) > MAX_LINE_BYTES:
                    yield too_long(line, data, MAX_LINE_BYTES)
                    while data and not data.endswith(b"\n"):
                        data = file.readline(MAX_LINE_BYTES)
                elif data.strip():
                    yield parse_row(line, data.rstrip(b"\r\n"))

    def _refuse_duplicates(self) -> None:
        keys = self._keys[self._order]
        same = np.flatnonzero((keys[1:] == keys[:-1]).all(axis=1))
        if not same.size:
            return
        pairs = np.sort(self.lines[np.stack([self._order[same], self._order[same + 1]])], axis=0)
        first, second = pairs[:, pairs[1].argmin()]
        (name,) = (row.custom_id for row in self._read() if row.line == first)
        more = f" ({same.size - 1} more lines repeat one)" if same.size > 1 else ""
        raise RequestError(
            f"lines {first} and {second} of {self.path} have the same custom_id, {name!r}{more}: "
            "give every row its own, or its answers could not be told apart"
        )

    def _changed(self, line: int) -> RequestError:
        return RequestError(
            f"{self.path} changed while it was read, at line {line}: what is answered stays; start again"
        )


def _halves(digests: bytes | bytearray) -> NDArray[np.uint64]:
    """Digests as numbers, uint64 ``[n, 2]``."""
    return np.frombuffer(digests, np.uint64).reshape(-1, DIGEST_BYTES // 8)
