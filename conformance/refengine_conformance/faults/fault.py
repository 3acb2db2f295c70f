"""What a seeded fault is, and how one is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from refengine.backend.numpy_backend import NumpyBackend
from refengine.program import POLICIES
from refengine_conformance.subject import Subject


@dataclass(frozen=True)
class Fault:
    """A subject that is wrong in one way.

    Attributes:
        name: what was done to it, in a few words.
        clause: the clause that it breaks, under which it must be caught.
        story: where this has happened, or how it comes about: one sentence.
        make: makes the subject.
    """

    name: str
    clause: str
    story: str
    make: Callable[[], Subject]


def faulty_op(op: str, function: Callable[..., Any]) -> Callable[[], Subject]:
    """Makes a subject whose NumPy backend computes one op with this function, called as the golden one."""

    class Suspect(NumpyBackend):
        name = "suspect"
        native = MappingProxyType({**NumpyBackend.native, op: function})

    return lambda: Subject(Suspect)


def made_op(
    op: str, make: Callable[[], Callable[..., Any]], policy: str = "float32"
) -> Callable[[], Subject]:
    """As `faulty_op`, under a policy; each backend that starts has a function of its own.

    So the function may remember what it has done.
    """
    return lambda: Subject(lambda: faulty_op(op, make())().start(), policy=POLICIES[policy])
