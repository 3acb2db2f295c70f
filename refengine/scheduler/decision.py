"""What the next step computes, as a pure function of plain state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import le

from refengine.scheduler.job import Blocks, Job, Limits
from refengine.scheduler.policy import FCFS, SchedulingPolicy
from refengine.scheduler.swapping import HostPool

Missing = Callable[[int, int], Blocks]
Reclaim = Callable[[Sequence[int]], Blocks]


@dataclass(frozen=True)
class Decision:
    """What to do next, in this order.

    Attributes:
        preempt: requests that give back all blocks and return to their place in the queue.
        compute: ``(request, tokens)``: the next tokens of each to compute, in the batch's order.
        swap: those of the pre-empted whose blocks are kept on the host; all others are computed again.
    """

    preempt: tuple[int, ...]
    compute: tuple[tuple[int, int], ...]
    swap: tuple[int, ...] = ()


def schedule(
    running: Sequence[Job],
    waiting: Iterable[Job],
    limits: Limits,
    free: Blocks,
    missing: Missing,
    reclaim: Reclaim,
    policy: SchedulingPolicy = FCFS,
    host: HostPool | None = None,
) -> Decision:
    """Build the next step.

    Running requests come first: those that need one token (decode), then those still in their prompt, each
    in order of admission, prompts cut to the token budget. Where blocks run short, the last admitted of the
    running requests is pre-empted for the earlier ones. Waiting requests are admitted in the policy's order,
    while budget, places and blocks last, and only in a step that pre-empts nobody. Under a policy that
    pre-empts, running and waiting requests take their turns by rank instead.

    Args:
        running: in order of admission.
        waiting: in the policy's order; read no further than requests are admitted, and one more.
        limits: of the step.
        free: free blocks of each pool.
        missing: ``missing(id, tokens)``, the blocks that a request lacks to hold so many positions.
        reclaim: ``reclaim(ids)``, the free blocks there would be more without these running requests.
        policy: the order of requests.
        host: where blocks of the pre-empted may be kept; ``None`` for nowhere.

    Clauses: SCH-1, SCH-2, SCH-3, SCH-4, SCH-5, SCH-6, SCH-7, SCH-8, SCH-9, SCH-10, SCH-11, SCH-15, SCH-16,
    SCH-19, SCH-21.
    """
    if policy.preempts:
        step = _by_rank(running, waiting, limits, free, missing, reclaim, policy)
    else:
        step = _Step(running, limits, free, missing, reclaim)
        prompts = []
        for job in running:
            if job.known - job.computed == 1:
                step.advance(job)
            else:
                prompts.append(job)
        for job in prompts:
            step.advance(job)
        if not step.victims:
            for job in waiting:
                if not step.admit(job):
                    break
    return Decision(
        tuple([job.id for job in step.victims]), tuple(step.compute), _swapped(step.victims, host)
    )


def _by_rank(
    running: Sequence[Job],
    waiting: Iterable[Job],
    limits: Limits,
    free: Blocks,
    missing: Missing,
    reclaim: Reclaim,
    policy: SchedulingPolicy,
) -> _Step:
    """One turn each, running or waiting, the first in rank first."""
    ranked = sorted([(policy.rank(job.terms), job) for job in running], key=lambda pair: pair[0])
    step = _Step([job for _, job in ranked], limits, free, missing, reclaim)
    queue: Iterator[Job] = iter(waiting)
    head = next(queue, None)
    for rank, job in ranked:
        while head is not None and policy.rank(head.terms) < rank:
            head = next(queue, None) if step.displace(head) else None
        step.advance(job)
        if job.id in step.gone:  # as are all behind it; only who is before them takes what they gave
            return step
    if not step.victims:
        while head is not None and step.admit(head):
            head = next(queue, None)
    return step


class _Step:
    """A step under construction.

    Args:
        standing: the running requests; the last of them is the first to be pre-empted.

    Attributes:
        compute: what is computed so far.
        victims: who is pre-empted so far.
        gone: their names.
    """

    def __init__(
        self, standing: Sequence[Job], limits: Limits, free: Blocks, missing: Missing, reclaim: Reclaim
    ) -> None:
        self._missing, self._reclaim = missing, reclaim
        self._budget = limits.token_budget
        self._places = limits.max_sequences - sum([job.places for job in standing])
        self._free = free
        none = self._given = self._reserved = (0,) * len(free)
        self._trivial = none if _fits(none, free) else None  # such a need is met, unless all is overdrawn
        self._idle: Blocks | None = None  # what running requests expect to take that have no turn here
        self._standing = list(standing)
        self.gone: set[int] = set()
        self.compute: list[tuple[int, int]] = []
        self.victims: list[Job] = []

    def advance(self, job: Job) -> None:
        """A running request's turn: it takes its tokens, at the cost of the last ones where it must."""
        tokens = job.known - job.computed
        if tokens > self._budget:
            tokens = self._budget
        if tokens == 0 or job.id in self.gone:
            return
        needed = self._missing(job.id, job.computed + tokens)
        if needed != self._trivial:
            while not _fits(needed, self._free):
                self._pre_empt()
                if job.id in self.gone:
                    return
        self._take(job, tokens, needed)

    def admit(self, job: Job) -> bool:
        """A waiting request's turn: whether it finds what it needs, and leaves what is promised."""
        tokens = min(job.remaining, self._budget)
        if tokens == 0 or job.places > self._places:
            return False
        needed = self._missing(job.id, job.computed + tokens)
        if not _fits(needed, self._free):
            return False
        if self._standing or self.compute:
            if self._idle is None:
                self._idle = self._idle_reserves()
            wanted = _sum(needed, self._reserved, _beyond(job.reserve, needed), self._idle)
            if not _fits(wanted, self._free):
                return False
        self._places -= job.places
        self._take(job, tokens, needed)
        return True

    def displace(self, job: Job) -> bool:
        """A waiting request's turn before running ones: whether it finds what it needs, or takes it."""
        tokens = min(job.remaining, self._budget)
        done = self._done()
        behind = [each for each in self._standing if each.id not in done]
        if tokens == 0 or job.places > self._places + sum([each.places for each in behind]):
            return False
        needed = self._missing(job.id, job.computed + tokens)
        if not _fits(needed, self._free) and not _fits(needed, self._free_without(behind)[0]):
            return False
        while job.places > self._places or not _fits(needed, self._free):
            self._pre_empt()
        self._places -= job.places
        self._take(job, tokens, needed)
        return True

    def _take(self, job: Job, tokens: int, needed: Blocks) -> None:
        if any(needed):
            self._free = tuple([f - n for f, n in zip(self._free, needed, strict=True)])
        if job.reserve:
            self._reserved = _sum(self._reserved, _beyond(job.reserve, needed))
        self.compute.append((job.id, tokens))
        self._budget -= tokens

    def _pre_empt(self) -> None:
        """The last of the running that has had no turn goes."""
        done = self._done()
        at = len(self._standing) - 1
        while self._standing[at].id in done:
            at -= 1
        victim = self._standing.pop(at)
        self.gone.add(victim.id)
        self.victims.append(victim)
        self._free, self._given = self._free_without(())
        self._places += victim.places

    def _free_without(self, more: Sequence[Job]) -> tuple[Blocks, Blocks]:
        """What is free without the victims and some more, and what all these gave: of one block's holders,
        the last to go gives it."""
        given = self._reclaim([job.id for job in (*self.victims, *more)])
        return tuple([f + g - b for f, g, b in zip(self._free, given, self._given, strict=True)]), given

    def _done(self) -> set[int]:
        """Who has had his turn."""
        return {id for id, _ in self.compute}

    def _idle_reserves(self) -> Blocks:
        """What running requests expect to take that have no turn in this step."""
        done = self._done()
        idle = [job.reserve for job in self._standing if job.reserve and job.id not in done]
        return _sum((0,) * len(self._free), *idle)


def _swapped(victims: Sequence[Job], host: HostPool | None) -> tuple[int, ...]:
    if host is None:
        return ()
    room, chosen = host.room, []
    for job in victims:
        if host.takes(job, room):
            room -= host.nbytes(job)
            chosen.append(job.id)
    return tuple(chosen)


def _fits(needed: Blocks, free: Blocks) -> bool:
    return all(map(le, needed, free))


def _sum(*blocks: Blocks) -> Blocks:
    return tuple([sum(each) for each in zip(*blocks, strict=True)])


def _beyond(reserve: Blocks, needed: Blocks) -> Blocks:
    """What of a reserve is left when ``needed`` is taken."""
    return tuple([max(r - n, 0) for r, n in zip(reserve or needed, needed, strict=True)])
