"""Faults of the loader."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from mmap import mmap
from pathlib import Path
from types import MappingProxyType

from refengine.backend.numpy_backend import NumpyBackend
from refengine.errors import FormatError
from refengine.loader.checkpoint import Checkpoint
from refengine.loader.gguf import parse_gguf
from refengine.quantizer import LazyTensor
from refengine_conformance.faults.fault import Fault
from refengine_conformance.subject import Subject

Bytes = bytes | mmap


def _loader(parse: Callable[[Bytes, Path], Checkpoint]) -> Callable[[], Subject]:
    return partial(Subject, NumpyBackend, parse=parse)


def _any_version(data: Bytes, path: Path) -> Checkpoint:
    return (
        parse_gguf(data[:4] + struct.pack("<I", 3) + data[8:], path)
        if data[:4] == b"GGUF"
        else parse_gguf(data, path)
    )


def _lenient_booleans(data: Bytes, path: Path) -> Checkpoint:
    try:
        return parse_gguf(data, path)
    except FormatError as error:
        if "boolean" not in str(error) or error.offset is None:
            raise
        return _lenient_booleans(data[: error.offset] + b"\1" + data[error.offset + 1 :], path)


def _last_of_two_wins(data: Bytes, path: Path) -> Checkpoint:
    try:
        return parse_gguf(data, path)
    except FormatError as error:
        if "occurs twice" not in str(error):
            raise
        return parse_gguf(struct.pack("<4sIQQ", b"GGUF", 3, 0, 0), path)


def _always_32(data: Bytes, path: Path) -> Checkpoint:
    return parse_gguf(bytes(data).replace(b"general.alignment", b"general.alignmenu"), path)


def _believed_offsets(data: Bytes, path: Path) -> Checkpoint:
    try:
        return parse_gguf(data, path)
    except FormatError as error:
        if "has offset" not in str(error) or error.offset is None:
            raise
        believed = int(str(error).split("ends at ")[1].split()[0])
        at = error.offset
        return _believed_offsets(data[:at] + struct.pack("<Q", believed) + data[at + 8 :], path)


def _stored_order(data: Bytes, path: Path) -> Checkpoint:
    checkpoint = parse_gguf(data, path)
    turned = {
        name: LazyTensor(name, t.shape[::-1], t.encoding, t.data.reshape(*t.shape[::-1][:-1], -1))
        if t.encoding == "f32"
        else t
        for name, t in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=MappingProxyType(turned))


def _trailing_bytes(data: Bytes, path: Path) -> Checkpoint:
    try:
        return parse_gguf(data, path)
    except FormatError as error:
        if "follow the end" not in str(error) or error.offset is None:
            raise
        return parse_gguf(data[: error.offset], path)


def _bare_errors(data: Bytes, path: Path) -> Checkpoint:
    try:
        return parse_gguf(data, path)
    except FormatError as error:
        raise FormatError("the file is damaged", path=path) from error


def _allocates_first(data: Bytes, path: Path) -> Checkpoint:
    declared = struct.unpack("<Q", data[8:16].ljust(8, b"\0"))[0]
    if 2**24 <= declared < 2**26:
        bytearray(declared * 8)  # a table with a place for every tensor
    return parse_gguf(data, path)


def _reads_at_once(data: Bytes, path: Path) -> Checkpoint:
    return parse_gguf(bytes(data), path)


def _foreign_is_damaged(data: Bytes, path: Path) -> Checkpoint:
    try:
        return parse_gguf(data, path)
    except Exception as error:
        raise FormatError("unknown tensor type", path=path, offset=0) from error


def _drops_unknown(data: Bytes, path: Path) -> Checkpoint:
    checkpoint = parse_gguf(data, path)
    known = {name: t for name, t in checkpoint.tensors.items() if ".x" not in name and name[0] != "x"}
    return replace(checkpoint, tensors=MappingProxyType(known))


FAULTS: tuple[Fault, ...] = (
    Fault("any version is read", "CKP-1", "The field was thought to be informative.", _loader(_any_version)),
    Fault(
        "a boolean over 1 is true",
        "CKP-2",
        "C's idea of a boolean; and another reader takes the lowest bit.",
        _loader(_lenient_booleans),
    ),
    Fault(
        "a key may occur twice",
        "CKP-3",
        "Two readers, one of which keeps the first value and one the last, see two models in a file.",
        _loader(_last_of_two_wins),
    ),
    Fault(
        "the alignment is always 32",
        "CKP-4",
        "Almost every file has this alignment, so that nobody notices.",
        _loader(_always_32),
    ),
    Fault(
        "declared offsets are not looked at",
        "CKP-5",
        "The running sum is right for every file of one's own.",
        _loader(_believed_offsets),
    ),
    Fault(
        "dimensions in stored order",
        "CKP-6",
        "ggml's ne taken for NumPy's shape.",
        _loader(_stored_order),
    ),
    Fault(
        "trailing bytes are ignored",
        "CKP-7",
        "Whatever is not asked for is not looked at.",
        _loader(_trailing_bytes),
    ),
    Fault(
        "errors without a place",
        "CKP-8",
        "A catch-all around the parser that means well.",
        _loader(_bare_errors),
    ),
    Fault(
        "a table for the declared number of tensors",
        "CKP-9",
        "The pattern behind the heap overflows found in GGUF readers in 2024.",
        _loader(_allocates_first),
    ),
    Fault(
        "the file is read when it is opened",
        "CKP-10",
        "read() in place of a memory map.",
        _loader(_reads_at_once),
    ),
    Fault(
        "a new encoding passes for damage",
        "CKP-11",
        "One error for whatever the table of types lacks sends its user to download the file again.",
        _loader(_foreign_is_damaged),
    ),
    Fault(
        "tensors without a role are dropped",
        "CKP-12",
        "A loader that asks for the names it knows, and runs a model that lacks its biases.",
        _loader(_drops_unknown),
    ),
)
