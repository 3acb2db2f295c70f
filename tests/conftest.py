"""The real models, fetched once into the user's cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from refengine.loader import resolve


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2 135M Instruct, Q4_1."""
    return resolve("smollm2")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma 3 270M, Q4_K_M."""
    return resolve("gemma3-270m")
