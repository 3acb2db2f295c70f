"""Faults of chapter *Scheduling*: in policies and queues."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from refengine import backend
from refengine.scheduler import (
    Decision,
    Limits,
    Missing,
    Queue,
    Reclaim,
    SchedulingPolicy,
    Terms,
    schedule,
    scheduling_policy,
)
from refengine_conformance.faults.f08_scheduling import Blocks, Jobs, scheduled_by
from refengine_conformance.faults.fault import Fault
from refengine_conformance.subject import Subject


def ordered_by(
    scheduling: Callable[..., SchedulingPolicy] = scheduling_policy,
    queue: Callable[[SchedulingPolicy], Queue] = Queue,
) -> Callable[[], Subject]:
    """Makes a subject with other policies, or another queue."""
    return lambda: Subject(lambda: backend.load("numpy"), scheduling=scheduling, queue=queue)


def in_vain(
    running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, missing: Missing, reclaim: Reclaim,
    policy: SchedulingPolicy, *more: Any,
) -> Decision:  # fmt: skip
    """The least urgent goes for a more urgent one, whether that helps or not."""
    decision = schedule(running, waiting, limits, free, missing, reclaim, policy, *more)
    computed = dict(decision.compute)
    left = [job for job in waiting if job.id not in computed]
    if not policy.preempts or decision.preempt or not left or not running:
        return decision
    last = max(running, key=lambda job: policy.rank(job.terms))
    if policy.rank(left[0].terms) > policy.rank(last.terms):
        return decision
    return Decision((last.id,), tuple(pair for pair in decision.compute if pair[0] != last.id))


def decoding_first(
    running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, missing: Missing, reclaim: Reclaim,
    policy: SchedulingPolicy, *more: Any,
) -> Decision:  # fmt: skip
    """Whatever the policy, nobody gives way but for want of memory."""
    return schedule(running, waiting, limits, free, missing, reclaim, replace(policy, preempts=False), *more)


def remade(change: Callable[[SchedulingPolicy], SchedulingPolicy]) -> Callable[..., SchedulingPolicy]:
    """Policies by name, with a change to each."""
    return lambda name, **parameters: change(scheduling_policy(name, **parameters))


class Ranked(SchedulingPolicy):
    """Forgets deadlines."""

    def rank(self, terms: Terms) -> tuple[int, int]:
        """As if there were none."""
        return super().rank(replace(terms, deadline=None))


class Boundless(SchedulingPolicy):
    """Forgets patience."""

    def rank(self, terms: Terms) -> tuple[int, int]:
        """The handicap as it comes."""
        return replace(self, patience=10**9).rank(terms) if self.patience < 10**9 else super().rank(terms)


def of_kind(kind: type[SchedulingPolicy]) -> Callable[[SchedulingPolicy], SchedulingPolicy]:
    """A policy of another kind with all that one has."""
    return lambda policy: kind(**{name: getattr(policy, name) for name in policy.__dataclass_fields__})


def output_only(policy: SchedulingPolicy) -> SchedulingPolicy:
    """The prompt costs nothing."""
    return replace(policy, handicap=lambda terms: policy.handicap(replace(terms, prompt=1)))


def prompts_only(policy: SchedulingPolicy) -> SchedulingPolicy:
    """The output is not known, so it is not counted."""
    return replace(policy, handicap=lambda terms: policy.handicap(replace(terms, output=0)))


def ageless(policy: SchedulingPolicy) -> SchedulingPolicy:
    """Urgency is all, however long one waits."""
    if policy.name != "priority":
        return policy
    return replace(policy, handicap=lambda terms: 10**6 * (9 - terms.priority), patience=10**7)


def whatever(name: str, **parameters: int) -> SchedulingPolicy:
    """A name that nobody knows is the default's."""
    try:
        return scheduling_policy(name, **parameters)
    except ValueError:
        return scheduling_policy("fcfs")


class BackOfTheQueue(Queue):
    """The pre-empted come again as new ones do."""

    def preempt(self, id: int) -> None:
        """To the place of its rank."""
        terms = self.terms(id)
        self.end(id)
        self.submit(id, terms)


class StaleAccounts(Queue):
    """Who comes back finds the account as it was."""

    def submit(self, id: int, terms: Terms) -> None:
        """Nothing is raised."""
        latest, self._latest = self._latest, 0
        super().submit(id, terms)
        self._latest = latest


class Unreturned(Queue):
    """What was promised and not generated stays charged."""

    def end(self, id: int, generated: int = 0) -> None:
        """As if all had been."""
        super().end(id, self._places[id].promised)


class PromptsOnly(Queue):
    """Accounts count prompts."""

    def submit(self, id: int, terms: Terms) -> None:
        """Without what it is to generate."""
        super().submit(id, replace(terms, output=0))

    def end(self, id: int, generated: int = 0) -> None:
        """Nor what it has."""
        super().end(id, 0)


FAULTS: tuple[Fault, ...] = (
    Fault(
        "the pre-empted queue up again",
        "SCH-17",
        "A request that lost its blocks loses its place too.",
        ordered_by(queue=BackOfTheQueue),
    ),
    Fault(
        "deadlines are forgotten",
        "SCH-18",
        "The hint is accepted and never looked at.",
        ordered_by(remade(of_kind(Ranked))),
    ),
    Fault(
        "patience has no end",
        "SCH-18",
        "The handicap is not cut.",
        ordered_by(remade(of_kind(Boundless))),
    ),
    Fault(
        "prompts cost nothing",
        "SCH-18",
        "Only the output is estimated.",
        ordered_by(remade(output_only)),
    ),
    Fault(
        "answers cost nothing",
        "SCH-18",
        "The length of the prompt is taken for that of the job.",
        ordered_by(remade(prompts_only)),
    ),
    Fault(
        "priority without age",
        "SCH-19",
        "The less urgent wait for ever.",
        ordered_by(remade(ageless)),
    ),
    Fault(
        "pre-emption in vain",
        "SCH-19",
        "A victim is chosen before it is known whether that helps.",
        scheduled_by(in_vain),
    ),
    Fault(
        "the urgent wait like all others",
        "SCH-19",
        "Priority orders the queue and takes nothing from the running.",
        scheduled_by(decoding_first),
    ),
    Fault(
        "turns are saved up",
        "SCH-20",
        "A tenant that stayed away for a day is served alone for another.",
        ordered_by(queue=StaleAccounts),
    ),
    Fault(
        "what is not generated is charged",
        "SCH-20",
        "A high max_tokens costs a tenant its turns.",
        ordered_by(queue=Unreturned),
    ),
    Fault(
        "prompts are counted alone",
        "SCH-20",
        "Short questions with long answers are free.",
        ordered_by(queue=PromptsOnly),
    ),
    Fault(
        "unknown policies are the default",
        "SCH-22",
        "A typing error in a configuration goes unnoticed for months.",
        ordered_by(whatever),
    ),
)
