"""Decoding: bytes of tokens, whole texts, and texts that arrive token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.errors import TokenIdError
from refengine.loader.metadata import Metadata
from refengine.tokenizer import Tokenizer, build_tokenizer

MakeMetadata = Callable[[dict[str, Any]], Metadata]
REAL = pytest.mark.parametrize("name", ["smollm2", "gemma3"])

# Bytes: Gemma 3's byte tokens, SmolLM2's one-character tokens. Most sequences of them are no UTF-8.
BYTE_IDS = {"smollm2": range(17, 250), "gemma3": range(238, 494)}


def _ids(name: str, tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    any_id = st.integers(0, tokenizer.vocabulary_size - 1)
    return st.lists(any_id | st.sampled_from(BYTE_IDS[name]), max_size=40)


@REAL
@given(data=st.data())
@settings(max_examples=500, deadline=None)
def test_decoding_is_that_of_the_bytes(
    name: str, data: st.DataObject, request: pytest.FixtureRequest
) -> None:
    """A text is the bytes of its tokens, read as UTF-8 with U+FFFD for what is none."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    ids = data.draw(_ids(name, tokenizer))
    assert tokenizer.decode(ids) == b"".join(map(tokenizer.token_bytes, ids)).decode(errors="replace")


@REAL
@given(data=st.data())
@settings(max_examples=500, deadline=None)
def test_streamed_text_is_the_decoded_text(
    name: str, data: st.DataObject, request: pytest.FixtureRequest
) -> None:
    """What a stream decoder returns is, joined, the text of the whole."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    ids, skip_special = data.draw(_ids(name, tokenizer)), data.draw(st.booleans())
    decoder = tokenizer.stream_decoder(skip_special=skip_special)
    pieces = [decoder.push(id) for id in ids]
    assert "".join(pieces) + decoder.finish() == tokenizer.decode(ids, skip_special=skip_special)


@REAL
@given(text=st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0x1FFFF), max_size=30))
@settings(max_examples=200, deadline=None)
def test_valid_text_is_streamed_without_replacements(
    name: str, text: str, request: pytest.FixtureRequest
) -> None:
    """While ids of a text arrive, what has been returned is a beginning of it: no character is ever cut."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    text = text.translate(dict.fromkeys(b"\x04\x06\x13\x14\x16\x1d"))  # which SmolLM2 lacks
    decoder, streamed = tokenizer.stream_decoder(skip_special=True), ""
    for id in tokenizer.encode(text):
        streamed += decoder.push(id)
        assert text.startswith(streamed)
    assert streamed == text
    assert decoder.finish() == ""


def test_a_character_comes_with_its_last_byte(gemma3: Tokenizer) -> None:
    """Three of the four bytes of an emoji give nothing; the fourth gives it."""
    decoder = gemma3.stream_decoder()
    assert [decoder.push(238 + byte) for byte in "😀".encode()] == ["", "", "", "😀"]


def test_an_unfinished_character_is_one_replacement(gemma3: Tokenizer) -> None:
    """A sequence that ends inside a character ends with U+FFFD; one that is broken off gives it at once."""
    decoder = gemma3.stream_decoder()
    assert [decoder.push(238 + byte) for byte in b"\xf0\x9f\x98"] == ["", "", ""]
    assert decoder.finish() == "\ufffd"
    assert decoder.finish() == ""
    decoder = gemma3.stream_decoder()
    assert [decoder.push(238 + byte) for byte in b"\xf0\x9fa"] == ["", "", "\ufffda"]


@pytest.mark.parametrize("id", [-1, 262_144, 2**64])
def test_ids_outside_the_vocabulary_are_refused(gemma3: Tokenizer, id: int) -> None:
    """An id below 0 or past the last is an error that names it, wherever it is decoded."""
    for decode in (gemma3.token_bytes, gemma3.stream_decoder().push, lambda id: gemma3.decode([2, id])):
        with pytest.raises(TokenIdError, match=str(id)):
            decode(id)


@pytest.mark.parametrize(
    ("ids", "options", "expected"),
    [
        ([1, " hello"], {}, "<s> hello"),
        ([1, " hello"], {"skip_special": True}, "hello"),
        ([" hello"], {}, "hello"),
        ([" hello"], {"continuation": True}, " hello"),
        (["  ", "hello"], {}, " hello"),
        ([" ", "hello"], {}, "hello"),
        (["hello", " hello"], {}, "hello hello"),
        ([3 + 0x20, "hello"], {}, "hello"),
        ([0, " hello", 2], {"skip_special": True}, "hello"),
        ([], {}, ""),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_the_space_before_text_is_taken_away(
    make_metadata: MakeMetadata,
    sentencepiece: dict[str, Any],
    ids: list[int | str],
    options: dict[str, bool],
    expected: str,
    streamed: bool,
) -> None:
    """One space at the start of the text is the one that encoding put there, unless the text goes on."""
    tokenizer = build_tokenizer(make_metadata(sentencepiece))
    tokens = sentencepiece["tokens"]
    numbers = [id if isinstance(id, int) else tokens.index(id.replace(" ", "▁")) for id in ids]
    if streamed:
        decoder = tokenizer.stream_decoder(**options)
        assert "".join(map(decoder.push, numbers)) + decoder.finish() == expected
    else:
        assert tokenizer.decode(numbers, **options) == expected


@given(text=st.text("helo ▁é<s>\n", max_size=20))
@settings(max_examples=300)
def test_text_comes_back(make_metadata: MakeMetadata, sentencepiece: dict[str, Any], text: str) -> None:
    """Encoding and decoding gives the text, but for U+2581, which stands for a space."""
    tokenizer = build_tokenizer(make_metadata(sentencepiece))
    assert tokenizer.decode(tokenizer.encode(text), skip_special=True) == text.replace("▁", " ")


def test_hidden_tokens_are_those_that_are_no_text(
    make_metadata: MakeMetadata, byte_level: dict[str, Any]
) -> None:
    """Control, unknown and unused tokens are skipped on request; user-defined ones are text."""
    added = ["<unk>", "[PAD1]"]
    tokenizer = build_tokenizer(
        make_metadata(
            byte_level
            | {"tokens": [*byte_level["tokens"], *added], "token_type": [*byte_level["token_type"], 2, 5]}
        )
    )
    ids = [256, 259, 260, 261, 262]
    assert tokenizer.decode(ids) == "he<|end|><table><unk>[PAD1]"
    assert tokenizer.decode(ids, skip_special=True) == "he<table>"


def test_a_token_outside_the_byte_alphabet_is_plain_text(
    make_metadata: MakeMetadata, byte_level: dict[str, Any]
) -> None:
    """A normal token of a byte-level vocabulary that is not written in its characters stands for itself."""
    tokenizer = build_tokenizer(
        make_metadata(
            byte_level
            | {
                "tokens": [*byte_level["tokens"], "｜a b", ""],
                "token_type": [*byte_level["token_type"], 1, 1],
            }
        )
    )
    assert tokenizer.token_bytes(261) == "｜a b".encode()
    assert tokenizer.token_bytes(262) == b""
