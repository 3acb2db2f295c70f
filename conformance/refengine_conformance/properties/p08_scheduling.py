"""Chapter *Scheduling*: the function in a simulation that counts all anew, and the engine on tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import MappingProxyType
from typing import Any

from hypothesis import strategies as st

from refengine import Engine, EngineConfig, Output, Request, SamplingParams
from refengine.memory import KVCacheManager
from refengine.models import Model
from refengine.sampling import Sampled
from refengine.scheduler import Decision, Job, Limits
from refengine_conformance.registry import holds
from refengine_conformance.subject import Subject
from refengine_conformance.tiny_model import tiny_model

Blocks = tuple[int, ...]


@dataclass
class Life:
    """A simulated request: its prompt, the tokens it is to generate, and how far it is."""

    prompt: int
    wanted: int
    arrival: int
    known: int = 0
    computed: int = 0
    ended: int | None = None

    def work(self, budget: int) -> int:
        """The steps it takes alone (SCH-11)."""
        return -(-self.prompt // budget) + max(self.wanted, 1) - 1


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

    running: tuple[Job, ...]
    waiting: tuple[Job, ...]
    limits: Limits
    free: Blocks
    missing: Callable[[int, int], Blocks]
    decision: Decision

    @property
    def jobs(self) -> dict[int, Job]:
        """Running and waiting requests by number, in order of arrival."""
        return {job.id: job for job in sorted(self.running + self.waiting, key=lambda job: job.id)}

    @property
    def tokens(self) -> dict[int, int]:
        """What each running request takes by SCH-1 and SCH-3, were there blocks enough."""
        left, taken = self.limits.token_budget, {}
        decoding = [job for job in self.running if job.remaining == 1]
        for job in [*decoding, *(job for job in self.running if job.remaining > 1)]:
            taken[job.id] = min(job.remaining, left)
            left -= taken[job.id]
        return taken

    def lacked(self, tokens: Mapping[int, int]) -> Blocks:
        """The blocks of each group that requests lack for so many more tokens."""
        lacked = [self.missing(id, self.jobs[id].computed + count) for id, count in tokens.items()]
        return tuple(map(sum, zip((0,) * len(self.free), *lacked, strict=True)))

    def fits(self, tokens: Mapping[int, int], victims: Sequence[Job] = ()) -> bool:
        """Whether there are blocks for so many more tokens, once the victims have given theirs."""
        given = [victim.held for victim in victims]
        return all(
            lacked <= sum(free)
            for lacked, free in zip(self.lacked(tokens), zip(self.free, *given, strict=True), strict=True)
        )


@dataclass
class Simulation:
    """The caller of the schedule, as the chapter's introduction has it, with counts for tokens."""

    subject: Subject
    limits: Limits
    pools: tuple[Pool, ...]
    lives: list[Life]
    aborted: Mapping[int, int] = field(default_factory=dict)
    now: int = 0
    running: list[int] = field(default_factory=list)

    def steps(self) -> Iterator[Step]:
        """Step by step until everybody has ended, or by SCH-11 should have."""
        horizon = max(life.arrival for life in self.lives)
        horizon += sum(life.work(self.limits.token_budget) for life in self.lives)
        while self.now <= horizon and any(life.ended is None for life in self.lives):
            arrived = [n for n, life in enumerate(self.lives) if life.arrival <= self.now]
            present = [n for n in arrived if self.lives[n].ended is None]
            if present:
                step = self._ask(present)
                yield step
                self._carry_out(step.decision)
            for number in present:
                if self.aborted.get(number) == self.now:
                    self._end(number)
            self.now += 1

    def _ask(self, present: Sequence[int]) -> Step:
        jobs = {n: self._job(n) for n in present}
        running = tuple(jobs[n] for n in sorted(self.running))
        waiting = tuple(jobs[n] for n in present if n not in self.running)
        used = [job.held for job in running]
        free = tuple(pool.blocks - sum(held[group] for held in used) for group, pool in enumerate(self.pools))

        def missing(number: int, tokens: int) -> Blocks:
            return tuple(pool.missing(self.lives[number].computed, tokens) for pool in self.pools)

        decision = self.subject.schedule(running, waiting, self.limits, free, missing)
        return Step(running, waiting, self.limits, free, missing, decision)

    def _job(self, number: int) -> Job:
        life = self.lives[number]
        life.known = max(life.known, life.prompt)
        return Job(number, life.known, life.computed, tuple(pool.held(life.computed) for pool in self.pools))

    def _carry_out(self, decision: Decision) -> None:
        for number in decision.preempt:
            self.lives[number].computed = 0
            self.running.remove(number)
        for number, tokens in decision.compute:
            life = self.lives[number]
            life.computed += tokens
            if number not in self.running:
                self.running.append(number)
            if life.computed == life.known:
                if life.known + 1 >= life.prompt + life.wanted:
                    self._end(number)
                life.known += 1

    def _end(self, number: int) -> None:
        self.lives[number].ended = self.now
        if number in self.running:
            self.running.remove(number)


@st.composite
def simulations(draw: st.DrawFn, subject: Subject) -> Simulation:
    """A few requests that each fit alone, in little memory; one or two groups, the second with a window."""
    limits = Limits(draw(st.sampled_from([8, 5, 30, 3, 2, 1])), draw(st.sampled_from([5, 3, 2, 1])))
    shapes = draw(
        st.lists(st.tuples(st.integers(1, 25), st.integers(0, 20), st.integers(0, 3)), min_size=3, max_size=7)
    )
    arrival, lives = 0, []
    for prompt, wanted, gap in shapes:
        arrival += gap
        lives.append(Life(prompt, wanted, arrival))
    size, spare = draw(st.sampled_from([2, 1, 4])), draw(st.integers(0, 3))
    longest = max(life.prompt + life.wanted for life in lives)
    pools = [Pool(None, -(-longest // size) + spare, size)]
    if window := draw(st.sampled_from([0, 1, 3, 6])):
        seen = min(longest, window + limits.token_budget + size)
        pools.append(Pool(window, -(-seen // size) + 1 + draw(st.integers(0, 3)), size))
    aborted = draw(st.dictionaries(st.integers(0, len(lives) - 1), st.integers(0, 15), max_size=2))
    return Simulation(subject, limits, tuple(pools), lives, aborted)


SIMULATIONS = 4
"""In each example: that rare states come up."""


def simulated(subject: Subject, data: st.DataObject) -> Iterator[Step]:
    """The steps of some simulations."""
    for _ in range(SIMULATIONS):
        yield from data.draw(simulations(subject)).steps()


@holds("SCH-1", "scheduler", tier="state")
def each_takes_what_it_needs_or_what_is_left(subject: Subject, data: st.DataObject) -> None:
    """Down the batch, every count is the smaller of what remains to do and what is left of the budget."""
    for step in simulated(subject, data):
        left = step.limits.token_budget
        for id, tokens in step.decision.compute:
            assert 0 < tokens == min(step.jobs[id].remaining, left)
            left -= tokens


@holds("SCH-2", "scheduler", tier="state")
def running_requests_have_a_place_each(subject: Subject, data: st.DataObject) -> None:
    """Running, less the pre-empted, with the admitted: no more than places."""
    for step in simulated(subject, data):
        computed = {id for id, _ in step.decision.compute}
        after = {job.id for job in step.running} - set(step.decision.preempt) | computed
        assert len(after) <= step.limits.max_sequences


@holds("SCH-3", "scheduler", tier="state")
def decoding_comes_first_and_then_arrival(subject: Subject, data: st.DataObject) -> None:
    """The batch is sorted: decoding, prompts, admitted; each by arrival."""
    for step in simulated(subject, data):
        running = [job.id for job in step.running]
        ranks = [
            (id not in running, id in running and step.jobs[id].remaining > 1, id)
            for id, _ in step.decision.compute
        ]
        assert ranks == sorted(ranks)


@holds("SCH-4", "scheduler", tier="state")
def what_is_computed_finds_its_blocks(subject: Subject, data: st.DataObject) -> None:
    """In every group the sum of what is lacked is covered by free blocks and those of the pre-empted."""
    for step in simulated(subject, data):
        victims = [step.jobs[id] for id in step.decision.preempt]
        assert step.fits(dict(step.decision.compute), victims)


@holds("SCH-5", "scheduler", tier="state")
def the_fewest_of_the_last_arrived_make_room(subject: Subject, data: st.DataObject) -> None:
    """By trying 0, 1, 2 … victims from the end of the running until the rest fit."""
    for step in simulated(subject, data):
        standing = list(step.running)
        victims: list[Job] = []
        while not step.fits({job.id: step.tokens[job.id] for job in standing}, victims):
            victims.append(standing.pop())
        assert list(step.decision.preempt) == [job.id for job in victims]


@holds("SCH-6", "scheduler", tier="state")
def nobody_is_named_twice(subject: Subject, data: st.DataObject) -> None:
    """Both lists together name distinct requests; pre-empted ones were running."""
    for step in simulated(subject, data):
        named = [*step.decision.preempt, *(id for id, _ in step.decision.compute)]
        assert len(named) == len(set(named))
        assert set(named) <= set(step.jobs)
        assert set(step.decision.preempt) <= {job.id for job in step.running}


@holds("SCH-7", "scheduler", tier="state")
def the_queue_is_admitted_from_its_head(subject: Subject, data: st.DataObject) -> None:
    """One waiting request after another is added, until the first that finds no place, token or block."""
    for step in simulated(subject, data):
        if step.decision.preempt:
            continue
        running = {job.id for job in step.running}
        batch = {id: tokens for id, tokens in step.decision.compute if id in running}
        admitted: list[int] = []
        for job in step.waiting:
            tokens = min(job.remaining, step.limits.token_budget - sum(batch.values()))
            batch[job.id] = tokens
            full = len(running) + len(admitted) == step.limits.max_sequences
            if full or not tokens or not step.fits(batch):
                break
            admitted.append(job.id)
        assert [id for id, _ in step.decision.compute if id not in running] == admitted


@holds("SCH-8", "scheduler", tier="state")
def nobody_is_admitted_while_another_is_pre_empted(subject: Subject, data: st.DataObject) -> None:
    """Either list may be what it likes, but not these two together."""
    for step in simulated(subject, data):
        admitted = {id for id, _ in step.decision.compute} - {job.id for job in step.running}
        assert not (admitted and step.decision.preempt)


@holds("SCH-9", "scheduler", tier="state")
def the_oldest_advances(subject: Subject, data: st.DataObject) -> None:
    """Every simulated request fits alone, so the first arrived is in every batch."""
    for step in simulated(subject, data):
        oldest = min(step.jobs)
        assert oldest in dict(step.decision.compute)
        assert oldest not in step.decision.preempt


@holds("SCH-9", "scheduler", tier="state")
def the_state_stays_orderly(subject: Subject, data: st.DataObject) -> None:
    """What the chapter derives: running before waiting, at most the last in its prompt, none idle."""
    for step in simulated(subject, data):
        running = [job.id for job in step.running]
        assert all(id < job.id for id in running for job in step.waiting)
        assert all(job.remaining == 1 for job in step.running[:-1])
        assert len(running) <= step.limits.token_budget
        assert set(running) <= {*step.decision.preempt, *(id for id, _ in step.decision.compute)}


@holds("SCH-10", "scheduler", tier="state", level="L2")
def the_same_state_gives_the_same_decision(subject: Subject, data: st.DataObject) -> None:
    """Asked again it says the same; with other numbers for the requests, the same of them."""
    simulation = data.draw(simulations(subject))
    names = data.draw(st.permutations(range(100, 100 + len(simulation.lives))))
    for step in simulation.steps():
        assert (
            subject.schedule(step.running, step.waiting, step.limits, step.free, step.missing)
            == step.decision
        )
        renamed = subject.schedule(
            tuple(replace(job, id=names[job.id]) for job in step.running),
            tuple(replace(job, id=names[job.id]) for job in step.waiting),
            step.limits,
            step.free,
            lambda name, tokens, ask=step.missing: ask(names.index(name), tokens),
        )
        assert renamed.preempt == tuple(names[id] for id in step.decision.preempt)
        assert renamed.compute == tuple((names[id], tokens) for id, tokens in step.decision.compute)


@holds("SCH-11", "scheduler", tier="state")
def everybody_ends_in_time(subject: Subject, data: st.DataObject) -> None:
    """The step in which a request ends is at most the sum of the works before it away from its arrival."""
    simulation = data.draw(simulations(subject))
    for _ in simulation.steps():
        pass
    for number, life in enumerate(simulation.lives):
        before = [
            other for other in simulation.lives[:number] if other.ended is None or other.ended >= life.arrival
        ]
        bound = sum(each.work(simulation.limits.token_budget) for each in [*before, life])
        assert life.ended is not None
        assert life.ended < life.arrival + bound


@cache
def model(family: str) -> Model:
    """A tiny model, made once: one kind of layer, or two with different windows."""
    return tiny_model(family, layers=1 if family == "llama" else 3)


@dataclass
class Watched:
    """The subject's engine on a tiny model, and what it gave each request so far."""

    engine: Engine
    memory: KVCacheManager
    outputs: dict[int, list[Output]] = field(default_factory=dict)

    def step(self) -> None:
        """One step; its outputs are noted."""
        for output in self.engine.step():
            self.outputs.setdefault(output.request, []).append(output)

    def finish(self, patience: int = 1000) -> None:
        """Steps until nothing is left."""
        while self.engine.has_work:
            assert patience, "requests that never end"
            patience -= 1
            self.step()

    def results(self, number: int) -> list[Sampled | None]:
        """A request's tokens with their log-probabilities."""
        return [output.sampled for output in self.outputs[number]]

    def holds_nothing(self) -> bool:
        """Whether all blocks of all groups are free."""
        return self.memory.free_blocks == self.engine.layout.num_blocks


def watched(
    subject: Subject,
    family: str,
    limits: Mapping[str, Any] = MappingProxyType({}),
    sample: Callable[..., Any] | None = None,
) -> Watched:
    """An engine of the subject's parts."""
    managers: list[KVCacheManager] = []

    def kv_cache(layout: Any) -> KVCacheManager:
        managers.append(subject.kv_cache(layout))
        return managers[-1]

    engine = Engine(
        model(family),
        subject.start(),
        EngineConfig(subject.policy.name, fallback=subject.fallback, **limits),
        schedule=subject.schedule,
        sample=sample or subject.sample,
        kv_cache=kv_cache,
    )
    return Watched(engine, managers[-1])


FAMILIES = st.sampled_from(["llama", "gemma3"])

LIMITS = st.fixed_dictionaries(
    {
        "token_budget": st.sampled_from([16, 5, 3, 2]),
        "max_sequences": st.sampled_from([4, 3, 2, 1]),
        "block_size": st.sampled_from([3, 4, 1]),
        "kv_tokens": st.sampled_from([24, 28, 36, 200]),
    }
)
"""Little memory and small steps; every one of ``REQUESTS`` fits alone."""

PROMPTS = st.builds(
    lambda length, first, step: tuple((first + step * i) % 97 for i in range(length)),
    *(st.sampled_from([12, 9, 14, 4, 1]), st.integers(0, 96), st.integers(0, 96)),
)

REQUESTS = st.builds(
    Request,
    PROMPTS,
    max_tokens=st.sampled_from([10, 8, 5, 1, 0]),
    sampling=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.9]),
        repetition_penalty=st.sampled_from([1.0, 1.5]),
        seed=st.integers(0, 2**64 - 1),
        logprobs=st.sampled_from([None, 3]),
    ),
)


@holds("SCH-12", "scheduler", "kv_cache", "backend", tier="state")
def one_reason_to_end_and_it_comes_last(subject: Subject, data: st.DataObject) -> None:
    """Some requests are aborted on the way; each still ends once, and at length with all its tokens."""
    made = watched(subject, data.draw(FAMILIES), data.draw(LIMITS))
    wanted = {made.engine.submit(request): request for request in data.draw(st.lists(REQUESTS, max_size=4))}
    for number in data.draw(st.lists(st.sampled_from(sorted(wanted) or [0]), max_size=2)):
        made.step()
        ended = made.engine.abort(number)
        over = number not in wanted or any(o.finish_reason for o in made.outputs.get(number, []))
        assert (ended is None) == over
        if ended is not None:
            assert ended.finish_reason == "abort"
            made.outputs.setdefault(number, []).append(ended)
    made.finish()
    assert set(made.outputs) == set(wanted)
    for number, request in wanted.items():
        reasons = [output.finish_reason for output in made.outputs[number]]
        assert reasons[:-1] == [None] * (len(reasons) - 1)
        assert reasons[-1] in ("length", "abort")
        if reasons[-1] == "length":
            assert sum(output.sampled is not None for output in made.outputs[number]) == request.max_tokens


@holds("SCH-13", "scheduler", "kv_cache", "sampler", "backend", level="L3", tier="state")
def company_and_memory_change_no_bit(subject: Subject, data: st.DataObject) -> None:
    """Each request alone with all the room there is, against all of them in turns with little."""
    family = data.draw(FAMILIES)
    requests = data.draw(st.lists(REQUESTS, min_size=2, max_size=3))
    together = watched(subject, family, data.draw(LIMITS))
    for request in requests:
        together.engine.submit(request)
        if data.draw(st.booleans()):
            together.step()
    together.finish()
    alone = watched(subject, family)
    for number, request in enumerate(requests):
        alone.engine.submit(request)
        alone.finish()
        assert together.results(number) == alone.results(number)


@holds("SCH-14", "scheduler", "kv_cache", "allocator", "backend", level="M", tier="state")
def the_ended_hold_nothing(subject: Subject, data: st.DataObject) -> None:
    """After requests have ended or been aborted, all blocks of all groups are free."""
    made = watched(subject, data.draw(FAMILIES), data.draw(LIMITS))
    numbers = [
        made.engine.submit(request) for request in data.draw(st.lists(REQUESTS, min_size=1, max_size=3))
    ]
    made.step()
    made.engine.abort(data.draw(st.sampled_from(numbers)))
    made.finish()
    assert made.holds_nothing()


class MishapError(Exception):
    """What goes wrong in a step."""


@holds("SCH-14", "scheduler", "kv_cache", "allocator", "backend", level="M", tier="state")
def a_failed_step_ends_its_requests_and_no_others(subject: Subject, data: st.DataObject) -> None:
    """The sampler fails once: the error comes through, the others get their own results, no block is lost."""
    family, limits = data.draw(FAMILIES), data.draw(LIMITS)
    requests = data.draw(st.lists(REQUESTS.filter(lambda r: r.max_tokens > 0), min_size=2, max_size=3))
    fuse = data.draw(st.integers(1, 6))
    batch: list[int] = []

    def sample(*arguments: Any) -> Sampled:
        nonlocal fuse
        fuse -= 1
        if fuse == 0:
            raise MishapError
        sampled: Sampled = subject.sample(*arguments)
        return sampled

    def schedule(*arguments: Any) -> Decision:
        decision: Decision = subject.schedule(*arguments)
        batch[:] = [id for id, _ in decision.compute]
        return decision

    made = watched(replace(subject, schedule=schedule), family, limits, sample)
    numbers = {made.engine.submit(request): request for request in requests}
    dead: set[int] = set()
    try:
        made.finish()
    except MishapError:
        dead.update(batch)
        assert all(made.engine.abort(number) is None for number in dead)
    made.finish()
    assert made.holds_nothing()
    alone = watched(subject, family)
    for number in numbers.keys() - dead:
        other = alone.engine.submit(numbers[number])
        alone.finish()
        assert made.results(number) == alone.results(other)
