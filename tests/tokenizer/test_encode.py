"""Encoding: which tokens text becomes, and which it never does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.errors import RequestError
from refengine.loader.metadata import Metadata
from refengine.tokenizer import Tokenizer, build_tokenizer
from refengine.tokenizer.sentencepiece import merge

MakeMetadata = Callable[[dict[str, Any]], Metadata]
Build = Callable[..., Tokenizer]


@pytest.fixture(scope="session")
def byte_level_tokenizer(make_metadata: MakeMetadata, byte_level: dict[str, Any]) -> Build:
    return lambda **values: build_tokenizer(make_metadata(byte_level | values))


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(make_metadata: MakeMetadata, sentencepiece: dict[str, Any]) -> Build:
    return lambda **values: build_tokenizer(make_metadata(sentencepiece | values))


def _texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    return [tokenizer.token_bytes(id).decode(errors="replace") for id in ids]


@st.composite
def _vocabularies(draw: st.DrawFn) -> tuple[dict[str, int], list[float], str]:
    """Pieces of a text over a small alphabet, with scores, many of them equal; and the text."""
    text = draw(st.text("ab▁c", min_size=2, max_size=20))
    starts = st.integers(0, len(text) - 2)
    pieces = st.builds(lambda start, length: text[start : start + length], starts, st.integers(2, 6))
    tokens = draw(st.lists(pieces | st.sampled_from("ab▁"), unique=True, max_size=20))
    scores = draw(st.lists(st.integers(-4, 0), min_size=len(tokens), max_size=len(tokens)))
    return {token: id for id, token in enumerate(tokens)}, [float(score) for score in scores], text


def _merge_naively(text: str, ids: Mapping[str, int], scores: Sequence[float]) -> list[str]:
    symbols = list(text)
    while True:
        unions = [symbols[i] + symbols[i + 1] for i in range(len(symbols) - 1)]
        found = [(-scores[ids[union]], i) for i, union in enumerate(unions) if union in ids]
        if not found:
            return symbols
        _, i = min(found)
        symbols[i : i + 2] = [unions[i]]


@given(_vocabularies())
@settings(max_examples=500)
def test_best_neighbours_are_joined_first(vocabulary: tuple[dict[str, int], list[float], str]) -> None:
    """`merge` joins as a loop does that looks at all neighbours each time and takes the best, leftmost."""
    ids, scores, text = vocabulary
    assert merge(text, ids, scores) == _merge_naively(text, ids, scores)


@given(_vocabularies())
@settings(max_examples=300, deadline=None)
def test_text_is_merged_as_one(
    make_metadata: MakeMetadata,
    sentencepiece: dict[str, Any],
    vocabulary: tuple[dict[str, int], list[float], str],
) -> None:
    """Where tokens reach across words, they are found: cutting text into chunks changes nothing."""
    ids, scores, text = vocabulary
    base = 259  # <unk>, <s>, </s> and the bytes
    metadata = make_metadata(
        sentencepiece
        | {
            "tokens": [*sentencepiece["tokens"][:base], *ids],
            "token_type": [*sentencepiece["token_type"][:base], *[1] * len(ids)],
            "scores": [*sentencepiece["scores"][:base], *scores],
            "add_space_prefix": False,
        }
    )
    expected = list[int]()
    for symbol in _merge_naively(text, ids, scores):
        expected += [base + ids[symbol]] if symbol in ids else [3 + byte for byte in symbol.encode()]
    assert build_tokenizer(metadata).encode(text, add_special=False) == expected


def test_merges_apply_in_their_order(byte_level_tokenizer: Build) -> None:
    """ "hello" is h e l l o, then he l l o, then he ll o, then hell o."""
    tokenizer = byte_level_tokenizer()
    assert _texts(tokenizer, tokenizer.encode("hello")) == ["hell", "o"]
    assert _texts(tokenizer, tokenizer.encode("hel")) == ["he", "l"]


def test_the_first_of_equal_merges_counts(byte_level_tokenizer: Build, byte_level: dict[str, Any]) -> None:
    """A merge repeated later in the list keeps its first rank."""
    tokenizer = byte_level_tokenizer(
        tokens=[*byte_level["tokens"], "el"],
        token_type=[*byte_level["token_type"], 1],
        merges=["h e", "e l", "h e"],
    )
    assert _texts(tokenizer, tokenizer.encode("hel")) == ["he", "l"]


def test_a_character_without_token_becomes_its_bytes(sentencepiece_tokenizer: Build) -> None:
    """SentencePiece falls back to the bytes of UTF-8."""
    tokenizer = sentencepiece_tokenizer(add_space_prefix=False)
    ids = tokenizer.encode("oé", add_special=False)
    assert [tokenizer.token_bytes(id) for id in ids] == [b"o", b"\xc3", b"\xa9"]


def test_a_character_without_token_and_bytes_is_refused(
    make_metadata: MakeMetadata, sentencepiece: dict[str, Any]
) -> None:
    """Where the byte tokens are missing too, nothing is lost in silence."""
    kept = [id for id, token in enumerate(sentencepiece["tokens"]) if token != "<0xA9>"]
    lists = ("tokens", "token_type", "scores")
    values = sentencepiece | {key: [sentencepiece[key][id] for id in kept] for key in lists}
    tokenizer = build_tokenizer(make_metadata(values))
    assert tokenizer.encode("è")
    with pytest.raises(RequestError, match="'é'"):
        tokenizer.encode("é")


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_a_lone_surrogate_is_refused(name: str, text: str, request: pytest.FixtureRequest) -> None:
    """A lone surrogate is no text: it has no UTF-8."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    with pytest.raises(RequestError, match="lone surrogate"):
        tokenizer.encode(text)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_written_control_tokens_are_text(
    name: str, data: st.DataObject, request: pytest.FixtureRequest
) -> None:
    """Without ``parse_special``, no text becomes a control token, and none is lost."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    names = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<bos>", "<eos>", "<end_of_turn>"]
    parts = st.sampled_from([*names, "<unused7>", "<unk>", "<", ">", "|", " ", "\n", "user", "<|im_"])
    text = "".join(data.draw(st.lists(parts, max_size=12)))
    ids = tokenizer.encode(text, add_special=False)
    assert tokenizer.decode(ids, skip_special=True) == text


@pytest.mark.parametrize(("name", "text"), [("smollm2", "<|im_start|>"), ("gemma3", "<start_of_turn>")])
def test_control_tokens_are_read_on_request(name: str, text: str, request: pytest.FixtureRequest) -> None:
    """With ``parse_special``, the name of a control token is that token."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    (id,) = tokenizer.encode(text, add_special=False, parse_special=True)
    assert tokenizer.token_bytes(id) == text.encode()
    assert len(tokenizer.encode(text, add_special=False)) > 1


@pytest.mark.parametrize("type", [2, 3, 5, 6])
def test_only_text_is_merged_from_its_parts(sentencepiece_tokenizer: Build, type: int) -> None:
    """An unknown, control, unused or byte token is not formed even where all its parts are tokens."""
    parts = ["<", "0", "x", "4", "1", ">", "<0", "<0x", "<0x4", "<0x41"]
    tokenizer = sentencepiece_tokenizer(
        tokens=["<unk>", "<s>", "</s>", "<0x41>", *parts],
        token_type=[2, 3, 3, type, *[1] * len(parts)],
        scores=[0.0] * 4 + [-1.0] * len(parts),
        add_space_prefix=False,
    )
    assert _texts(tokenizer, tokenizer.encode("<0x41>", add_special=False)) == ["<0x41", ">"]


def test_user_defined_tokens_are_always_whole(byte_level_tokenizer: Build) -> None:
    """A user-defined token is found with and without ``parse_special``, a control token only with it."""
    tokenizer = byte_level_tokenizer()
    table = tokenizer.encode("<table>")
    assert len(table) == 1
    assert tokenizer.encode("he<table><table>") == [*tokenizer.encode("he"), *table, *table]
    assert tokenizer.encode("<table><|end|>", parse_special=True) == [*table, 259]


def test_the_longest_special_token_is_taken(byte_level_tokenizer: Build, byte_level: dict[str, Any]) -> None:
    """Of special tokens that begin at one place, the longest is taken; what only begins like one is text."""
    added = ["\n", "\n\n", "\n\n\n", "<|", "<|en"]
    tokens = [*byte_level["tokens"], *added]
    tokenizer = byte_level_tokenizer(tokens=tokens, token_type=[*byte_level["token_type"], *[4] * len(added)])

    def pieces(text: str, **options: bool) -> list[str]:
        return [tokens[id] for id in tokenizer.encode(text, **options)]

    assert pieces("\n" * 5) == ["\n\n\n", "\n\n"]
    assert pieces("\n" * 4) == ["\n\n\n", "\n"]
    assert pieces("<|end|>") == ["<|en", "d", "|", ">"]
    assert pieces("<|end|>", parse_special=True) == ["<|end|>"]
    assert pieces("<<|e<|\n<") == ["<", "<|", "e", "<|", "\n", "<"]


@pytest.mark.parametrize(
    ("values", "text", "expected"),
    [
        ({}, "hello", ["<s>", " hello"]),
        ({"add_space_prefix": False}, "hello", ["<s>", "hello"]),
        ({}, " hello", ["<s>", " ", " hello"]),
        ({"add_bos_token": False}, "hello", [" hello"]),
        ({"add_eos_token": True}, "hello", ["<s>", " hello", "</s>"]),
        ({}, "", ["<s>"]),
        ({}, "hello<s>hello", ["<s>", " hello", "<s>", " hello"]),
        ({}, "<table>hello", ["<s>", "<table>", " hello"]),
    ],
)
def test_a_space_goes_before_text(
    sentencepiece_tokenizer: Build, values: dict[str, Any], text: str, expected: list[str]
) -> None:
    """SentencePiece puts a space before text at the start, and llama.cpp after special tokens too."""
    tokenizer = sentencepiece_tokenizer(**values)
    assert _texts(tokenizer, tokenizer.encode(text, parse_special=True)) == expected


@pytest.mark.parametrize(
    ("values", "adds_bos"),
    [
        ({"pre": "gpt-2"}, False),
        ({"pre": "qwen2"}, False),
        ({"pre": "llama-bpe"}, True),
        ({"pre": "tekken"}, True),
        ({"pre": "llama-bpe", "add_bos_token": False}, False),
        ({"pre": "gpt-2", "add_bos_token": True}, True),
    ],
)
def test_bos_is_added_as_the_pre_tokenizer_has_it(
    byte_level_tokenizer: Build, values: dict[str, Any], adds_bos: bool
) -> None:
    """Where the file does not say, Llama 3 and Tekken vocabularies begin with BOS, others do not."""
    tokenizer = byte_level_tokenizer(bos_token_id=259, **values)
    assert tokenizer.encode("he") == [259] * adds_bos + tokenizer.encode("he", add_special=False)


def test_whole_words_skip_merges_where_the_model_says_so(
    byte_level_tokenizer: Build, byte_level: dict[str, Any]
) -> None:
    """With ``llama-bpe``, a word that is a token needs no merges; with ``gpt-2`` it does."""
    values = {
        "tokens": [*byte_level["tokens"], "xyz"],
        "token_type": [*byte_level["token_type"], 1],
        "add_bos_token": False,
    }
    llama, gpt2 = (byte_level_tokenizer(pre=pre, **values) for pre in ("llama-bpe", "gpt-2"))
    assert _texts(llama, llama.encode("xyz")) == ["xyz"]
    assert _texts(gpt2, gpt2.encode("xyz")) == ["x", "y", "z"]


@pytest.mark.parametrize("character", ["a", " ", "\n", "é", "<", "😀"])
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_long_runs_of_one_character_come_back(
    name: str, character: str, request: pytest.FixtureRequest
) -> None:
    """100,000 times the same character, which only an algorithm below O(n²) encodes while a test waits."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    text = character * 100_000
    assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text
