"""The tokenizer of a model: text to token ids and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from refengine.errors import RequestError, TokenIdError
from refengine.tokenizer.byte_level import ByteLevelBPE
from refengine.tokenizer.data import Metadata, TokenizerData, TokenType, check_merges, read_tokenizer_data
from refengine.tokenizer.sentencepiece import SentencePiece
from refengine.tokenizer.special_tokens import SpecialTokens
from refengine.tokenizer.stream import StreamDecoder

HIDDEN = frozenset({TokenType.CONTROL, TokenType.UNKNOWN, TokenType.UNUSED})
"""The types of tokens whose names are no part of a text."""


def build_tokenizer(metadata: Metadata) -> Tokenizer:
    """The tokenizer that a checkpoint's metadata describes.

    Raises:
        FormatError: the metadata is incomplete or contradicts itself; the text names the key.
        UnsupportedError: the tokenizer's model or its pre-tokenizer is not implemented.
    """
    data = read_tokenizer_data(metadata)
    try:
        return Tokenizer(data)
    except Exception:  # tokenizers looks every merge up anyway, so that merges are not checked before
        if data.merges:
            check_merges(metadata, data)
        raise


class TextModel(Protocol):
    """What turns text without special tokens into tokens and normal tokens into bytes."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``."""

    def decode(self, token: str) -> bytes:
        """The bytes that a normal token stands for."""


class Tokenizer:
    """Text <-> token ids, as llama.cpp does it.

    Attributes:
        vocabulary_size: ids are 0 to ``vocabulary_size - 1``.
        bos_id, eos_id: the tokens that begin and end a text, or ``None``.
        bos_token, eos_token: their texts, as chat templates write them; empty for ``None``.
        end_ids: every id that ends generation: end of text, of turn, of message.
        chat_template: source of the model's Jinja chat template, or ``None``.
        control_names: the texts that ``encode`` reads as control tokens where ``parse_special`` says so.
    """

    def __init__(self, data: TokenizerData) -> None:
        self.vocabulary_size = len(data.tokens)
        self.bos_id, self.eos_id, self.end_ids = data.bos_id, data.eos_id, data.end_ids
        self.bos_token, self.eos_token = (
            "" if id is None else data.tokens[id] for id in (data.bos_id, data.eos_id)
        )
        self.chat_template = data.chat_template
        self._tokens, self._types = data.tokens, data.types
        self._first = [data.bos_id] if data.add_bos and data.bos_id is not None else []
        self._last = [data.eos_id] if data.add_eos and data.eos_id is not None else []
        self._add_space_prefix = data.add_space_prefix
        self._model: TextModel = ByteLevelBPE(data) if data.model == "gpt2" else SentencePiece(data)
        kept = data.ids_of_type(TokenType.USER_DEFINED)
        self._kept = SpecialTokens(kept)
        control = data.ids_of_type(TokenType.CONTROL, TokenType.UNKNOWN)
        self._special = SpecialTokens(kept | control)
        self.control_names = frozenset(control)

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = False, mark: str = ""
    ) -> list[int]:
        """The token ids of ``text``.

        Args:
            text: any text; user-defined tokens in it are always kept whole.
            add_special: begin with BOS and end with EOS, where the model's metadata says so.
            parse_special: read the text of a control token, such as ``<|im_start|>``, as that token. Without
                it, and so for what users write, such text is text like any other.
            mark: a character that is not part of the text: where it stands in the name of a control token,
                the name is text.

        Raises:
            RequestError: the text holds a lone surrogate, or a character the vocabulary cannot express.
        """
        _check_encodable(text)
        ids = self._first.copy() if add_special else []
        after_special = True
        pieces = (self._special if parse_special else self._kept).split(text)
        for piece in self._unmarked(pieces, mark) if mark else pieces:
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._model.encode(f" {piece}" if self._add_space_prefix and after_special else piece)
            after_special = isinstance(piece, int)
        return ids + self._last if add_special else ids

    def _unmarked(self, pieces: Iterable[str | int], mark: str) -> Iterator[str | int]:
        """The pieces without marks; what marks have kept apart is text and user-defined tokens."""
        for piece in pieces:
            if isinstance(piece, int):
                yield piece
            else:
                yield from self._kept.split(piece.replace(mark, ""))

    def decode(self, ids: Iterable[int], *, skip_special: bool = False, continuation: bool = False) -> str:
        """The text of ``ids``, with U+FFFD for bytes that are not UTF-8.

        The one space that ``encode`` puts before a text is taken away again.

        Args:
            ids: token ids.
            skip_special: leave out control and unknown tokens.
            continuation: the ids go on from others, so that a space at their start is one of the text.

        Raises:
            TokenIdError: an id lies outside the vocabulary.
        """
        decoder = self.stream_decoder(skip_special=skip_special, continuation=continuation)
        return "".join([*map(decoder.push, ids), decoder.finish()])

    def stream_decoder(self, *, skip_special: bool = False, continuation: bool = False) -> StreamDecoder:
        """A decoder for ids that come one by one; the arguments are those of ``decode``."""

        def token_bytes(id: int) -> bytes:
            data = self.token_bytes(id)
            return b"" if skip_special and self._types[id] in HIDDEN else data

        return StreamDecoder(token_bytes, drop_space=self._add_space_prefix and not continuation)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token adds to a text; for a control token, those of its name.

        Raises:
            TokenIdError: the id lies outside the vocabulary.
        """
        if not 0 <= id < self.vocabulary_size:
            raise TokenIdError(f"token id {id} is outside the vocabulary, 0 to {self.vocabulary_size - 1}")
        token, type = self._tokens[id], self._types[id]
        if type == TokenType.NORMAL:
            return self._model.decode(token)
        if type == TokenType.BYTE:
            return bytes.fromhex(token.removeprefix("<0x").removesuffix(">"))
        return token.encode()


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text has a lone surrogate, U+{ord(text[error.start]):04X}, as character {error.start}"
        ) from None
