"""Tiny models, loaded once."""

from __future__ import annotations

import pytest
from cli.alphabet_model import write_model

import refengine
from refengine import LLM, EngineConfig


@pytest.fixture(scope="session")
def alphabet(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """Answers every chat with the alphabet; 4 sequences at once, 256 positions of context."""
    path = write_model(tmp_path_factory.mktemp("batch") / "alphabet.gguf", context=256)
    return refengine.load(str(path), backend="numpy", config=EngineConfig(max_sequences=4))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """The same without a chat template."""
    path = write_model(tmp_path_factory.mktemp("batch") / "base.gguf", template=None)
    return refengine.load(str(path), backend="numpy")
