"""Scheduling policies: in which order requests are admitted, found by name.

A package offers a policy of its own by an entry point in its `pyproject.toml`, which names a callable that
makes a `SchedulingPolicy` from whole numbers given by name:

    [project.entry-points."refengine.scheduling_policies"]
    longest = "my_package:longest_first"

The policies that are built in are not entered there, but in a table of this module. So nobody takes their
names, of which the specification says what they mean; they are there in a source tree that was not installed;
and to start an engine with one of them, no installed package is looked at.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import MappingProxyType

from refengine.errors import RequestError
from refengine.scheduler.job import Terms

GROUP = "refengine.scheduling_policies"
"""The entry-point group in which packages offer policies of their own."""

CHUNK = 512
"""Tokens of a prompt that a step is taken to compute, where a deadline is set against a request's work."""

Rank = tuple[int, int]
"""The smaller, the earlier; no two requests have the same."""


@dataclass(frozen=True)
class SchedulingPolicy:
    """An order of requests.

    Requests are ranked as if each had been submitted some steps later than it was: its *handicap*. Whatever
    a policy does, nobody is therefore overtaken by one that comes more than ``patience`` steps later.

    Attributes:
        name: what the user types.
        description: one line.
        handicap: of a request, in steps; cut to 0 … ``patience``, and where there is a deadline, to the steps
            that are left when the request's work is taken from it.
        patience: the largest handicap.
        preempts: whether a waiting request takes the blocks and places of running ones that rank behind it.
        shares: whether tenants take turns, by the tokens each has been served; the rank then counts among the
            requests of one tenant.

    Raises:
        RequestError: a negative ``patience``.

    Clauses: SCH-17, SCH-18, SCH-19, SCH-20, SCH-22.
    """

    name: str
    description: str
    handicap: Callable[[Terms], int]
    patience: int = 0
    preempts: bool = False
    shares: bool = False

    def __post_init__(self) -> None:
        if self.patience < 0:
            raise RequestError(
                f"scheduling policy {self.name!r} takes a patience of at least 0 steps, not {self.patience}"
            )

    def rank(self, terms: Terms) -> Rank:
        """Where a request stands in the order."""
        handicap = min(self.handicap(terms), self.patience)
        if terms.deadline is not None:
            handicap = min(handicap, terms.deadline - terms.work(CHUNK))
        return terms.submitted + max(handicap, 0), terms.arrival


def first_come_first_served() -> SchedulingPolicy:
    """Requests in the order in which they came."""
    return SchedulingPolicy("fcfs", "first come, first served", lambda terms: 0)


def shortest_job_first(ageing: int = 4, patience: int = 65_536, chunk: int = 1) -> SchedulingPolicy:
    """Requests by their work; one of ``n`` goes before all that come ``n · ageing`` steps later.

    Args:
        ageing: steps for a unit of work.
        patience: the largest handicap.
        chunk: tokens of a prompt that take as long as one token of output.

    Raises:
        RequestError: ``ageing`` or ``patience`` below 0, or ``chunk`` below 1.
    """
    if ageing < 0 or chunk < 1:
        raise RequestError(
            "scheduling policy 'sjf' takes an ageing of at least 0 and a chunk of at least 1 token, not "
            f"{ageing} and {chunk}"
        )
    return SchedulingPolicy(
        "sjf", "the shortest job first", lambda terms: ageing * terms.work(chunk), patience=patience
    )


def priority(ageing: int = 256, highest: int = 9) -> SchedulingPolicy:
    """Requests by priority, ``0 … highest``; waiting for ``ageing`` steps is worth a level.

    Raises:
        RequestError: a parameter below 0.
    """
    if ageing < 0 or highest < 0:
        raise RequestError(
            "scheduling policy 'priority' takes an ageing and a highest level of at least 0, not "
            f"{ageing} and {highest}"
        )
    return SchedulingPolicy(
        "priority",
        "the most urgent first, at the cost of those less urgent",
        lambda terms: ageing * (highest - terms.priority),
        patience=ageing * highest,
        preempts=True,
    )


def fair_sharing() -> SchedulingPolicy:
    """Tenants take turns; each tenant's requests in the order in which they came."""
    return SchedulingPolicy("fair", "tenants take turns, by tokens served", lambda terms: 0, shares=True)


FCFS = first_come_first_served()

BUILT_IN: Mapping[str, Callable[..., SchedulingPolicy]] = MappingProxyType(
    {
        "fcfs": first_come_first_served,
        "sjf": shortest_job_first,
        "priority": priority,
        "fair": fair_sharing,
    }
)


def scheduling_policies() -> tuple[str, ...]:
    """The names of all policies: those built in, then those of installed packages."""
    theirs = sorted({point.name for point in entry_points(group=GROUP)} - BUILT_IN.keys())
    return (*BUILT_IN, *theirs)


def scheduling_policy(name: str, **parameters: int) -> SchedulingPolicy:
    """Make a policy by its name; parameters may follow a colon: ``sjf:ageing=8,chunk=4``.

    Raises:
        RequestError: no such policy, or it does not take these parameters.

    Clauses: SCH-22.
    """
    name, _, given = name.partition(":")
    parameters |= _parameters(given)
    make = BUILT_IN.get(name) or _theirs(name)
    if make is None:
        known = scheduling_policies()
        near = difflib.get_close_matches(name, known, n=1)
        raise RequestError(
            f"there is no scheduling policy {name!r}: choose one of {', '.join(known)}"
            f"{f'; perhaps {near[0]!r}' if near else ''}"
        )
    try:
        policy = make(**parameters)
    except TypeError as cause:
        raise RequestError(f"scheduling policy {name!r} does not take these parameters: {cause}") from cause
    if not isinstance(policy, SchedulingPolicy):
        raise RequestError(
            f"what a package offers as scheduling policy {name!r} makes a {type(policy).__name__}, and no "
            "SchedulingPolicy: update that package"
        )
    return policy


def _parameters(text: str) -> dict[str, int]:
    found = {}
    for pair in filter(None, text.split(",")):
        name, _, value = pair.partition("=")
        try:
            found[name.strip()] = int(value)
        except ValueError:
            raise RequestError(
                f"a scheduling policy takes whole numbers by name, such as sjf:ageing=8, not {pair!r}"
            ) from None
    return found


def _theirs(name: str) -> Callable[..., object] | None:
    for point in entry_points(group=GROUP, name=name):
        try:
            make: Callable[..., object] = point.load()
        except Exception as cause:
            raise RequestError(
                f"scheduling policy {name!r} failed to load from {point.value!r}: "
                f"{type(cause).__name__}: {cause}; reinstall the package that offers it"
            ) from cause
        return make
    return None
