"""Both kinds of vocabulary give the ids that Transformers gives, from the same files."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import GemmaTokenizer, PreTrainedTokenizerFast

from refengine.errors import RequestError
from refengine.tokenizer import Tokenizer

CORPUS = {
    "nothing": [""],
    "words": [
        "Hello, world!",
        "How's it going? I'm fine, they'll've said we'd DON'T 'TIS 'tis",
        "CamelCase snake_case SCREAMING http://example.org/a?b=c&d=%20#x user@example.org",
        "İstanbul ıI DŽ Dž dž ſ 's 'ſ K k",
    ],
    "white space": [
        *(
            " ",
            "  ",
            " a",
            "   a  ",
            "a" + " " * 31 + "b",
            "\t",
            "\t\t\tx",
            "\t" * 25,
            "\n",
            "\n\n",
            "\n" * 40,
        ),
        *(
            "\r\n\r\n",
            " \n \n\n  \n",
            "a\nb\r\nc\rd\n\n\n\ne",
            "\u00a0\u2003\u2028\u2029\u3000x\u0085\u200b\ufeff",
        ),
    ],
    "digits": ["0123456789" * 5, "3.14159 1,000,000 1e-10 0xDEADBEEF", "١٢٣ ²³ Ⅷ ½ १२३", "a  1\n 2"],
    "code": [
        "x = [i**2 for i in range(10)]  # squares\n\tif x:\n        return {'a': None}\n",
        '<div class="x"><p>hi</p></div> <table><tr><td></s><s><strong>\n\n\n',
        "'''\"\"\"```~~~!!!???...---___===<<<>>>",
    ],
    "scripts": [
        *(
            "漢字かな交じり文。カタカナ、한국어 조선말 中文",
            "مرحبا بالعالم، كيف حالك؟",
            "שלום עולם",
            "Привет, мир! Ёлка",
        ),
        *("नमस्ते दुनिया", "ภาษาไทยไม่มีช่องว่าง", "ᚠᛇᚻ ᛒᛦᚦ", "ｆｕｌｌｗｉｄｔｈ ﬁ ﬀ"),
    ],
    "emoji": ["😀😃👍🏽", "👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ❤️"],
    "combining marks": [
        "e\u0301 é A\u030a Å Å",
        "Z\u0351\u036b\u0343\u032aa\u0334\u0335l\u0332\u0325go",
        "\u0301\u0300",
    ],
    "controls": ["\0", "a\0b\x01\x02\x03\x05\x07\x08\x0b\x0c\x0e\x1b\x7f\x80\x9f"],
    "planes": [
        "\ud7ff\ue000\ufffd\ufffe\uffff",
        "\U00010000\U00020000\U0002a6d6\U00030000\U000e0041\U000f0000\U0010ffff",
    ],
    "special tokens": [
        *(
            "<|im_start|>user\nhi<|im_end|>\n",
            "<|endoftext|><|endoftext|>",
            "<|im_start|",
            "<repo_name>x<reponame>",
        ),
        *(
            "<bos><start_of_turn>user\nhi<end_of_turn>",
            "foo<eos>",
            "<unused5><unused99>",
            "<pad> <unk> <mask>",
        ),
        *("[multimodal]", "<0x0A><0xFF>", "Ġ Ċ Ġhello"),
    ],
    "repetition": ["a" * 51, "ab" * 33, "<" * 37, "=-" * 40, "\U0001f600" * 20],
}


def _random_texts() -> list[str]:
    choose = random.Random(0)
    assigned = [
        character
        for character in map(chr, range(0x110000))
        if unicodedata.category(character) not in ("Cs", "Cn")
        and character not in "▁\x04\x06\x13\x14\x16\x1d"
    ]
    ascii_ = [*map(chr, range(32, 127)), *"\n\t\r   "]
    fixed = [text for texts in CORPUS.values() for text in texts]
    return [
        *("".join(choose.choices(assigned, k=40)) for _ in range(100)),
        *("".join(choose.choices(ascii_, k=60)) for _ in range(200)),
        *(" ".join(choose.choices(fixed, k=3)) for _ in range(100)),
    ]


CORPUS["random texts"] = _random_texts()


@pytest.fixture(scope="module")
def smollm2_reference(smollm2_path: Path) -> Any:
    """Transformers' tokenizer with the pre-tokenizer that SmolLM2 was published with.

    Transformers takes GPT-2's for every ``pre`` it does not know, ``smollm`` among them, and so cuts
    white space before a digit as if the digit belonged to it.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def gemma3_reference(gemma3_path: Path) -> Any:
    """Transformers' tokenizer; `AutoTokenizer` finds the same one, in five times the time."""
    return GemmaTokenizer.from_pretrained(gemma3_path.parent, gguf_file=gemma3_path.name)


def _reference_ids(reference: Any, text: str, *, parse_special: bool) -> list[int]:
    ids: list[int] = reference(
        text, add_special_tokens=False, split_special_tokens=not parse_special
    ).input_ids
    return ids


@pytest.mark.parametrize("parse_special", [False, True])
@pytest.mark.parametrize("texts", CORPUS)
def test_byte_level_ids_are_those_of_transformers(
    smollm2: Tokenizer, smollm2_reference: Any, texts: str, parse_special: bool
) -> None:
    """SmolLM2's ids are Transformers', whether or not control tokens are read as such."""
    for text in CORPUS[texts]:
        ids = smollm2.encode(text, add_special=False, parse_special=parse_special)
        assert ids == _reference_ids(smollm2_reference, text, parse_special=parse_special), ascii(text)


@pytest.mark.parametrize("parse_special", [False, True])
@pytest.mark.parametrize("texts", CORPUS)
def test_sentencepiece_ids_are_those_of_transformers(
    gemma3: Tokenizer, gemma3_reference: Any, texts: str, parse_special: bool
) -> None:
    """Gemma 3's ids are Transformers', whether or not control tokens are read as such."""
    for text in CORPUS[texts]:
        ids = gemma3.encode(text, add_special=False, parse_special=parse_special)
        assert ids == _reference_ids(gemma3_reference, text, parse_special=parse_special), ascii(text)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x04\x06\x13\x14\x16\x1d")))
@settings(max_examples=300, deadline=None)
def test_byte_level_ids_of_any_text(smollm2: Tokenizer, smollm2_reference: Any, text: str) -> None:
    """SmolLM2's ids are Transformers' for any text that its vocabulary can express."""
    if {0xF1, 0xF2} & set(text.encode()):
        with pytest.raises(RequestError, match="no token for the byte 0xF"):
            smollm2.encode(text)
    else:
        ids = smollm2.encode(text, add_special=False)
        assert ids == _reference_ids(smollm2_reference, text, parse_special=False)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
@settings(max_examples=300, deadline=None)
def test_sentencepiece_ids_of_any_text(gemma3: Tokenizer, gemma3_reference: Any, text: str) -> None:
    """Gemma 3's ids are Transformers' for any text without U+2581."""
    ids = gemma3.encode(text, add_special=False)
    assert ids == _reference_ids(gemma3_reference, text, parse_special=False)


def test_special_tokens_are_added_as_transformers_adds_them(
    smollm2: Tokenizer, smollm2_reference: Any, gemma3: Tokenizer, gemma3_reference: Any
) -> None:
    """SmolLM2's file asks for no BOS, Gemma 3's for one."""
    for tokenizer, reference in ((smollm2, smollm2_reference), (gemma3, gemma3_reference)):
        assert tokenizer.encode("hello") == reference("hello").input_ids
        assert tokenizer.encode("") == reference("").input_ids
    assert gemma3.encode("hello")[0] == gemma3.bos_id


@pytest.mark.parametrize("skip_special", [False, True])
def test_decoded_text_is_that_of_transformers(
    smollm2: Tokenizer,
    smollm2_reference: Any,
    gemma3: Tokenizer,
    gemma3_reference: Any,
    skip_special: bool,
) -> None:
    """Ids of valid text decode as in Transformers, with control tokens and without."""
    for tokenizer, reference in ((smollm2, smollm2_reference), (gemma3, gemma3_reference)):
        for text in (text for texts in CORPUS.values() for text in texts):
            ids = tokenizer.encode(text, parse_special=True)
            expected = reference.decode(
                ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
            )
            assert tokenizer.decode(ids, skip_special=skip_special) == expected


def test_a_byte_without_token_is_refused(smollm2: Tokenizer, smollm2_reference: Any) -> None:
    """SmolLM2 has no token for U+0004: an error, where Transformers and llama.cpp drop it silently."""
    assert smollm2_reference.decode(smollm2_reference("a\x04b").input_ids) == "ab"
    with pytest.raises(RequestError, match="no token for the byte 0x04"):
        smollm2.encode("a\x04b")


@pytest.mark.parametrize("length", [32, 40, 62, 63, 100])
def test_long_runs_of_spaces_are_cut_from_the_left(
    gemma3: Tokenizer, gemma3_reference: Any, length: int
) -> None:
    """Gemma 3's runs of spaces are user-defined tokens, taken as long as there are from the left.

    So do SentencePiece and llama.cpp; Transformers merges pairs of spaces, and halves runs above 31.
    """
    text = "x" + " " * length + "\n"
    ids = gemma3.encode(text, add_special=False)
    assert [gemma3.token_bytes(id) for id in ids[1 : 1 + length // 31]] == [b" " * 31] * (length // 31)
    assert b"".join(map(gemma3.token_bytes, ids)) == text.encode()
    assert ids != _reference_ids(gemma3_reference, text, parse_special=False)


def test_a_written_lower_block_is_not_a_run_of_spaces(gemma3: Tokenizer) -> None:
    """Two U+2581 are not the token of two spaces, as in llama.cpp: that one is written with real spaces.

    Transformers writes it with U+2581 instead, and finds it here.
    """
    assert list(map(gemma3.token_bytes, gemma3.encode("▁▁.", add_special=False))) == [b" ", b" ."]
    assert list(map(gemma3.token_bytes, gemma3.encode("  .", add_special=False))) == [b"  ", b"."]
