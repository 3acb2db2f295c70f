"""Byte-level BPE: text as bytes, every byte as a character, merged as the vocabulary's merges say.

Source: GPT-2's ``encoder.py`` for the bytes; Sennrich et al., 2016 (arXiv:1508.07909) for the merges, which
are left to Hugging Face's ``tokenizers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from refengine.errors import RequestError
from refengine.tokenizer.data import TokenizerData


def _characters() -> dict[int, str]:
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


CHARACTERS: Mapping[int, str] = MappingProxyType(_characters())
"""The character that stands for each byte in a token; a space is Ġ, a newline is Ċ."""

BYTES: Mapping[str, int] = MappingProxyType({character: byte for byte, character in CHARACTERS.items()})


class ByteLevelBPE:
    """Text without special tokens <-> tokens of a ``gpt2`` vocabulary."""

    def __init__(self, data: TokenizerData) -> None:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers

        pre = data.pre_tokenizer
        patterns, ignore_merges = (pre.patterns, pre.ignore_merges) if pre else ((), False)
        self._bpe = Tokenizer(models.BPE(dict(data.text_ids), list(data.merges), ignore_merges=ignore_merges))
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self._bytes = bytes(byte for byte in CHARACTERS if CHARACTERS[byte] in data.text_ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``.

        Raises:
            RequestError: a byte of its UTF-8 has no token; Transformers and llama.cpp leave it out silently.
        """
        if missing := text.encode().translate(None, delete=self._bytes):
            raise RequestError(
                f"the model's vocabulary has no token for the byte 0x{missing[0]:02X} of the text"
            )
        ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        return ids

    @staticmethod
    def decode(token: str) -> bytes:
        """The bytes that a normal token stands for; one that is not written in `CHARACTERS` is plain text."""
        try:
            return bytes(BYTES[character] for character in token)
        except KeyError:
            return token.encode()
