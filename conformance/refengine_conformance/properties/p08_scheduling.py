"""Chapter *Scheduling*: the function, in a simulation that counts all anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

from refengine.scheduler import Decision, HostPool, Job, Limits
from refengine_conformance.registry import holds
from refengine_conformance.schedule_lives import (
    ALL,
    STAYING,
    Step,
    finished,
    simulated,
    simulations,
    waits_for,
)
from refengine_conformance.subject import Subject

Blocks = tuple[int, ...]


@holds("SCH-1", "scheduler", tier="state")
def each_takes_what_it_needs_or_what_is_left(subject: Subject, data: st.DataObject) -> None:
    """Down the batch, every count is the smaller of what remains to do and what is left of the budget."""
    for step in simulated(subject, data, *ALL):
        left = step.limits.token_budget
        for id, tokens in step.decision.compute:
            assert 0 < tokens == min(step.jobs[id].remaining, left)
            left -= tokens


@holds("SCH-2", "scheduler", tier="state")
def running_requests_have_a_place_each(subject: Subject, data: st.DataObject) -> None:
    """Running, less the pre-empted, with the admitted: no more than places."""
    for step in simulated(subject, data, *ALL):
        after = {job.id for job in step.running} - set(step.decision.preempt) | set(step.admitted)
        assert sum(step.jobs[id].places for id in after) <= step.limits.max_sequences


@holds("SCH-3", "scheduler", tier="state")
def decoding_comes_first_and_then_admission(subject: Subject, data: st.DataObject) -> None:
    """The batch is sorted: decoding, prompts, admitted; each in its order."""
    for step in simulated(subject, data, *STAYING):
        running = [job.id for job in step.running]
        places = {job.id: at for at, job in enumerate(step.running + step.waiting)}
        ranks = [
            (id not in running, id in running and step.jobs[id].remaining > 1, places[id])
            for id, _ in step.decision.compute
        ]
        assert ranks == sorted(ranks)


@holds("SCH-4", "scheduler", tier="state")
def what_is_computed_finds_its_blocks(subject: Subject, data: st.DataObject) -> None:
    """In every pool the sum of what is lacked is covered by free blocks and those of the pre-empted."""
    for step in simulated(subject, data, *ALL):
        assert step.fits(dict(step.decision.compute), step.decision.preempt)


@st.composite
def shared_states(draw: st.DrawFn) -> tuple[list[Job], list[set[int]], list[int], int]:
    """Decoding requests that hold blocks together, how many each lacks, and how many are free."""
    holders = draw(st.integers(2, 6))
    blocks = draw(st.lists(st.sets(st.integers(0, holders - 1), min_size=1), min_size=1, max_size=8))
    jobs = [Job(n, n + 3, n + 2) for n in range(holders)]
    lacks = draw(st.lists(st.integers(0, 2), min_size=holders, max_size=holders))
    return jobs, blocks, lacks, draw(st.integers(0, 3))


def freed(blocks: list[set[int]], gone: Any) -> int:
    """The blocks all of whose holders are gone."""
    return sum(holders <= set(gone) for holders in blocks)


def decide_shared(
    subject: Subject, jobs: Sequence[Job], blocks: list[set[int]], lacks: Sequence[int], free: int
) -> Decision:
    """The subject's decision for a state with shared blocks."""
    decision: Decision = subject.schedule(
        jobs,
        [],
        Limits(64, 8),
        (free,),
        lambda number, _: (lacks[number],),
        lambda gone: (freed(blocks, gone),),
    )
    return decision


@holds("SCH-4", "scheduler", tier="state")
def shared_blocks_come_with_their_last_holder(subject: Subject, data: st.DataObject) -> None:
    """What each lacks in sum is free, or was held by the pre-empted alone."""
    for _ in range(20):
        jobs, blocks, lacks, free = data.draw(shared_states())
        decision = decide_shared(subject, jobs, blocks, lacks, free)
        assert sum(lacks[n] for n, _ in decision.compute) <= free + freed(blocks, decision.preempt)


@holds("SCH-5", "scheduler", tier="state")
def the_fewest_holders_make_room(subject: Subject, data: st.DataObject) -> None:
    """With shared blocks too: as many as it takes for the others to fit, and not one more."""
    for _ in range(20):
        jobs, blocks, lacks, free = data.draw(shared_states())
        decision = decide_shared(subject, jobs, blocks, lacks, free)
        stay = len(jobs)
        while sum(lacks[:stay]) > free + freed(blocks, range(stay, len(jobs))):
            stay -= 1
        assert decision.preempt == tuple(range(len(jobs) - 1, stay - 1, -1))


@holds("SCH-5", "scheduler", tier="state")
def the_fewest_of_the_last_admitted_make_room(subject: Subject, data: st.DataObject) -> None:
    """By trying 0, 1, 2 … victims from the end of the running until the rest fit."""
    for step in simulated(subject, data, *STAYING):
        standing = [job.id for job in step.running]
        victims: list[int] = []
        while not step.fits({id: step.tokens[id] for id in standing}, victims):
            victims.append(standing.pop())
        assert list(step.decision.preempt) == victims


@holds("SCH-6", "scheduler", tier="state")
def nobody_is_named_twice(subject: Subject, data: st.DataObject) -> None:
    """Both lists together name distinct requests; pre-empted ones were running."""
    for step in simulated(subject, data, *ALL):
        named = [*step.decision.preempt, *(id for id, _ in step.decision.compute)]
        assert len(named) == len(set(named))
        assert set(named) <= set(step.jobs)
        assert set(step.decision.preempt) <= {job.id for job in step.running}


@holds("SCH-7", "scheduler", tier="state")
def the_queue_is_admitted_from_its_head(subject: Subject, data: st.DataObject) -> None:
    """One waiting request after another is added, until the first that finds no place, token or block."""
    for step in simulated(subject, data, *STAYING):
        if step.decision.preempt:
            continue
        running = {job.id for job in step.running}
        batch = {id: tokens for id, tokens in step.decision.compute if id in running}
        places = step.limits.max_sequences - sum(job.places for job in step.running)
        admitted: list[int] = []
        for job in step.waiting:
            tokens = min(job.remaining, step.limits.token_budget - sum(batch.values()))
            batch[job.id] = tokens
            places -= job.places
            if places < 0 or not tokens or not step.fits(batch):
                break
            admitted.append(job.id)
        assert step.admitted == admitted


@holds("SCH-7", "scheduler", tier="state")
def nobody_behind_the_first_left_out_is_looked_at(subject: Subject, data: st.DataObject) -> None:
    """Of the waiting, the admitted are read and at most one more."""
    for step in simulated(subject, data, *ALL):
        assert step.read <= len(step.admitted) + 1


@holds("SCH-8", "scheduler", tier="state")
def nobody_is_admitted_behind_the_pre_empted(subject: Subject, data: st.DataObject) -> None:
    """Nobody is admitted beside somebody pre-empted, except by rank before all of these."""
    for step in simulated(subject, data, *ALL):
        if step.policy.preempts:
            ranks = {id: step.policy.rank(job.terms) for id, job in step.jobs.items()}
            assert all(ranks[a] < ranks[v] for a in step.admitted for v in step.decision.preempt)
        else:
            assert not (step.admitted and step.decision.preempt)


@holds("SCH-9", "scheduler", tier="state")
def the_first_advances(subject: Subject, data: st.DataObject) -> None:
    """Every simulated request fits alone: the first admitted is in every batch, or else the first waiting."""
    for step in simulated(subject, data, *STAYING):
        first = (*step.running, *step.waiting)[0].id
        assert first in dict(step.decision.compute)
        assert first not in step.decision.preempt


@holds("SCH-9", "scheduler", tier="state")
def the_state_stays_orderly(subject: Subject, data: st.DataObject) -> None:
    """What the chapter derives: at most the last is in its prompt; with one sample each, none is idle."""
    for step in simulated(subject, data, *STAYING):
        assert all(job.remaining == 1 for job in step.running[:-1])
        if all(job.terms.samples == 1 for job in step.jobs.values()):
            running = [job.id for job in step.running]
            assert len(running) <= step.limits.token_budget
            assert set(running) <= {*step.decision.preempt, *(id for id, _ in step.decision.compute)}


@holds("SCH-10", "scheduler", tier="state", level="L2")
def the_same_state_gives_the_same_decision(subject: Subject, data: st.DataObject) -> None:
    """Asked again it says the same; with other numbers for the requests, the same of them."""
    simulation = data.draw(simulations(subject, ALL))
    names = data.draw(st.permutations(range(100, 130)))
    for step in simulation.steps():
        given = step.limits, step.free, step.missing, step.reclaim, step.policy
        assert subject.schedule(step.running, step.waiting, *given) == step.decision
        renamed = subject.schedule(
            tuple(job._replace(id=names[job.id]) for job in step.running),
            tuple(job._replace(id=names[job.id]) for job in step.waiting),
            step.limits,
            step.free,
            lambda name, tokens, ask=step.missing: ask(names.index(name), tokens),
            lambda gone, ask=step.reclaim: ask([names.index(name) for name in gone]),
            step.policy,
        )
        assert renamed.preempt == tuple(names[id] for id in step.decision.preempt)
        assert renamed.compute == tuple((names[id], tokens) for id, tokens in step.decision.compute)


@holds("SCH-11", "scheduler", tier="state")
def everybody_ends_in_time(subject: Subject, data: st.DataObject) -> None:
    """The step in which a request ends is at most the sum of the works before it away from its arrival."""
    simulation = data.draw(simulations(subject))
    lives = finished(simulation)
    for number, life in lives.items():
        came = life.terms.submitted
        before = [
            other.terms
            for other in lives.values()
            if other.terms.arrival <= life.terms.arrival and (other.ended is None or other.ended >= came)
        ]
        bound = sum(terms.work(simulation.limits.token_budget) for terms in before)
        assert life.ended is not None, number
        assert life.ended < came + bound


@holds("SCH-15", "scheduler", tier="state")
def samples_are_admitted_together(subject: Subject, data: st.DataObject) -> None:
    """A request is admitted only where all its samples find places, and no other goes on in its stead."""
    for step in simulated(subject, data, *STAYING):
        places = step.limits.max_sequences - sum(job.places for job in step.running)
        for id in step.admitted:
            places -= step.jobs[id].places
            assert places >= 0
        left = [job for job in step.waiting if job.id not in step.admitted]
        if not step.decision.preempt and step.running == () and left and not step.admitted:
            assert left[0].places > step.limits.max_sequences


@holds("SCH-16", "scheduler", tier="state")
def blocks_go_where_it_is_cheaper(subject: Subject, data: st.DataObject) -> None:
    """Victim after victim: to the host where there is room left and two copies take less than computing."""
    for _ in range(10):
        computed = data.draw(st.lists(st.integers(1, 40), min_size=2, max_size=6))
        held = [data.draw(st.tuples(st.integers(1, 5), st.integers(0, 5))) for _ in computed]
        host = HostPool(
            data.draw(st.integers(0, 120)),
            (3, 4),
            held.__getitem__,
            token_seconds=data.draw(st.sampled_from([0.5, 1.0, 4.0])),
            byte_seconds=0.25,
        )
        running = [Job(n, tokens + 1, tokens) for n, tokens in enumerate(computed)]
        lacks = data.draw(st.integers(0, 30))
        state: tuple[Any, ...] = (
            running,
            [],
            Limits(64, 8),
            (0, 0),
            lambda n, _, lacks=lacks: (0 if n else lacks, 0),
            lambda gone, held=held: tuple(sum(held[n][pool] for n in gone) for pool in (0, 1)),
            subject.scheduling("fcfs"),
        )
        without, decision = subject.schedule(*state), subject.schedule(*state, host)
        assert (decision.preempt, decision.compute) == (without.preempt, without.compute)
        assert without.swap == ()
        room, swapped = host.room, []
        for n in decision.preempt:
            nbytes = 3 * held[n][0] + 4 * held[n][1]
            if nbytes <= room and 0.5 * nbytes < host.token_seconds * computed[n]:
                room -= nbytes
                swapped.append(n)
        assert list(decision.swap) == swapped


@holds("SCH-21", "scheduler", tier="state")
def what_is_expected_stays_free(subject: Subject, data: st.DataObject) -> None:
    """One after another is admitted, as long as what all others and itself expect to take is free as well."""
    for step in simulated(subject, data, *STAYING, hints=True):
        if step.decision.preempt:
            continue
        batch = {id: tokens for id, tokens in step.decision.compute if id not in step.admitted}
        here = list(step.running)
        places = step.limits.max_sequences - sum(job.places for job in step.running)
        admitted: list[int] = []
        for job in step.waiting:
            batch[job.id] = min(job.remaining, step.limits.token_budget - sum(batch.values()))
            places -= job.places
            if places < 0 or not batch[job.id] or not step.fits(batch):
                break
            if here and not all(map(int.__le__, expected(step, [*here, job], batch), step.free)):
                break
            here.append(job)
            admitted.append(job.id)
        assert step.admitted == admitted


def expected(step: Step, jobs: Sequence[Job], batch: Mapping[int, int]) -> Blocks:
    """The blocks that requests lack in this step, or expect to lack in this and later ones."""
    lacked = [step.lacked({job.id: batch.get(job.id, 0)}) for job in jobs]
    reserves = [job.reserve or (0,) * len(step.free) for job in jobs]
    pairs = [tuple(map(max, *each)) for each in zip(lacked, reserves, strict=True)]
    return tuple(map(sum, zip(*pairs, strict=True)))


@holds("SCH-21", "scheduler", tier="state")
def expectations_stop_nobody_for_ever(subject: Subject, data: st.DataObject) -> None:
    """The longest wait is what it is without them."""
    simulation = data.draw(simulations(subject, STAYING, hints=True))
    for life in finished(simulation).values():
        assert life.ended is not None
        assert life.ended < life.terms.submitted + waits_for(simulation, life)
