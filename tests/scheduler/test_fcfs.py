"""First come, first served: budgets hold, order holds, and somebody always advances."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from refengine.scheduler import Decision, Job, Limits, schedule

BLOCK = 4


def held(job: Job) -> int:
    return -(-job.computed // BLOCK)


def decide(running: list[Job], waiting: list[Job], limits: Limits, free: int) -> Decision:
    jobs = {job.id: job for job in running + waiting}
    return schedule(
        running,
        waiting,
        limits,
        (free,),
        lambda id, tokens: (-(-tokens // BLOCK) - held(jobs[id]),),
        lambda ids: (sum(held(jobs[id]) for id in ids),),
    )


def test_decode_goes_before_prefill_and_prompts_are_cut_to_the_budget() -> None:
    """Two decoding requests take a token each; the prompt gets what is left of the budget."""
    running = [Job(0, 40, 0), Job(1, 9, 8), Job(2, 5, 4)]
    decision = decide(running, [], Limits(10, 8), free=100)
    assert decision.compute == ((1, 1), (2, 1), (0, 8))


def test_waiting_requests_are_admitted_in_order_while_places_last() -> None:
    """With two places, the first two of three start; the budget cuts the second."""
    waiting = [Job(i, 6, 0) for i in range(3)]
    assert decide([], waiting, Limits(10, 2), free=100).compute == ((0, 6), (1, 4))


def test_a_request_that_does_not_fit_holds_back_those_behind_it() -> None:
    """First come, first served: a small request does not overtake a large one for want of blocks."""
    waiting = [Job(0, 40, 0), Job(1, 4, 0)]
    assert decide([], waiting, Limits(64, 8), free=5).compute == ()


def test_the_last_to_arrive_makes_room_for_the_first() -> None:
    """Where a decoding request needs a block and none is free, the youngest gives all of its own back."""
    running = [Job(0, 9, 8), Job(1, 7, 6), Job(2, 7, 6)]
    decision = decide(running, [Job(3, 4, 0)], Limits(64, 8), free=0)
    assert decision.preempt == (2,)
    assert decision.compute == ((0, 1), (1, 1))


JOBS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 29)), max_size=6)


@given(JOBS, JOBS, st.integers(1, 20), st.integers(1, 8), st.integers(0, 12))
def test_what_always_holds(running: list, waiting: list, budget: int, places: int, free: int) -> None:
    """Budget, places and blocks are kept; nobody is both computed and pre-empted; someone advances."""
    jobs = [Job(id, known, min(computed, known - 1)) for id, (known, computed) in enumerate(running[:places])]
    queue = [Job(100 + id, known, 0) for id, (known, _) in enumerate(waiting)]
    decision = decide(jobs, queue, Limits(budget, places), free)
    by_id = {job.id: job for job in jobs + queue}
    computed = dict(decision.compute)

    assert sum(computed.values()) <= budget
    assert all(0 < tokens <= by_id[id].remaining for id, tokens in computed.items())
    assert not set(computed) & set(decision.preempt)
    assert len([id for id in computed if id >= 100]) + len(jobs) - len(decision.preempt) <= places
    taken = sum(
        -(-(by_id[id].computed + tokens) // BLOCK) - held(by_id[id]) for id, tokens in computed.items()
    )
    assert taken <= free + sum(held(by_id[id]) for id in decision.preempt)
    admitted = [id for id in computed if id >= 100]
    assert admitted == [job.id for job in queue[: len(admitted)]]
    if jobs and free + sum(held(job) for job in jobs) >= -(-jobs[0].known // BLOCK):
        assert computed, "the oldest request could have everything, and nobody advances"
