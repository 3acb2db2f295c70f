"""Faults of chapter *Scheduling*: in the function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from refengine import backend
from refengine.scheduler import (
    FCFS,
    Decision,
    HostPool,
    Job,
    Limits,
    Missing,
    Reclaim,
    SchedulingPolicy,
    schedule,
)
from refengine_conformance.faults.fault import Fault
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
    return schedule(running, [job._replace(places=1) for job in waiting], limits, free, *given)


class OneWay(HostPool):
    """Counts the way out and not the way back."""

    def takes(self, job: Job, room: int) -> bool:
        """Half of the price."""
        return super().takes(job._replace(computed=2 * job.computed), room)


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
    return schedule([job._replace(reserve=()) for job in running], waiting, limits, free, *given)


def never_alone(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, *given: Any) -> Decision:
    """A request that expects more than is free waits, even where it is alone."""
    if not running and waiting and any(n > f for n, f in zip(waiting[0].reserve, free, strict=False)):
        return Decision((), ())
    return schedule(running, waiting, limits, free, *given)


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
)
