"""Kernels run on a device that the host plays, see emulation.h: where it can."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

REASON = None
if shutil.which("g++") is None:
    REASON = "g++ is not installed, which the kernels are compiled with"
elif platform.machine() != "x86_64":
    REASON = "the played device switches threads in x86-64 code"


class SkippedModule(pytest.Module):
    """A module of tests that is not imported."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip(str(REASON), allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return SkippedModule.from_parent(parent, path=module_path) if REASON else None
