"""Typed access to key-values: the right type, the default, or an error that names the key and its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refengine.errors import FormatError
from refengine.loader.metadata import Metadata, StringArray

TOKENS = StringArray(b"........hi................\xc3\xa9", np.array([0, 10, 18, 28]), name="'tokens'")
SCORES = np.array([1.0, 2.0], "<f4")
VALUES: dict[str, Any] = {
    "string": "text",
    "integer": 7,
    "large": 2**64 - 1,
    "float": 0.5,
    "boolean": True,
    "array": SCORES,
    "strings": TOKENS,
}
OFFSETS = {key: 100 + index for index, key in enumerate(VALUES)}
METADATA = Metadata(VALUES, offsets=OFFSETS, path=Path("model.gguf"))

ACCEPTED = {
    "string": {"string"},
    "integer": {"integer", "large"},
    "number": {"integer", "large", "float"},
    "boolean": {"boolean"},
    "array": {"array"},
    "strings": {"strings"},
}


@pytest.mark.parametrize(
    ("accessor", "key"), [(a, key) for a, keys in ACCEPTED.items() for key in sorted(keys)]
)
def test_value_of_the_type_is_returned(accessor: str, key: str) -> None:
    """An accessor returns a value of its type, whether or not there is a default."""
    access = getattr(METADATA, accessor)
    for value in (access(key), access(key, None)):
        if accessor == "number":
            assert type(value) is float
            assert value == float(VALUES[key])
        else:
            assert value is VALUES[key]


@pytest.mark.parametrize(
    ("accessor", "key"), [(a, key) for a, keys in ACCEPTED.items() for key in VALUES if key not in keys]
)
def test_value_of_another_type_is_an_error(accessor: str, key: str) -> None:
    """A value of another type is an error at the value's offset, with or without a default."""
    for default in ((), (None,)):
        with pytest.raises(FormatError, match=f"^metadata key '{key}' must be .*, but is ") as caught:
            getattr(METADATA, accessor)(key, *default)
        assert caught.value.offset == OFFSETS[key]
        assert caught.value.path == Path("model.gguf")


@pytest.mark.parametrize("accessor", ACCEPTED)
def test_missing_key_is_the_default_or_an_error(accessor: str) -> None:
    """An absent key gives the default, even None; without a default it is an error, with no offset."""
    default = object()
    access = getattr(METADATA, accessor)
    assert access("absent", default) is default
    assert access("absent", None) is None
    with pytest.raises(FormatError, match=r"^metadata key 'absent' is missing: it must be an? ") as caught:
        access("absent")
    assert caught.value.offset is None
    assert caught.value.path == Path("model.gguf")


def test_types_are_named_in_errors() -> None:
    """The error says both the type that was needed and the type that is there."""
    for key, found in {
        "string": "a string",
        "float": "a float",
        "array": "an array of float32",
        "strings": "an array of strings",
    }.items():
        with pytest.raises(FormatError, match=f"must be a boolean, but is {found}"):
            METADATA.boolean(key)
    with pytest.raises(FormatError, match="must be an integer, but is a boolean"):
        METADATA.integer("boolean")
    with pytest.raises(FormatError, match="must be a string, but is an integer"):
        METADATA.string("integer")


def test_error_about_a_value_carries_its_place() -> None:
    """A reader of metadata reports a bad value with the key, the file and the offset."""
    error = METADATA.error("integer", "must be positive")
    assert isinstance(error, FormatError)
    assert str(error) == "metadata key 'integer' must be positive (at byte 101 in model.gguf)"
    assert (error.offset, error.path) == (101, Path("model.gguf"))


def test_metadata_without_offsets_has_errors_without() -> None:
    """Formats whose metadata have no place in the file give errors without one."""
    metadata = Metadata({"key": 1})
    assert metadata.offset("key") is None
    with pytest.raises(FormatError, match=r"^metadata key 'key' must be a string, but is an integer$"):
        metadata.string("key")


def test_metadata_is_a_mapping_in_file_order() -> None:
    """Metadata iterate and count like a dict, and do not change with the one they are made of."""
    values = {"b": 1, "a": 2}
    metadata = Metadata(values)
    values["c"] = 3
    assert list(metadata.items()) == [("b", 1), ("a", 2)]
    assert len(metadata) == 2
    assert "c" not in metadata
    with pytest.raises(KeyError):
        metadata["c"]


def test_string_array_is_a_sequence() -> None:
    """Strings are reached by index from either end, by slice, by iteration and all at once."""
    strings = ["hi", "", "\u00e9"]
    assert len(TOKENS) == 3
    assert [TOKENS[0], TOKENS[1], TOKENS[2], TOKENS[-1], TOKENS[-3]] == [*strings, "\u00e9", "hi"]
    assert TOKENS[::-1] == strings[::-1]
    assert TOKENS[1:] == strings[1:]
    assert TOKENS.tolist() == list(TOKENS) == strings
    assert TOKENS.index("\u00e9") == 2
    assert "absent" not in TOKENS
    for index in (3, -4):
        with pytest.raises(IndexError):
            TOKENS[index]


def test_string_array_may_be_empty() -> None:
    """An array of no strings is an empty sequence."""
    empty = StringArray(b"abc", np.array([3]), name="'none'")
    assert len(empty) == 0
    assert empty.tolist() == []
