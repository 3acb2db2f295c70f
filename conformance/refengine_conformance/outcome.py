"""What came of holding a property against a subject."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from refengine_conformance.subject import Subject

Kind = Literal["passed", "unsupported", "broken", "unsteady", "raised", "crashed", "hung"]
"""``unsupported``: the backend declares that it lacks what the property takes, so that nothing was tested.
``broken``: the clause is. ``unsteady``: an example failed, and held when it was run again. ``raised``: an
error that is no assertion. ``crashed``: the process ended. ``hung``: it did not end in time."""

FINDINGS: frozenset[Kind] = frozenset({"broken", "unsteady", "raised", "crashed", "hung"})
"""The kinds that the subject has to answer for."""


@dataclass(frozen=True)
class Profile:
    """How hard to look.

    Attributes:
        name: what the user types.
        examples: per property.
        limit_s: seconds a property may take, the search for its simplest example included.
    """

    name: str
    examples: int
    limit_s: float


PROFILES = MappingProxyType(
    {"quick": Profile("quick", 25, 20.0), "thorough": Profile("thorough", 400, 300.0)}
)


@dataclass(frozen=True)
class Task:
    """One property to be held against one subject.

    Attributes:
        make: makes the subject, in the worker; picklable.
        property_id: see ``Property.id``.
        examples: how many to draw.
        seed: of the drawing; the same seed draws the same examples.
        limit_s: seconds it may take.
        shrink: whether to look for the simplest example that fails.
    """

    make: Callable[[], Subject]
    property_id: str
    examples: int
    seed: int
    limit_s: float
    shrink: bool = True


@dataclass(frozen=True)
class Outcome:
    """What came of a task.

    Attributes:
        kind: in a word.
        seconds: it took.
        message: what went wrong, or what is lacking and why.
        example: the simplest one found to fail, as drawn; or where the process was when it ended.
        worst: the largest error as a fraction of its bound, where the property tells.
        backend_failed: whether the backend raised that it failed: all that it does afterwards in the same
            process may be due to that.
    """

    kind: Kind
    seconds: float
    message: str = ""
    example: str = ""
    worst: float | None = None
    backend_failed: bool = False

    @property
    def found(self) -> bool:
        """Whether this is a finding."""
        return self.kind in FINDINGS
