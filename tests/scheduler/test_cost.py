"""A decision costs in proportion to the running requests, and nothing for those that only wait."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import pytest

from refengine.scheduler import Job, Limits, Queue, Terms, schedule, scheduling_policy


def fastest(call: Callable[[], object], times: int) -> float:
    """Seconds of the fastest of some calls: the one that nothing else disturbed."""
    taken = []
    for _ in range(times):
        start = perf_counter()
        call()
        taken.append(perf_counter() - start)
    return min(taken)


def decision(name: str, running: int, waiting: int) -> Callable[[], object]:
    """One decision with everybody decoding, jobs and queue made as an engine does."""
    policy = scheduling_policy(name)
    queue = Queue(policy)
    terms = [Terms(n, n, 20 + n % 7, 30 + n % 5, tenant=str(n % 50)) for n in range(running + waiting)]
    for n, each in enumerate(terms):
        queue.submit(n, each)
    for n in range(running):
        queue.admit(n)
    nothing = (0, 0)

    def decide() -> object:
        return schedule(
            [Job(n, 50, 49, 1, (), terms[n]) for n in range(running)],
            (Job(n, 50, 0, 1, (), terms[n]) for n in queue),
            Limits(2 * running, running),
            (5, 5),
            lambda id, tokens: nothing,
            lambda ids: nothing,
            policy,
        )

    return decide


@pytest.mark.parametrize("name", ["fcfs", "sjf", "priority", "fair"])
def test_a_decision_is_cheap_and_linear(name: str) -> None:
    """Under 200 µs for 64 running; 1,000 take at most 25 times that; 10,000 waiting add less than half."""
    few = fastest(decision(name, 64, 100), 200)
    assert few < 200e-6
    assert fastest(decision(name, 64, 10_000), 200) < 1.5 * few
    assert fastest(decision(name, 1000, 10_000), 50) < 25 * few


@pytest.mark.parametrize("name", ["fcfs", "sjf", "fair"])
def test_a_place_in_a_long_queue_is_cheap(name: str) -> None:
    """To come, to be read, to be admitted and to end: under 200 µs with 10,000 waiting."""
    queue = Queue(scheduling_policy(name))
    for n in range(10_000):
        queue.submit(n, Terms(n, n, 1 + n * 7919 % 1000, n * 104729 % 500, tenant=str(n % 5000)))
    numbers = iter(range(10_000, 20_000))

    def turn() -> None:
        n = next(numbers)
        queue.submit(n, Terms(n, n, 1 + n * 7919 % 1000, n * 104729 % 500, tenant=str(n % 5000)))
        head = next(iter(queue))
        queue.admit(head)
        queue.end(head, 3)

    assert fastest(turn, 1000) < 200e-6
