"""Makers of subjects that can be sent to a worker."""

from __future__ import annotations

from dataclasses import dataclass

from refengine import backend
from refengine.backend import Backend
from refengine.program import policy
from refengine_conformance.subject import Subject


@dataclass(frozen=True)
class BackendSubject:
    """Makes the subject that is a registered backend in the golden engine.

    Attributes:
        backend: its name.
        policy: name of the precision policy.
        fallback: whether golden ops may stand in for what it lacks.
    """

    backend: str
    policy: str = "float32"
    fallback: bool = False

    def __call__(self) -> Subject:
        """Make it."""
        return Subject(self._start, policy=policy(self.policy), fallback=self.fallback)

    def _start(self) -> Backend:
        return backend.load(self.backend)
