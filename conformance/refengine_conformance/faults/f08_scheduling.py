"""Faults of chapter *Scheduling*."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from refengine import backend
from refengine.memory import KVCacheManager
from refengine.ops import FloatArray
from refengine.scheduler import (
    FCFS,
    Decision,
    HostPool,
    Job,
    Limits,
    Missing,
    Queue,
    Reclaim,
    SchedulingPolicy,
    Terms,
    schedule,
    scheduling_policy,
)
from refengine.simulation import Done, Journal, Simulator
from refengine_conformance.faults.fault import Fault, faulty_op
from refengine_conformance.subject import Subject

Blocks = tuple[int, ...]
Jobs = Sequence[Job]


def scheduled_by(function: Callable[..., Decision]) -> Callable[[], Subject]:
    """Makes a subject with another schedule; the waiting come as a list."""

    def listed(
        running: Jobs, waiting: Iterable[Job], limits: Limits, free: Blocks, missing: Missing,
        reclaim: Reclaim, policy: SchedulingPolicy = FCFS, host: HostPool | None = None,
    ) -> Decision:  # fmt: skip
        return function(running, list(waiting), limits, free, missing, reclaim, policy, host)

    return lambda: Subject(lambda: backend.load("numpy"), schedule=listed)


def ordered_by(
    scheduling: Callable[..., SchedulingPolicy] = scheduling_policy,
    queue: Callable[[SchedulingPolicy], Queue] = Queue,
) -> Callable[[], Subject]:
    """Makes a subject with other policies, or another queue."""
    return lambda: Subject(lambda: backend.load("numpy"), scheduling=scheduling, queue=queue)


def simulated_by(
    journal: Callable[..., Journal] = Journal, simulator: Callable[..., Simulator] = Simulator
) -> Callable[[], Subject]:
    """Makes a subject with another journal, or another simulator."""
    return lambda: Subject(lambda: backend.load("numpy"), journal=journal, simulator=simulator)


def one_token_more(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, *given: Any) -> Decision:
    """The budget counts from zero."""
    return schedule(running, waiting, replace(limits, token_budget=limits.token_budget + 1), free, *given)


def half_a_prompt(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, *given: Any) -> Decision:
    """A prompt leaves half of the budget unused."""
    decision = schedule(running, waiting, limits, free, *given)
    most = max(1, limits.token_budget // 2)
    return replace(decision, compute=tuple((id, min(tokens, most)) for id, tokens in decision.compute))


def one_place_more(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, *given: Any) -> Decision:
    """The places are checked before the request takes one."""
    return schedule(running, waiting, replace(limits, max_sequences=limits.max_sequences + 1), free, *given)


def prompts_first(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, *given: Any) -> Decision:
    """The batch begins with the longest spans."""
    decision = schedule(running, waiting, limits, free, *given)
    return replace(decision, compute=tuple(sorted(decision.compute, key=lambda pair: -pair[1])))


def endless_memory(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, *given: Any) -> Decision:
    """Nobody looks whether blocks are free."""
    return schedule(running, waiting, limits, (10**9,) * len(free), *given)


def first_group_only(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, *given: Any) -> Decision:
    """Blocks are counted in the first group of layers alone."""
    return schedule(running, waiting, limits, (free[0], *(10**9 for _ in free[1:])), *given)


def per_request(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, *given: Any) -> Decision:
    """Each admitted request is held against all the free blocks, and none subtracts what it takes."""
    decision = schedule(running, waiting, limits, free, *given)
    if decision.preempt:
        return decision
    left = limits.token_budget - sum(tokens for _, tokens in decision.compute)
    admitted = {id for id, _ in decision.compute} - {job.id for job in running}
    places = limits.max_sequences - len(running) - len(admitted)
    for job in waiting[len(admitted) :][: max(places, 0)]:
        tokens = min(job.remaining, left)
        if not tokens or any(n > f for n, f in zip(given[0](job.id, tokens), free, strict=True)):
            break
        decision = replace(decision, compute=(*decision.compute, (job.id, tokens)))
        left -= tokens
    return decision


def first_pre_empted(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, *given: Any) -> Decision:
    """The head of the list gives way instead of its end."""
    decision = schedule(running[::-1], waiting, limits, free, *given)
    places = {job.id: at for at, job in enumerate((*running, *waiting))}
    decoding = {job.id for job in running if job.remaining == 1}
    order = sorted(decision.compute, key=lambda pair: (pair[0] not in decoding, places[pair[0]]))
    return replace(decision, compute=tuple(order))


def one_victim_more(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, *given: Any) -> Decision:
    """Where one must go, its neighbour goes with it."""
    decision = schedule(running, waiting, limits, free, *given)
    if not decision.preempt or len(decision.compute) < 2:
        return decision
    *kept, (last, _) = decision.compute
    return Decision((*decision.preempt, last), tuple(kept))


def computed_as_well(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, *given: Any) -> Decision:
    """The pre-empted request stays in the batch that was being built."""
    decision = schedule(running, waiting, limits, free, *given)
    return replace(decision, compute=decision.compute + tuple((id, 1) for id in decision.preempt[:1]))


def smallest_first(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, *given: Any) -> Decision:
    """The shortest prompts are admitted first."""
    return schedule(running, sorted(waiting, key=lambda job: job.remaining), limits, free, *given)


def overtaking(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, *given: Any) -> Decision:
    """A request that does not fit is passed over."""
    decision = schedule(running, waiting, limits, free, *given)
    admitted = {id for id, _ in decision.compute} - {job.id for job in running}
    if decision.preempt or len(admitted) == len(waiting):
        return decision
    return schedule(running, [job for job in waiting if job != waiting[len(admitted)]], limits, free, *given)


def admitting_always(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, *given: Any) -> Decision:
    """The blocks and the place of the pre-empted go to the head of the queue."""
    decision = schedule(running, waiting, limits, free, *given)
    standing = [job for job in running if job.id not in decision.preempt]
    freed = tuple(map(sum, zip(free, given[1](decision.preempt), strict=True)))
    return replace(decision, compute=schedule(standing, waiting, limits, freed, *given).compute)


def oldest_last(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, *given: Any) -> Decision:
    """Round robin: who was first goes to the end."""
    return schedule([*running[1:], *running[:1]], waiting, limits, free, *given)


def by_number(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, *given: Any) -> Decision:
    """The order of numbers, in the place of the order of the lists."""
    return schedule(
        sorted(running, key=lambda job: job.id),
        sorted(waiting, key=lambda job: job.id),
        limits,
        free,
        *given,
    )


def whole_prompts_only(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, *given: Any) -> Decision:
    """A prompt waits for a step that can take it whole; one longer than the budget waits for ever."""
    whole = [job for job in waiting if job.remaining <= limits.token_budget]
    return schedule(running, whole, limits, free, *given)


def counted_by_holder(
    running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, missing: Missing, reclaim: Reclaim, *more: Any
) -> Decision:
    """Each victim is taken to give all blocks that it holds, shared or not."""
    everybody = [job.id for job in running]

    def held(id: int) -> Blocks:
        others = [other for other in everybody if other != id]
        return tuple(a - b for a, b in zip(reclaim(everybody), reclaim(others), strict=True))

    def given(gone: Sequence[int]) -> Blocks:
        return tuple(map(sum, zip((0,) * len(free), *map(held, gone), strict=True)))

    return schedule(running, waiting, limits, free, missing, given, *more)


def counted_one_by_one(
    running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, missing: Missing, reclaim: Reclaim, *more: Any
) -> Decision:
    """Each victim is taken to give what it holds alone."""

    def given(gone: Sequence[int]) -> Blocks:
        return tuple(map(sum, zip((0,) * len(free), *(reclaim([id]) for id in gone), strict=True)))

    return schedule(running, waiting, limits, free, missing, given, *more)


def one_place_each(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, *given: Any) -> Decision:
    """Samples are not counted."""
    return schedule(running, [replace(job, places=1) for job in waiting], limits, free, *given)


class OneWay(HostPool):
    """Counts the way out and not the way back."""

    def takes(self, job: Job, room: int) -> bool:
        """Half of the price."""
        return super().takes(replace(job, computed=2 * job.computed), room)


class Bottomless(HostPool):
    """Does not look at what the others have taken."""

    def takes(self, job: Job, room: int) -> bool:
        """All of the room, for each."""
        return super().takes(job, self.room)


def host_of(kind: type[HostPool]) -> Callable[..., Decision]:
    """The schedule with a host pool of another kind."""

    def scheduled(*given: Any) -> Decision:
        *state, last = given
        if not isinstance(last, HostPool):
            return schedule(*given)
        host = kind(last.room, last.block_bytes, last.held, last.token_seconds, last.byte_seconds)
        changed: Sequence[Any] = (*state, host)
        return schedule(*changed)

    return scheduled


def unreserved(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, *given: Any) -> Decision:
    """What the running expect to need is forgotten once they run."""
    return schedule([replace(job, reserve=()) for job in running], waiting, limits, free, *given)


def never_alone(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, *given: Any) -> Decision:
    """A request that expects more than is free waits, even where it is alone."""
    if not running and waiting and any(n > f for n, f in zip(waiting[0].reserve, free, strict=False)):
        return Decision((), ())
    return schedule(running, waiting, limits, free, *given)


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


def summed_in_batch_order(
    x: FloatArray, weight: FloatArray, bias: FloatArray | None = None, *, out: FloatArray | None = None
) -> FloatArray:
    """One dot product alone, and for several rows partial sums of odd and even elements."""
    exact = x.dtype.type
    if len(x) == 1:
        y = np.stack([np.cumsum(row * x[0], dtype=exact)[-1] for row in weight])[None]
    else:
        y = sum((x[:, part::2, None] * weight.T[None, part::2]).sum(1, dtype=exact) for part in (0, 1))
    y = y if bias is None else y + bias
    if out is None:
        return y
    out[...] = y
    return out


class FirstGroupReleased(KVCacheManager):
    """Forgets a sequence and gives back its blocks of the first group only."""

    def release(self, sequence: Hashable) -> None:
        """Give back what is in the first table."""
        for table in self.tables(sequence)[:1]:
            table.release_all()
        self._sequences.pop(sequence, None)


class KeptOnRelease(KVCacheManager):
    """Keeps the last block of a sequence that is cut off in the middle of a block."""

    def release(self, sequence: Hashable) -> None:
        """Give back whole blocks."""
        for table in self.tables(sequence):
            for block in table.blocks[:-1]:
                if block >= 0:
                    table._allocator.release(int(block))
        self._sequences.pop(sequence, None)


def cached_by(manager: Callable[..., Any]) -> Callable[[], Subject]:
    """Makes a subject with another manager of the KV cache."""
    return lambda: Subject(lambda: backend.load("numpy"), kv_cache=manager)


FAULTS: tuple[Fault, ...] = (
    Fault(
        "one token above the budget",
        "SCH-1",
        "The budget is compared before the last token is counted.",
        scheduled_by(one_token_more),
    ),
    Fault(
        "prompts fill half of the budget",
        "SCH-1",
        "A reserve for decoding stays in force where nobody decodes.",
        scheduled_by(half_a_prompt),
    ),
    Fault(
        "one sequence above the places",
        "SCH-2",
        "`<=` for `<` where a request is admitted.",
        scheduled_by(one_place_more),
    ),
    Fault(
        "prompts before decoding",
        "SCH-3",
        "Early batching servers put prompts first, and answers stuttered.",
        scheduled_by(prompts_first),
    ),
    Fault(
        "free blocks are not looked at",
        "SCH-4",
        "The allocator is expected to complain, in the middle of a step.",
        scheduled_by(endless_memory),
    ),
    Fault(
        "free blocks are promised twice",
        "SCH-4",
        "Each request is checked against the same number of free blocks.",
        scheduled_by(per_request),
    ),
    Fault(
        "blocks of one group are counted",
        "SCH-4",
        "Written for one kind of layer, before models mixed windows.",
        scheduled_by(first_group_only),
    ),
    Fault(
        "shared blocks are given by each holder",
        "SCH-4",
        "A count of blocks per request, summed: right until requests share.",
        scheduled_by(counted_by_holder),
    ),
    Fault(
        "the first arrived is pre-empted",
        "SCH-5",
        "`pop(0)` for `pop()`.",
        scheduled_by(first_pre_empted),
    ),
    Fault(
        "more are pre-empted than need be",
        "SCH-5",
        "The loop tests for room before it has counted what the victim gave.",
        scheduled_by(one_victim_more),
    ),
    Fault(
        "shared blocks are given by nobody",
        "SCH-5",
        "Each victim is asked what it holds alone; two that share a block give it together.",
        scheduled_by(counted_one_by_one),
    ),
    Fault(
        "the pre-empted are computed as well",
        "SCH-6",
        "The victim is taken from the running, but not from the batch under construction.",
        scheduled_by(computed_as_well),
    ),
    Fault(
        "the smallest is admitted first",
        "SCH-7",
        "Shortest job first where first come, first served was promised.",
        scheduled_by(smallest_first),
    ),
    Fault(
        "who does not fit is overtaken",
        "SCH-7",
        "`continue` for `break` in the loop of admission.",
        scheduled_by(overtaking),
    ),
    Fault(
        "all the waiting are looked at",
        "SCH-7",
        "The queue is sorted in every step, and ten thousand wait.",
        scheduled_by(schedule),
    ),
    Fault(
        "admission in a step that pre-empts",
        "SCH-8",
        "Pre-empted and admitted chase each other round the cache.",
        scheduled_by(admitting_always),
    ),
    Fault(
        "the oldest goes last",
        "SCH-9",
        "Round robin, thought to be fair.",
        scheduled_by(oldest_last),
    ),
    Fault(
        "numbers decide the order",
        "SCH-10",
        "A heap of request numbers, which a proxy hands out at random.",
        scheduled_by(by_number),
    ),
    Fault(
        "long prompts starve",
        "SCH-11",
        "Chunking is switched off, and the prompt is longer than any budget.",
        scheduled_by(whole_prompts_only),
    ),
    Fault(
        "sums depend on the number of rows",
        "SCH-13",
        "A BLAS takes another kernel, with another order of additions, for one row than for several.",
        faulty_op("linear", summed_in_batch_order),
    ),
    Fault(
        "only the first group's blocks come back",
        "SCH-14",
        "A second kind of layer was added and the release forgotten.",
        cached_by(FirstGroupReleased),
    ),
    Fault(
        "the block begun is kept",
        "SCH-14",
        "The number of blocks to give back is rounded down.",
        cached_by(KeptOnRelease),
    ),
    Fault(
        "samples find no place",
        "SCH-15",
        "A request is counted as one sequence until it parts.",
        scheduled_by(one_place_each),
    ),
    Fault(
        "copies go one way",
        "SCH-16",
        "What is copied out has to come in again.",
        scheduled_by(host_of(OneWay)),
    ),
    Fault(
        "the host's room is promised twice",
        "SCH-16",
        "Each victim is held against all the room.",
        scheduled_by(host_of(Bottomless)),
    ),
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
        "expectations end with admission",
        "SCH-21",
        "What the running still need is promised to the waiting.",
        scheduled_by(unreserved),
    ),
    Fault(
        "who expects too much never runs",
        "SCH-21",
        "A guess above the pool's size is taken for a need.",
        scheduled_by(never_alone),
    ),
    Fault(
        "unknown policies are the default",
        "SCH-22",
        "A typing error in a configuration goes unnoticed for months.",
        ordered_by(whatever),
    ),
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
