"""The tokenizers of two real models, and metadata for synthetic ones."""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refengine.loader import read_gguf
from refengine.loader.metadata import Metadata, StringArray
from refengine.tokenizer import Tokenizer, build_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

MakeMetadata = Callable[[dict[str, Any]], Metadata]


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Tokenizer:
    """A byte-level vocabulary of 49,152 tokens."""
    return build_tokenizer(read_gguf(smollm2_path).metadata)


@pytest.fixture(scope="session")
def gemma3(gemma3_path: Path) -> Tokenizer:
    """A SentencePiece vocabulary of 262,144 tokens."""
    return build_tokenizer(read_gguf(gemma3_path).metadata)


@pytest.fixture(scope="session")
def make_metadata() -> MakeMetadata:
    """Metadata as a file would give it, of ``tokenizer.ggml.*`` keys; that of key i lies at byte 1000 + i."""

    def make(values: dict[str, Any]) -> Metadata:
        stored = {
            key if "." in key else f"tokenizer.ggml.{key}": _stored(key, value)
            for key, value in values.items()
            if value is not None
        }
        offsets = {key: 1000 + index for index, key in enumerate(stored)}
        return Metadata(stored, offsets=offsets, path=Path("model.gguf"))

    return make


def _stored(key: str, value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if key in ("tokens", "merges"):
        data = [struct.pack("<Q", len(text.encode())) + text.encode() for text in value]
        offsets = np.array([0, *accumulate(map(len, data))])
        return StringArray(b"".join(data), offsets, name=key)
    return np.array(value, "<f4" if key == "scores" else "<i4")


@pytest.fixture(scope="session")
def byte_level() -> dict[str, Any]:
    """The keys of a byte-level vocabulary: 256 bytes, three merges, a control and a user-defined token."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = [chr(byte) for byte in visible] + [chr(0x100 + i) for i in range(256 - len(visible))]
    tokens = [*characters, "he", "ll", "hell", "<|end|>", "<table>"]
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [NORMAL] * 259 + [CONTROL, USER_DEFINED],
        "merges": ["h e", "l l", "he ll"],
        "eos_token_id": 259,
    }


@pytest.fixture(scope="session")
def sentencepiece() -> dict[str, Any]:
    """The keys of a SentencePiece vocabulary: <unk>, <s>, </s>, 256 bytes, <table>, and a few pieces."""
    pieces = ["▁", "h", "e", "l", "o", "he", "ll", "hell", "hello", "▁hello", "▁▁"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<table>", *pieces]
    return {
        "model": "llama",
        "tokens": tokens,
        "token_type": [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, USER_DEFINED, *[NORMAL] * len(pieces)],
        "scores": [0.0] * 260 + [-1.0 - index for index in range(len(pieces))],
    }
