"""One test per property, for the backend that ``--refengine-backend`` names: see ``plugin``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from refengine.errors import BackendError
from refengine_conformance.outcome import PROFILES, Task
from refengine_conformance.registry import all_properties
from refengine_conformance.runner import Worker
from refengine_conformance.subjects import BackendSubject
from refengine_conformance.support import Examine


@pytest.fixture(scope="session")
def subject(pytestconfig: pytest.Config) -> BackendSubject:
    """What makes the subject that the options name."""
    backend = pytestconfig.getoption("--refengine-backend")
    if backend is None:
        pytest.skip("no backend is named: --refengine-backend NAME")
    policy, fallback = (pytestconfig.getoption(f"--refengine-{name}") for name in ("policy", "fallback"))
    return BackendSubject(backend, policy, fallback)


@pytest.fixture(scope="session")
def worker(subject: BackendSubject) -> Iterator[Worker]:
    """The process that the properties run in; a backend that cannot be used ends the session."""
    with Worker() as worker:
        try:
            worker.call(Examine(subject))
        except BackendError as error:
            pytest.exit(str(error), returncode=BackendError.exit_code)
        worker.prepare(subject)
        yield worker


@pytest.mark.parametrize("id", [item.id for item in all_properties()])
def test_property(id: str, subject: BackendSubject, worker: Worker, pytestconfig: pytest.Config) -> None:
    """The backend has the property; where it declares to lack an op that this takes, the test is skipped."""
    profile = PROFILES[pytestconfig.getoption("--refengine-profile")]
    seed = pytestconfig.getoption("--refengine-seed")
    outcome = worker.hold(Task(subject, id, profile.examples, seed, profile.limit_s))
    if outcome.kind == "unsupported":
        pytest.skip(outcome.message)
    if outcome.found:
        pytest.fail(f"{outcome.kind}: {outcome.message}\n{outcome.example}", pytrace=False)
