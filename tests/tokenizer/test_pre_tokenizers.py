"""Pre-tokenizers split text as those the models were published with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2

from refengine.errors import UnsupportedError
from refengine.loader.metadata import Metadata
from refengine.tokenizer import build_tokenizer
from refengine.tokenizer.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer

MakeMetadata = Callable[[dict[str, Any]], Metadata]

LLAMA3 = inspect.signature(TikTokenConverter).parameters["pattern"].default

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
PUBLISHED = {
    "gpt-2": [GPT2],
    "starcoder": [DIGITS, GPT2],
    "falcon": [
        pre_tokenizers.Punctuation("contiguous"),
        GPT2,
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ],
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES],
    "qwen2": [pre_tokenizers.Split(Regex(QWEN2), "isolated"), BYTES],
}

EXAMPLES = [
    ("gpt-2", "we'll  go 123\n\nx", ["we", "'ll", " ", " go", " 123", "\n", "\n", "x"]),
    ("smollm", "a 12", ["a", " ", "1", "2"]),
    ("falcon", "a 1234.", ["a", " ", "123", "4", "."]),
    ("default", "x1234.5", ["x", "123", "4", ".", "5"]),
    ("llama-bpe", "It'S 12345!\n \n x", ["It", "'S", " ", "123", "45", "!\n", " \n", " x"]),
    ("qwen2", "It'S 123!\n कि", ["It", "'S", " ", "1", "2", "3", "!\n", " क", "ि"]),
    ("qwen35", "It'S 123!\n कि", ["It", "'S", " ", "1", "2", "3", "!\n", " कि"]),
    ("seed-coder", "12!\n", ["1", "2", "!", "\n"]),
    ("bailingmoe", "it's 12!\n", ["it", "'s", " ", "1", "2", "!\n"]),
    ("tekken", "camelCaseTEXT it's 12", ["camel", "Case", "TEXT", " it", "'s", " ", "1", "2"]),
    ("gpt-4o", "camelCase it's 1234", ["camel", "Case", " it's", " ", "123", "4"]),
    ("bloom", " a.b c12", [" a", ".", "b", " c12"]),
    ("viking", " a.b c12", [" a", ".", "b", " c", "1", "2"]),
    ("deepseek-llm", "Hello 漢字 12\n", ["Hello", " ", "漢字", " ", "12", "\n"]),
    ("deepseek-coder", "a 12!\n", ["a", " ", "1", "2", "!", "\n"]),
    ("deepseek-v3", "1234 def.x()漢字", ["123", "4", " def", ".x", "()", "漢字"]),
]

# Characters whose class has been the same in every version of Unicode that the libraries know.
TEXTS = st.text(
    st.sampled_from("aZéßſK'sStTrReE 0123٣½\n\r\t\u00a0\u3000.,!?$+<=>^|~`_/漢かカ가ा\u0301😀()[]{}#\"")
    | st.characters(codec="latin-1"),
    max_size=40,
)


def _steps(name: str) -> list[Any]:
    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name].patterns]


@pytest.mark.parametrize("name", PUBLISHED)
@given(text=TEXTS)
@settings(max_examples=300, deadline=None)
def test_text_is_split_as_published(name: str, text: str) -> None:
    """The pieces are those of the pre-tokenizer the model was published with, as its library has it."""
    ours = pre_tokenizers.Sequence([*_steps(name), BYTES]).pre_tokenize_str(text)
    assert ours == pre_tokenizers.Sequence(PUBLISHED[name]).pre_tokenize_str(text)


@pytest.mark.parametrize(("name", "text", "pieces"), EXAMPLES)
def test_text_is_split_as_described(name: str, text: str, pieces: list[str]) -> None:
    """One example for each pattern, worked out by hand."""
    assert [piece for piece, _ in pre_tokenizers.Sequence(_steps(name)).pre_tokenize_str(text)] == pieces


def test_every_pattern_has_an_example() -> None:
    """The examples above leave out no pattern, so that each compiles and matches something."""
    seen = {PRE_TOKENIZERS[name].patterns for name, _, _ in EXAMPLES}
    assert seen == {known.patterns for known in PRE_TOKENIZERS.values()}


@pytest.mark.parametrize("name", ["qwen3-unheard-of", "", "kimi-k2"])
def test_an_unknown_name_is_unsupported(name: str) -> None:
    """An unknown pre-tokenizer is an error with those that are known, never a silent default."""
    with pytest.raises(UnsupportedError, match=r"bailingmoe, .*llama-bpe, .*smollm, "):
        pre_tokenizer(name)


def test_a_missing_name_is_unsupported(make_metadata: MakeMetadata, byte_level: dict[str, Any]) -> None:
    """A file that does not name its pre-tokenizer is refused too: a guess would degrade every answer."""
    with pytest.raises(UnsupportedError, match="convert the model again"):
        build_tokenizer(make_metadata(byte_level | {"pre": None}))
