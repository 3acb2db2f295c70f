"""The shared suite, held against the kernels on the played device: few examples of each property."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from cupy_backend.emulation import EmulatedBackend

from refengine.program import policy
from refengine_conformance.outcome import Task
from refengine_conformance.registry import Property, all_properties
from refengine_conformance.runner import Worker
from refengine_conformance.subject import Subject
from refengine_cupy.backend import POLICIES

CHAPTERS = ("OPS", "ATT", "SKV", "MIX", "BCK")
"""Those whose clauses a backend's arithmetic can break."""

TOO_SLOW = ("BCK-15", "BCK-16", "MIX-15")
"""They compute whole models under many limits: minutes each here. ``test_streaming`` has what they hold."""

EXAMPLES, LIMIT_S = 2, 240.0
"""Of a property; a step takes a thousand times what it takes a GPU."""

CHECKS = [
    pytest.param(item, name, id=f"{item.id} {name}")
    for item in all_properties()
    for name in item.policies
    if name in POLICIES and item.clause.split("-")[0] in CHAPTERS and item.clause not in TOO_SLOW
]


@dataclass(frozen=True)
class PlayedSubject:
    """Makes the backend on the played device, in the golden engine."""

    policy: str

    def __call__(self) -> Subject:
        return Subject(EmulatedBackend, policy=policy(self.policy))


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as worker:
        yield worker


@pytest.mark.parametrize(("item", "name"), CHECKS)
def test_the_kernels_conform(item: Property, name: str, worker: Worker) -> None:
    """No property is broken, and none cannot be run for want of a kernel."""
    outcome = worker.hold(Task(PlayedSubject(name), item.id, EXAMPLES, 0, LIMIT_S))
    assert outcome.kind == "passed", f"{outcome.message}\n{outcome.example}"
