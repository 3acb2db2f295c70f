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
from stored_matrices import stored_matrix

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
