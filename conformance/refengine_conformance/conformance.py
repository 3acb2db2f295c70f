"""What a run of the suite amounts to: the results, and the levels reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import get_args

from refengine.specification import Clause
from refengine_conformance.outcome import Profile
from refengine_conformance.registry import Level
from refengine_conformance.runner import Result
from refengine_conformance.support import Support

LEVELS: Mapping[Level, str] = MappingProxyType(
    {
        "L1": "values: every op and whole models, within their bounds",
        "L2": "deterministic: same inputs, same bits, run to run",
        "L3": "schedule-invariant: same bits however the work is batched, cut and placed",
        "M": "memory: never above the plan",
    }
)
"""The levels of conformance, each with what it says."""


@dataclass(frozen=True)
class LevelReached:
    """How a level fared.

    Attributes:
        passed, found, unsupported: number of its properties, counted per policy.
    """

    passed: int
    found: int
    unsupported: int

    @property
    def reached(self) -> bool:
        """Whether all its properties were run and hold; ``False`` where there is none."""
        return self.passed > 0 and self.found == self.unsupported == 0

    @property
    def word(self) -> str:
        """``reached``, ``not reached`` or ``not tested``."""
        if self.reached:
            return "reached"
        return "not reached" if self.found or self.unsupported else "not tested"

    @property
    def verdict(self) -> str:
        """Why, in a few words."""
        if self.reached:
            return f"{_amount(self.passed, 'check')} passed"
        if self.word == "not tested":
            return "no check of it was chosen"
        causes = {"failed": self.found, "could not be run for lack of an op": self.unsupported}
        of = f" of {self.passed + self.found + self.unsupported:,}"
        return ", ".join(f"{n:,}{of} {what}" for what, n in causes.items() if n)


@dataclass(frozen=True)
class Conformance:
    """One run of the suite.

    Attributes:
        backend: its name.
        description: of the backend, in a line.
        devices: their names.
        version: of refengine.
        python, numpy, system: what it ran on.
        profile, seed, fallback: how it was run.
        partial: whether only some clauses were chosen.
        policies: the names of those it was run under.
        seconds: in all.
        support: what the backend says of itself.
        clauses: the specification, by id.
        results: one per property and policy, in order.
    """

    backend: str
    description: str
    devices: tuple[str, ...]
    version: str
    python: str
    numpy: str
    system: str
    profile: Profile
    seed: int
    fallback: bool
    partial: bool
    policies: tuple[str, ...]
    seconds: float
    support: tuple[Support, ...]
    clauses: Mapping[str, Clause]
    results: tuple[Result, ...]

    @cached_property
    def findings(self) -> tuple[Result, ...]:
        """The results that the backend has to answer for."""
        return tuple(r for r in self.results if r.outcome.found)

    @cached_property
    def levels(self) -> Mapping[Level, LevelReached]:
        """All levels."""
        return {level: self._level(level) for level in get_args(Level)}

    @cached_property
    def by_clause(self) -> Mapping[str, tuple[Result, ...]]:
        """The results by clause, in the specification's order; clauses without any are left out."""
        order = [*self.clauses, *(r.property.clause for r in self.results)]
        found = {id: tuple(r for r in self.results if r.property.clause == id) for id in dict.fromkeys(order)}
        return {id: results for id, results in found.items() if results}

    def standing(self, row: Support) -> str:
        """``native``, ``fallback`` or ``unsupported``."""
        return "native" if row.reason is None else "fallback" if self.fallback else "unsupported"

    def _level(self, level: Level) -> LevelReached:
        kinds = [r.outcome.kind for r in self.results if r.property.level == level]
        passed, unsupported = kinds.count("passed"), kinds.count("unsupported")
        return LevelReached(passed, len(kinds) - passed - unsupported, unsupported)


def _amount(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
