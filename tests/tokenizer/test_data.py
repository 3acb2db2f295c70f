"""What a file may say about its tokenizer, and what it means where it says nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refengine.errors import FormatError, UnsupportedError
from refengine.loader.metadata import Metadata
from refengine.tokenizer import Tokenizer, build_tokenizer
from refengine.tokenizer.data import read_tokenizer_data

MakeMetadata = Callable[[dict[str, Any]], Metadata]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def _replaced(values: list[Any], index: int, value: Any) -> list[Any]:
    return [*values[:index], value, *values[index + 1 :]]


BYTE_LEVEL_FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "a type too few": ("token_type", lambda values: values["token_type"][:-1]),
    "a type too many": ("token_type", lambda values: [*values["token_type"], 1]),
    "type 0": ("token_type", lambda values: _replaced(values["token_type"], 3, 0)),
    "type 7": ("token_type", lambda values: _replaced(values["token_type"], 3, 7)),
    "a negative type": ("token_type", lambda values: _replaced(values["token_type"], 3, -1)),
    "types as floats": ("token_type", lambda values: np.ones(len(values["tokens"]), "<f4")),
    "a byte that is none": ("token_type", lambda values: _replaced(values["token_type"], 3, BYTE)),
    "a token twice": ("tokens", lambda values: _replaced(values["tokens"], 3, "he")),
    "no tokens": ("tokens", lambda values: []),
    "tokens as numbers": ("tokens", lambda values: np.arange(261)),
    "no merges": ("merges", lambda values: None),
    "a merge of one part": ("merges", lambda values: [*values["merges"], "he"]),
    "a merge of three parts": ("merges", lambda values: [*values["merges"], "h e l"]),
    "a merge without its first part": ("merges", lambda values: [*values["merges"], " he"]),
    "a merge of an absent token": ("merges", lambda values: [*values["merges"], "he zz"]),
    "a merge into an absent token": ("merges", lambda values: [*values["merges"], "he he"]),
    "a merge of a control token": ("merges", lambda values: [*values["merges"], "<|end|> >"]),
    "a negative EOS": ("eos_token_id", lambda values: -1),
    "EOS past the last token": ("eos_token_id", lambda values: len(values["tokens"])),
    "an unknown token past the last": ("unknown_token_id", lambda values: 10**6),
    "a padding token past the last": ("padding_token_id", lambda values: 2**32 - 1),
    "EOS as text": ("eos_token_id", lambda values: "<|end|>"),
    "BOS to add, but none": ("add_bos_token", lambda values: True),
    "a template that is no text": ("tokenizer.chat_template", lambda values: 3),
    "no model": ("model", lambda values: None),
}

SENTENCEPIECE_FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "no scores": ("scores", lambda values: None),
    "a score too few": ("scores", lambda values: values["scores"][:-1]),
    "a score that is not a number": ("scores", lambda values: _replaced(values["scores"], 3, float("nan"))),
    "an infinite score": ("scores", lambda values: _replaced(values["scores"], 3, float("-inf"))),
    "scores as booleans": ("scores", lambda values: np.ones(len(values["tokens"]), bool)),
    "byte -1": ("tokens", lambda values: _replaced(values["tokens"], 3, "<0x-1>")),
    "a byte in small letters": ("tokens", lambda values: _replaced(values["tokens"], 3 + 0xAB, "<0xab>")),
    "a byte of three digits": ("tokens", lambda values: _replaced(values["tokens"], 3, "<0x000>")),
    "an empty byte": ("tokens", lambda values: _replaced(values["tokens"], 3, "")),
}


def _check_fault(metadata: Metadata, key: str) -> None:
    key = key if "." in key else f"tokenizer.ggml.{key}"
    with pytest.raises(FormatError, match=re.escape(repr(key))) as raised:
        build_tokenizer(metadata)
    assert raised.value.offset == metadata.offset(key)


@pytest.mark.parametrize("fault", BYTE_LEVEL_FAULTS)
def test_byte_level_faults_are_named(
    make_metadata: MakeMetadata, byte_level: dict[str, Any], fault: str
) -> None:
    """A contradiction is a FormatError that names the key, and the byte where its value lies."""
    key, value = BYTE_LEVEL_FAULTS[fault]
    _check_fault(make_metadata(byte_level | {key: value(byte_level)}), key)


def test_the_first_faulty_merge_is_named(make_metadata: MakeMetadata, byte_level: dict[str, Any]) -> None:
    """Of several merges that are none, the text quotes the first and tells its place, repeated ones counted."""
    merges = byte_level["merges"]
    faulty = [*merges, merges[0], "he he", "he", *merges]
    with pytest.raises(FormatError, match=f"'he he' as merge {len(merges) + 1},"):
        build_tokenizer(make_metadata(byte_level | {"merges": faulty}))


def test_of_two_equal_merges_the_first_counts(
    make_metadata: MakeMetadata, byte_level: dict[str, Any]
) -> None:
    """A merge that comes again later changes nothing."""
    merges = byte_level["merges"]
    once = build_tokenizer(make_metadata(byte_level))
    again = build_tokenizer(make_metadata(byte_level | {"merges": [*merges, *merges[::-1]]}))
    text = "".join(byte_level["tokens"][256:])
    assert again.encode(text) == once.encode(text)


@pytest.mark.parametrize("fault", SENTENCEPIECE_FAULTS)
def test_sentencepiece_faults_are_named(
    make_metadata: MakeMetadata, sentencepiece: dict[str, Any], fault: str
) -> None:
    """A contradiction is a FormatError that names the key, and the byte where its value lies."""
    key, value = SENTENCEPIECE_FAULTS[fault]
    values = sentencepiece | {key: value(sentencepiece)}
    _check_fault(make_metadata(values), "token_type" if key == "tokens" else key)


@pytest.mark.parametrize("model", ["bert", "t5", "rwkv", "none", "no_vocab", "plamo2", "gemma4", ""])
def test_other_models_are_unsupported(
    make_metadata: MakeMetadata, sentencepiece: dict[str, Any], model: str
) -> None:
    """A tokenizer that is not implemented is named, with those that are."""
    with pytest.raises(UnsupportedError, match=rf"{model!r}.*gpt2.*llama"):
        build_tokenizer(make_metadata(sentencepiece | {"model": model}))


def test_extra_white_space_is_not_removed_silently(
    make_metadata: MakeMetadata, sentencepiece: dict[str, Any]
) -> None:
    """A vocabulary that wants white space collapsed is refused, since that is not implemented."""
    with pytest.raises(UnsupportedError, match="remove_extra_whitespaces"):
        build_tokenizer(make_metadata(sentencepiece | {"remove_extra_whitespaces": True}))


def test_absent_keys_have_the_defaults_of_llama_cpp(
    make_metadata: MakeMetadata, sentencepiece: dict[str, Any], byte_level: dict[str, Any]
) -> None:
    """SentencePiece: BOS 1, EOS 2, BOS and a space go before text. Byte-level: none of these."""
    data = read_tokenizer_data(make_metadata(sentencepiece))
    assert (data.bos_id, data.eos_id, data.add_bos, data.add_eos) == (1, 2, True, False)
    assert data.add_space_prefix
    data = read_tokenizer_data(make_metadata(byte_level | {"eos_token_id": None, "add_space_prefix": True}))
    assert (data.bos_id, data.eos_id, data.add_bos, data.add_eos) == (None, None, False, False)
    assert not data.add_space_prefix
    tokenizer = build_tokenizer(make_metadata(byte_level | {"eos_token_id": None}))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("", "")


def test_tokens_without_types_are_normal(make_metadata: MakeMetadata, byte_level: dict[str, Any]) -> None:
    """Where no types are given, no token is special."""
    data = read_tokenizer_data(make_metadata(byte_level | {"token_type": None}))
    assert set(data.types) == {NORMAL}


def test_empty_tokens_may_repeat(make_metadata: MakeMetadata, byte_level: dict[str, Any]) -> None:
    """Empty tokens fill gaps in some vocabularies; they add nothing to a text, and no text leads to them."""
    values = {
        "tokens": [*byte_level["tokens"], "", "", ""],
        "token_type": [*byte_level["token_type"], NORMAL, CONTROL, USER_DEFINED],
    }
    tokenizer = build_tokenizer(make_metadata(byte_level | values))
    assert tokenizer.vocabulary_size == 264
    assert tokenizer.decode([256, 261, 262, 263]) == "he"
    assert tokenizer.encode("he", parse_special=True) == [256]


@pytest.mark.parametrize(
    ("added", "type", "ends"),
    [
        (["<|eot_id|>", "<|eom_id|>"], CONTROL, ["<|eot_id|>", "<|eom_id|>"]),
        (["<|im_end|>", "<end_of_turn>"], CONTROL, ["<|im_end|>", "<end_of_turn>"]),
        (["<|im_start|>", "<start_of_turn>"], CONTROL, []),
        (["</s>", "<|im_end|>"], NORMAL, []),
        (["</s>", "<|im_end|>"], USER_DEFINED, []),
        (["<|return|>", "<|call|>"], CONTROL, ["<|return|>", "<|call|>"]),
        (["<|fim_pad|>", "<|repo_name|>"], CONTROL, ["<|fim_pad|>", "<|repo_name|>"]),
    ],
)
def test_ends_are_known_by_their_text(
    make_metadata: MakeMetadata, byte_level: dict[str, Any], added: list[str], type: int, ends: list[str]
) -> None:
    """Control tokens with the names llama.cpp knows end a generation; other tokens of these names do not.

    ``<|end|>``, which the vocabulary has, ends one too, unless ``<|return|>`` and ``<|call|>`` do.
    """
    values = {
        "tokens": [*byte_level["tokens"], *added],
        "token_type": [*byte_level["token_type"], *[type] * len(added)],
        "eos_token_id": None,
    }
    tokenizer = build_tokenizer(make_metadata(byte_level | values))
    expected = ends if "<|return|>" in ends else ["<|end|>", *ends]
    assert sorted(tokenizer.token_bytes(id).decode() for id in tokenizer.end_ids) == sorted(expected)


@pytest.mark.parametrize("role", ["eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"])
def test_ends_are_named_by_keys(make_metadata: MakeMetadata, byte_level: dict[str, Any], role: str) -> None:
    """The tokens a file gives these roles end a generation, whatever they are called."""
    values = byte_level | {"eos_token_id": None, f"{role}_token_id": 5}
    assert build_tokenizer(make_metadata(values)).end_ids == {5, 259}


def test_real_vocabularies_end_as_in_llama_cpp(smollm2: Tokenizer, gemma3: Tokenizer) -> None:
    """The ends of generation that llama.cpp lists for these files, but for Gemma 3's ``</s>``.

    That one is user-defined, the end of struck-out HTML, which llama.cpp takes for a mistake.
    """

    def ends(tokenizer: Tokenizer) -> set[str]:
        return {tokenizer.token_bytes(id).decode() for id in tokenizer.end_ids}

    assert ends(smollm2) == {"<|im_end|>", "<|endoftext|>", "<reponame>"}
    assert ends(gemma3) == {"<eos>", "<end_of_turn>"}
    assert (smollm2.vocabulary_size, gemma3.vocabulary_size) == (49_152, 262_144)
    assert (smollm2.bos_token, smollm2.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (gemma3.bos_token, gemma3.eos_token) == ("<bos>", "<eos>")
    assert (smollm2.chat_template is None, gemma3.chat_template is None) == (False, True)
