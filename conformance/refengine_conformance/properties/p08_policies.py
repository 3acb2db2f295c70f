"""Chapter *Scheduling*: policies, their orders, and how long anybody waits under them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import strategies as st

from refengine.errors import RequestError
from refengine.scheduler import Terms
from refengine_conformance.registry import holds
from refengine_conformance.schedule_lives import (
    ALL,
    Life,
    Simulation,
    choices,
    finished,
    simulated,
    simulations,
    waits_for,
)
from refengine_conformance.subject import Subject


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
