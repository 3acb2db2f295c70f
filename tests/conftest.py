"""The real models, fetched once into the user's cache; and the golden backend, where a test names no other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from refengine.backend.selection import VARIABLE
from refengine.loader import resolve

os.environ[VARIABLE] = "numpy"


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2 135M Instruct, Q4_1."""
    return resolve("smollm2")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma 3 270M, Q4_K_M."""
    return resolve("gemma3-270m")
