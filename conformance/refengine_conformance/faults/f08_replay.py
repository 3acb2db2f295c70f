"""Faults of chapter *Scheduling*: in journals and simulations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from refengine import backend
from refengine.scheduler import Decision, Job, Terms, schedule
from refengine.simulation import Done, Journal, Simulator
from refengine_conformance.faults.f08_scheduling import Jobs
from refengine_conformance.faults.fault import Fault
from refengine_conformance.subject import Subject


def simulated_by(
    journal: Callable[..., Journal] = Journal, simulator: Callable[..., Simulator] = Simulator
) -> Callable[[], Subject]:
    """Makes a subject with another journal, or another simulator."""
    return lambda: Subject(lambda: backend.load("numpy"), journal=journal, simulator=simulator)


class HeadOnly(Journal):
    """Writes down the running, and of the waiting nobody."""

    def recording(self, schedule: Callable[..., Decision] = schedule) -> Callable[..., Decision]:
        """With a decision made for all."""

        def recorded(running: Jobs, waiting: Iterable[Job], *given: Any) -> Decision:
            decision = schedule(running, list(waiting), *given)
            super(HeadOnly, self).recording(lambda *given: decision)(running, [], *given)
            return decision

        return recorded


class Roundly(Journal):
    """Writes times in whole seconds."""

    def submit(self, id: int, terms: Terms, time: float, *given: Any, **named: Any) -> None:
        """To save space."""
        super().submit(id, terms, round(time), *given, **named)


class Leaking(Simulator):
    """Who is ended by its caller keeps its blocks."""

    def _end(self, number: int, reason: str) -> None:
        kept = number, (1,) * len(self.layout.groups)
        super()._end(number, reason)
        if reason == "abort":
            self.memory.grow(kept, 1)


class TokensOnly(Simulator):
    """Contexts cost nothing."""

    def _step(self) -> Done:
        self.costs = replace(self.costs, position=0.0)
        return super()._step()


class Endless(Simulator):
    """Those of a failed step are told that they go on, and are never heard of again."""

    def _fail(self, decision: Decision) -> list[int]:
        super()._fail(decision)
        return []


FAULTS: tuple[Fault, ...] = (
    Fault(
        "the waiting are not written down",
        "SCH-23",
        "A journal of what runs, from which no admission can be explained.",
        simulated_by(journal=HeadOnly),
    ),
    Fault(
        "times are rounded",
        "SCH-23",
        "Seconds are enough for people, and requests that came apart come together.",
        simulated_by(journal=Roundly),
    ),
    Fault(
        "the aborted leave a block behind",
        "SCH-24",
        "A way out that nobody took in tests.",
        simulated_by(simulator=Leaking),
    ),
    Fault(
        "contexts cost nothing",
        "SCH-24",
        "A step of long contexts takes as long as one of short ones.",
        simulated_by(simulator=TokensOnly),
    ),
    Fault(
        "failed requests are not heard of",
        "SCH-24",
        "The error is logged, and the caller waits.",
        simulated_by(simulator=Endless),
    ),
)
