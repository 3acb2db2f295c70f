"""The suite against itself: every seeded fault must be caught, under the clause that it breaks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from refengine_conformance.faults.fault import Fault
from refengine_conformance.outcome import Profile, Task
from refengine_conformance.registry import Property, all_properties
from refengine_conformance.runner import Worker
from refengine_conformance.subject import Subject
from refengine_conformance.subjects import BackendSubject


@dataclass(frozen=True)
class Verdict:
    """What became of a fault.

    Attributes:
        fault, clause: its name, and the clause it breaks.
        by: id of the property that caught it, ``None`` where none did.
        how: the kind of the finding.
        sound: whether that property holds where nothing is wrong; if not, it proves nothing.
    """

    fault: str
    clause: str
    by: str | None
    how: str | None
    sound: bool = True

    @property
    def killed(self) -> bool:
        """Whether it was caught under its clause."""
        return self.sound and self.by is not None and self.by.startswith(f"{self.clause}:")

    @property
    def word(self) -> str:
        """``killed``, ``survived``, ``killed elsewhere`` under another clause, or ``false alarm``."""
        if self.by is None:
            return "survived"
        return "killed" if self.killed else "killed elsewhere" if self.sound else "false alarm"


@dataclass(frozen=True)
class FaultySubject:
    """Makes the subject of a fault; can be sent to a worker.

    Attributes:
        clause, name: which fault.
    """

    clause: str
    name: str

    def __call__(self) -> Subject:
        """Make it."""
        return next(f for f in faults() if (f.clause, f.name) == (self.clause, self.name)).make()


@cache
def faults() -> tuple[Fault, ...]:
    """All faults, in the order of their modules: the ``FAULTS`` of each."""
    package: Any = import_module("refengine_conformance.faults")
    modules = [import_module(f"{package.__name__}.{m.name}") for m in iter_modules(package.__path__)]
    return tuple(fault for module in modules for fault in getattr(module, "FAULTS", ()))


def self_test(profile: Profile, chosen: tuple[Fault, ...], *, seed: int = 0) -> Iterator[Verdict]:
    """Look for each fault, in the properties of its clause first; yields what became of it."""
    sound: dict[str, bool] = {}
    with Worker() as worker:
        for fault in chosen:
            verdict = judge(fault, worker, profile, seed=seed)
            if verdict.by and verdict.by not in sound:
                golden = BackendSubject("numpy", _policies(verdict.by)[0])
                task = Task(golden, verdict.by, profile.examples, seed, profile.limit_s, shrink=False)
                sound[verdict.by] = not worker.hold(task).found
            yield replace(verdict, sound=sound.get(verdict.by or "", True))


def _policies(property_id: str) -> tuple[str, ...]:
    return next(item.policies for item in all_properties() if item.id == property_id)


def judge(fault: Fault, worker: Worker, profile: Profile, *, seed: int = 0) -> Verdict:
    """Look for one fault."""
    make = FaultySubject(fault.clause, fault.name)
    for item in _suspects(fault):
        task = Task(make, item.id, profile.examples, seed, profile.limit_s, shrink=False)
        if (outcome := worker.hold(task)).found:
            return Verdict(fault.name, fault.clause, item.id, outcome.kind)
    return Verdict(fault.name, fault.clause, None, None)


def _suspects(fault: Fault) -> list[Property]:
    """The properties of the clause, then those of other clauses that exercise the same parts."""
    own = [p for p in all_properties() if p.clause == fault.clause]
    parts = frozenset[str]().union(*(p.parts for p in own))
    return own + [p for p in all_properties() if p.clause != fault.clause and p.parts & parts]
