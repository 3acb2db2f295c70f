"""Chapter *Scheduling*: the function in a simulation that counts all anew, and the engine on tiny models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from io import StringIO
from types import MappingProxyType
from typing import Any

from hypothesis import strategies as st

from refengine import Engine, EngineConfig, Output, Request, SamplingParams
from refengine.errors import FormatError, RequestError
from refengine.memory import KVCacheManager
from refengine.models import Model
from refengine.sampling import Sampled
from refengine.scheduler import Decision, HostPool, Job, Limits, Terms
from refengine.simulation import (
    Costs,
    HeavyTails,
    Mishaps,
    Simulator,
    differences,
    generate,
    read_journal,
    small_layout,
)
from refengine_conformance.registry import holds
from refengine_conformance.schedule_lives import (
    ALL,
    STAYING,
    Life,
    Simulation,
    Step,
    choices,
    simulated,
    simulations,
)
from refengine_conformance.subject import Subject
from refengine_conformance.tiny_model import tiny_model

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
            tuple(replace(job, id=names[job.id]) for job in step.running),
            tuple(replace(job, id=names[job.id]) for job in step.waiting),
            step.limits,
            step.free,
            lambda name, tokens, ask=step.missing: ask(names.index(name), tokens),
            lambda gone, ask=step.reclaim: ask([names.index(name) for name in gone]),
            step.policy,
        )
        assert renamed.preempt == tuple(names[id] for id in step.decision.preempt)
        assert renamed.compute == tuple((names[id], tokens) for id, tokens in step.decision.compute)


def finished(simulation: Simulation) -> Mapping[int, Life]:
    """Everybody, at the end of a simulation."""
    for _ in simulation.steps():
        pass
    assert not simulation.to_come
    return simulation.lives


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


def waits_for(simulation: Simulation, life: Life) -> int:
    """The works of those before a request (SCH-17), with its own and its other samples'."""
    budget, lives = simulation.limits.token_budget, simulation.lives
    arrivals = {lives[n].terms.arrival for n in life.before} | {life.terms.arrival}
    return sum(other.terms.work(budget) for other in lives.values() if other.terms.arrival in arrivals)


@holds("SCH-17", "scheduler", tier="state")
def nobody_waits_longer_than_those_before_it_take(subject: Subject, data: st.DataObject) -> None:
    """Those before it are those admitted when it came, and others that rank before it."""
    simulation = data.draw(simulations(subject, ("sjf", "fcfs")))
    lives = finished(simulation)
    for life in lives.values():
        for n in life.before:
            other = lives[n]
            earlier = other.began is not None and other.began < life.terms.submitted
            assert earlier or simulation.rank(other.terms) < simulation.rank(life.terms)
            assert other.terms.submitted <= simulation.rank(life.terms)[0]
        assert life.ended is not None
        assert life.ended < life.terms.submitted + waits_for(simulation, life)


@holds("SCH-17", "scheduler", tier="state")
def the_queue_stands_in_the_policys_order(subject: Subject, data: st.DataObject) -> None:
    """Told of each change alone, it lists in every step what looking at all the waiting finds."""
    for _ in range(6):
        listed_alike(subject, data.draw(simulations(subject, ("sjf", "fcfs", "priority"))))


def listed_alike(subject: Subject, simulation: Simulation) -> None:
    """The subject's queue lists in every step who waits, and in which order."""
    queue = simulation.mirror = subject.queue(simulation.policy)
    for step in simulation.steps():
        waiting = [job.id for job in step.waiting]
        assert list(queue) == waiting
        assert len(queue) == len(waiting)
        assert [id for id in step.jobs if id in queue] == [id for id in step.jobs if id in waiting]


TERMS = st.builds(
    Terms,
    st.integers(0, 50),
    st.integers(0, 2000),
    st.one_of(st.integers(1, 30), st.integers(500, 2000)),
    st.integers(0, 300),
    priority=st.integers(-3, 12),
    deadline=st.one_of(st.none(), st.integers(-5, 1500)),
)


def ranked_alike(subject: Subject, data: st.DataObject, name: str) -> None:
    """A policy made by name ranks as its clause says."""
    for _ in range(20):
        choice, terms = data.draw(choices(name)), data.draw(TERMS)
        policy = subject.scheduling(choice.name, **choice.parameters)
        assert policy.name == name
        assert policy.rank(terms) == choice.rank(terms)
        handicap = policy.rank(terms)[0] - terms.submitted
        assert 0 <= handicap <= policy.patience


@holds("SCH-17", "scheduler", tier="state")
def first_come_has_no_handicap(subject: Subject, data: st.DataObject) -> None:
    """Deadlines, priorities and sizes do not count."""
    ranked_alike(subject, data, "fcfs")


@holds("SCH-18", "scheduler", tier="state")
def the_shorter_has_the_smaller_handicap(subject: Subject, data: st.DataObject) -> None:
    """By chunks of the prompt, tokens of output, and the steps to a deadline."""
    ranked_alike(subject, data, "sjf")


@holds("SCH-19", "scheduler", tier="state")
def the_more_urgent_has_the_smaller_handicap(subject: Subject, data: st.DataObject) -> None:
    """By levels below the highest; what lies outside the levels counts as the nearest."""
    ranked_alike(subject, data, "priority")


@holds("SCH-19", "scheduler", tier="state")
def turns_are_taken_by_rank(subject: Subject, data: st.DataObject) -> None:
    """Found by trying, for each in order of rank, all numbers of victims from the end."""
    for step in simulated(subject, data, "priority"):
        jobs, limits = step.jobs, step.limits
        rank = {id: step.policy.rank(job.terms) for id, job in jobs.items()}
        standing = sorted((job.id for job in step.running), key=rank.__getitem__)
        batch: dict[int, int] = {}
        victims: list[int] = []
        waiting = [job.id for job in step.waiting]
        order = sorted([*standing, *waiting], key=lambda id: (rank[id], id in waiting))
        closed = False
        for id in order:
            tokens = min(jobs[id].remaining, limits.token_budget - sum(batch.values()))
            behind = [other for other in standing if other not in batch and other not in victims]
            if id in waiting:
                last = bool(victims) and rank[id] >= min(rank[victim] for victim in victims)
                if closed or last or not tokens:
                    closed = True
                    continue
            elif id in victims or not tokens:
                continue
            for count in range(len(behind) + 1):
                gone = [*victims, *behind[::-1][:count]]
                if id in gone:
                    victims = gone
                    break
                stay = {*standing, *batch, id} - set(gone)
                places = sum(jobs[other].places for other in stay)
                if places <= limits.max_sequences and step.fits({**batch, id: tokens}, gone):
                    victims, batch[id] = gone, tokens
                    break
            else:
                closed = True
        assert list(step.decision.preempt) == victims
        assert step.decision.compute == tuple(batch.items())


@holds("SCH-19", "scheduler", tier="state")
def the_first_in_rank_advances(subject: Subject, data: st.DataObject) -> None:
    """Whoever ranks first of all takes part, and at full budget."""
    for step in simulated(subject, data, "priority"):
        first = min(step.jobs.values(), key=lambda job: step.policy.rank(job.terms))
        assert step.decision.compute[0] == (first.id, min(first.remaining, step.limits.token_budget))


@holds("SCH-19", "scheduler", tier="state")
def nobody_waits_for_ever_behind_the_urgent(subject: Subject, data: st.DataObject) -> None:
    """The works of all that rank before it, and for each that came later the longest of them once more."""
    simulation = data.draw(simulations(subject, ("priority",)))
    lives, budget = finished(simulation), simulation.limits.token_budget
    for life in lives.values():
        came, rank = life.terms.submitted, simulation.rank(life.terms)
        ahead = [
            other.terms
            for other in lives.values()
            if simulation.rank(other.terms) <= rank and (other.ended is None or other.ended >= came)
        ]
        later = sum(terms.arrival > life.terms.arrival and terms.samples > 0 for terms in ahead)
        longest = max(terms.work(budget) for terms in ahead)
        assert life.ended is not None
        assert life.ended < came + sum(terms.work(budget) for terms in ahead) + later * longest


@holds("SCH-20", "scheduler", tier="state")
def tenants_take_turns(subject: Subject, data: st.DataObject) -> None:
    """The queue, told of each change alone, lists what counting all tenants' tokens finds."""
    for _ in range(4):
        listed_alike(subject, data.draw(simulations(subject, ("fair",))))


@holds("SCH-20", "scheduler", tier="state")
def others_get_no_more_than_their_turn(subject: Subject, data: st.DataObject) -> None:
    """Tokens of the requests that another tenant begins while one waits, without the last of them."""
    for _ in range(4):
        simulation = data.draw(simulations(subject, ("fair",)))
        lives = finished(simulation)
        for n, life in lives.items():
            if n != life.terms.arrival:
                continue
            for tenant in "abc":
                begun = [
                    lives[other]
                    for other in life.before
                    if other == lives[other].terms.arrival and lives[other].terms.tenant == tenant
                    if (lives[other].began or 0) >= life.terms.submitted
                ]
                begun.sort(key=lambda other: other.serial or (0, 0))
                if tenant == life.terms.tenant:
                    assert all(other.terms.arrival < n for other in begun)
                    continue
                account, promised = life.accounts.get(tenant, (life.latest, 0))
                tokens = sum(served(lives, other.terms) for other in begun[:-1])
                assert tokens <= max(0, life.turn - account) + promised


def served(lives: Mapping[int, Life], terms: Terms) -> int:
    """Tokens of a request: of its prompt, and of all its samples."""
    samples = [life for life in lives.values() if life.terms.arrival == terms.arrival]
    return terms.prompt + sum(life.known - terms.prompt for life in samples)


@holds("SCH-20", "scheduler", tier="state")
def who_shares_waits_for_those_before_it(subject: Subject, data: st.DataObject) -> None:
    """In steps: the works of those admitted when it came, and of those admitted while it waited."""
    simulation = data.draw(simulations(subject, ("fair",)))
    for life in finished(simulation).values():
        assert life.ended is not None
        assert life.ended < life.terms.submitted + waits_for(simulation, life)


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


@holds("SCH-22", "scheduler", tier="state")
def policies_are_made_by_name(subject: Subject, data: st.DataObject) -> None:
    """What is named is made; what is not, or not with these parameters, is refused with the names."""
    choice = data.draw(choices(*ALL))
    given = ",".join(f"{name}={value}" for name, value in choice.parameters.items())
    for policy in (
        subject.scheduling(choice.name, **choice.parameters),
        subject.scheduling(f"{choice.name}:{given}"),
    ):
        terms = data.draw(TERMS)
        assert (policy.name, policy.rank(terms)) == (choice.name, choice.rank(terms))
    wrong = data.draw(st.sampled_from(["", "FCFS", "lifo", choice.name + "x"]))
    refusals: list[tuple[Callable[[], Any], tuple[str, ...]]] = [
        (lambda: subject.scheduling(wrong), ALL),
        (lambda: subject.scheduling(choice.name, colour=1), (choice.name, "colour")),
        (lambda: subject.scheduling("sjf", patience=-1), ("sjf", "patience")),
        (lambda: subject.scheduling("sjf", chunk=0), ("sjf", "chunk")),
        (lambda: subject.scheduling("sjf", ageing=-1), ("sjf", "ageing")),
        (lambda: subject.scheduling("priority", ageing=-1), ("priority", "ageing")),
    ]
    for refused, words in refusals:
        try:
            refused()
        except RequestError as error:
            assert all(word in str(error) for word in words)
        else:
            raise AssertionError("something was made")


SHAPES = st.builds(
    HeavyTails,
    rate=st.sampled_from([20.0, 200.0, 2.0]),
    prompt_median=st.just(12.0),
    output_least=st.just(3.0),
    longest=st.just(40),
    tenants=st.just(3),
    priorities=st.just(3),
    samples=st.sampled_from([1, 3]),
    hinted=st.sampled_from([0.0, 0.5]),
)

TROUBLES = st.builds(
    Mishaps,
    st.sampled_from([0.0, 0.05]),
    st.sampled_from([0.0, 0.05]),
    st.sampled_from([0.0, 0.1]),
    st.integers(0, 2**32),
)

COSTS = Costs(step=1.0, token=1 / 8, position=1 / 256, byte=1 / 1024)
"""Sums of these are exact."""


@st.composite
def simulators(draw: st.DrawFn, subject: Subject, text: StringIO | None = None) -> Simulator:
    """Thirty requests in little memory, with a host or windows, and things going wrong."""
    choice = draw(choices(*ALL))
    journal = None if text is None else subject.journal(text, choice.name, **choice.parameters)
    return subject.simulator(
        generate(draw(SHAPES), 30, draw(st.integers(0, 2**32))),
        subject.scheduling(choice.name, **choice.parameters),
        Limits(draw(st.sampled_from([16, 8, 64])), draw(st.sampled_from([4, 3, 8]))),
        small_layout(draw(st.sampled_from([96, 128, 256])), 4, draw(st.sampled_from([None, 6]))),
        COSTS,
        host_bytes=draw(st.sampled_from([0, 1000])),
        mishaps=draw(TROUBLES),
        journal=journal,
    )


@holds("SCH-23", "scheduler", tier="state")
def a_journal_gives_the_same_decisions(subject: Subject, data: st.DataObject) -> None:
    """All of a simulation's, made again from the text alone; and the load as it came."""
    text = StringIO()
    simulator = data.draw(simulators(subject, text))
    load = simulator.load
    made = [done.decision for done in simulator.steps()]
    lines = text.getvalue().splitlines(keepends=True)
    record = read_journal(lines)
    assert [entry.decision for entry in record.entries] == made
    assert list(differences(record, subject.schedule)) == []
    assert record.load == load
    broken = data.draw(st.integers(0, len(lines) - 1))
    for wrong in ("{", '{"step":0}\n', "[]\n", "\n"):
        try:
            read_journal([*lines[:broken], wrong, *lines[broken + 1 :]])
        except FormatError as error:
            assert f"line {broken + 1} " in str(error)
        else:
            assert wrong == "{"
            assert 0 < broken == len(lines) - 1


@holds("SCH-23", "scheduler", tier="state")
def another_decision_is_found(subject: Subject, data: st.DataObject) -> None:
    """A schedule that leaves out one token, somewhere, differs in that line and in no other."""
    text = StringIO()
    made = [done.decision for done in data.draw(simulators(subject, text)).steps()]
    record = read_journal(text.getvalue().splitlines(keepends=True))
    at, calls = data.draw(st.integers(0, len(made) - 1)), 0

    def otherwise(*given: Any) -> Decision:
        nonlocal calls
        calls += 1
        decision: Decision = subject.schedule(*given)
        return replace(decision, compute=decision.compute[1:]) if calls == at + 1 else decision

    assert list(differences(record, otherwise)) == [record.entries[at].line]


@holds("SCH-24", "scheduler", "kv_cache", tier="state")
def whatever_goes_wrong_all_end_once(subject: Subject, data: st.DataObject) -> None:
    """Nobody is lost, nobody ends twice, nobody holds a block at the end, and limits hold in between."""
    simulator: Simulator = data.draw(simulators(subject))
    requests, ended = len(simulator.load), list[int]()
    for done in simulator.steps():
        assert sum(tokens for _, tokens in done.decision.compute) <= simulator.limits.token_budget
        places = sum(simulator.courses[n].places for n in simulator.running)
        assert places <= simulator.limits.max_sequences
        ended += done.ended
    assert sorted(ended) == sorted(simulator.courses)
    firsts = {course.terms.arrival for course in simulator.courses.values()}
    assert len(firsts) == requests
    for course in simulator.courses.values():
        assert course.reason in ("length", "abort", "error")
        assert course.generated <= course.arrival.output
        assert (course.generated == course.arrival.output) or course.reason != "length"
    assert simulator.memory.free_blocks == simulator.layout.num_blocks
    assert (len(simulator.queue), simulator.running) == (0, [])


@holds("SCH-24", "scheduler", "kv_cache", tier="state", level="L2")
def the_clock_counts_the_costs(subject: Subject, data: st.DataObject) -> None:
    """Summed from a journal, step by step, with the pauses between; and the same again from the start."""
    text = StringIO()
    simulator = data.draw(simulators(subject, text))
    times = [done.time for done in simulator.steps()]
    record = read_journal(text.getvalue().splitlines(keepends=True))
    block = sum(simulator.layout.block_bytes(g) for g in range(len(simulator.layout.groups)))
    on_host: dict[int, int] = {}
    for entry, time in zip(record.entries, times, strict=True):
        jobs = {job.id: job for each in entry.arguments[:2] for job in each}
        moved = 0
        for id in entry.decision.swap:
            on_host[id] = block * -(-jobs[id].computed // 4)
            moved += on_host[id]
        cost = COSTS.step
        for id, tokens in entry.decision.compute:
            cost += COSTS.token * tokens + COSTS.position * (jobs[id].computed + tokens)
            moved += on_host.pop(id, 0)
        assert time == entry.time + cost + COSTS.byte * moved
    for a, entry in zip(times, record.entries[1:], strict=False):
        assert entry.time == a or entry.time in {arrival.time for arrival in record.load}


@holds("SCH-24", "scheduler", tier="state")
def loads_come_of_a_seed(subject: Subject, data: st.DataObject) -> None:
    """The same twice, in order of time, with lengths inside their bounds; and another of another seed."""
    shape, seed = data.draw(SHAPES), data.draw(st.integers(0, 2**32))
    load = generate(shape, 30, seed)
    assert load == generate(shape, 30, seed) != generate(shape, 30, seed + 1)
    assert sorted(load, key=lambda arrival: arrival.time) == list(load)
    for arrival in load:
        assert 1 <= arrival.prompt <= shape.longest
        assert 1 <= arrival.output <= shape.longest
        assert 1 <= arrival.samples <= shape.samples


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
        return self.memory.free_blocks == self.engine.plan.layout.num_blocks


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
    """The sampler fails once: one request ends with the cause, the others with their own results."""
    family, limits = data.draw(FAMILIES), data.draw(LIMITS)
    requests = data.draw(st.lists(REQUESTS.filter(lambda r: r.max_tokens > 0), min_size=2, max_size=3))
    fuse = data.draw(st.integers(1, 6))

    def sample(*arguments: Any) -> Sampled:
        nonlocal fuse
        fuse -= 1
        if fuse == 0:
            raise MishapError
        sampled: Sampled = subject.sample(*arguments)
        return sampled

    made = watched(subject, family, limits, sample)
    numbers = {made.engine.submit(request): request for request in requests}
    made.finish()
    assert made.holds_nothing()
    last = {number: made.outputs[number][-1] for number in numbers}
    dead = {number for number, output in last.items() if output.finish_reason == "error"}
    assert len(dead) == (fuse <= 0)
    assert all(isinstance(last[number].error, MishapError) for number in dead)
    assert all(made.engine.abort(number) is None for number in numbers)
    alone = watched(subject, family)
    for number in numbers.keys() - dead:
        other = alone.engine.submit(numbers[number])
        alone.finish()
        assert made.results(number) == alone.results(other)
