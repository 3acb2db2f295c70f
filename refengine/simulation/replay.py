"""A load under a policy, in simulated time, and what came of it in figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from refengine.scheduler import Decision, SchedulingPolicy, schedule, scheduling_policy
from refengine.simulation.loads import Load
from refengine.simulation.record import Record
from refengine.simulation.simulator import Course, Simulator


@dataclass(frozen=True)
class Trace:
    """What came of a load.

    Attributes:
        policy: its name.
        courses: of all requests and samples, in the order of their numbers.
        seconds, steps: from the beginning to the end of the last.
        tokens: computed, with those computed again.
        preemptions, swaps: how many requests were pre-empted, and of how many of these the blocks were kept.
    """

    policy: str
    courses: tuple[Course, ...]
    seconds: float
    steps: int
    tokens: int
    preemptions: int
    swaps: int

    @property
    def figures(self) -> Mapping[str, float]:
        """By name: times waited and to the first token in seconds, output tokens per second, counts."""
        first = [c for c in self.courses if c.number == c.terms.arrival]
        waited = [course.waited for course in first]
        to_first = [c.first_token - c.arrival.time for c in first if c.first_token is not None]
        answered = sum(course.generated for course in self.courses)
        return {
            "requests": len(first),
            "wait_mean": fmean(waited) if waited else 0.0,
            "wait_p50": quantile(waited, 0.5),
            "wait_p95": quantile(waited, 0.95),
            "wait_max": max(waited, default=0.0),
            "first_token_mean": fmean(to_first) if to_first else 0.0,
            "first_token_p95": quantile(to_first, 0.95),
            "tokens_per_second": answered / self.seconds if self.seconds else 0.0,
            "preemptions": self.preemptions,
            "swaps": self.swaps,
            "steps": self.steps,
        }


def simulate(load: Load, policy: SchedulingPolicy | str = "fcfs", **settings: Any) -> Trace:
    """Let a load pass through the scheduler; ``settings`` are those of ``Simulator``.

    Clauses: SCH-24.
    """
    chosen = scheduling_policy(policy) if isinstance(policy, str) else policy
    simulator = Simulator(load, chosen, **settings)
    for _ in simulator.steps():
        pass
    return trace(simulator)


def trace(simulator: Simulator) -> Trace:
    """What came of a simulator's load so far."""
    courses = tuple(course for _, course in sorted(simulator.courses.items()))
    return Trace(
        simulator.policy.name,
        courses,
        simulator.time,
        simulator.number,
        simulator.tokens,
        simulator.preemptions,
        simulator.swaps,
    )


def replay(record: Record, policy: SchedulingPolicy | str | None = None, **settings: Any) -> Trace:
    """Let the requests of a journal come again; policy, limits and layout are the recorded ones.

    Unless others are given. Requests that were forked from others do not come again.

    Clauses: JRN-4.
    """
    if policy is None:
        policy = scheduling_policy(record.policy, **record.parameters)
    recorded = {"limits": record.limits, "layout": record.layout}
    return simulate(record.load, policy, **{**recorded, **settings})


def differences(record: Record, schedule: Callable[..., Decision] = schedule) -> Sequence[int]:
    """The lines of a journal whose decisions would be others today; none, if nothing has changed.

    Clauses: SCH-23.
    """
    policy, found = scheduling_policy(record.policy, **record.parameters), []
    for entry in record.entries:
        try:
            same = entry.decide(policy, schedule) == entry.decision
        except LookupError:
            same = False
        if not same:
            found.append(entry.line)
    return found


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed; 0 of none."""
    if not values:
        return 0.0
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]
