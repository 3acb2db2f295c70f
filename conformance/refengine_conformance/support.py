"""What a backend says of itself: for every op, encoding and policy, whether it computes that, or why not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from refengine.backend import Backend, PreparingBackend
from refengine.ops import OPS
from refengine.program import POLICIES
from refengine.quantizer import ENCODINGS, GROUPED
from refengine_conformance.subject import Subject

ENCODED_OPS: Mapping[str, Iterable[str]] = MappingProxyType(
    {"embedding": ENCODINGS, "linear": ENCODINGS, "linear_a8": GROUPED, "linear_a16": ENCODINGS}
)
"""The ops whose weight may have these encodings; that of others is held as numbers."""

PRODUCTS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "plain": frozenset({"linear"}),
        "a8": frozenset({"linear", "quantize_a8", "linear_a8"}),
        "a16": frozenset({"linear_a16"}),
    }
)
"""The ops of products that programs hold, by how a policy computes them."""


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


@dataclass(frozen=True)
class Ask:
    """Asks a subject's backend whether it claims a policy; a callable that can be sent to a worker."""

    make: Callable[[], Subject]
    policy: str

    def __call__(self) -> bool:
        """Start the backend and ask."""
        return claims(self.make().start(), self.policy)


@dataclass(frozen=True)
class Prepare:
    """Lets a subject's backend do its slow work beforehand; a callable that can be sent to a worker."""

    make: Callable[[], Subject]

    def __call__(self) -> None:
        """Start the backend and ask it, if it has such work."""
        subject = self.make()
        backend = subject.start()
        if isinstance(backend, PreparingBackend):
            backend.prepare(subject.policy.name)


def support_table(backend: Backend, policy: str) -> tuple[Support, ...]:
    """Every op that the policy's programs hold, in every encoding that its weight may have there."""
    chosen = POLICIES[policy]
    others = frozenset[str]().union(*PRODUCTS.values()) - PRODUCTS[chosen.products]
    questions = [
        (op, e)
        for op in OPS
        if op not in others
        for e in ENCODED_OPS.get(op, (None,))
        if not (chosen.products == "a8" and op == "linear" and e in GROUPED)
    ]
    return tuple(
        Support(op, e, policy, backend.support(op, encoding=e, policy=policy)) for op, e in questions
    )


def claims(backend: Backend, policy: str) -> bool:
    """Whether the backend says that it computes the policy's products, in some encoding at least."""
    products = PRODUCTS[POLICIES[policy].products] - {"quantize_a8"}
    return POLICIES[policy].products == "plain" or any(
        backend.support(op, encoding=e, policy=policy) is None
        for op in products - {"linear"}
        for e in ENCODED_OPS[op]
    )


def lacks_any(subject: Subject) -> bool:
    """Whether the backend declares that it does not support something."""
    return any(row.reason for row in support_table(subject.start(), subject.policy.name))
