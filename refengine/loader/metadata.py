"""A checkpoint's key-values, with typed access whose errors name the key and its place in the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from mmap import mmap
from os import PathLike
from typing import Any, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from refengine.errors import FormatError

T = TypeVar("T")
V = TypeVar("V")

_REQUIRED: Any = object()
"""Default of a key that must be there."""

LENGTH_BYTES = 8
"""Of a string's length, which stands before it."""

AT_ONCE = 2**12
"""Strings decoded together: many, though few enough that their bytes are soon given back."""


class StringArray(Sequence[str]):
    """Length-prefixed UTF-8 strings, one after another in a file, decoded when asked for.

    A vocabulary of 262,144 tokens is opened without making one Python string.

    Args:
        data: the bytes of the whole file.
        offsets: int64 [n + 1], where each string's 8-byte length begins, and where the last string ends.
        name: what the strings are, for errors.
        path: the file, for errors.

    Raises:
        FormatError: on access to a string that is not UTF-8, with the offset of its first wrong byte.
    """

    def __init__(
        self,
        data: mmap | bytes,
        offsets: NDArray[np.int64],
        *,
        name: str,
        path: str | PathLike[str] | None = None,
    ) -> None:
        self._data, self._offsets, self._name, self._path = data, offsets, name, path

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        start = int(self._offsets[index]) + LENGTH_BYTES
        try:
            return self._data[start : int(self._offsets[index + 1])].decode()
        except UnicodeDecodeError as error:
            raise FormatError(
                f"string {index} of {self._name} is not UTF-8", path=self._path, offset=start + error.start
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.tolist())

    def tolist(self) -> list[str]:
        """All strings at once: the fast way through a vocabulary."""
        texts = list[str]()
        for first in range(0, len(self), AT_ONCE):
            texts += self._several(first)
        return texts

    def _several(self, first: int) -> list[str]:
        """The next `AT_ONCE` strings: lengths become zeros, and these part a text that is decoded as one."""
        offsets = self._offsets[first : first + AT_ONCE + 1]
        starts, start, end = offsets[:-1] - offsets[0], int(offsets[0]), int(offsets[-1])
        text = np.frombuffer(self._data, np.uint8, end - start, start).copy()
        for place in range(LENGTH_BYTES):
            text[starts + place] = 0
        if np.count_nonzero(text) == len(text) - LENGTH_BYTES * len(starts):  # no other zeros
            try:
                return text.tobytes().decode().split("\0" * LENGTH_BYTES)[1:]
            except UnicodeDecodeError:
                pass
        return self[first : first + AT_ONCE]  # one by one, which meets the culprit and tells its offset


Value: TypeAlias = str | int | float | bool | NDArray[Any] | StringArray


class Metadata(Mapping[str, Value]):
    """Key-values in file order.

    ``metadata[key]`` gives the value whatever its type. The typed accessors below are for readers that know
    which type they need: each returns ``default`` where the key is absent, and raises `FormatError` where it
    is absent without a default, or of another type.

    Args:
        values: key -> value; integers, floats and booleans as Python values, numeric arrays as NumPy arrays.
        offsets: key -> byte offset of its value in the file, where there is one.
        path: the file, for errors.
    """

    def __init__(
        self,
        values: Mapping[str, Value],
        *,
        offsets: Mapping[str, int] | None = None,
        path: str | PathLike[str] | None = None,
    ) -> None:
        self._values, self._offsets, self._path = dict(values), dict(offsets or {}), path

    def __getitem__(self, key: str) -> Value:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def offset(self, key: str) -> int | None:
        """Byte offset of the key's value in the file, or ``None`` where it has none."""
        return self._offsets.get(key)

    def error(self, key: str, problem: str) -> FormatError:
        """The error to raise about a key's value: ``raise metadata.error(key, "must be positive")``."""
        return FormatError(f"metadata key {key!r} {problem}", path=self._path, offset=self.offset(key))

    def string(self, key: str, default: T = _REQUIRED) -> str | T:
        """The string at ``key``."""
        return self._typed(key, default, str, "a string")

    def integer(self, key: str, default: T = _REQUIRED) -> int | T:
        """The integer at ``key``, of any stored width; a boolean is not one."""
        return self._typed(key, default, int, "an integer")

    def number(self, key: str, default: T = _REQUIRED) -> float | T:
        """The float or integer at ``key``, as a float; NaN and infinity are the caller's to judge."""
        if type(self._values.get(key)) is int:
            return float(self.integer(key))
        return self._typed(key, default, float, "a number")

    def boolean(self, key: str, default: T = _REQUIRED) -> bool | T:
        """The boolean at ``key``; an integer is not one."""
        return self._typed(key, default, bool, "a boolean")

    def array(self, key: str, default: T = _REQUIRED) -> NDArray[Any] | T:
        """The array of numbers or booleans at ``key``, shape [n], read-only, of the dtype it is stored in."""
        return self._typed(key, default, np.ndarray, "an array of numbers")

    def strings(self, key: str, default: T = _REQUIRED) -> StringArray | T:
        """The array of strings at ``key``."""
        return self._typed(key, default, StringArray, "an array of strings")

    def _typed(self, key: str, default: T, wanted: type[V], description: str) -> V | T:
        if key not in self._values:
            if default is _REQUIRED:
                raise self.error(key, f"is missing: it must be {description}")
            return default
        value = self._values[key]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is int):
            raise self.error(key, f"must be {description}, but is {_describe(value)}")
        return value


def _describe(value: Value) -> str:
    if isinstance(value, StringArray):
        return "an array of strings"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype.name}"
    return {str: "a string", int: "an integer", float: "a float", bool: "a boolean"}[type(value)]
