"""``auto`` is the fastest backend that computes the program, and says why it passes over a faster one."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import pytest

from refengine.backend import select
from refengine.backend.info import BackendInfo
from refengine.backend.numpy_backend import NumpyBackend
from refengine.backend.registry import BACKENDS, INFOS
from refengine.backend.selection import VARIABLE, missing
from refengine.errors import UnknownBackendError
from refengine.program import POLICIES
from refengine_conformance.tiny_model import tiny_model

FAST = BackendInfo("fast", "pip install fast", lambda: None, 90)
FASTER = BackendInfo("faster, where it starts", "pip install faster", lambda: None, 91)
ABSENT = BackendInfo("not here", "pip install absent", lambda: "no module", 92)


class Fast(NumpyBackend):
    """All ops of one encoding."""

    name = "fast"

    def support(self, op: str, *, encoding: str | None, policy: str) -> str | None:
        return None if encoding in (None, "f32") else f"fast has no kernels for {encoding}"


class Faster:
    """A backend that does not start."""

    def __init__(self) -> None:
        raise OSError("driver too old")


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy and three faster ones, one of which can run."""
    names = {"numpy": "refengine.backend.numpy_backend:NumpyBackend"}
    infos = {"numpy": "refengine.backend.numpy_info:INFO"}
    for name in ("Fast", "Faster", "Absent"):
        names[name.lower()] = f"{__name__}:{name}"
        infos[name.lower()] = f"{__name__}:{name.upper()}"
    made = {BACKENDS: names, INFOS: infos}

    def entry_points(group: str) -> EntryPoints:
        return EntryPoints([EntryPoint(name, value, group) for name, value in made[group].items()])

    monkeypatch.setattr("refengine.backend.registry.entry_points", entry_points)
    monkeypatch.delenv(VARIABLE)


def chosen(name: str, encoding: str = "f32") -> str:
    """The backend that is taken for a tiny model."""
    model = tiny_model()
    encodings = dict.fromkeys(model.weights, encoding)
    return select(name, model.program, POLICIES["float32"], encodings).name


@pytest.mark.usefixtures("backends")
def test_auto_takes_the_fastest_that_starts(caplog: pytest.LogCaptureFixture) -> None:
    """What is not installed is passed over in silence, what fails to start with its cause."""
    assert chosen("auto") == "fast"
    assert "driver too old" in caplog.text
    assert "absent" not in caplog.text


@pytest.mark.usefixtures("backends")
def test_auto_takes_none_that_lacks_an_encoding(caplog: pytest.LogCaptureFixture) -> None:
    """The reason is given."""
    assert chosen("auto", "q2_k") == "numpy"
    assert "fast has no kernels for q2_k" in caplog.text


@pytest.mark.usefixtures("backends")
def test_a_name_is_taken_at_its_word() -> None:
    """Nothing is asked of it here; and an unknown one is refused."""
    assert chosen("numpy") == "numpy"
    assert chosen("fast", "q2_k") == "fast"
    with pytest.raises(UnknownBackendError):
        chosen("quick")


@pytest.mark.usefixtures("backends")
def test_the_environment_says_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not overrule a name."""
    monkeypatch.setenv(VARIABLE, "numpy")
    assert chosen("auto") == "numpy"
    assert chosen("fast") == "fast"


def test_a_reason_is_found_beside_an_encoding_that_is_supported() -> None:
    """One matrix of many is enough."""
    model = tiny_model()
    encodings = dict.fromkeys(model.weights, "f32") | {"layers.0.q": "q2_k"}
    reasons = missing(Fast(), model.program, POLICIES["float32"], encodings)
    assert reasons == {"linear": "fast has no kernels for q2_k"}
