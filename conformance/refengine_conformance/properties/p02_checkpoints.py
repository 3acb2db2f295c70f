"""Chapter *Checkpoints*: files packed by hand, field by field."""

from __future__ import annotations

import math
import struct
import tracemalloc
from collections.abc import Mapping
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refengine.errors import FormatError, RefengineError, UnsupportedError
from refengine.loader.checkpoint import Checkpoint
from refengine.models import build
from refengine_conformance.registry import holds
from refengine_conformance.subject import Subject

PATH = Path("drawn.gguf")

U32, STRING, ARRAY = 4, 8, 9


def integers(letter: str) -> tuple[st.SearchStrategy[Any], str]:
    """All that ``struct`` packs as this letter."""
    bits, signed = 8 * struct.calcsize(letter), letter.islower()
    return st.integers(-(2 ** (bits - 1)) if signed else 0, 2 ** (bits - signed) - 1), letter


VALUES: Mapping[int, tuple[st.SearchStrategy[Any], str]] = MappingProxyType(
    {
        **{
            code: integers(letter)
            for code, letter in zip((0, 1, 2, 3, 4, 5, 10, 11), "BbHhIiQq", strict=True)
        },
        6: (st.floats(width=32, allow_nan=False), "f"),
        7: (st.booleans(), "?"),
        STRING: (st.text(max_size=5), ""),
        12: (st.floats(allow_nan=False), "d"),
    }
)
"""Metadata types, with their values and their letters in ``struct``."""

F32 = 0
IMPLEMENTED = {
    **{0: (1, 4), 1: (1, 2), 30: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210)},
    **{20: (32, 18), 23: (256, 136), 39: (32, 17)},
}
"""Tensor types, with the weights and bytes of a block."""
WITHDRAWN = (4, 5, 31, 32, 33, 36, 37, 38)
FOREIGN = {9: "q8_1", 15: "q8_k", 16: "iq2_xxs", 19: "iq1_s", 24: "i8", 26: "i32", 28: "f64", 34: "tq1_0"}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: its dimensions as stored, and where it claims to lie, if not where it does."""

    name: str
    dimensions: tuple[int, ...]
    data: bytes
    code: int = F32
    offset: int | None = None


def string(text: str | bytes) -> bytes:
    """Its length and its bytes."""
    encoded = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(encoded)) + encoded


def key_value(key: str, code: int, value: bytes) -> bytes:
    """One piece of metadata."""
    return string(key) + struct.pack("<I", code) + value


def padding(size: int, alignment: int) -> int:
    """Bytes from ``size`` to the next multiple of the alignment."""
    return -size % alignment


def gguf(
    key_values: list[bytes], tensors: list[Tensor], *, alignment: int = 32, version: int = 3, end: bool = True
) -> bytes:
    """A file; with padding behind the last tensor, or without."""
    infos, data = b"", b""
    for tensor in tensors:
        data += bytes(padding(len(data), alignment))
        offset = len(data) if tensor.offset is None else tensor.offset
        count = len(tensor.dimensions)
        infos += string(tensor.name)
        infos += struct.pack(f"<I{count}QIQ", count, *tensor.dimensions, tensor.code, offset)
        data += tensor.data
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(key_values))
    head += b"".join(key_values) + infos
    file = head + bytes(padding(len(head), alignment)) + data if tensors else head
    return file + bytes(padding(len(file), alignment)) if end else file


@st.composite
def tensors(draw: st.DrawFn, least: int = 1) -> list[Tensor]:
    """F32 tensors of small shapes, their weights numbered through."""
    drawn: list[Tensor] = []
    for number in range(draw(st.integers(least, 4))):
        dimensions = tuple(draw(st.lists(st.integers(1, 4), max_size=4)))
        size = math.prod(dimensions)
        drawn.append(Tensor(f"tensor.{number}", dimensions, struct.pack(f"<{size}f", *range(size))))
    return drawn


def check_place(error: FormatError, file: bytes | mmap) -> None:
    """The error names the file, and an offset in it."""
    assert error.path == PATH, f"the error is said to be in {error.path}"
    assert error.offset in range(len(file) + 1), f"the error is said to be at {error.offset} of {len(file)}"


def opened(subject: Subject, file: bytes | mmap) -> Checkpoint:
    """A file that nothing is wrong with."""
    try:
        return subject.parse(file, PATH)
    except RefengineError as error:
        raise AssertionError(f"a file without fault was refused: {error}") from error


def refusal(subject: Subject, file: bytes | mmap, kind: type[RefengineError] = FormatError) -> Any:
    """The error of this kind with which a file is refused."""
    try:
        subject.parse(file, PATH)
    except RefengineError as error:
        if not isinstance(error, kind):
            raise AssertionError(f"refused with a {type(error).__name__}: {error}") from error
        if isinstance(error, FormatError):
            check_place(error, file)
        return error
    raise AssertionError("the file was opened")


@holds("CKP-1", "loader")
def a_file_begins_with_magic_and_version(subject: Subject, data: st.DataObject) -> None:
    """Versions 2 and 3 are read alike, the others and foreign files refused at the byte that tells."""
    contents = data.draw(tensors())
    version = data.draw(st.sampled_from([2, 3]))
    assert list(opened(subject, gguf([], contents, version=version)).tensors) == [t.name for t in contents]
    other = data.draw(st.integers(0, 2**32 - 1).filter(lambda v: v not in (2, 3, 2 << 24, 3 << 24)))
    assert refusal(subject, gguf([], contents, version=other)).offset == 4
    refusal(subject, gguf([], contents, version=version << 24), UnsupportedError)
    magic = data.draw(st.binary(min_size=4, max_size=4).filter(lambda m: m != b"GGUF"))
    assert refusal(subject, magic + gguf([], contents)[4:]).offset == 0


@holds("CKP-2", "loader")
def values_come_back_as_they_were_written(subject: Subject, data: st.DataObject) -> None:
    """Alone and in arrays, in order, whatever stands beside them."""
    written: dict[str, Any] = {}
    packed = []
    for number in range(data.draw(st.integers(1, 5))):
        code, (one, letter) = data.draw(st.sampled_from(sorted(VALUES.items())))
        values = data.draw(st.lists(one, max_size=4))
        elements = [struct.pack(f"<{letter}", v) if letter else string(v) for v in values]
        key = f"key.{number}"
        if len(values) == 1:
            written[key] = values[0]
            packed.append(key_value(key, code, elements[0]))
        else:
            written[key] = values
            head = struct.pack("<IQ", code, len(values))
            packed.append(key_value(key, ARRAY, head + b"".join(elements)))
    metadata: Any = opened(subject, gguf(packed, [])).metadata
    found = {k: metadata[k].tolist() if isinstance(written[k], list) else metadata[k] for k in metadata}
    assert list(found.items()) == list(written.items()), f"{found} was {written}"
    assert list(map(type, found.values())) == list(map(type, written.values())), f"{found} was {written}"


@holds("CKP-2", "loader")
def other_types_are_refused_where_they_stand(subject: Subject, data: st.DataObject) -> None:
    """Unknown types, arrays of arrays, and booleans that are neither."""
    unknown = data.draw(st.integers(13, 2**32 - 1))
    element = data.draw(st.sampled_from([ARRAY, 13, 200]))
    at = 24 + 8 + len("key")  # of the type
    assert refusal(subject, gguf([key_value("key", unknown, bytes(8))], [])).offset == at
    nested = key_value("key", ARRAY, struct.pack("<IQ", element, 1) + bytes(12))
    assert refusal(subject, gguf([nested], [])).offset == at + 4
    neither = bytes([data.draw(st.integers(2, 255))])
    assert refusal(subject, gguf([key_value("key", 7, neither)], [])).offset == at + 4
    second = key_value("key", ARRAY, struct.pack("<IQ", 7, 3) + b"\1" + neither + b"\0")
    assert refusal(subject, gguf([second], [])).offset == at + 4 + 12 + 1


@holds("CKP-3", "loader")
def keys_and_names_are_unique(subject: Subject, data: st.DataObject) -> None:
    """A second one of the same letters is refused where it stands, wherever that is."""
    others = data.draw(st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1, max_size=5))
    twice = data.draw(st.permutations([*others, data.draw(st.sampled_from(others))]))
    values = [key_value(name, 0, b"\7") for name in twice]
    refusal(subject, gguf(values, []))
    assert list(opened(subject, gguf([key_value(name, 0, b"\7") for name in others], [])).metadata) == others
    refusal(subject, gguf([], [Tensor(name, (1,), bytes(4)) for name in twice]))


@holds("CKP-3", "loader")
def keys_and_names_are_of_bounded_length(subject: Subject, data: st.DataObject) -> None:
    """From one byte to the most; without zero bytes; in UTF-8."""
    size = data.draw(st.sampled_from([1, 2, 63, 64, 65535]))
    assert list(opened(subject, gguf([key_value("k" * size, 0, b"\7")], [])).metadata) == ["k" * size]
    named = gguf([], [Tensor("t" * min(size, 63), (1,), bytes(4))])
    assert list(opened(subject, named).tensors) == ["t" * min(size, 63)]
    wrong = data.draw(st.sampled_from(["", "a\0b", "\0", "é" * 32, "t" * 64]))
    refusal(subject, gguf([], [Tensor(wrong, (1,), bytes(4))]))
    if "\0" in wrong or not wrong:
        refusal(subject, gguf([key_value(wrong, 0, b"\7")], []))
    refusal(subject, gguf([key_value("k" * 65536, 0, b"\7")], []))
    broken = gguf([key_value("key", 0, b"\7")], []).replace(b"key", b"k\xffy")
    assert refusal(subject, broken).offset == 24 + 8 + 1


@holds("CKP-4", "loader")
def data_begins_at_the_alignment(subject: Subject, data: st.DataObject) -> None:
    """At any power of two, with anything in the padding; other alignments are refused."""
    contents = data.draw(tensors())
    alignment = 2 ** data.draw(st.integers(0, 12))
    fill = data.draw(st.binary(min_size=1, max_size=8))
    declared = key_value("general.alignment", U32, struct.pack("<I", alignment))
    file = bytearray(gguf([declared], contents, alignment=alignment))
    heads = sum(8 + len(t.name) + 4 + 8 * len(t.dimensions) + 12 for t in contents)
    end = 24 + len(declared) + heads
    gap = padding(end, alignment)
    file[end : end + gap] = (fill * gap)[:gap]
    check_weights(opened(subject, bytes(file)), contents)

    wrong = data.draw(st.sampled_from([0, 3, 24, 33, 2**22, 2**31, 2**32 - 1]))
    refusal(subject, gguf([key_value("general.alignment", U32, struct.pack("<I", wrong))], contents))
    refusal(subject, gguf([key_value("general.alignment", 10, struct.pack("<Q", 32))], contents))


@holds("CKP-5", "loader")
def offsets_are_the_padded_sum(subject: Subject, data: st.DataObject) -> None:
    """Each tensor's bytes are found behind the ones before it; any other offset is refused at its field."""
    contents = data.draw(tensors(least=2))
    check_weights(opened(subject, gguf([], contents)), contents)
    moved = data.draw(st.integers(0, len(contents) - 1))
    before = sum(len(t.data) + padding(len(t.data), 32) for t in contents[:moved])
    wrong = data.draw(st.sampled_from([0, 4, 32, 64, before + 1, before + 32, max(before - 32, 1), 2**63]))
    if wrong != before:
        tensor = contents[moved]
        contents[moved] = Tensor(tensor.name, tensor.dimensions, tensor.data, offset=wrong)
        heads = (8 + len(t.name) + 4 + 8 * len(t.dimensions) + 12 for t in contents[: moved + 1])
        assert refusal(subject, gguf([], contents)).offset == 24 + sum(heads) - 8


@holds("CKP-6", "loader")
def shapes_are_dimensions_reversed(subject: Subject, data: st.DataObject) -> None:
    """The weight at an index is the one that many rows, and columns, further on."""
    dimensions = data.draw(st.lists(st.integers(1, 5), max_size=4))
    size = math.prod(dimensions)
    stored = struct.pack(f"<{size}f", *range(size))
    tensor = opened(subject, gguf([], [Tensor("t", tuple(dimensions), stored)])).tensors["t"]
    assert tensor.shape == (tuple(reversed(dimensions)) or (1,))
    weights = tensor.decode()
    for index in np.ndindex(*tensor.shape):
        number = 0
        for i, length in zip(index, tensor.shape, strict=True):
            number = number * length + i
        assert weights[index] == number, f"{weights[index]} at {index}, expected {number}"


@holds("CKP-6", "loader")
def impossible_shapes_are_refused(subject: Subject, data: st.DataObject) -> None:
    """Five dimensions, rows that cut a block, and products beyond 2^60 even where a zero hides them."""
    code = data.draw(st.sampled_from([t for t, (weights, _) in IMPLEMENTED.items() if weights > 1]))
    weights, size = IMPLEMENTED[code]
    cut = data.draw(st.integers(1, 2 * weights).filter(lambda n: n % weights))
    refusal(subject, gguf([], [Tensor("t", (cut, weights), bytes(cut * size), code)]))
    refusal(subject, gguf([], [Tensor("t", (1,) * 5, bytes(4))]))
    huge = data.draw(st.sampled_from([(2**60,), (2**32, 2**32), (0, 2**62), (2**20, 2**20, 0, 2**20)]))
    refusal(subject, gguf([], [Tensor("t", huge, b"")]))


@holds("CKP-7", "loader")
def a_file_ends_with_its_padding(subject: Subject, data: st.DataObject) -> None:
    """With the last tensor or its padding, or anything between; no byte earlier or later."""
    contents = data.draw(tensors(least=0))
    least, most = gguf([], contents, end=False), gguf([], contents)
    size = data.draw(st.integers(len(least), len(most)))
    assert opened(subject, most[:size]).file_bytes == size
    beyond = data.draw(st.binary(min_size=1, max_size=40))
    assert refusal(subject, most + beyond).offset == len(most)
    refusal(subject, most[: data.draw(st.integers(0, len(least) - 1))])


@holds("CKP-8", "loader")
def any_bytes_are_opened_or_refused(subject: Subject, data: st.DataObject) -> None:
    """A file with some bytes changed, and perhaps cut: no other error, and its place is in the file."""
    values = [
        key_value("general.alignment", U32, struct.pack("<I", 32)),
        key_value("text", STRING, string("abc")),
    ]
    values.append(key_value("list", ARRAY, struct.pack("<IQ", STRING, 2) + string("a") + string("b")))
    file = bytearray(gguf(values, data.draw(tensors())))
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(file[: data.draw(st.integers(0, len(file)))] if data.draw(st.booleans()) else file)
    try:
        subject.parse(damaged, PATH)
    except FormatError as error:
        check_place(error, damaged)
    except UnsupportedError:
        pass


@holds("CKP-8", "loader")
def a_cut_field_is_told_by_its_beginning(subject: Subject, data: st.DataObject) -> None:
    """A file that ends within its header, or within its only value."""
    empty, one = gguf([], [], end=False), gguf([key_value("key", 10, bytes(8))], [], end=False)
    cut = data.draw(st.integers(0, len(empty) - 1))
    assert refusal(subject, empty[:cut]).offset == max(field for field in (0, 4, 8, 16) if field <= cut)
    value = len(one) - 8
    assert refusal(subject, one[: data.draw(st.integers(value, len(one) - 1))]).offset == value


@holds("CKP-9", "loader")
def memory_follows_the_bytes_that_are_there(subject: Subject, data: st.DataObject) -> None:
    """A declared number, from 2^24 on, costs the loader less than a byte for each thing declared."""
    declared = data.draw(st.sampled_from([2**24, 2**28, 2**30, 2**31, 2**40, 2**61, 2**63, 2**64 - 1]))
    number, element = struct.pack("<Q", declared), data.draw(st.sampled_from([0, 5, 7, STRING, 10, 12]))
    header, key = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1), string("key")
    file = data.draw(
        st.sampled_from(
            [
                struct.pack("<4sI", b"GGUF", 3) + number + bytes(8),  # tensors
                struct.pack("<4sIQ", b"GGUF", 3, 0) + number,  # key-values
                header + number + b"k",  # the length of a key
                header + key + struct.pack("<I", STRING) + number + b"text",
                header + key + struct.pack("<II", ARRAY, element) + number,
                header + key + struct.pack("<IIQ", ARRAY, STRING, 1) + number,
                gguf([], [Tensor("t", (declared,), b"")]),
                gguf([], [Tensor("t", (1, declared), b"")]),
            ]
        )
    )
    file += bytes(data.draw(st.integers(0, 64)))
    tracemalloc.start()
    try:
        refusal(subject, file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < declared, f"{peak} bytes were allocated for {declared} things that are not there"


@holds("CKP-10", "loader")
def tensors_are_read_when_asked_for(subject: Subject, data: st.DataObject) -> None:
    """Weights written into the file's memory after it was opened are the weights that are found."""
    contents = data.draw(tensors())
    blank = gguf([], [Tensor(t.name, t.dimensions, b"\xff" * len(t.data)) for t in contents])
    memory = mmap(-1, len(blank))
    memory[:] = blank
    checkpoint = opened(subject, memory)
    memory[:] = gguf([], contents)
    check_weights(checkpoint, contents)


@holds("CKP-10", "loader")
def strings_are_decoded_when_asked_for(subject: Subject, data: st.DataObject) -> None:
    """In an array, a string that is not UTF-8 is no obstacle until it is reached; then its place is told."""
    before = data.draw(st.lists(st.text(max_size=3), max_size=3))
    strings = b"".join(map(string, before)) + string(b"ab\xff")
    stored = key_value("key", ARRAY, struct.pack("<IQ", STRING, len(before) + 1) + strings)
    found: Any = opened(subject, gguf([stored], [])).metadata["key"]
    assert [found[i] for i in range(len(before))] == before
    try:
        found[len(before)]
    except FormatError as error:
        place = error.offset
    else:
        raise AssertionError("bytes that are not UTF-8 were taken for text")
    assert place == 24 + len(stored) - 1


@holds("CKP-11", "loader")
def tensor_types_are_implemented_or_refused_by_name(subject: Subject, data: st.DataObject) -> None:
    """Each type that is implemented opens with its sizes; of the others, ggml's own are unsupported."""
    code, (weights, size) = data.draw(st.sampled_from(sorted(IMPLEMENTED.items())))
    rows = data.draw(st.integers(1, 3))
    stored = Tensor("t", (2 * weights, rows), bytes(2 * size * rows), code)
    tensor = opened(subject, gguf([], [stored])).tensors["t"]
    assert (tensor.shape, tensor.nbytes) == ((rows, 2 * weights), 2 * size * rows)
    number, name = data.draw(st.sampled_from(sorted(FOREIGN.items())))
    message = str(
        refusal(subject, gguf([], [Tensor("odd one", (256,), bytes(512), number)]), UnsupportedError)
    )
    assert "odd one" in message, f"the tensor is not named: {message}"
    assert name in message.lower(), f"{name} is not named: {message}"
    unknown = data.draw(st.sampled_from(WITHDRAWN) | st.integers(1000, 2**32 - 1))
    refusal(subject, gguf([], [Tensor("t", (256,), bytes(512), unknown)]))


@holds("CKP-12", "loader", "model")
def what_nobody_uses_is_refused(subject: Subject, data: st.DataObject) -> None:
    """A model builds; with one hyper-parameter or tensor more, less or of another shape, it does not."""
    values, contents = tiny_llama()
    assert set(build(opened(subject, gguf(values, contents))).weights) >= {
        "token_embedding",
        "layers.0.q",
    }
    name = data.draw(st.text("abcdefghij_.", min_size=1, max_size=10))
    check_refused(
        subject, [*values, key_value(f"llama.x{name}", 6, struct.pack("<f", 1.0))], contents, f"llama.x{name}"
    )
    extra = data.draw(st.sampled_from([f"x{name}", f"blk.0.x{name}", f"x{name}.weight"]))
    check_refused(subject, values, [*contents, Tensor(extra, (4,), bytes(16))], extra)
    at = data.draw(st.integers(0, len(contents) - 1))
    check_refused(subject, values, contents[:at] + contents[at + 1 :], "", FormatError)
    first, *others = contents[at].dimensions
    wider = Tensor(contents[at].name, (first + 1, *others), bytes(4 * (first + 1) * math.prod(others)))
    check_refused(subject, values, [*contents[:at], wider, *contents[at + 1 :]], "", FormatError)


def check_refused(
    subject: Subject,
    values: list[bytes],
    contents: list[Tensor],
    name: str,
    kind: type[RefengineError] = UnsupportedError,
) -> None:
    """The file opens, but makes no model, and the error names the reason."""
    checkpoint = opened(subject, gguf(values, contents))
    try:
        build(checkpoint)
    except kind as error:
        message = str(error)
    else:
        raise AssertionError(f"a model was built, in spite of {name or 'a tensor'}")
    assert name in message, f"{name!r} is not named: {message}"


def check_weights(checkpoint: Checkpoint, contents: list[Tensor]) -> None:
    """The names are in order, and each tensor's weights are its own."""
    assert list(checkpoint.tensors) == [tensor.name for tensor in contents]
    for tensor in contents:
        weights = checkpoint.tensors[tensor.name].decode().astype("<f4")
        assert weights.tobytes() == tensor.data, f"{tensor.name} has the weights {weights.tolist()}"


def tiny_llama() -> tuple[list[bytes], list[Tensor]]:
    """A model of one layer, four wide, all of whose weights are zero."""
    counts = {"block_count": 1, "embedding_length": 4, "context_length": 8, "feed_forward_length": 6}
    values = [key_value("general.architecture", STRING, string("llama"))]
    for name, count in (counts | {"attention.head_count": 2}).items():
        values.append(key_value(f"llama.{name}", U32, struct.pack("<I", count)))
    values.append(key_value("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)))
    matrices: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("attn_q", "attn_k", "attn_v", "attn_output"), (4, 4)
    )
    matrices |= {
        "ffn_gate": (4, 6),
        "ffn_up": (4, 6),
        "ffn_down": (6, 4),
        "attn_norm": (4,),
        "ffn_norm": (4,),
    }
    shapes = {f"blk.0.{name}.weight": shape for name, shape in matrices.items()}
    shapes |= {"token_embd.weight": (4, 5), "output_norm.weight": (4,)}
    return values, [Tensor(name, shape, bytes(4 * math.prod(shape))) for name, shape in shapes.items()]
