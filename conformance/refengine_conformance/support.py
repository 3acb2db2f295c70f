"""What a backend says of itself: for every op, encoding and policy, whether it computes that, or why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from refengine.backend import Backend
from refengine.ops import OPS
from refengine.quantizer import ENCODINGS
from refengine_conformance.subject import Subject

ENCODED_OPS = frozenset({"embedding", "linear"})
"""The ops whose weight may have any encoding; that of others is held as numbers."""


@dataclass(frozen=True)
class Support:
    """One answer of ``Backend.support``.

    Attributes:
        op, encoding, policy: what was asked; ``encoding`` is ``None`` for an op without one.
        reason: why it is not native, ``None`` where it is.
    """

    op: str
    encoding: str | None
    policy: str
    reason: str | None


@dataclass(frozen=True)
class Self:
    """What a backend says of itself: its name, its devices, its support."""

    name: str
    devices: tuple[str, ...]
    support: tuple[Support, ...]


@dataclass(frozen=True)
class Examine:
    """Asks a subject's backend about itself; a callable that can be sent to a worker."""

    make: Callable[[], Subject]

    def __call__(self) -> Self:
        """Start the backend and ask."""
        subject = self.make()
        backend = subject.start()
        return Self(
            backend.name,
            tuple(device.name for device in backend.devices()),
            support_table(backend, subject.policy.name),
        )


def support_table(backend: Backend, policy: str) -> tuple[Support, ...]:
    """Every op, in every encoding that its weight may have."""
    questions = [(op, e) for op in OPS for e in (ENCODINGS if op in ENCODED_OPS else (None,))]
    return tuple(
        Support(op, e, policy, backend.support(op, encoding=e, policy=policy)) for op, e in questions
    )


def lacks_any(subject: Subject) -> bool:
    """Whether the backend declares that it does not support something."""
    return any(row.reason for row in support_table(subject.start(), subject.policy.name))
