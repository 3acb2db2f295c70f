"""The scheduler and the KV cache's manager at work on a load, with a clock that counts and no model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from random import Random

import numpy as np

from refengine.errors import ContextLengthError, OutOfBlocksError
from refengine.memory import KVCacheManager, KVGroupLayout, KVLayout
from refengine.scheduler import (
    FCFS,
    Blocks,
    Decision,
    HostPool,
    Job,
    Limits,
    Queue,
    SchedulingPolicy,
    Terms,
    schedule,
)
from refengine.simulation.journal import Journal
from refengine.simulation.loads import Arrival, Load


@dataclass(frozen=True)
class Costs:
    """What time a step takes, in seconds.

    Attributes:
        step: whatever it computes.
        token: for each token computed.
        position: for each position of the KV cache that is read.
        byte: for each byte copied between device and host.
    """

    step: float = 0.010
    token: float = 0.001
    position: float = 0.000_001
    byte: float = 1e-9


@dataclass(frozen=True)
class Mishaps:
    """What goes wrong, at random and from a seed.

    Attributes:
        allocation: the probability that a step finds too few blocks in spite of all.
        executor: the probability that a step fails.
        abort: the probability, in each step, that somebody's request is ended by its caller.
    """

    allocation: float = 0.0
    executor: float = 0.0
    abort: float = 0.0
    seed: int = 0


@dataclass
class Course:
    """What became of a request, or of one of its samples.

    Attributes:
        arrival: as it came.
        terms: as the scheduler is told.
        number: the request's, plus the sample's.
        known, computed, places: how far it is.
        submitted_step, first_step, last_step: the steps before which it came, and in which it was first
            admitted and ended.
        first_token, ended: in seconds; ``None`` before.
        reason: why it ended: ``length``, ``abort`` or ``error``; ``None`` before.
        waited: seconds that it spent waiting.
        since: when it last began to wait; ``None`` while it runs.
        preemptions: how often it was pre-empted.
        most_steps: within how many steps it ends by SCH-17, as far as can be told by now.
    """

    arrival: Arrival
    terms: Terms
    number: int
    known: int
    computed: int = 0
    places: int = 1
    first_step: int | None = None
    last_step: int | None = None
    first_token: float | None = None
    ended: float | None = None
    reason: str | None = None
    waited: float = 0.0
    since: float | None = None
    preemptions: int = 0
    most_steps: int = 0

    @property
    def generated(self) -> int:
        """Tokens of output so far."""
        return self.known - self.arrival.prompt

    @property
    def steps(self) -> int:
        """Steps from its submission to its end."""
        return 0 if self.last_step is None else self.last_step - self.terms.submitted + 1

    def work(self, budget: int) -> int:
        """Steps that all its samples would take, each alone (SCH-11, SCH-15)."""
        output = max(self.arrival.output, self.terms.output)
        return replace(self.terms, output=output).work(budget) * self.terms.samples


@dataclass(frozen=True)
class Done:
    """A simulated step.

    Attributes:
        number: counted from 0.
        time: at its end, in seconds.
        decision: what was to be done.
        failed: whether it went wrong.
        ended: the numbers of those that ended in it.
    """

    number: int
    time: float
    decision: Decision
    failed: bool
    ended: tuple[int, ...]


class Simulator:
    """An engine without a model: the scheduler, the queue and the KV cache's manager are the real ones.

    Args:
        load: what comes, in order of time.
        policy, limits: of the scheduler.
        layout: of the KV cache; no keys or values are held.
        costs: what makes the clock go on.
        host_bytes: room for the blocks of pre-empted requests; only without attention windows.
        mishaps: what goes wrong.
        journal: where decisions are written down.
        schedule, queue, kv_cache: the parts.

    Attributes:
        load: what it was given.
        courses: all requests and samples by number.
        running: in order of admission.

    Raises:
        ContextLengthError: a request of the load does not fit into the cache alone, or a request asks for
            more samples than may run at once.

    Clauses: SCH-24.
    """

    def __init__(
        self,
        load: Load,
        policy: SchedulingPolicy = FCFS,
        limits: Limits | None = None,
        layout: KVLayout | None = None,
        costs: Costs | None = None,
        *,
        host_bytes: int = 0,
        mishaps: Mishaps | None = None,
        journal: Journal | None = None,
        schedule: Callable[..., Decision] = schedule,
        queue: Callable[[SchedulingPolicy], Queue] = Queue,
        kv_cache: Callable[[KVLayout], KVCacheManager] = KVCacheManager,
    ) -> None:
        self.policy, self.limits = policy, limits or Limits(512, 16)
        self.layout, self.costs = layout or small_layout(), costs or Costs()
        self.mishaps = mishaps or Mishaps()
        self.load = load
        self.memory, self.queue = kv_cache(self.layout), queue(policy)
        self.courses: dict[int, Course] = {}
        self.running: list[int] = []
        self.time, self.number, self.preemptions, self.swaps, self.tokens = 0.0, 0, 0, 0, 0
        self._journal, self._schedule = journal, schedule
        self._random = Random(self.mishaps.seed)
        self._to_come = deque(load)
        self._next = self._works_running = self._works_admitted = 0
        self._noted: dict[int, int] = {}
        whole = all(group.window is None and not group.recent for group in self.layout.groups)
        self._host_bytes = host_bytes if whole else 0
        self._on_host: dict[int, int] = {}
        self._check(load)

    @property
    def unfinished(self) -> int:
        """How many requests and samples have come and not ended."""
        return len(self.queue) + len(self.running)

    def steps(self) -> Iterator[Done]:
        """Step by step until all requests have ended."""
        while self._to_come or self.unfinished:
            if not self.unfinished:
                self.time = max(self.time, self._to_come[0].time)
            while self._to_come and self._to_come[0].time <= self.time:
                self._submit(self._to_come.popleft())
            yield self._step()

    # -- What a caller of the scheduler does ---------------------------------------------------------------

    def _submit(self, arrival: Arrival) -> None:
        terms = Terms(
            self._next, self.number, arrival.prompt, arrival.expected, arrival.samples,
            arrival.priority, arrival.tenant, arrival.deadline,
        )  # fmt: skip
        course = Course(arrival, terms, self._next, arrival.prompt, places=arrival.samples)
        course.since = arrival.time
        self._noted[self._next] = self._works_running - self._works_admitted
        self.courses[self._next] = course
        self.queue.submit(self._next, terms)
        if self._journal is not None:
            self._journal.submit(self._next, terms, arrival.time, arrival.output, arrival.positions)
        self._next += arrival.samples

    def _step(self) -> Done:
        decision = self._decide()
        moved = self._preempt(decision)
        for number, _ in decision.compute:
            if self.courses[number].since is not None:
                moved += self._admit(number)
        try:
            self._allocate(decision)
            failed = self._random.random() < self.mishaps.executor
        except OutOfBlocksError:
            failed = True
        positions = sum(self.courses[n].computed + tokens for n, tokens in decision.compute)
        tokens = sum(tokens for _, tokens in decision.compute)
        self.time += self.costs.step + self.costs.token * tokens + self.costs.position * positions
        self.time += self.costs.byte * moved
        ended = self._fail(decision) if failed else self._advance(decision)
        if self.unfinished and self._random.random() < self.mishaps.abort:
            number = self._random.choice([*self.running, *self.queue])
            self._end(number, "abort")
            ended.append(number)
        self.number += 1
        return Done(self.number - 1, self.time, decision, failed, tuple(ended))

    def _decide(self) -> Decision:
        decide = self._schedule if self._journal is None else self._journal.recording(self._schedule)
        if self._journal is not None:
            self._journal.step, self._journal.time = self.number, self.time
        return decide(
            [self._job(n) for n in self.running],
            map(self._job, self.queue),
            self.limits,
            self.memory.free_blocks,
            self.memory.missing,
            self.memory.reclaimable,
            self.policy,
            self._host(),
        )

    def _job(self, number: int) -> Job:
        course = self.courses[number]
        reserve: Blocks = ()
        if course.arrival.positions is not None:
            reserve = expected_blocks(self.layout, course.arrival.positions, self.limits.token_budget)
            held = self.memory.held(number)
            reserve = tuple(max(0, most - now) for most, now in zip(reserve, held, strict=True))
        return Job(number, course.known, course.computed, course.places, reserve, course.terms)

    def _host(self) -> HostPool | None:
        if not self._host_bytes:
            return None
        return HostPool(
            self._host_bytes - sum(self._on_host.values()),
            tuple(self.layout.block_bytes(g) for g in range(len(self.layout.groups))),
            self.memory.held,
            self.costs.token,
            self.costs.byte,
        )

    def _preempt(self, decision: Decision) -> int:
        moved, host = 0, self._host()
        for number in decision.preempt:
            course = self.courses[number]
            if number in decision.swap and host is not None:
                self._on_host[number] = host.nbytes(self._job(number))
                moved += self._on_host[number]
                self.swaps += 1
            else:
                course.computed = 0
            self.memory.release(number)
            self.running.remove(number)
            self.queue.preempt(number)
            course.since = self.time
            course.preemptions += 1
            self.preemptions += 1
        return moved

    def _admit(self, number: int) -> int:
        course = self.courses[number]
        course.waited += self.time - (course.since or 0.0)
        course.since = None
        if course.first_step is None:
            work = course.work(self.limits.token_budget)
            course.first_step = self.number
            course.most_steps = self._noted.pop(number) + self._works_admitted + work
            self._works_admitted += work
            self._works_running += work
        self.queue.admit(number)
        self.running.append(number)
        return self._on_host.pop(number, 0)

    def _allocate(self, decision: Decision) -> None:
        for number, tokens in decision.compute:
            if self._random.random() < self.mishaps.allocation / len(decision.compute):
                raise OutOfBlocksError("no block is free, by chance")
            self.memory.grow(number, self.courses[number].computed + tokens)
        self.memory.take_copies()

    def _fail(self, decision: Decision) -> list[int]:
        for number, _ in decision.compute:
            self._end(number, "error")
        return [number for number, _ in decision.compute]

    def _advance(self, decision: Decision) -> list[int]:
        ended = []
        for number, tokens in decision.compute:
            course = self.courses[number]
            course.computed += tokens
            self.tokens += tokens
            self.memory.release_passed(number, course.computed)
            if course.computed < course.known:
                continue
            for each in self._samples(course):
                if each.arrival.output:
                    each.known += 1
                    each.first_token = each.first_token or self.time
                if each.generated >= each.arrival.output:
                    self._end(each.number, "length")
                    ended.append(each.number)
        return ended

    def _samples(self, course: Course) -> list[Course]:
        samples, at = [course], self.running.index(course.number) + 1 if course.places > 1 else 0
        for number in range(course.number + 1, course.number + course.places):
            self.memory.fork(course.number, number)
            self.queue.fork(course.number, number)
            self.courses[number] = replace(course, number=number, places=1)
            self.running.insert(at, number)
            samples.append(self.courses[number])
            at += 1
        course.places = 1
        return samples

    def _end(self, number: int, reason: str) -> None:
        course = self.courses[number]
        self.memory.release(number)
        self.queue.end(number, course.generated)
        self._on_host.pop(number, None)
        if course.since is None:
            self.running.remove(number)
        else:
            course.waited += self.time - course.since
        if course.first_step is None:
            del self._noted[number]
        else:
            self._works_running -= (
                course.work(self.limits.token_budget) // course.terms.samples * course.places
            )
        course.ended, course.reason, course.last_step = self.time, reason, self.number
        if self._journal is not None:
            self._journal.end(number, reason, self.time, course.generated)

    def _check(self, load: Iterable[Arrival]) -> None:
        budget = self.limits.token_budget
        for place, arrival in enumerate(load):
            needed = expected_blocks(self.layout, arrival.prompt + arrival.output, budget)
            if any(n > b for n, b in zip(needed, self.layout.num_blocks, strict=True)):
                raise ContextLengthError(
                    f"request {place} of the load takes {arrival.prompt + arrival.output} positions, and the "
                    "KV cache has no room for so many: shorten the load's longest requests or give it more "
                    "blocks"
                )
            if arrival.samples > self.limits.max_sequences:
                raise ContextLengthError(
                    f"request {place} of the load asks for {arrival.samples} samples, and "
                    f"{self.limits.max_sequences} sequences may run at once"
                )


def small_layout(positions: int = 16_384, block_size: int = 16, window: int | None = None) -> KVLayout:
    """One pool for so many positions of layers that see everything; with a window, a second one for those."""
    layer = ((0, 1, 1),)
    groups = [KVGroupLayout(None, layer, positions // block_size)]
    if window is not None:
        groups.append(KVGroupLayout(window, layer, positions // block_size))
    return KVLayout(block_size, np.dtype(np.float32), tuple(groups))


def expected_blocks(layout: KVLayout, positions: int, token_budget: int) -> Blocks:
    """The most blocks of each pool that a sequence holds on its way to so many positions."""
    size, seen = layout.block_size, []
    for group in layout.groups:
        kept = 2 * size if group.recent else group.window
        seen.append(positions if kept is None else min(positions, kept + token_budget + size))
    return tuple(-(-each // size) for each in seen)
