"""What the tests of the Numba backend share: stored matrices, and threads that run an entry."""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refengine.quantizer import ENCODINGS

REASON = next(
    (
        f"{name} is not installed"
        for name in ("numba.extending", "llvmlite", "refengine_numba")
        if importlib.util.find_spec(name.split(".")[0]) is None
        or (name == "numba.extending" and importlib.util.find_spec("numba").origin is None)
    ),
    None,
)
"""Why these tests cannot run; this folder itself could pass for a package called ``numba``."""


class SkippedModule(pytest.Module):
    """A module of tests that is not imported."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip(str(REASON), allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return SkippedModule.from_parent(parent, path=module_path) if REASON else None


HALVES = {
    "q4_0": [0],
    "q4_1": [0, 2],
    "q5_0": [0],
    "q5_1": [0, 2],
    "q8_0": [0],
    "q4_k": [0, 2],
    "q5_k": [0, 2],
    "q6_k": [208],
}
"""Where in a block float16 numbers stand."""


def stored_matrix(name: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Stored bytes [rows, row_bytes] of ordinary, finite weights of either sign, about one in size."""
    rng = np.random.default_rng([seed, rows, columns])
    weights = rng.standard_normal((rows, columns)).astype(np.float32)
    match name:
        case "f32":
            return weights.view(np.uint8)
        case "f16":
            return weights.astype(np.float16).view(np.uint8)
        case "bf16":
            return np.ascontiguousarray(weights.view(np.uint16)[:, 1::2]).view(np.uint8)
    stored = ENCODINGS[name]
    data = rng.integers(0, 256, (rows, stored.row_bytes(columns)), dtype=np.uint8)
    blocks = data.reshape(rows, -1, stored.block_bytes)
    size = {4: 0.1, 5: 0.05, 8: 0.01, 6: 0.0005}[int(name[1])] / (60 if name in ("q4_k", "q5_k") else 1)
    for at in HALVES[name]:
        halves = (rng.standard_normal(blocks.shape[:2]) * size).astype("<f2")
        blocks[..., at : at + 2] = halves[..., None].view(np.uint8)
    return data


def run(compiled: Any, arguments: Any, threads: int = 1, at_once: bool = False) -> None:
    """Call an entry as each of so many threads: one after the other, or at once."""
    pointer = arguments.words.ctypes.data_as(ctypes.POINTER(ctypes.c_int64))
    if not at_once:
        for thread in reversed(range(threads)):
            compiled.function(thread, threads, pointer)
        return
    team = [threading.Thread(target=compiled.function, args=(t, threads, pointer)) for t in range(threads)]
    for member in team:
        member.start()
    for member in team:
        member.join()


@pytest.fixture(scope="session")
def matrix() -> Callable[..., np.ndarray]:
    """:func:`stored_matrix`."""
    return stored_matrix


@pytest.fixture(scope="session")
def call() -> Callable[..., None]:
    """:func:`run`."""
    return run
