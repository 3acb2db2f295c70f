"""What a GGUF file says about its tokenizer, read and checked.

Source: the GGUF specification (``docs/gguf.md`` of ggml) for the keys, llama.cpp (``src/llama-vocab.cpp``)
for what holds where a key is absent.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol, TypeVar

import numpy as np

from refengine.errors import FormatError, UnsupportedError
from refengine.tokenizer.pre_tokenizers import PreTokenizer, pre_tokenizer

T = TypeVar("T")

MERGES = "tokenizer.ggml.merges"

BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
"""How SentencePiece writes the token of one byte."""

SPECIAL_IDS = ("bos", "eos", "eot", "eom", "unknown", "padding", "fim_pad", "fim_rep", "fim_sep")
"""The roles a file may give to tokens, under ``tokenizer.ggml.{role}_token_id``."""

ENDING_IDS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
"""Those after which a model has nothing more to say."""

ENDING_TEXTS = frozenset(
    (
        *("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<｜end▁of▁sentence｜>", "[e~["),
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<EOT>", "_<EOT>", "[EOT]"),
        *("<end_of_utterance>", "<|eom_id|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>"),
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
        *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
    )
)
"""The control tokens after which llama.cpp ends a generation, whatever a file's keys say."""


class TokenType(IntEnum):
    """What a token is for (``tokenizer.ggml.token_type``)."""

    NORMAL = 1
    UNKNOWN = 2  # stands for text that has no token
    CONTROL = 3  # never written by a user: <|im_start|>
    USER_DEFINED = 4  # always kept whole: a run of newlines, <table>
    UNUSED = 5  # fills up the vocabulary
    BYTE = 6  # one byte of text that has no token: <0x0A>


class Metadata(Protocol):
    """What is needed of a checkpoint's key-values; `refengine.loader.metadata.Metadata` has it."""

    def error(self, key: str, problem: str) -> FormatError:
        """The error to raise about a key's value."""

    def string(self, key: str, default: T = ...) -> str | T:
        """The string at ``key``."""

    def integer(self, key: str, default: T = ...) -> int | T:
        """The integer at ``key``."""

    def boolean(self, key: str, default: T = ...) -> bool | T:
        """The boolean at ``key``."""

    def array(self, key: str, default: T = ...) -> Any | T:
        """The array of numbers at ``key``, a NumPy array."""

    def strings(self, key: str, default: T = ...) -> Sequence[str] | T:
        """The array of strings at ``key``."""


@dataclass(frozen=True, eq=False)
class TokenizerData:
    """A vocabulary and how to use it; token ids are positions in ``tokens``.

    Attributes:
        model: ``"gpt2"`` (byte-level BPE) or ``"llama"`` (SentencePiece).
        tokens: [n], distinct but for empty ones.
        types: [n], the `TokenType` of each token.
        text_ids: text -> id of the tokens that ordinary text can become: the normal and user-defined ones.
        scores: [n], finite, the higher the earlier merged; empty for ``gpt2``.
        merges: pairs of tokens whose concatenation is a token, earliest first; empty for ``llama``. Whether
            they are that is for `check_merges` to tell.
        pre_tokenizer: how text is split first; ``None`` for ``llama``.
        bos_id, eos_id: the tokens that begin and end a text, or ``None``.
        end_ids: the tokens after which a model has nothing more to say.
        add_bos, add_eos: whether texts are to begin with ``bos_id`` and end with ``eos_id``.
        add_space_prefix: whether a space goes before text; always false for ``gpt2``.
        chat_template: source of the Jinja template, or ``None``.
    """

    model: str
    tokens: Sequence[str]
    types: bytes
    text_ids: Mapping[str, int]
    scores: Sequence[float]
    merges: Sequence[tuple[str, str]]
    pre_tokenizer: PreTokenizer | None
    bos_id: int | None
    eos_id: int | None
    end_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None

    def ids_of_type(self, *types: TokenType) -> dict[str, int]:
        """Text -> id of the tokens of these types, empty ones left out."""
        ids = (id for type in types for id in _positions(self.types, type))
        return {token: id for id in ids if (token := self.tokens[id])}


def read_tokenizer_data(metadata: Metadata) -> TokenizerData:
    """Reads and checks the ``tokenizer.*`` keys.

    Raises:
        FormatError: a key is missing, of the wrong type, or contradicts another; the text names it.
        UnsupportedError: the tokenizer's model or its pre-tokenizer is not implemented.
    """
    model = metadata.string("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise UnsupportedError(
            f"the tokenizer model {model!r} (tokenizer.ggml.model) is not implemented; implemented are gpt2 "
            "(byte-level BPE) and llama (SentencePiece), not bert (WordPiece), t5 (Unigram), rwkv and others"
        )
    sentencepiece = model == "llama"
    pre = None if sentencepiece else _pre_tokenizer(metadata)
    tokens, ids = _tokens(metadata)
    types = _types(metadata, tokens)
    special = {role: _special_id(metadata, role, len(tokens)) for role in SPECIAL_IDS}
    if sentencepiece:  # its own numbering
        for role, id in (("bos", 1), ("eos", 2)):
            if special[role] is None and id < len(tokens):
                special[role] = id
    if sentencepiece and metadata.boolean("tokenizer.ggml.remove_extra_whitespaces", False):
        raise UnsupportedError("tokenizer.ggml.remove_extra_whitespaces is set, which is not implemented")

    def adds(role: str, default: bool) -> bool:
        key = f"tokenizer.ggml.add_{role}_token"
        if (add := metadata.boolean(key, default)) and special[role] is None:
            raise metadata.error(
                key, f"or its default is true, but tokenizer.ggml.{role}_token_id is missing"
            )
        return add

    end_ids = _end_ids(special, ids, types)
    text_ids = _text_ids(tokens, ids, types)
    return TokenizerData(
        model=model,
        tokens=metadata.strings("tokenizer.ggml.tokens"),  # in the file: no Python strings are kept
        types=types,
        text_ids=text_ids,
        scores=_scores(metadata, len(tokens)) if sentencepiece else (),
        merges=() if sentencepiece else _merges(metadata),
        pre_tokenizer=pre,
        bos_id=special["bos"],
        eos_id=special["eos"],
        end_ids=end_ids,
        add_bos=adds("bos", pre.add_bos if pre else True),
        add_eos=adds("eos", False),
        add_space_prefix=sentencepiece and metadata.boolean("tokenizer.ggml.add_space_prefix", True),
        chat_template=metadata.string("tokenizer.chat_template", None),
    )


def _pre_tokenizer(metadata: Metadata) -> PreTokenizer:
    name = metadata.string("tokenizer.ggml.pre", None)
    if name is None:
        raise UnsupportedError(
            "the file does not say how text is split (tokenizer.ggml.pre is missing), as those converted "
            "before May 2024; convert the model again"
        )
    return pre_tokenizer(name)


def _tokens(metadata: Metadata) -> tuple[list[str], dict[str, int]]:
    """The tokens, and the id of each."""
    key = "tokenizer.ggml.tokens"
    tokens = list(metadata.strings(key))
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(ids) != len(tokens):
        for id, token in enumerate(tokens):
            if token and ids[token] != id:
                raise metadata.error(key, f"has {token!r} twice, as tokens {id} and {ids[token]}")
    if not tokens:
        raise metadata.error(key, "is empty")
    return tokens, ids


def _types(metadata: Metadata, tokens: Sequence[str]) -> bytes:
    key = "tokenizer.ggml.token_type"
    stored = metadata.array(key, None)
    if stored is None:
        return bytes([TokenType.NORMAL]) * len(tokens)
    if stored.dtype.kind not in "iu":
        raise metadata.error(key, f"must be an array of integers, but is one of {stored.dtype.name}")
    if len(stored) != len(tokens):
        raise metadata.error(key, f"has {len(stored)} entries for {len(tokens)} tokens")
    unknown = (stored < min(TokenType)) | (stored > max(TokenType))
    if unknown.any():
        id = int(unknown.argmax())
        raise metadata.error(key, f"gives token {id} the unknown type {stored[id]}")
    types: bytes = stored.astype("u1").tobytes()
    for id in _positions(types, TokenType.BYTE):
        if not BYTE_TOKEN.fullmatch(tokens[id]):
            raise metadata.error(
                key, f"calls token {id} a byte, but it is {tokens[id]!r}, not '<0x00>' to '<0xFF>'"
            )
    return types


def _positions(types: bytes, type: TokenType) -> Iterator[int]:
    at = types.find(type)
    while at >= 0:
        yield at
        at = types.find(type, at + 1)


def _text_ids(tokens: Sequence[str], ids: dict[str, int], types: bytes) -> dict[str, int]:
    """``ids`` itself, without the tokens that no ordinary text becomes: a copy of it would be large."""
    ids.pop("", None)
    for type in (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.UNUSED, TokenType.BYTE):
        for id in _positions(types, type):
            ids.pop(tokens[id], None)
    return ids


def _scores(metadata: Metadata, n_tokens: int) -> Sequence[float]:
    key = "tokenizer.ggml.scores"
    stored = metadata.array(key)
    if stored.dtype.kind not in "fi":
        raise metadata.error(key, f"must be an array of floats, but is one of {stored.dtype.name}")
    if len(stored) != n_tokens:
        raise metadata.error(key, f"has {len(stored)} entries for {n_tokens} tokens")
    with np.errstate(over="ignore"):
        scores = stored.astype("f")
    if not np.isfinite(scores).all():
        raise metadata.error(key, "has entries that are infinite or not numbers")
    return array("f", scores.tobytes())


def _merges(metadata: Metadata) -> list[tuple[str, str]]:
    merges = dict.fromkeys(metadata.strings(MERGES))  # of two equal ones, the first counts
    return [merge.partition(" ")[::2] for merge in merges]


def check_merges(metadata: Metadata, data: TokenizerData) -> None:
    """Names the first merge that is none.

    Raises:
        FormatError: a merge is not two tokens, or their union is not a token.
    """
    ids = data.text_ids
    for index, merge in enumerate(metadata.strings(MERGES)):
        first, _, second = merge.partition(" ")
        if first not in ids or second not in ids or first + second not in ids:
            raise metadata.error(
                MERGES,
                f"has {merge!r} as merge {index}, not two tokens with a space between them whose union is a "
                "token (all of them normal or user-defined)",
            )


def _special_id(metadata: Metadata, role: str, n_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    id = metadata.integer(key, None)
    if id is not None and not 0 <= id < n_tokens:
        raise metadata.error(key, f"is {id}, but tokens are numbered from 0 to {n_tokens - 1}")
    return id


def _end_ids(special: Mapping[str, int | None], ids: Mapping[str, int], types: bytes) -> frozenset[int]:
    """Tokens the file names as ends, and those known as ends by their text.

    The second only where the file calls them control tokens: to Gemma 3, ``</s>`` ends struck-out HTML.
    """
    named = {id for role in ENDING_IDS if (id := special[role]) is not None}
    known = {text for text in ENDING_TEXTS & ids.keys() if types[ids[text]] == TokenType.CONTROL}
    if {"<|return|>", "<|call|>"} <= known or {"<|calls|>", "<|flush|>"} <= known:
        known.discard("<|end|>")  # with these, it ends one of several messages
    return frozenset(named | {ids[text] for text in known})
