"""Who waits, in a policy's order, kept from step to step so that no step has to look at all of them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

from refengine.scheduler.job import Terms
from refengine.scheduler.policy import FCFS, Rank, SchedulingPolicy


@dataclass
class _Tenant:
    """Whose requests wait.

    Attributes:
        account: tokens that its requests have been served, and that those admitted have been promised.
        waiting: ``(rank, id)`` of its requests that were never admitted, in order.
        admitted: how many of its requests are running or pre-empted.
    """

    account: int
    waiting: list[tuple[Rank, int]] = field(default_factory=list)
    admitted: int = 0


@dataclass
class _Place:
    """Where a request stands.

    Attributes:
        terms: the request's.
        admitted: its place in the order of admission; ``None`` before.
        promised: tokens that its tenant's account was charged with and that it may generate yet.
        waits: whether it is waiting.
    """

    terms: Terms
    admitted: tuple[int, int] | None = None
    promised: int = 0
    waits: bool = True


class Queue:
    """The unfinished requests of a scheduler; iterates over those that wait, in the order of a policy.

    Those that were pre-empted stand first, in the order of their admission, unless the policy pre-empts by
    rank; then all others, by rank. Where tenants share, the next request is the first of the tenant whose
    account is lowest.

    Every call takes time in proportion to the logarithm of the number of requests, but for moving the tail of
    a list; reading the first ``k`` takes time in proportion to ``k``.

    Args:
        policy: the order.

    Clauses: SCH-17, SCH-20.
    """

    def __init__(self, policy: SchedulingPolicy = FCFS) -> None:
        self.policy = policy
        self._places: dict[int, _Place] = {}
        self._returned: list[tuple[tuple[int, int], int]] = []
        self._tenants: dict[str, _Tenant] = {}
        self._turns: list[tuple[int, Rank, str]] = []  # of tenants with waiting requests
        self._length = self._admissions = self._latest = 0

    def __len__(self) -> int:
        return self._length

    def __contains__(self, id: int) -> bool:
        return id in self._places and self._places[id].waits

    def __iter__(self) -> Iterator[int]:
        for _, id in self._returned:
            yield id
        ahead: list[tuple[int, Rank, str, int]] = []  # tenants' second requests, third …
        turns = iter(self._turns)
        turn = next(turns, None)
        while turn is not None or ahead:
            if turn is not None and (not ahead or turn < ahead[0][:3]):
                (account, _, name), index = turn, 0
                turn = next(turns, None)
            else:
                account, _, name, index = heappop(ahead)
            waiting = self._tenants[name].waiting
            yield (id := waiting[index][1])
            if index + 1 < len(waiting):
                account += self._cost(self._places[id].terms)
                heappush(ahead, (account, waiting[index + 1][0], name, index + 1))

    @property
    def accounts(self) -> Mapping[str, int]:
        """Tokens that each tenant was served and promised; those left out stand at ``latest``."""
        return {name: tenant.account for name, tenant in self._tenants.items()}

    @property
    def latest(self) -> int:
        """The highest account at which anybody was admitted; one that comes anew begins there."""
        return self._latest

    def terms(self, id: int) -> Terms:
        """The terms of an unfinished request."""
        return self._places[id].terms

    def submit(self, id: int, terms: Terms) -> None:
        """A request comes."""
        name = self._name(terms)
        tenant = self._tenants.setdefault(name, _Tenant(self._latest))
        self._places[id] = _Place(terms)
        with self._changed(name):
            if not tenant.waiting:
                tenant.account = max(tenant.account, self._latest)
            insort(tenant.waiting, (self.policy.rank(terms), id))
        self._length += 1

    def admit(self, id: int) -> None:
        """A waiting request begins to run, or goes on."""
        place = self._places[id]
        self._leave(id, place)
        place.waits = False
        if place.admitted is None:
            self._admissions += 1
            place.admitted, place.promised = (self._admissions, 0), place.terms.samples * place.terms.output
            name = self._name(place.terms)
            tenant = self._tenants[name]
            self._latest = max(self._latest, tenant.account)
            with self._changed(name):
                tenant.account += self._cost(place.terms)
            tenant.admitted += 1

    def preempt(self, id: int) -> None:
        """A running request waits again, in its place."""
        place = self._places[id]
        place.waits = True
        self._length += 1
        if self.policy.preempts:
            name = self._name(place.terms)
            with self._changed(name):
                insort(self._tenants[name].waiting, (self.policy.rank(place.terms), id))
        elif place.admitted is not None:
            insort(self._returned, (place.admitted, id))

    def fork(self, parent: int, child: int) -> None:
        """One of a running request's samples goes on as a request of its own, right behind it."""
        place = self._places[parent]
        place.terms = replace(place.terms, samples=1)
        place.promised -= place.terms.output
        serial, index = place.admitted or (0, 0)
        self._places[child] = _Place(
            place.terms, (serial, index + child - parent), place.terms.output, waits=False
        )
        self._tenants[self._name(place.terms)].admitted += 1

    def end(self, id: int, generated: int = 0) -> None:
        """A request ends that has generated so many tokens; others that it was promised are given back."""
        place = self._places[id]
        if place.waits:
            self._leave(id, place)
        name = self._name(place.terms)
        tenant = self._tenants[name]
        if place.admitted is not None:
            with self._changed(name):
                tenant.account += generated - place.promised if self.policy.shares else 0
            tenant.admitted -= 1
        del self._places[id]
        if not tenant.waiting and not tenant.admitted and tenant.account <= self._latest:
            del self._tenants[name]
        if not self._places:
            self._tenants.clear()
            self._latest = 0

    def _leave(self, id: int, place: _Place) -> None:
        """Take a request off the list in which it waits."""
        self._length -= 1
        if place.admitted is not None and not self.policy.preempts:
            del self._returned[bisect_left(self._returned, (place.admitted, id))]
            return
        name = self._name(place.terms)
        with self._changed(name):
            waiting = self._tenants[name].waiting
            del waiting[bisect_left(waiting, (self.policy.rank(place.terms), id))]

    def _cost(self, terms: Terms) -> int:
        return terms.tokens if self.policy.shares else 0

    def _name(self, terms: Terms) -> str:
        return terms.tenant if self.policy.shares else ""

    @contextmanager
    def _changed(self, name: str) -> Iterator[None]:
        """While a tenant's account or first request changes, its turn is off the list."""
        tenant = self._tenants[name]
        if tenant.waiting:
            del self._turns[bisect_left(self._turns, (tenant.account, tenant.waiting[0][0], name))]
        yield
        if tenant.waiting:
            insort(self._turns, (tenant.account, tenant.waiting[0][0], name))
