"""Made-up vocabularies: every byte, so that any text has tokens, and words to fill them to the real size.

The words are a, b … z, aa, ab … zz, aaa …, each with a space before it and without. Each is a shorter one
joined with a last letter, so that text becomes tokens of three or four letters, about as long as those of a
real vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice, product
from string import ascii_lowercase
from types import MappingProxyType

import numpy as np

from refengine.errors import RequestError
from refengine.loader.gguf_writer import WritableValue
from refengine.tokenizer.byte_level import CHARACTERS
from refengine.tokenizer.data import TokenType
from refengine.tokenizer.sentencepiece import SPACE


@dataclass(frozen=True)
class Vocabulary:
    """What tells one kind of vocabulary from another.

    Attributes:
        model: ``tokenizer.ggml.model``, ``gpt2`` or ``llama``.
        pre: ``tokenizer.ggml.pre``.
        special: tokens that no text becomes, first in the vocabulary.
        roles: which of them is ``bos``, ``eos`` …
        add_bos: whether texts begin with ``bos``.
        add_space_prefix: whether a space goes before text.
    """

    model: str
    pre: str
    special: tuple[str, ...]
    roles: Mapping[str, str]
    add_bos: bool
    add_space_prefix: bool


VOCABULARIES: Mapping[str, Vocabulary] = MappingProxyType(
    {
        "llama": Vocabulary(
            "llama",
            "default",
            ("<unk>", "<s>", "</s>"),
            {"bos": "<s>", "eos": "</s>", "unknown": "<unk>"},
            add_bos=True,
            add_space_prefix=True,
        ),
        "gemma": Vocabulary(
            "llama",
            "default",
            ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
            {"bos": "<bos>", "eos": "<eos>", "unknown": "<unk>", "padding": "<pad>"},
            add_bos=True,
            add_space_prefix=False,
        ),
        "llama-3": Vocabulary(
            "gpt2",
            "llama-bpe",
            ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
            {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"},
            add_bos=True,
            add_space_prefix=False,
        ),
        "smollm": Vocabulary(
            "gpt2",
            "smollm",
            ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            {"bos": "<|im_start|>", "eos": "<|im_end|>", "unknown": "<|endoftext|>", "padding": "<|im_end|>"},
            add_bos=False,
            add_space_prefix=False,
        ),
        "qwen": Vocabulary(
            "gpt2",
            "qwen2",
            ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            {"bos": "<|endoftext|>", "eos": "<|im_end|>", "padding": "<|endoftext|>"},
            add_bos=False,
            add_space_prefix=False,
        ),
    }
)
"""By name; the special tokens and the flags are those of the models whose name they have."""


def tokenizer_metadata(name: str, size: int) -> dict[str, WritableValue]:
    """The ``tokenizer.*`` keys of a vocabulary with ``size`` tokens.

    Raises:
        RequestError: so few tokens do not cover every text.
    """
    kind = VOCABULARIES[name]
    byte_level = kind.model == "gpt2"
    space = CHARACTERS[ord(" ")] if byte_level else SPACE
    if byte_level:
        letters, types = list(CHARACTERS.values()), [TokenType.NORMAL] * 256
    else:
        visible = [SPACE, *map(chr, range(0x21, 0x7F))]
        letters = [*(f"<0x{byte:02X}>" for byte in range(256)), *visible]
        types = [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(visible)
    first = [*kind.special, *letters]
    if size < len(first):
        raise RequestError(
            f"a vocabulary of {size} tokens does not cover every text: the least is {len(first)}"
        )
    words = list(islice(_words(space), size - len(first)))
    special_types = [
        TokenType.UNKNOWN if kind.roles.get("unknown") == text and not byte_level else TokenType.CONTROL
        for text in kind.special
    ]
    all_types = [*special_types, *types, *[TokenType.NORMAL] * len(words)]
    metadata: dict[str, WritableValue] = {
        "tokenizer.ggml.model": kind.model,
        "tokenizer.ggml.pre": kind.pre,
        "tokenizer.ggml.tokens": [*first, *words],
        "tokenizer.ggml.token_type": np.array(all_types, np.int32),
    }
    if byte_level:
        metadata["tokenizer.ggml.merges"] = [f"{word[:-1]} {word[-1]}" for word in words]
    else:  # the earlier, the likelier; what is no word has no score that matters
        metadata["tokenizer.ggml.scores"] = np.minimum(len(first) - np.arange(size), 0).astype(np.float32)
    for role, text in kind.roles.items():
        metadata[f"tokenizer.ggml.{role}_token_id"] = np.uint32(kind.special.index(text))
    metadata["tokenizer.ggml.add_bos_token"] = kind.add_bos
    metadata["tokenizer.ggml.add_eos_token"] = False
    metadata["tokenizer.ggml.add_space_prefix"] = kind.add_space_prefix
    return metadata


def _words(space: str) -> Iterator[str]:
    for length in count(1):
        for letters in product(ascii_lowercase, repeat=length):
            word = "".join(letters)
            yield space + word
            if length > 1:
                yield word
