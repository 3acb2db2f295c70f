"""Backends are found by entry point, imported only when chosen, and their errors say how to go on."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from refengine import backend
from refengine.backend import registry
from refengine.backend.info import BackendInfo
from refengine.errors import (
    BackendError,
    BackendFailedError,
    BackendNotInstalledError,
    UnknownBackendError,
    UnsupportedError,
)
from refengine.ops import OPS
from refengine.program import POLICIES

MISSING = BackendInfo("needs what is not there", "pip install 'refengine[missing]'", lambda: "no module x", 9)
SOUND = BackendInfo("fails when started", "pip install 'refengine[broken]'", lambda: None, -1)


class Exploding:
    """A backend whose start fails."""

    def __init__(self) -> None:
        raise OSError("driver too old")


class Choosy:
    """A backend that a setting keeps from starting."""

    def __init__(self) -> None:
        raise UnsupportedError("THREADS='0' is no number of threads")


def explode() -> None:
    """An info that is not one."""


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside NumPy: one backend not installed, one that fails to start, one whose description is broken."""
    made = {
        registry.BACKENDS: {"missing": "x:Y", "broken": f"{__name__}:Exploding", "odd": "x:Y"}
        | {"choosy": f"{__name__}:Choosy"},
        registry.INFOS: {"missing": f"{__name__}:MISSING", "broken": f"{__name__}:SOUND", "odd": "x:Y"}
        | {"choosy": f"{__name__}:SOUND"},
    }
    real = registry.entry_points

    def entry_points(group: str) -> EntryPoints:
        added = [EntryPoint(name, value, group) for name, value in made[group].items()]
        return EntryPoints([*real(group=group), *added])

    monkeypatch.setattr(registry, "entry_points", entry_points)
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])


def test_numpy_is_registered_and_supports_everything() -> None:
    """The golden backend computes every op under every policy."""
    loaded = backend.load("numpy")
    assert loaded.name == "numpy"
    assert all(loaded.support(op, encoding=None, policy=p) is None for op in OPS for p in POLICIES)
    assert "no op" in str(loaded.support("nonsense", encoding=None, policy="float32"))
    assert "no policy" in str(loaded.support("add", encoding=None, policy="float3"))
    assert loaded.devices()


@pytest.mark.parametrize(
    ("name", "error", "why", "mend"),
    [
        ("nmupy", UnknownBackendError, "no installed package", "'numpy'"),
        ("missing", BackendNotInstalledError, "no module x", "refengine[missing]"),
        ("broken", BackendFailedError, "OSError: driver too old", "refengine[broken]"),
        ("choosy", BackendFailedError, "THREADS='0' is no number", "change what the reason names"),
    ],
)
@pytest.mark.usefixtures("plugins")
def test_errors_have_four_parts(name: str, error: type[BackendError], why: str, mend: str) -> None:
    """State, what is available, why, and the command that mends it."""
    with pytest.raises(error) as caught:
        backend.load(name)
    assert name in caught.value.state
    assert "numpy" in caught.value.available
    assert why in caught.value.why
    assert mend in caught.value.mend
    for part in ("available:", "why:", "to mend it:"):
        assert part in str(caught.value)


@pytest.mark.usefixtures("plugins")
def test_a_broken_plugin_is_listed_and_breaks_nothing() -> None:
    """The others stay usable."""
    statuses = {status.name: status for status in backend.registered()}
    assert statuses["numpy"].problem is None
    assert "failed to load" in str(statuses["odd"].problem)


def test_listing_backends_imports_none() -> None:
    """Only the chosen backend is imported."""
    code = (
        "import sys; from refengine import backend; backend.registered(); "
        "sys.exit('refengine.backend.numpy_backend' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
