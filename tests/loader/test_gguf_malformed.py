"""A malformed GGUF file is one `FormatError` that points at the damage, soon and in little memory."""

from __future__ import annotations

import struct
import sys
import tracemalloc
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.errors import FormatError, UnsupportedError
from refengine.loader.checkpoint import Checkpoint
from refengine.loader.gguf import parse_gguf, read_gguf
from refengine.loader.metadata import StringArray

U8, BOOL, STRING, ARRAY, U32, F32, U64 = 0, 7, 8, 9, 4, 6, 10

MEMORY_PER_BYTE = 32
"""Memory a file may cost for each of its bytes: one of nothing but empty arrays costs about 18."""
MEMORY_CONSTANT = 64 * 2**10
CALLS_PER_BYTE = 4
CALLS_CONSTANT = 1000


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def text(data: bytes) -> bytes:
    return u64(len(data)) + data


# ---- a valid file, field by field -----------------------------------------------------------------------

PAD = None
"""Stands for zeros up to the next multiple of the alignment, 32."""

FIELDS: dict[str, bytes | None] = {
    "magic": b"GGUF",
    "version": u32(3),
    "tensor count": u64(4),
    "key-value count": u64(8),
    "name: key length": u64(12),
    "name: key": b"general.name",
    "name: type": u32(STRING),
    "name: length": u64(5),
    "name: text": "caf\u00e9".encode(),
    "alignment: key length": u64(17),
    "alignment: key": b"general.alignment",
    "alignment: type": u32(U32),
    "alignment: value": u32(32),
    "big: key length": u64(3),
    "big: key": b"big",
    "big: type": u32(U64),
    "big: value": u64(2**64 - 1),
    "flag: key length": u64(4),
    "flag: key": b"flag",
    "flag: type": u32(BOOL),
    "flag: value": b"\1",
    "flags: key length": u64(5),
    "flags: key": b"flags",
    "flags: type": u32(ARRAY),
    "flags: element type": u32(BOOL),
    "flags: count": u64(3),
    "flags: elements": b"\1\0\1",
    "numbers: key length": u64(7),
    "numbers: key": b"numbers",
    "numbers: type": u32(ARRAY),
    "numbers: element type": u32(U64),
    "numbers: count": u64(2),
    "numbers: elements": u64(1) + u64(2**63),
    "tokens: key length": u64(6),
    "tokens: key": b"tokens",
    "tokens: type": u32(ARRAY),
    "tokens: element type": u32(STRING),
    "tokens: count": u64(3),
    "tokens: 0 length": u64(5),
    "tokens: 0 text": b"hello",
    "tokens: 1 length": u64(0),
    "tokens: 1 text": b"",
    "tokens: 2 length": u64(4),
    "tokens: 2 text": "\U0001f600".encode(),
    "empty: key length": u64(5),
    "empty: key": b"empty",
    "empty: type": u32(ARRAY),
    "empty: element type": u32(F32),
    "empty: count": u64(0),
    "q: name length": u64(1),
    "q: name": b"q",
    "q: dimension count": u32(2),
    "q: dimension 0": u64(64),
    "q: dimension 1": u64(2),
    "q: type": u32(8),  # q8_0, blocks of 32 weights in 34 bytes
    "q: offset": u64(0),
    "f: name length": u64(1),
    "f: name": b"f",
    "f: dimension count": u32(1),
    "f: dimension 0": u64(3),
    "f: type": u32(0),  # f32
    "f: offset": u64(160),
    "z: name length": u64(1),
    "z: name": b"z",
    "z: dimension count": u32(3),
    "z: dimension 0": u64(5),
    "z: dimension 1": u64(0),
    "z: dimension 2": u64(7),
    "z: type": u32(1),  # f16
    "z: offset": u64(192),
    "s: name length": u64(1),
    "s: name": b"s",
    "s: dimension count": u32(0),
    "s: type": u32(0),
    "s: offset": u64(192),
    "padding": PAD,
    "q: data": bytes(range(136)),
    "q: padding": PAD,
    "f: data": struct.pack("<3f", 1.0, 2.0, 3.0),
    "f: padding": PAD,
    "s: data": struct.pack("<f", 4.0),
    "s: padding": PAD,
}


def assemble(changes: Mapping[str, bytes] | None = None) -> tuple[bytes, dict[str, int]]:
    """The bytes of the file with some fields replaced, and where each field begins."""
    data, starts = bytearray(), {}
    for field, content in {**FIELDS, **(changes or {})}.items():
        starts[field] = len(data)
        data += bytes(-len(data) % 32) if content is PAD else content
    return bytes(data), starts


def parse(data: bytes) -> Checkpoint:
    return parse_gguf(data, Path("model.gguf"))


def test_the_valid_file_is_valid() -> None:
    """The file that the tests below break is read in full, field by field."""
    checkpoint = parse(assemble()[0])
    metadata, tensors = checkpoint.metadata, checkpoint.tensors
    plain = {k: v.tolist() if isinstance(v, StringArray | np.ndarray) else v for k, v in metadata.items()}
    assert plain == {
        "general.name": "caf\u00e9",
        "general.alignment": 32,
        "big": 2**64 - 1,
        "flag": True,
        "flags": [True, False, True],
        "numbers": [1, 2**63],
        "tokens": ["hello", "", "\U0001f600"],
        "empty": [],
    }
    assert {name: (tensor.encoding, tensor.shape) for name, tensor in tensors.items()} == {
        "q": ("q8_0", (2, 64)),
        "f": ("f32", (3,)),
        "z": ("f16", (7, 0, 5)),
        "s": ("f32", (1,)),
    }
    assert tensors["q"].data.tobytes() == bytes(range(136))
    assert tensors["f"].decode().tolist() == [1.0, 2.0, 3.0]
    assert tensors["z"].decode().shape == (7, 0, 5)
    assert tensors["s"].decode().tolist() == [4.0]


def test_values_know_their_offsets() -> None:
    """The offset of a key is that of its value: behind the type."""
    data, starts = assemble()
    metadata = parse(data).metadata
    for key, field in {
        "general.name": "name: length",
        "big": "big: value",
        "flags": "flags: element type",
        "tokens": "tokens: element type",
    }.items():
        assert metadata.offset(key) == starts[field]


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (text(b"k") + u32(U8) + b"\7", 7),
        (text(b"k") + u32(STRING) + text(b""), ""),
        (text(b"k") + u32(ARRAY) + u32(STRING) + u64(1) + text(b""), [""]),
        (text(b"k") + u32(ARRAY) + u32(U64) + u64(1) + u64(5), [5]),
    ],
)
def test_the_last_value_may_end_the_file(content: bytes, value: object) -> None:
    """A file without tensors may end with the last byte of its last value, however short."""
    found = parse(b"GGUF" + u32(3) + u64(0) + u64(1) + content).metadata["k"]
    assert (found if isinstance(found, int | str) else found.tolist()) == value


# ---- one class of damage each: the error names it, and points at it -------------------------------------

HUGE = u64(2**64 - 1)


def damage(
    name: str, changes: dict[str, bytes], message: str, field: str | None = None, plus: int = 0
) -> Any:
    """A case: ``changes`` to the valid file, the text of its error, and the byte: ``plus`` into ``field``."""
    return pytest.param(changes, message, field or next(iter(changes)), plus, id=name)


CASES = [
    # header
    damage("magic", {"magic": b"GGUX"}, r"unknown \(b'GGUX'\), not GGUF"),
    damage("version_0", {"version": u32(0)}, "version 0"),
    damage("version_1", {"version": u32(1)}, "version 1;"),
    damage("version_future", {"version": u32(4)}, "version 4;"),
    damage("version_high_half", {"version": u32(3 << 16)}, "version 196608;"),
    damage("tensor_count_huge", {"tensor count": HUGE}, "number of tensors"),
    damage("tensor_count_wraps", {"tensor count": u64(2**62)}, "number of tensors"),
    damage("tensor_count_beyond_file", {"tensor count": u64(50)}, "number of tensors is 50, too many"),
    damage("key_value_count_huge", {"key-value count": HUGE}, "number of key-values"),
    damage("key_value_count_beyond_file", {"key-value count": u64(100)}, "key-values is 100, too many"),
    # keys
    damage("key_length_huge", {"flag: key length": HUGE}, "length of metadata key 3"),
    damage("key_length_beyond_file", {"flag: key length": u64(2000)}, "too many for the"),
    damage(
        "key_too_long",
        {"flag: key length": u64(65536), "flag: key": b"k" * 65536},
        "65536, more than the 65535 allowed",
    ),
    damage("key_empty", {"flag: key length": u64(0), "flag: key": b""}, "metadata key 3 is '': empty"),
    damage("key_not_utf8", {"flag: key": b"fl\xffg"}, "metadata key 3 is not UTF-8", plus=2),
    damage(
        "key_with_zero_byte",
        {"flag: key": b"fl\0g"},
        r"'fl\\x00g': empty, or with a zero",
        "flag: key length",
    ),
    damage("key_twice", {"flags: key length": u64(4), "flags: key": b"flag"}, "'flag' occurs twice"),
    # values
    damage("type_unknown", {"flag: type": u32(13)}, "'flag' has the unknown type 13"),
    damage("type_negative", {"flag: type": u32(2**32 - 1)}, "'flag' has the unknown type 4294967295"),
    damage("bool_of_2", {"flag: value": b"\2"}, "'flag' has a boolean that is neither"),
    damage("bool_of_255", {"flag: value": b"\xff"}, "'flag' has a boolean that is neither"),
    damage("string_length_huge", {"name: length": HUGE}, "length of 'general.name'"),
    damage("string_length_beyond_file", {"name: length": u64(2000)}, "too many for the"),
    damage("string_not_utf8", {"name: text": b"caf\xc3("}, "is not UTF-8", plus=3),
    # arrays
    damage("array_of_arrays", {"flags: element type": u32(ARRAY)}, "'flags' is an array of arrays"),
    damage("element_type_unknown", {"flags: element type": u32(13)}, "'flags' has elements of type 13"),
    damage("array_count_huge", {"flags: count": HUGE}, "number of elements of 'flags'"),
    damage("array_size_wraps", {"numbers: count": u64(2**61)}, "number of elements of 'numbers'"),
    damage("array_count_beyond_file", {"numbers: count": u64(100)}, "is 100, too many for the"),
    damage("array_bool_of_2", {"flags: elements": b"\1\0\2"}, "'flags' has a boolean", plus=2),
    damage("strings_count_huge", {"tokens: count": HUGE}, "number of elements of 'tokens'"),
    damage("strings_count_wraps", {"tokens: count": u64(2**61)}, "number of elements of 'tokens'"),
    damage("strings_count_beyond_file", {"tokens: count": u64(100)}, "is 100, too many for the"),
    damage("strings_length_huge", {"tokens: 2 length": HUGE}, "string 2 of 'tokens'"),
    damage("strings_length_wraps", {"tokens: 2 length": u64(2**64 - 8)}, "string 2 of 'tokens'"),
    damage("strings_length_beyond_file", {"tokens: 1 length": u64(2000)}, "string 1 of 'tokens'"),
    # alignment
    damage(
        "alignment_type",
        {"alignment: type": u32(U64), "alignment: value": u64(32)},
        "'general.alignment' has type 10, not 4",
    ),
    damage("alignment_zero", {"alignment: value": u32(0)}, "power of two"),
    damage("alignment_24", {"alignment: value": u32(24)}, "power of two"),
    damage("alignment_4MiB", {"alignment: value": u32(2**22)}, "at most 2097152"),
    damage("alignment_2GiB", {"alignment: value": u32(2**31)}, "at most 2097152"),
    damage(
        "alignment_inconsistent",
        {"alignment: value": u32(64)},
        r"has offset 160, but .* ends at 192",
        "f: offset",
    ),
    # names of tensors
    damage("name_empty", {"f: name length": u64(0), "f: name": b""}, "name of tensor 1 is ''"),
    damage("name_of_64", {"f: name length": u64(64), "f: name": b"n" * 64}, "64, more than the 63"),
    damage("name_length_huge", {"f: name length": HUGE}, "length of the name of tensor 1"),
    damage("name_not_utf8", {"f: name": b"\x80"}, "name of tensor 1 is not UTF-8"),
    damage("name_with_zero_byte", {"f: name": b"\0"}, "with a zero byte", "f: name length"),
    damage("name_twice", {"f: name": b"q"}, "'q' occurs twice", "f: name length"),
    # shapes
    damage("dimensions_5", {"f: dimension count": u32(5)}, "5 dimensions"),
    damage("dimensions_huge", {"f: dimension count": u32(2**32 - 1)}, "4294967295 dimensions"),
    damage("dimension_negative", {"f: dimension 0": HUGE}, "impossible shape"),
    damage("product_too_large", {"q: dimension 1": u64(2**57)}, "impossible shape"),
    damage(
        "product_wraps_to_0",
        {"q: dimension 0": u64(2**32), "q: dimension 1": u64(2**32)},
        "impossible shape",
        "q: dimension 1",
    ),
    damage(
        "product_wraps_to_4",  # 4194305 * 4194305 * 211106198978564 = 4 mod 2**64
        {
            "z: dimension 0": u64(4194305),
            "z: dimension 1": u64(4194305),
            "z: dimension 2": u64(211106198978564),
        },
        "impossible shape",
        "z: dimension 2",
    ),
    damage("product_beside_zero", {"z: dimension 2": u64(2**62)}, "impossible shape"),
    damage(
        "size_beyond_file",
        {"f: dimension 0": u64(2**40)},
        r"has offset 192, but .* ends at",
        "z: offset",
    ),
    damage("row_of_part_blocks", {"q: dimension 0": u64(48)}, "rows of 48 weights, not whole blocks of 32"),
    # types of tensors
    *(
        damage(f"tensor_type_{number}", {"f: type": u32(number)}, f"withdrawn type {number} ")
        for number in (4, 5, 31, 32, 33, 36, 37, 38, 43, 2**31, 2**32 - 1)
    ),
    # offsets
    damage("offset_unaligned", {"f: offset": u64(168)}, r"has offset 168, but .* ends at 160"),
    damage("offset_overlaps", {"f: offset": u64(128)}, r"has offset 128, but .* ends at 160"),
    damage("offset_of_another", {"f: offset": u64(0)}, r"has offset 0, but .* ends at 160"),
    damage("offset_leaves_a_hole", {"f: offset": u64(192)}, r"has offset 192, but .* ends at 160"),
    damage("offset_beyond_file", {"f: offset": u64(2**40)}, "has offset"),
    damage("offset_into_the_header", {"q: offset": u64(2**64 - 64)}, "has offset 18446744073709551552"),
    # the end
    damage("data_one_byte_short", {"s: data": b"123", "s: padding": b""}, "tensor 's' takes", "s: offset"),
    damage(
        "data_missing",
        {"f: data": b"", "f: padding": b"", "s: data": b"", "s: padding": b""},
        "tensor 'f' takes",
        "f: offset",
    ),
    damage("data_ends_in_padding", {"padding": b"\0"}, "tensor 's' takes", "s: offset"),
    damage("trailing_byte", {"end": b"\0"}, "1 bytes follow"),
    damage("trailing_archive", {"end": b"PK\5\6" + bytes(18)}, "22 bytes follow"),
]


@pytest.mark.parametrize(("changes", "message", "field", "plus"), CASES)
def test_error_points_at_the_damage(changes: dict[str, bytes], message: str, field: str, plus: int) -> None:
    """Each class of damage is a `FormatError` that says what is wrong, and at which byte."""
    data, starts = assemble(changes)
    with pytest.raises(FormatError, match=message) as caught:
        parse(data)
    assert caught.value.offset == starts[field] + plus
    assert caught.value.path == Path("model.gguf")


@pytest.mark.parametrize(("index", "field"), [(0, "tokens: 0 text"), (2, "tokens: 2 text")])
def test_strings_of_an_array_are_checked_when_decoded(index: int, field: str) -> None:
    """A string that is not UTF-8 is an error when it is asked for, at its first wrong byte."""
    content = FIELDS[field]
    assert content is not None
    data, starts = assemble({field: content[:1] + b"\xff" + content[2:]})
    strings = parse(data).metadata.strings("tokens")
    assert strings[1] == ""
    wrong = starts[field] + (1 if content[0] < 0x80 else 0)  # a character cut short is wrong from its start
    for access in (lambda: strings[index], strings.tolist, lambda: list(strings), lambda: strings[:]):
        with pytest.raises(FormatError, match=f"string {index} of 'tokens' is not UTF-8") as caught:
            access()
        assert caught.value.offset == wrong


def test_deep_arrays_do_not_recurse() -> None:
    """Arrays nested 100,000 deep are refused at the first level."""
    nested = (u32(ARRAY) + u64(1)) * 100_000 + u32(U8) + u64(1) + b"\0"
    data, starts = assemble({"flags: element type": nested, "flags: count": b"", "flags: elements": b""})
    with pytest.raises(FormatError, match="array of arrays") as caught:
        parse(data)
    assert caught.value.offset == starts["flags: element type"]


@pytest.mark.parametrize("field", ["name: length", "flags: count", "tokens: count", "tokens: 0 length"])
def test_lengths_over_2_to_the_30_are_refused(tmp_path: Path, field: str) -> None:
    """llama.cpp's limit holds where the file does have so many bytes."""
    data, starts = assemble({field: u64(2**30 + 1)})
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with path.open("r+b") as file:  # a hole, which takes no disk
        file.truncate(2**34)
    with pytest.raises(FormatError, match="1073741825") as caught:
        read_gguf(path)
    assert caught.value.offset == starts[field]


def test_tensor_beyond_the_end_is_told_by_its_offset_field() -> None:
    """The last tensor may declare any size that fits the rules; the bytes decide."""
    data, starts = assemble({"s: dimension count": u32(1) + u64(2**59)})
    with pytest.raises(FormatError, match="the file ends too early: tensor 's'") as caught:
        parse(data)
    assert caught.value.offset == starts["s: offset"]


def test_parts_of_a_split_model_are_unsupported() -> None:
    """More than one part is unsupported; a split into one part is a whole file."""
    for parts in (0, 1, 2, 65535):
        split = {
            "flag: key length": u64(11),
            "flag: key": b"split.count",
            "flag: type": u32(2),
            "flag: value": struct.pack("<H", parts),
        }
        if parts > 1:
            with pytest.raises(UnsupportedError, match=f"one of {parts} parts"):
                parse(assemble(split)[0])
        else:
            assert parse(assemble(split)[0]).metadata["split.count"] == parts


def test_split_count_of_another_type_is_malformed() -> None:
    """The number of parts must be an integer."""
    data, starts = assemble({"flag: key length": u64(11), "flag: key": b"split.count"})
    with pytest.raises(FormatError, match=r"'split\.count' must be an integer, but is a boolean") as caught:
        parse(data)
    assert caught.value.offset == starts["flag: value"]


# ---- whatever the damage --------------------------------------------------------------------------------


def assert_bounded(data: bytes) -> None:
    """Reading ``data`` succeeds or raises one of two errors, in work and memory in proportion to its size.

    Work is counted in calls of functions, since a clock would make the test depend on the machine; what runs
    long inside a single call also takes memory.
    """
    outcome, calls, peak = measured(data)
    assert peak <= MEMORY_PER_BYTE * len(data) + MEMORY_CONSTANT
    assert calls <= CALLS_PER_BYTE * len(data) + CALLS_CONSTANT
    if isinstance(outcome, FormatError):
        assert outcome.offset is not None
        assert 0 <= outcome.offset <= len(data)
    elif isinstance(outcome, Checkpoint):
        exhaust(outcome)


def measured(data: bytes) -> tuple[Checkpoint | FormatError | UnsupportedError, int, int]:
    """What comes of reading ``data``, the number of calls, and the peak of memory in bytes."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    outcome: Checkpoint | FormatError | UnsupportedError
    previous = sys.getprofile()
    tracemalloc.start()
    sys.setprofile(count)
    try:
        outcome = parse(data)
    except (FormatError, UnsupportedError) as error:
        outcome = error
    finally:
        sys.setprofile(previous)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return outcome, calls, peak


def exhaust(checkpoint: Checkpoint) -> None:
    """Reads all there is: what was accepted can be decoded, but for strings that are not UTF-8."""
    for value in checkpoint.metadata.values():
        if isinstance(value, StringArray | np.ndarray):
            with suppress(FormatError):
                value.tolist()
    for tensor in checkpoint.tensors.values():
        with np.errstate(all="ignore"):  # the numbers in damaged blocks may be anything
            assert tensor.decode().shape == tensor.shape


def test_every_truncation_is_refused() -> None:
    """A file cut before the end of its last tensor is malformed; the padding behind it may be missing."""
    data, starts = assemble()
    for size in range(len(data)):
        assert_bounded(data[:size])
        if size < starts["s: padding"]:
            with pytest.raises(FormatError) as caught:
                parse(data[:size])
            assert caught.value.offset is not None
            assert caught.value.offset <= size
        else:
            parse(data[:size])


HOSTILE = [0, 1, 2, 3, 5, 9, 63, 64, 255, 2**16, 2**30, 2**30 + 1, 2**31 - 1, 2**31, 2**32 - 1]
HOSTILE_64 = [
    *HOSTILE,
    2**32,
    2**60,
    2**61,
    2**61 + 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 64,
    2**64 - 8,
    2**64 - 1,
]


def hostile(content: bytes) -> list[bytes]:
    """What might be put in the place of a field: extreme numbers, near misses, nothing, too much, garbage."""
    if len(content) in (4, 8):
        size, numbers = len(content), HOSTILE if len(content) == 4 else HOSTILE_64
        value = int.from_bytes(content, "little")
        near = [(value + step) % 256**size for step in (-32, -8, -1, 1, 8, 32)]
        replaced = [number.to_bytes(size, "little") for number in [*numbers, *near]]
    else:
        replaced = [
            content[:i] + bytes([byte]) + content[i + 1 :]
            for i in range(len(content))
            for byte in (0, 2, 255)
        ]
    return [*replaced, b"", content[:-1], content + b"\0", content + content, content[::-1]]


MUTATIONS = [(field, value) for field, content in FIELDS.items() if content for value in hostile(content)]


def test_every_field_may_hold_anything() -> None:
    """Each field of a valid file, replaced by each hostile value, is read or refused within bounds."""
    for field, value in MUTATIONS:
        assert_bounded(assemble({field: value})[0])


@settings(deadline=None, max_examples=400)
@given(st.lists(st.sampled_from(MUTATIONS), min_size=2, max_size=4))
def test_several_fields_may_hold_anything(changes: list[tuple[str, bytes]]) -> None:
    """Several fields at once, replaced by hostile values, are read or refused within bounds."""
    assert_bounded(assemble(dict(changes))[0])


@settings(deadline=None, max_examples=400)
@given(st.dictionaries(st.integers(0, len(assemble()[0]) - 1), st.integers(0, 255), min_size=1, max_size=4))
def test_any_byte_may_be_anything(flips: dict[int, int]) -> None:
    """Random bytes at random places are read or refused within bounds."""
    data = bytearray(assemble()[0])
    for place, byte in flips.items():
        data[place] = byte
    assert_bounded(bytes(data))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_anything_may_follow_the_version(content: bytes) -> None:
    """Random bytes behind a valid magic and version are read or refused within bounds."""
    assert_bounded(b"GGUF" + u32(3) + content)


COUNT = 2000
INDICES = [b"%x" % index for index in range(COUNT)]


@pytest.mark.parametrize(
    ("n_tensors", "n_key_values", "content"),
    [
        pytest.param(0, COUNT, b"".join(text(i) + u32(U8) + b"\1" for i in INDICES), id="numbers"),
        pytest.param(
            0, COUNT, b"".join(text(i) + u32(ARRAY) + u32(STRING) + u64(0) for i in INDICES), id="arrays"
        ),
        pytest.param(
            0, 1, text(b"k") + u32(ARRAY) + u32(STRING) + u64(COUNT) + u64(0) * COUNT, id="empty_strings"
        ),
        pytest.param(
            0, 1, text(b"k") + u32(STRING) + text(b"a" * 10**5 + b"\xf0\x9f\x98\x80"), id="wide_string"
        ),
        pytest.param(0, 1, text(b"\1" * 65535) + u32(13), id="long_key"),
        pytest.param(
            COUNT, 0, b"".join(text(i) + u32(1) + u64(0) + u32(0) + u64(0) for i in INDICES), id="tensors"
        ),
    ],
)
def test_many_small_things_take_little_memory(n_tensors: int, n_key_values: int, content: bytes) -> None:
    """Files made of what costs most memory per byte stay within the bound too."""
    data = b"GGUF" + u32(3) + u64(n_tensors) + u64(n_key_values) + content
    assert_bounded(data + bytes(-len(data) % 32))
