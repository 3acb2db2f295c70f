"""How long everybody waits for an engine, and how long they may by the clause of its policy."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

import numpy as np

from refengine.scheduler import SchedulingPolicy, Terms


@dataclass
class Wait:
    """A sample on its way.

    Attributes:
        terms: of its request.
        admitted: the request's place in the order of first admission; ``None`` before.
        first, last: the steps in which its request was first admitted and in which it ended, counted from 1.
        generated: tokens of output.
        turn: where tenants share, tokens of its own tenant before its request, when that came.
        others: accounts of all tenants then, each with what was promised and not generated yet.
    """

    terms: Terms
    admitted: int | None = None
    first: int | None = None
    last: int | None = None
    generated: int = 0
    turn: int = 0
    others: dict[str, tuple[int, int]] = field(default_factory=dict)


class Waits:
    """What becomes of requests, by the numbers of their samples.

    A sample that a caller has forked counts as one more of the request that it was forked from.

    Args:
        policy: of the engine.
        budget: its token budget.

    Attributes:
        forked: whether a caller forked any.
    """

    def __init__(self, policy: SchedulingPolicy, budget: int) -> None:
        self.policy, self._budget = policy, budget
        self.forked = False
        self._all: dict[int, Wait] = {}
        self._accounts: dict[str, int] = {}
        self._latest = self._admissions = 0

    def submitted(self, terms: Terms) -> None:
        """A request came."""
        waiting = [wait for wait in self._unfinished(terms.tenant) if wait.admitted is None]
        account = self._accounts.get(terms.tenant, self._latest)
        self._accounts[terms.tenant] = account if waiting else max(account, self._latest)
        ahead = {wait.terms.arrival: wait.terms.tokens for wait in waiting}
        turn = self._accounts[terms.tenant] + sum(ahead.values())
        others: defaultdict[str, tuple[int, int]] = defaultdict(lambda latest=self._latest: (latest, 0))
        for tenant, account in self._accounts.items():
            admitted = [wait for wait in self._unfinished(tenant) if wait.admitted is not None]
            others[tenant] = account, sum(wait.terms.output - wait.generated for wait in admitted)
        for number in range(terms.arrival, terms.arrival + terms.samples):
            self._all[number] = Wait(terms, turn=turn, others=others)

    def admitted(self, number: int, step: int) -> None:
        """A request takes part in a step."""
        if (wait := self._all[number]).admitted is not None:
            return
        self._admissions += 1
        for each in range(number, number + wait.terms.samples):
            self._all[each].admitted, self._all[each].first = self._admissions, step
        account = self._accounts[wait.terms.tenant]
        self._latest = max(self._latest, account)
        self._accounts[wait.terms.tenant] = account + wait.terms.tokens

    def generated(self, number: int) -> None:
        """A sample has got a token."""
        self._all[number].generated += 1

    def fork(self, parent: int, child: int) -> None:
        """A caller has forked a request."""
        self._all[child] = replace(self._all[parent])
        self.forked = True

    def ended(self, number: int, step: int) -> None:
        """A sample has ended in a step, or behind it."""
        wait = self._all[number]
        wait.last = step
        if wait.admitted is not None:
            self._accounts[wait.terms.tenant] += wait.generated - wait.terms.output
        if not any(each.last is None for each in self._all.values()):
            self._accounts, self._latest = {}, 0

    def _unfinished(self, tenant: str) -> list[Wait]:
        return [w for w in self._all.values() if w.last is None and w.terms.tenant == tenant]

    def check(self) -> None:
        """Everybody has ended in time, by SCH-11, SCH-17, SCH-19 or SCH-20.

        Those that were never admitted were ended by their callers, and count for nobody.
        """
        waits = [wait for wait in self._all.values() if wait.admitted is not None]
        works = np.array([wait.terms.work(self._budget) for wait in waits])
        arrival = np.array([wait.terms.arrival for wait in waits])
        came = np.array([wait.terms.submitted for wait in waits])
        first, last, place = (
            np.array([getattr(wait, name) for wait in waits]) for name in ("first", "last", "admitted")
        )
        ranks = [self.policy.rank(wait.terms) for wait in waits]
        order = np.array([sorted(set(ranks)).index(rank) for rank in ranks])
        for i, wait in enumerate(waits):
            met = last > came[i]
            if self.policy.name == "fcfs":
                before = met & (arrival <= arrival[i])
            elif self.policy.preempts:
                before = met & (order <= order[i])
            else:
                before = met & (place <= place[i])
                overtook = before & (first > came[i]) & (arrival != arrival[i])
                if self.policy.shares:
                    self._took_their_turns(wait, [waits[j] for j in np.flatnonzero(overtook)])
                else:
                    assert (order[overtook] < order[i]).all(), "overtaken by one of higher rank"
                    assert (came[overtook] <= ranks[i][0]).all(), "overtaken by one that came too late"
            bound = works[before].sum()
            if self.policy.preempts:
                bound += (before & (arrival > arrival[i])).sum() * works[before].max()
            assert last[i] - came[i] <= bound, f"ended after {last[i] - came[i]} steps, and not {bound}"

    def _took_their_turns(self, wait: Wait, begun: list[Wait]) -> None:
        """SCH-20: tokens of those that were admitted while a request waited for its first admission."""
        assert all(w.terms.arrival < wait.terms.arrival for w in begun if w.terms.tenant == wait.terms.tenant)
        for tenant in {w.terms.tenant for w in begun} - {wait.terms.tenant}:
            served: dict[int, int] = {}  # by place in the order of admission
            for each in begun:
                if each.terms.tenant == tenant:
                    known = served.setdefault(each.admitted or 0, each.terms.prompt)
                    served[each.admitted or 0] = known + each.generated
            account, promised = wait.others[tenant]
            tokens = sum(served.values()) - served[max(served)]
            if not self.forked:  # whose copies generate more than was expected of the request
                assert tokens <= max(0, wait.turn - account) + promised, f"{tenant} has had too much"
