"""Requests on their way through the schedule, counted by hand: what its properties look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hypothesis import strategies as st

from refengine.scheduler import Decision, Job, Limits, Queue, SchedulingPolicy, Terms
from refengine_conformance.subject import Subject

Blocks = tuple[int, ...]


@dataclass
class Life:
    """A simulated request, or one of its samples.

    Attributes:
        terms: what the policy knows of it.
        wanted: tokens that it generates in fact; at most what its terms say.
        known, computed: how far it is.
        places: samples that it still stands for.
        hint: how many positions its caller expects it to take; ``None`` where it says nothing.
        serial: its place in the order of admission, ``None`` before.
        began, ended: the steps of its first admission and of its end.
        before: whom it waits for at most: those admitted and unfinished when it came, and those admitted
            before it.
        accounts: of other tenants when it came, with what their running requests had been promised (SCH-20).
        latest: the account at which a tenant began then that came anew.
        turn: its own tenant's account then, and the tokens of its tenant's requests before it.
    """

    terms: Terms
    wanted: int
    known: int
    computed: int = 0
    places: int = 1
    hint: int | None = None
    serial: tuple[int, int] | None = None
    began: int | None = None
    ended: int | None = None
    before: set[int] = field(default_factory=set)
    accounts: dict[str, tuple[int, int]] = field(default_factory=dict)
    latest: int = 0
    turn: int = 0


@dataclass(frozen=True)
class Pool:
    """A group of layers: its window, and its blocks of ``size`` positions."""

    window: int | None
    blocks: int
    size: int

    def held(self, computed: int) -> int:
        """Blocks of a request so far, without those that its window has passed."""
        passed = 0 if self.window is None else max(0, computed - self.window + 1) // self.size
        return -(-computed // self.size) - passed

    def missing(self, computed: int, tokens: int) -> int:
        """Blocks that a request of ``computed`` positions lacks to hold ``tokens``."""
        return max(0, -(-tokens // self.size) + computed // -self.size)


@dataclass(frozen=True)
class Step:
    """One call of the schedule: what it was given, and what it said."""

    now: int
    running: tuple[Job, ...]
    waiting: tuple[Job, ...]
    limits: Limits
    free: Blocks
    missing: Callable[[int, int], Blocks]
    reclaim: Callable[[Sequence[int]], Blocks]
    policy: SchedulingPolicy
    decision: Decision
    read: int
    """How many of the waiting were looked at."""

    @property
    def jobs(self) -> dict[int, Job]:
        """Running and waiting requests by name."""
        return {job.id: job for job in self.running + self.waiting}

    @property
    def tokens(self) -> dict[int, int]:
        """What each running request takes by SCH-1 and SCH-3, were there blocks enough."""
        left, taken = self.limits.token_budget, {}
        decoding = [job for job in self.running if job.remaining == 1]
        for job in [*decoding, *(job for job in self.running if job.remaining > 1)]:
            taken[job.id] = min(job.remaining, left)
            left -= taken[job.id]
        return taken

    @property
    def admitted(self) -> list[int]:
        """Who is admitted, in the order of the batch."""
        running = {job.id for job in self.running}
        return [id for id, _ in self.decision.compute if id not in running]

    def lacked(self, tokens: Mapping[int, int]) -> Blocks:
        """The blocks of each pool that requests lack for so many more tokens."""
        jobs = self.jobs
        lacked = [self.missing(id, jobs[id].computed + count) for id, count in tokens.items() if count]
        return tuple(map(sum, zip((0,) * len(self.free), *lacked, strict=True)))

    def fits(self, tokens: Mapping[int, int], victims: Sequence[int] = ()) -> bool:
        """Whether there are blocks for so many more tokens, once the victims have given theirs."""
        given = self.reclaim(list(victims))
        room = [free + more for free, more in zip(self.free, given, strict=True)]
        return all(lacked <= free for lacked, free in zip(self.lacked(tokens), room, strict=True))


@dataclass
class Simulation:
    """The caller of the schedule, as the chapter's introduction has it, with counts for tokens.

    ``rank`` is the policy's, written anew from its clause; ``mirror`` is a queue under test, told of all that
    happens.
    """

    subject: Subject
    policy: SchedulingPolicy
    rank: Callable[[Terms], tuple[int, int]]
    limits: Limits
    pools: tuple[Pool, ...]
    to_come: list[Life]
    aborted: Mapping[int, int] = field(default_factory=dict)
    mirror: Queue | None = None
    now: int = 0
    lives: dict[int, Life] = field(default_factory=dict)
    running: list[int] = field(default_factory=list)
    accounts: dict[str, int] = field(default_factory=dict)
    latest: int = 0
    admissions: int = 0

    def steps(self) -> Iterator[Step]:
        """Step by step until everybody has ended, or long should have."""
        work = [life.terms.work(self.limits.token_budget) * life.places for life in self.to_come]
        horizon = self.to_come[-1].terms.submitted + sum(work) + len(work) * max(work)
        while self.now <= horizon and (self.to_come or self.unfinished):
            while self.to_come and self.to_come[0].terms.submitted <= self.now:
                self._submit(self.to_come.pop(0))
            if self.unfinished:
                step = self._ask()
                yield step
                self._carry_out(step.decision)
            for number in [n for n in self.unfinished if self.aborted.get(n) == self.now]:
                self._end(number)
            self.now += 1

    @property
    def unfinished(self) -> list[int]:
        """Who has come and not ended."""
        return [n for n, life in self.lives.items() if life.ended is None]

    @property
    def queue(self) -> list[int]:
        """Who waits, in order (SCH-17, SCH-20), found by looking at all."""
        waiting = [n for n in self.unfinished if n not in self.running]
        returned = [n for n in waiting if self.lives[n].serial and not self.policy.preempts]
        rest = sorted((n for n in waiting if n not in returned), key=lambda n: self.rank(self.lives[n].terms))
        if self.policy.shares:
            accounts, queue = dict(self.accounts), rest
            rest = []
            while queue:
                first: dict[str, int] = {}
                for n in queue:
                    first.setdefault(self.lives[n].terms.tenant, n)
                tenant = min(
                    first, key=lambda name: (accounts[name], self.rank(self.lives[first[name]].terms))
                )
                rest.append(first[tenant])
                accounts[tenant] += self.lives[first[tenant]].terms.tokens
                queue = [n for n in queue if n != first[tenant]]
        return sorted(returned, key=lambda n: self.lives[n].serial or (0, 0)) + rest

    def _submit(self, life: Life) -> None:
        tenant, others = life.terms.tenant, self.unfinished
        mine = [n for n in others if self.lives[n].terms.tenant == tenant and self.lives[n].serial is None]
        if not mine:
            self.accounts[tenant] = max(self.accounts.get(tenant, 0), self.latest)
        life.latest = self.latest
        life.turn = self.accounts[tenant] + sum(self.lives[n].terms.tokens for n in mine)
        for name, account in self.accounts.items():
            theirs = [self.lives[n] for n in others if self.lives[n].terms.tenant == name]
            promised = [other.places * other.terms.output for other in theirs if other.serial is not None]
            life.accounts[name] = account, sum(promised)
        life.before = {n for n in others if self.lives[n].serial is not None}
        self.lives[life.terms.arrival] = life
        if self.mirror is not None:
            self.mirror.submit(life.terms.arrival, life.terms)

    def _ask(self) -> Step:
        jobs = {n: self._job(n) for n in self.unfinished}
        running, waiting = tuple(jobs[n] for n in self.running), tuple(jobs[n] for n in self.queue)
        used = [[pool.held(job.computed) for pool in self.pools] for job in running]
        free = tuple(pool.blocks - sum(held[g] for held in used) for g, pool in enumerate(self.pools))
        computed = {n: job.computed for n, job in jobs.items()}
        read = 0

        def missing(number: int, tokens: int) -> Blocks:
            return tuple(pool.missing(computed[number], tokens) for pool in self.pools)

        def reclaim(numbers: Sequence[int]) -> Blocks:
            return tuple(sum(pool.held(computed[n]) for n in numbers) for pool in self.pools)

        def reading() -> Iterator[Job]:
            nonlocal read
            for job in waiting:
                read += 1
                yield job

        decision = self.subject.schedule(running, reading(), self.limits, free, missing, reclaim, self.policy)
        return Step(
            self.now, running, waiting, self.limits, free, missing, reclaim, self.policy, decision, read
        )

    def _job(self, number: int) -> Job:
        life = self.lives[number]
        reserve: Blocks = ()
        if life.hint is not None:
            budget = self.limits.token_budget
            seen = [life.hint if p.window is None else min(life.hint, p.window + budget) for p in self.pools]
            reserve = tuple(
                max(0, -(-positions // pool.size) - pool.held(life.computed))
                for positions, pool in zip(seen, self.pools, strict=True)
            )
        return Job(number, life.known, life.computed, life.places, reserve, life.terms)

    def _carry_out(self, decision: Decision) -> None:
        for number in decision.preempt:
            self.lives[number].computed = 0
            self.running.remove(number)
            if self.mirror is not None:
                self.mirror.preempt(number)
        for number, tokens in decision.compute:
            life = self.lives[number]
            if number not in self.running:
                self._admit(number, life)
            life.computed += tokens
            if life.computed == life.known:
                for sample in self._samples(number, life):
                    self.lives[sample].known += life.wanted > 0
                    if self.lives[sample].known >= life.terms.prompt + life.wanted:
                        self._end(sample)

    def _admit(self, number: int, life: Life) -> None:
        self.running.append(number)
        if self.mirror is not None:
            self.mirror.admit(number)
        if life.serial is None:
            self.admissions += 1
            life.serial, life.began = (self.admissions, 0), self.now
            for n in self.unfinished:
                if self.lives[n].serial is None:
                    self.lives[n].before.add(number)
            tenant = life.terms.tenant
            self.latest = max(self.latest, self.accounts[tenant])
            self.accounts[tenant] += life.terms.tokens

    def _samples(self, number: int, life: Life) -> list[int]:
        """Those that go on from here, one for each place."""
        samples = [number + index for index in range(life.places)]
        at = self.running.index(number)
        self.running[at + 1 : at + 1] = samples[1:]
        life.places = 1
        for index, sample in enumerate(samples[1:], 1):
            child = replace(life, before=set(life.before), accounts=dict(life.accounts))
            child.serial = (life.serial or (0, 0))[0], index
            self.lives[sample] = child
            if self.mirror is not None:
                self.mirror.fork(number, sample)
        return samples

    def _end(self, number: int) -> None:
        life = self.lives[number]
        generated = life.known - life.terms.prompt
        if self.mirror is not None:
            self.mirror.end(number, generated)
        if life.serial is not None:
            self.accounts[life.terms.tenant] += generated - life.places * life.terms.output
        life.ended = self.now
        if number in self.running:
            self.running.remove(number)
        if not self.unfinished:
            self.accounts, self.latest = {}, 0


@dataclass(frozen=True)
class Choice:
    """A policy by name and parameters, and its rank as its clause has it."""

    name: str
    parameters: Mapping[str, int]
    handicap: Callable[[Terms], int]
    patience: int

    def rank(self, terms: Terms) -> tuple[int, int]:
        """The steps before which it counts as submitted, and its place in the order of arrival."""
        handicap = min(self.handicap(terms), self.patience)
        if terms.deadline is not None:
            steps = (terms.prompt + 511) // 512 + max(terms.output, 1) - 1
            handicap = min(handicap, terms.deadline - steps)
        return terms.submitted + max(handicap, 0), terms.arrival


def choices(*names: str) -> st.SearchStrategy[Choice]:
    """Policies of these names, with parameters of all sizes."""
    return st.sampled_from(names).flatmap(lambda name: _CHOICES[name])


def _shortest(ageing: int, patience: int, chunk: int) -> Choice:
    return Choice(
        "sjf",
        {"ageing": ageing, "patience": patience, "chunk": chunk},
        lambda terms: ageing * ((terms.prompt + chunk - 1) // chunk + max(terms.output, 1) - 1),
        patience,
    )


def _priority(ageing: int, highest: int) -> Choice:
    return Choice(
        "priority",
        {"ageing": ageing, "highest": highest},
        lambda terms: ageing * (highest - terms.priority),
        ageing * highest,
    )


_CHOICES: dict[str, st.SearchStrategy[Choice]] = {
    "fcfs": st.just(Choice("fcfs", {}, lambda terms: 0, 0)),
    "fair": st.just(Choice("fair", {}, lambda terms: 0, 0)),
    "sjf": st.builds(
        _shortest, st.integers(0, 4), st.sampled_from([1000, 20, 3]), st.sampled_from([1, 3, 512])
    ),
    "priority": st.builds(_priority, st.sampled_from([0, 1, 5, 100]), st.integers(1, 3)),
}

ALL = ("fcfs", "sjf", "fair", "priority")
STAYING = ("fcfs", "sjf", "fair")
"""Policies that pre-empt for want of memory only."""


@st.composite
def simulations(
    draw: st.DrawFn, subject: Subject, names: Sequence[str] = ("fcfs",), *, hints: bool = False
) -> Simulation:
    """A few requests that each fit alone, in little memory; one or two groups, the second with a window."""
    choice = draw(choices(*names))
    limits = Limits(draw(st.sampled_from([8, 5, 30, 3, 2, 1])), draw(st.sampled_from([5, 3, 2, 1])))
    shapes = draw(
        st.lists(
            st.tuples(st.integers(1, 25), st.integers(0, 20), st.integers(0, 3), st.integers(1, 4)),
            min_size=3,
            max_size=7,
        )
    )
    step, arrival, lives = 0, 0, []
    for prompt, output, gap, samples in shapes:
        step += gap
        samples = min(max(1, samples - 1), limits.max_sequences)  # mostly one
        terms = Terms(
            arrival, step, prompt, output, samples,
            draw(st.integers(0, 3)),
            draw(st.sampled_from("abc")),
            draw(st.sampled_from([None, None, 0, 10, 40])),
        )  # fmt: skip
        wanted = draw(st.sampled_from([output, output, output // 3]))
        hint = draw(st.sampled_from([None, prompt + output, 100])) if hints else None
        lives.append(Life(terms, wanted, prompt, places=samples, hint=hint))
        arrival += samples
    size, spare = draw(st.sampled_from([2, 1, 4])), draw(st.integers(0, 3))
    longest = max(life.terms.prompt + life.terms.output for life in lives)
    pools = [Pool(None, -(-longest // size) + spare, size)]
    if window := draw(st.sampled_from([0, 1, 3, 6])):
        seen = min(longest, window + limits.token_budget + size)
        pools.append(Pool(window, -(-seen // size) + 1 + draw(st.integers(0, 3)), size))
    aborted = draw(st.dictionaries(st.integers(0, arrival - 1), st.integers(0, 15), max_size=2))
    policy = subject.scheduling(choice.name, **choice.parameters)
    return Simulation(subject, policy, choice.rank, limits, tuple(pools), lives, aborted)


SIMULATIONS = 4
"""In each example: that rare states come up."""


def simulated(subject: Subject, data: st.DataObject, *names: str, hints: bool = False) -> Iterator[Step]:
    """The steps of some simulations under policies of these names."""
    for _ in range(SIMULATIONS):
        yield from data.draw(simulations(subject, names or ("fcfs",), hints=hints)).steps()


def finished(simulation: Simulation) -> Mapping[int, Life]:
    """Everybody, at the end of a simulation."""
    for _ in simulation.steps():
        pass
    assert not simulation.to_come
    return simulation.lives


def waits_for(simulation: Simulation, life: Life) -> int:
    """The works of those before a request (SCH-17), with its own and its other samples'."""
    budget, lives = simulation.limits.token_budget, simulation.lives
    arrivals = {lives[n].terms.arrival for n in life.before} | {life.terms.arrival}
    return sum(other.terms.work(budget) for other in lives.values() if other.terms.arrival in arrivals)
