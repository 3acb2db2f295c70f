"""Faults of chapter *Scheduling*."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from refengine import backend
from refengine.memory import KVCacheManager
from refengine.ops import FloatArray
from refengine.scheduler import Decision, Job, Limits, schedule
from refengine_conformance.faults.fault import Fault, faulty_op
from refengine_conformance.subject import Subject

Blocks = tuple[int, ...]
Jobs = Sequence[Job]
Missing = Callable[[int, int], Blocks]


def scheduled_by(function: Callable[..., Decision]) -> Callable[[], Subject]:
    """Makes a subject with another schedule."""
    return lambda: Subject(lambda: backend.load("numpy"), schedule=function)


def one_token_more(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, missing: Missing) -> Decision:
    """The budget counts from zero."""
    return schedule(running, waiting, replace(limits, token_budget=limits.token_budget + 1), free, missing)


def half_a_prompt(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, missing: Missing) -> Decision:
    """A prompt leaves half of the budget unused."""
    decision = schedule(running, waiting, limits, free, missing)
    most = max(1, limits.token_budget // 2)
    return replace(decision, compute=tuple((id, min(tokens, most)) for id, tokens in decision.compute))


def one_place_more(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, missing: Missing) -> Decision:
    """The places are checked before the request takes one."""
    return schedule(running, waiting, replace(limits, max_sequences=limits.max_sequences + 1), free, missing)


def prompts_first(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, missing: Missing) -> Decision:
    """The batch begins with the longest spans."""
    decision = schedule(running, waiting, limits, free, missing)
    return replace(decision, compute=tuple(sorted(decision.compute, key=lambda pair: -pair[1])))


def endless_memory(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, missing: Missing) -> Decision:
    """Nobody looks whether blocks are free."""
    return schedule(running, waiting, limits, (10**9,) * len(free), missing)


def first_group_only(
    running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, missing: Missing
) -> Decision:
    """Blocks are counted in the first group of layers alone."""
    return schedule(running, waiting, limits, (free[0], *(10**9 for _ in free[1:])), missing)


def per_request(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, missing: Missing) -> Decision:
    """Each admitted request is held against all the free blocks, and none subtracts what it takes."""
    decision = schedule(running, waiting, limits, free, missing)
    if decision.preempt:
        return decision
    left = limits.token_budget - sum(tokens for _, tokens in decision.compute)
    admitted = {id for id, _ in decision.compute} - {job.id for job in running}
    places = limits.max_sequences - len(running) - len(admitted)
    for job in waiting[len(admitted) :][: max(places, 0)]:
        tokens = min(job.remaining, left)
        if not tokens or any(n > f for n, f in zip(missing(job.id, tokens), free, strict=True)):
            break
        decision = replace(decision, compute=(*decision.compute, (job.id, tokens)))
        left -= tokens
    return decision


def first_pre_empted(
    running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, missing: Missing
) -> Decision:
    """The head of the list gives way instead of its end."""
    decision = schedule(running[::-1], waiting, limits, free, missing)
    places = {job.id: at for at, job in enumerate((*running, *waiting))}
    decoding = {job.id for job in running if job.remaining == 1}
    order = sorted(decision.compute, key=lambda pair: (pair[0] not in decoding, places[pair[0]]))
    return replace(decision, compute=tuple(order))


def one_victim_more(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, missing: Missing) -> Decision:
    """Where one must go, its neighbour goes with it."""
    decision = schedule(running, waiting, limits, free, missing)
    if not decision.preempt or len(decision.compute) < 2:
        return decision
    *kept, (last, _) = decision.compute
    return Decision((*decision.preempt, last), tuple(kept))


def computed_as_well(
    running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, missing: Missing
) -> Decision:
    """The pre-empted request stays in the batch that was being built."""
    decision = schedule(running, waiting, limits, free, missing)
    return replace(decision, compute=decision.compute + tuple((id, 1) for id in decision.preempt[:1]))


def smallest_first(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, missing: Missing) -> Decision:
    """The shortest prompts are admitted first."""
    return schedule(running, sorted(waiting, key=lambda job: job.remaining), limits, free, missing)


def overtaking(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, missing: Missing) -> Decision:
    """A request that does not fit is passed over."""
    decision = schedule(running, waiting, limits, free, missing)
    admitted = {id for id, _ in decision.compute} - {job.id for job in running}
    if decision.preempt or len(admitted) == len(waiting):
        return decision
    return schedule(running, [job for job in waiting if job != waiting[len(admitted)]], limits, free, missing)


def admitting_always(
    running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, missing: Missing
) -> Decision:
    """The blocks and the place of the pre-empted go to the head of the queue."""
    decision = schedule(running, waiting, limits, free, missing)
    victims = [job for job in running if job.id in decision.preempt]
    standing = [job for job in running if job.id not in decision.preempt]
    given = tuple(map(sum, zip(free, *(job.held for job in victims), strict=True)))
    return replace(decision, compute=schedule(standing, waiting, limits, given, missing).compute)


def oldest_last(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, missing: Missing) -> Decision:
    """Round robin: who was first goes to the end."""
    return schedule([*running[1:], *running[:1]], waiting, limits, free, missing)


def by_number(running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, missing: Missing) -> Decision:
    """The order of numbers, in the place of the order of the lists."""
    return schedule(
        sorted(running, key=lambda job: job.id),
        sorted(waiting, key=lambda job: job.id),
        limits,
        free,
        missing,
    )


def whole_prompts_only(
    running: Jobs, waiting: Jobs, limits: Limits, free: Blocks, missing: Missing
) -> Decision:
    """A prompt waits for a step that can take it whole; one longer than the budget waits for ever."""
    whole = [job for job in waiting if job.remaining <= limits.token_budget]
    return schedule(running, whole, limits, free, missing)


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
        for table in self._tables.pop(sequence, ())[:1]:
            table.release_all()


class KeptOnRelease(KVCacheManager):
    """Keeps the last block of a sequence that is cut off in the middle of a block."""

    def release(self, sequence: Hashable) -> None:
        """Give back whole blocks."""
        for table in self._tables.pop(sequence, ()):
            for block in table.blocks[:-1]:
                if block >= 0:
                    table._allocator.release(int(block))


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
)
