"""GGUF: one file with a model's metadata and its tensors, read through a memory map.

Source: the GGUF specification (``docs/gguf.md`` of ggml). All numbers are little-endian, and nothing before
the tensor data is aligned::

    file         header, key-values, tensor infos, zeros up to the alignment, tensor data
    header       "GGUF", version u32, number of tensors u64, number of key-values u64
    key-value    key string, type u32, value
    tensor info  name string, number of dimensions u32, dimensions u64 (fastest first), type u32, offset u64
    tensor data  each tensor at its offset, with zeros up to the alignment behind it
    string       length in bytes u64, UTF-8 without a final zero
    array        type of the elements u32, number of elements u64, elements

What is accepted is a subset of what llama.cpp accepts (``ggml/src/gguf.cpp``), and holds every file of one
model that it and gguf-py write. Refused here, though not there:

* what the specification forbids: text that is not UTF-8, booleans other than 0 and 1, keys over 65,535 bytes;
* names and keys with a zero byte, where C would end them, and tensors without a name;
* bytes behind the padding of the last tensor, so that nothing rides along unseen. They may also mean that
  every tensor lies elsewhere than the header says, as in a file padded to another alignment than declared;
* shapes that only a dimension of zero keeps from being absurd, and alignments over 2 MiB.

Padding is not inspected, since that would read the pages of tensor data.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from mmap import mmap
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from refengine.errors import FormatError, UnsupportedError
from refengine.loader.checkpoint import Checkpoint
from refengine.loader.cursor import Cursor
from refengine.loader.metadata import Metadata, Value
from refengine.quantizer.encodings import ENCODINGS
from refengine.quantizer.mapping import MappedFile
from refengine.quantizer.tensor import LazyTensor

VERSIONS = (2, 3)
MAX_KEY_BYTES = 65535
MAX_NAME_BYTES = 63  # GGML_MAX_NAME, less the zero that ends it
MAX_DIMENSIONS = 4
MAX_ELEMENTS = 2**60  # without the dimensions that are zero; sizes in bytes stay below 2**63
MIN_KEY_VALUE_BYTES = 8 + 1 + 4 + 1  # a key of one letter, a value of one byte
MIN_TENSOR_INFO_BYTES = 8 + 1 + 4 + 4 + 8  # a name of one letter, no dimensions
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 2**21  # a huge page: nothing gains from more

UINT32, STRING, ARRAY = 4, 8, 9
NUMBERS: Mapping[int, np.dtype[Any]] = MappingProxyType(
    dict(enumerate(map(np.dtype, ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))))
    | dict(enumerate(map(np.dtype, ("<u8", "<i8", "<f8")), ARRAY + 1))
)
"""The value types that are numbers or booleans, each with its dtype."""

TENSOR_TYPES = (
    *("f32", "f16", "q4_0", "q4_1", "", "", "q5_0", "q5_1"),  # 0 to 7
    *("q8_0", "q8_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_k"),
    *("iq2_xxs", "iq2_xs", "iq3_xxs", "iq1_s", "iq4_nl", "iq3_s", "iq2_s", "iq4_xs"),  # 16 to 23
    *("i8", "i16", "i32", "i64", "f64", "iq1_m", "bf16", ""),
    *("", "", "tq1_0", "tq2_0", "", "", "", "mxfp4"),  # 32 to 39
    *("nvfp4", "q1_0", "q2_0"),
)
"""The name of each tensor type (``ggml_type``), by number; empty where ggml has withdrawn it."""

FOREIGN_MAGIC = (
    (b"PK\x03\x04", "a zip archive (as PyTorch writes)"),
    (b"\x80", "a Python pickle"),
    (b"lmgg", "a GGML file, the predecessor of GGUF"),
    (b"fmgg", "a GGMF file, a predecessor of GGUF"),
    (b"tjgg", "a GGJT file, a predecessor of GGUF"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip file"),
    (b"version https://git-lfs", "a Git LFS pointer, in place of a file that was not downloaded"),
    (b"<", "a web page"),
)


def read_gguf(path: str | PathLike[str]) -> Checkpoint:
    """Opens a GGUF file of version 2 or 3; its tensors are mapped, not read.

    The file must not shrink while it is open: the operating system stops a process that reads mapped bytes
    which are gone.

    Raises:
        FormatError: the file cannot be read, or breaks the format; with the offset of the offending field.
            Time and memory until then are in proportion to the size of the file, whatever it declares.
        UnsupportedError: the file is big-endian, part of a split model, or holds a tensor in an encoding that
            is not implemented.
    """
    path = Path(path)
    return parse_gguf(_map(path), path)


def _map(path: Path) -> MappedFile:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for its writer
            raise FormatError("not a regular file", path=path)
        if status.st_size == 0:
            raise FormatError("the file is empty", path=path, offset=0)
        with path.open("rb") as file:
            return MappedFile.of(file)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise FormatError(f"the file cannot be read: {reason}", path=path) from error


def parse_gguf(data: mmap | bytes, path: Path) -> Checkpoint:
    """Reads the bytes of a GGUF file as `read_gguf` does; ``path`` is for errors and the checkpoint.

    Clauses: CKP-1, CKP-2, CKP-3, CKP-4, CKP-5, CKP-6, CKP-7, CKP-8, CKP-10, CKP-11.
    """
    cursor = Cursor(data, path)
    n_tensors, n_key_values = _read_header(cursor)
    metadata = _read_metadata(cursor, n_key_values)
    if (parts := metadata.integer("split.count", 1)) > 1:
        raise UnsupportedError(
            f"{path} is one of {parts} parts of a split model, which have to be merged before they are read: "
            "llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf"
        )
    tensors = _read_tensors(cursor, n_tensors, _alignment(metadata))
    return Checkpoint(path, "gguf", metadata, MappingProxyType(tensors), len(data))


def _read_header(cursor: Cursor) -> tuple[int, int]:
    """The number of tensors, and the number of key-values."""
    cursor.skip(4, "the magic number")
    head = cursor.data[:32]
    if not head.startswith(b"GGUF"):
        kinds = [kind for magic, kind in FOREIGN_MAGIC if head.startswith(magic)]
        if head[8:9] == b"{":  # behind the length of the header
            kinds = ["a safetensors file"]
        raise cursor.error(f"this is {kinds[0] if kinds else f'unknown ({head[:4]!r})'}, not GGUF", 0)
    version = cursor.integer(4, "the version")
    if int.from_bytes(head[4:8], "big") in VERSIONS:
        raise UnsupportedError(f"{cursor.path} is a big-endian GGUF file; only little-endian ones are read")
    if version not in VERSIONS:
        raise cursor.error(f"this is GGUF version {version}; versions 2 and 3 are read", 4)
    return (
        cursor.count("the number of tensors", MIN_TENSOR_INFO_BYTES),
        cursor.count("the number of key-values", MIN_KEY_VALUE_BYTES),
    )


def _read_metadata(cursor: Cursor, count: int) -> Metadata:
    values: dict[str, Value] = {}
    offsets: dict[str, int] = {}
    for index in range(count):
        start = cursor.position
        key = cursor.name(f"metadata key {index}", MAX_KEY_BYTES)
        if key in values:
            raise cursor.error(f"metadata key {key!r} occurs twice", start)
        value_type = cursor.integer(4, f"the type of {key!r}")
        if key == "general.alignment" and value_type != UINT32:
            raise cursor.error(f"{key!r} has type {value_type}, not {UINT32} (u32)", cursor.position - 4)
        offsets[key] = cursor.position
        values[key] = _read_value(cursor, value_type, repr(key))
    return Metadata(values, offsets=offsets, path=cursor.path)


def _read_value(cursor: Cursor, value_type: int, field: str) -> Value:
    if value_type in NUMBERS:
        value: Value = cursor.numbers(NUMBERS[value_type], 1, field).item()
        return value
    if value_type == STRING:
        return cursor.string(field)
    if value_type != ARRAY:
        raise cursor.error(f"{field} has the unknown type {value_type}", cursor.position - 4)
    element_type = cursor.integer(4, f"the type of the elements of {field}")
    length = f"the number of elements of {field}"
    if element_type in NUMBERS:
        dtype = NUMBERS[element_type]
        return cursor.numbers(dtype, cursor.count(length, dtype.itemsize), field)
    if element_type == STRING:
        return cursor.strings(cursor.count(length, 8), field)
    problem = "is an array of arrays" if element_type == ARRAY else f"has elements of type {element_type}"
    raise cursor.error(f"{field} {problem}; elements are numbers or strings", cursor.position - 4)


def _alignment(metadata: Metadata) -> int:
    key = "general.alignment"
    alignment = metadata.integer(key, DEFAULT_ALIGNMENT)
    if alignment.bit_count() != 1 or alignment > MAX_ALIGNMENT:
        raise metadata.error(key, f"must be a power of two, at most {MAX_ALIGNMENT}, but is {alignment}")
    return alignment


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    name: str
    shape: tuple[int, ...]  # slowest first: the dimensions of the file, reversed
    encoding: str
    data_shape: tuple[int, ...]  # [*shape[:-1], bytes of a row]
    offset: int  # from the start of the tensor data
    offset_field: int  # where the file says so


def _read_tensors(cursor: Cursor, count: int, alignment: int) -> dict[str, LazyTensor]:
    infos: dict[str, _TensorInfo] = {}
    data_bytes = 0
    for index in range(count):
        start = cursor.position
        info = _read_tensor_info(cursor, index)
        if info.name in infos:
            raise cursor.error(f"tensor name {info.name!r} occurs twice", start)
        if info.offset != data_bytes:
            raise cursor.error(
                f"tensor {info.name!r} has offset {info.offset}, but the data before it ends at {data_bytes}",
                info.offset_field,
            )
        data_bytes += _pad(prod(info.data_shape), alignment)
        infos[info.name] = info

    end, data_start = cursor.position, _pad(cursor.position, alignment)
    tensors: dict[str, LazyTensor] = {}
    for name, info in infos.items():
        start = data_start + info.offset
        end = start + prod(info.data_shape)
        if end > len(cursor.data):
            raise cursor.error(
                f"the file ends too early: tensor {name!r} takes the bytes from {start} to {end}",
                info.offset_field,
            )
        data = cursor.bytes[start:end].reshape(info.data_shape)
        tensors[name] = LazyTensor(name, info.shape, info.encoding, data)
    if (rest := len(cursor.data) - _pad(end, alignment)) > 0:
        raise cursor.error(f"{rest} bytes follow the end of the tensor data", _pad(end, alignment))
    return tensors


def _read_tensor_info(cursor: Cursor, index: int) -> _TensorInfo:
    name = cursor.name(f"the name of tensor {index}", MAX_NAME_BYTES)
    n_dimensions = cursor.integer(4, f"the number of dimensions of tensor {name!r}")
    if n_dimensions > MAX_DIMENSIONS:
        problem = f"tensor {name!r} has {n_dimensions} dimensions, more than {MAX_DIMENSIONS}"
        raise cursor.error(problem, cursor.position - 4)
    dimensions_field = cursor.position
    dimensions: list[int] = []
    for axis in range(n_dimensions):
        dimensions.append(cursor.integer(8, f"dimension {axis} of tensor {name!r}"))
        if prod(max(size, 1) for size in dimensions) >= MAX_ELEMENTS:
            raise cursor.error(f"tensor {name!r} has an impossible shape: {dimensions}", cursor.position - 8)

    number = cursor.integer(4, f"the type of tensor {name!r}")
    encoding_name = TENSOR_TYPES[number] if number < len(TENSOR_TYPES) else ""
    if not encoding_name:
        raise cursor.error(f"tensor {name!r} has the unknown or withdrawn type {number}", cursor.position - 4)
    if encoding_name not in ENCODINGS:
        raise UnsupportedError(
            f"tensor {name!r} of {cursor.path} is stored as {encoding_name}, which is not implemented; "
            f"implemented are {', '.join(e for e in ENCODINGS if e in TENSOR_TYPES)}"
        )
    encoding = ENCODINGS[encoding_name]
    shape = tuple(reversed(dimensions)) or (1,)  # to ggml too, no dimensions and one of size 1 are the same
    if shape[-1] % encoding.block_size:
        raise cursor.error(
            f"tensor {name!r} has rows of {shape[-1]} weights, not whole blocks of {encoding.block_size}",
            dimensions_field,
        )
    data_shape = (*shape[:-1], encoding.row_bytes(shape[-1]))
    offset_field = cursor.position
    offset = cursor.integer(8, f"the offset of tensor {name!r}")
    return _TensorInfo(name, shape, encoding.name, data_shape, offset, offset_field)


def _pad(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
