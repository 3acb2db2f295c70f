"""Writing GGUF files: one tensor's bytes at a time, into a file that has its name only when it is whole.

The format is told in ``refengine.loader.gguf``, and every file written here is one that it reads. Memory in
use is the header (mostly the vocabulary) and one chunk of a tensor, however large the file. The bytes go to a
hidden file beside the target, which is flushed to the disk and takes the target's name at the end; whatever
stops that before (an error, an interrupt, a full disk) removes it, and leaves an older target as it was.
"""

from __future__ import annotations

import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from refengine.errors import FormatError, OutputError, UnsupportedError
from refengine.loader.cursor import MAX_LENGTH
from refengine.loader.gguf import (
    ARRAY,
    DEFAULT_ALIGNMENT,
    MAX_ALIGNMENT,
    MAX_DIMENSIONS,
    MAX_ELEMENTS,
    MAX_KEY_BYTES,
    MAX_NAME_BYTES,
    NUMBERS,
    STRING,
    TENSOR_TYPES,
)
from refengine.loader.progress import Progress, QuietProgress
from refengine.quantizer.encodings import ENCODINGS

VERSION = 3

WritableValue: TypeAlias = str | bool | np.bool_ | np.number[Any] | NDArray[Any] | Sequence[str]
"""A metadata value that tells its own type: ``np.uint32(7)`` is stored as u32, an array by its dtype."""

Chunk: TypeAlias = bytes | NDArray[Any]
"""Consecutive bytes of a tensor."""


@dataclass(frozen=True, eq=False)
class OutgoingTensor:
    """A tensor to be written.

    Attributes:
        name: its name in the file, 1 to 63 bytes of UTF-8.
        shape: its shape in weights, the slowest axis first; rows, along the last axis, are whole blocks.
        encoding: a name in :data:`refengine.quantizer.ENCODINGS` for which GGUF has a type.
        chunks: its bytes in order, ``nbytes`` in all; asked for only when it is this tensor's turn.

    Raises:
        FormatError: GGUF cannot hold such a tensor; the text says why.
        UnsupportedError: GGUF has no type for the encoding.
    """

    name: str
    shape: tuple[int, ...]
    encoding: str
    chunks: Iterable[Chunk]

    def __post_init__(self) -> None:
        _text(self.name, f"tensor name {self.name!r}", MAX_NAME_BYTES)
        if self.encoding not in ENCODINGS:
            raise FormatError(f"tensor {self.name!r} has the unknown encoding {self.encoding!r}")
        if self.encoding not in TENSOR_TYPES:
            raise UnsupportedError(
                f"tensor {self.name!r} is stored as {self.encoding}, for which GGUF has no type; "
                f"write it in one that it has: {', '.join(e for e in ENCODINGS if e in TENSOR_TYPES)}"
            )
        if not 1 <= len(self.shape) <= MAX_DIMENSIONS or min(self.shape) < 0:
            problem = f"has the shape {list(self.shape)}, not 1 to {MAX_DIMENSIONS} sizes"
            raise FormatError(f"tensor {self.name!r} {problem}")
        if prod(max(size, 1) for size in self.shape) >= MAX_ELEMENTS:
            raise FormatError(f"tensor {self.name!r} has an impossible shape: {list(self.shape)}")
        if self.shape[-1] % (block := ENCODINGS[self.encoding].block_size):
            problem = f"has rows of {self.shape[-1]} weights, not whole blocks of {block}"
            raise FormatError(f"tensor {self.name!r} {problem}, as {self.encoding} asks for")

    @property
    def size(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return prod(self.shape[:-1]) * ENCODINGS[self.encoding].row_bytes(self.shape[-1])


def gguf_bytes(metadata: Mapping[str, WritableValue], tensors: Sequence[OutgoingTensor]) -> int:
    """How large the file will be, padding included. Raises FormatError as `write_gguf` does."""
    return len(_header(metadata, tensors)) + _data_bytes(tensors, _alignment(metadata))


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, WritableValue],
    tensors: Sequence[OutgoingTensor],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write a GGUF file of version 3, and return its size in bytes.

    Args:
        path: where it goes; its folder must be there.
        metadata: key -> value, written in order; ``general.alignment``, a u32, aligns the tensors (else 32).
        tensors: written in order, each asked for its bytes once.
        overwrite: replace a file that is there, once the new one is whole.
        progress: told of every chunk.

    Raises:
        FormatError: GGUF cannot hold a key, value or tensor, or a tensor brought too few or too many bytes.
        OutputError: the file exists, the disk has too little room, or it cannot be written. Too little room
            is told before the first byte, with how much is needed.
    """
    path = Path(path)
    header, alignment = _header(metadata, tensors), _alignment(metadata)
    n_bytes = len(header) + _data_bytes(tensors, alignment)
    _refuse_target(path, overwrite=overwrite)
    _require_space(path, n_bytes)
    progress = progress or QuietProgress()
    progress.start(path.name, n_bytes)
    try:
        with _replaced_at_end(path, overwrite=overwrite) as write:
            for piece in _pieces(header, tensors, alignment):
                write(piece)
                progress.advance(len(piece))
    finally:
        progress.finish()
    return n_bytes


def _pieces(header: bytes, tensors: Iterable[OutgoingTensor], alignment: int) -> Iterator[memoryview]:
    """The file's bytes in order; a tensor's bytes beyond its size are refused before they are given out."""
    yield memoryview(header)
    for tensor in tensors:
        missing = tensor.nbytes
        for chunk in tensor.chunks:
            piece = memoryview(chunk) if isinstance(chunk, bytes) else chunk.reshape(-1).view(np.uint8).data
            missing -= len(piece)
            if missing < 0:
                break
            yield piece
        if missing:
            brought = "more than" if missing < 0 else f"{tensor.nbytes - missing:,} of"
            raise FormatError(f"tensor {tensor.name!r} brought {brought} its {tensor.nbytes:,} bytes")
        yield memoryview(bytes(-tensor.nbytes % alignment))


def _data_bytes(tensors: Sequence[OutgoingTensor], alignment: int) -> int:
    return sum(tensor.nbytes + -tensor.nbytes % alignment for tensor in tensors)


def _header(metadata: Mapping[str, WritableValue], tensors: Sequence[OutgoingTensor]) -> bytes:
    """All that comes before the tensor data, padded."""
    alignment = _alignment(metadata)
    parts = [struct.pack("<4sIQQ", b"GGUF", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key, f"metadata key {key!r}", MAX_KEY_BYTES), *_value(key, value)]
    offset, names = 0, set[str]()
    for tensor in tensors:
        if tensor.name in names:
            raise FormatError(f"tensor name {tensor.name!r} occurs twice")
        names.add(tensor.name)
        dimensions = tuple(reversed(tensor.shape))
        parts += [
            _text(tensor.name, f"tensor name {tensor.name!r}", MAX_NAME_BYTES),
            struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions),
            struct.pack("<IQ", TENSOR_TYPES.index(tensor.encoding), offset),
        ]
        offset += tensor.nbytes + -tensor.nbytes % alignment
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment)


def _alignment(metadata: Mapping[str, WritableValue]) -> int:
    stored = metadata.get("general.alignment", np.uint32(DEFAULT_ALIGNMENT))
    if not isinstance(stored, np.uint32) or int(stored).bit_count() != 1 or stored > MAX_ALIGNMENT:
        raise FormatError(
            f"general.alignment must be a u32 (np.uint32), a power of two and at most {MAX_ALIGNMENT}, "
            f"but is {stored!r}"
        )
    return int(stored)


def _value(key: str, value: WritableValue) -> list[bytes]:
    """The type of a value and its bytes."""
    field = f"metadata key {key!r}"
    if isinstance(value, str):
        return [struct.pack("<I", STRING), _string(value, field)]
    if isinstance(value, bool | np.bool_ | np.number):
        scalar = np.asarray(value)
        return [struct.pack("<I", _number_type(scalar.dtype, field)), _little_endian(scalar)]
    if isinstance(value, np.ndarray):
        if value.ndim != 1 or value.size > MAX_LENGTH:
            raise FormatError(f"{field} is an array of shape {list(value.shape)}; GGUF has flat ones")
        return [
            struct.pack("<IIQ", ARRAY, _number_type(value.dtype, field), value.size),
            _little_endian(value),
        ]
    if isinstance(value, Sequence) and all(isinstance(text, str) for text in value):
        if len(value) > MAX_LENGTH:
            raise FormatError(f"{field} has {len(value)} strings, more than {MAX_LENGTH}")
        strings = (_string(text, field) for text in value)
        return [struct.pack("<IIQ", ARRAY, STRING, len(value)), *strings]
    raise FormatError(
        f"{field} is a {type(value).__name__}, which does not tell its type in the file: numbers are NumPy's "
        "(np.uint32(7)), arrays of numbers NumPy arrays, other arrays sequences of str"
    )


def _number_type(dtype: np.dtype[Any], field: str) -> int:
    for number, known in NUMBERS.items():
        if known == dtype.newbyteorder("<"):
            return number
    raise FormatError(f"{field} is of {dtype.name}, which GGUF does not have")


def _little_endian(value: NDArray[Any]) -> bytes:
    return value.astype(value.dtype.newbyteorder("<")).tobytes()


def _text(text: str, field: str, most: int) -> bytes:
    """A name as stored: not empty, without a zero byte, of bounded length."""
    stored = _string(text, field)
    if not text or "\0" in text or len(stored) - 8 > most:
        raise FormatError(f"{field} must have 1 to {most} bytes, and no zero byte")
    return stored


def _string(text: str, field: str) -> bytes:
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise FormatError(f"{field} has a lone surrogate, which UTF-8 does not have") from None
    if len(data) > MAX_LENGTH:
        raise FormatError(f"{field} has {len(data)} bytes of text, more than {MAX_LENGTH}")
    return struct.pack("<Q", len(data)) + data


def _refuse_target(path: Path, *, overwrite: bool) -> None:
    """OutputError unless ``path`` is free, or a file to be replaced, in a folder that is there."""
    with _told(path):
        if path.is_dir():
            raise OutputError(f"{path} is a folder: give the name of a file in it")
        if os.path.lexists(path):
            if path.exists() and not path.is_file():  # a device would be replaced, not written to
                raise OutputError(f"{path} is not a regular file, and is not replaced")
            if not overwrite:
                raise OutputError(f"{path} exists already, and is replaced only on request (--force)")
        if not path.parent.is_dir():
            raise OutputError(f"there is no folder {path.parent}: make it first")


def _require_space(path: Path, n_bytes: int) -> None:
    with _told(path):
        free = shutil.disk_usage(path.parent).free
    if n_bytes > free:
        raise OutputError(
            f"{path} takes {n_bytes:,} bytes, and its disk has {free:,} free; "
            f"free {n_bytes - free:,} more, or write to another disk"
        )


@contextmanager
def _replaced_at_end(path: Path, *, overwrite: bool) -> Iterator[Callable[[memoryview], None]]:
    """Gives what appends to a hidden file, which takes the name ``path`` at the end or is gone on failure."""
    hidden = path.with_name(f".{path.name[:20]}.{secrets.token_hex(4)}.partial")

    def write(piece: memoryview) -> None:
        with _told(path):
            while piece:  # without a buffer, whose rest would fail once more when the file is closed
                piece = piece[file.write(piece) :]

    try:
        with _told(path):
            file = hidden.open("xb", buffering=0)
        with file:
            yield write
            with _told(path):
                os.fsync(file.fileno())
        _refuse_target(path, overwrite=overwrite)  # it may have appeared meanwhile
        with _told(path):
            hidden.replace(path)
    except BaseException:
        with suppress(OSError, ValueError):  # where it could not even be made
            hidden.unlink()
        raise


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the system refuses becomes an OutputError."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OutputError(f"{path} cannot be written: {reason}; nothing was left behind") from error
