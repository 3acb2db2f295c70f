"""Arrays of strings: found many at a time, they lie where their lengths say, whatever they hold."""

from __future__ import annotations

import random
import struct
from itertools import accumulate
from pathlib import Path

import pytest

from refengine.errors import FormatError
from refengine.loader.cursor import MANY, WINDOW_BYTES, Cursor
from refengine.loader.metadata import AT_ONCE

PATH = Path("model.gguf")
SHORT = [f"tök{number}" for number in range(3 * MANY)]

ARRAYS: dict[str, list[str]] = {
    "none": [],
    "one": ["a"],
    "a vocabulary": [f"▁{number:x}" for number in range(2 * AT_ONCE + 3)],
    "an empty one first": ["", *SHORT],
    "empty ones among others": [*SHORT, "", *SHORT, "", "", *SHORT],
    "empty ones only": [""] * (3 * MANY),
    "every length": ["x" * length for length in range(600)],
    "long ones": ["é" * 300 for _ in range(2 * MANY)],
    "longer than what is searched at a time": [*SHORT, "x" * (WINDOW_BYTES + 1), *SHORT],
    "zero bytes": [*SHORT, "\0", "a\0b", "\0" * 8, "\0" * 15, *SHORT, "ends\0", "\0begins", *SHORT],
    "seven zeros after a letter": ["\x05" + "\0" * 7 + "hello"] * (2 * MANY),
}


def encoded(texts: list[str]) -> list[bytes]:
    """Each string as a file has it."""
    return [struct.pack("<Q", len(data := text.encode())) + data for text in texts]


@pytest.mark.parametrize("name", ARRAYS)
def test_strings_are_read_as_they_were_written(name: str) -> None:
    """All at once, one by one and in slices; what follows the last one is left alone."""
    texts, head = ARRAYS[name], b"head"
    parts = encoded(texts)
    for tail in (b"", b"\0" * 100, b"\x01" + b"\0" * 7 + b"y" * 9):
        cursor = Cursor(head + b"".join(parts) + tail, PATH)
        cursor.position = len(head)
        strings = cursor.strings(len(texts), "the tokens")
        assert cursor.position == len(head) + sum(map(len, parts))
        assert list(strings) == strings.tolist() == strings[:] == texts


@pytest.mark.parametrize("seed", range(5))
def test_a_cut_is_told_where_it_is(seed: int) -> None:
    """A file that ends inside a string is refused at that string, whatever lies before."""
    rng = random.Random(seed)
    texts = [*SHORT, *rng.choices(["", "\0", "x" * 255, "x" * 256, "tök"], k=9), *SHORT]
    parts = encoded(texts)
    starts = [0, *accumulate(map(len, parts))]
    for index in rng.sample(range(len(texts)), 20):
        size = starts[index] + rng.randrange(len(parts[index]))
        cursor = Cursor(b"".join(parts)[:size], PATH)
        with pytest.raises(FormatError, match=rf"\bstring {index} of the tokens") as caught:
            cursor.strings(len(texts), "the tokens")
        assert caught.value.offset == starts[index]


@pytest.mark.parametrize("index", [0, MANY, AT_ONCE - 1, AT_ONCE, AT_ONCE + 5])
def test_a_string_that_is_not_utf8_is_told_where_it_is(index: int) -> None:
    """Decoding all names the string and its first wrong byte; a character cut in two by two strings is wrong."""
    parts = encoded([f"{number}" for number in range(AT_ONCE + 9)])
    parts[index : index + 2] = [struct.pack("<Q", 2) + b"a\xc3", struct.pack("<Q", 2) + b"\xa9b"]
    strings = Cursor(b"".join(parts), PATH).strings(len(parts), "the tokens")
    with pytest.raises(FormatError, match=rf"^string {index} of the tokens is not UTF-8") as caught:
        strings.tolist()
    assert caught.value.offset == sum(map(len, parts[:index])) + 9
