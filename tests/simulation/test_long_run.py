"""Many thousands of simulated steps in little memory, with everything going wrong, under every policy."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest

from refengine.scheduler import Limits, SchedulingPolicy, scheduling_policy
from refengine.simulation import Course, HeavyTails, Mishaps, Simulator, generate, small_layout

SHORT, LONG = 50_000, 1_000_000
"""Steps of all policies together, in an ordinary run and with ``--refengine-profile thorough``."""

POLICIES = {
    "fcfs": scheduling_policy("fcfs"),
    "sjf": scheduling_policy("sjf", ageing=1),
    "priority": scheduling_policy("priority", ageing=32, highest=3),
    "fair": scheduling_policy("fair"),
}

SHAPE = HeavyTails(
    rate=25,
    prompt_median=24,
    longest=160,
    output_least=8,
    tenants=4,
    priorities=4,
    samples=4,
    hinted=0.3,
)


def simulator(policy: SchedulingPolicy, seed: int) -> Simulator:
    """A few hundred requests, a cache of five times the longest one's size, and a host or windows."""
    return Simulator(
        generate(SHAPE, 300, seed),
        policy,
        Limits((64, 48, 300)[seed % 3], (6, 12)[seed % 2]),
        small_layout((768, 480)[seed // 2 % 2], 8, window=(None, 40)[seed // 3 % 2]),
        host_bytes=(0, 4000)[seed // 5 % 2],
        mishaps=Mishaps(allocation=0.002, executor=0.002, abort=0.01, seed=seed),
    )


class Books:
    """What a simulator says of itself, added up anew."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator
        self.admitted: dict[int, int] = {}  # by number of request: its place in the order of admission
        self.ended: set[int] = set()

    def run(self) -> int:
        """All steps, each looked at; gives how many there were."""
        made = self.simulator
        for done in made.steps():
            decision = done.decision
            assert decision.compute, "a step that computes nothing"
            assert sum(tokens for _, tokens in decision.compute) <= made.limits.token_budget
            assert sum(made.courses[n].places for n in made.running) <= made.limits.max_sequences
            for n, _ in decision.compute:
                self.admitted.setdefault(made.courses[n].terms.arrival, len(self.admitted))
            assert not self.ended & set(done.ended), "ended twice"
            self.ended |= set(done.ended)
            if done.number % 97 == 0:
                self._nobody_else_holds_blocks()
        self._nobody_is_lost()
        return made.number

    def _nobody_else_holds_blocks(self) -> None:
        made = self.simulator
        assert set(made.memory.sequences) <= set(made.running)
        tables = [made.memory.tables(n) for n in made.memory.sequences]
        for pool, free in enumerate(made.memory.free_blocks):
            blocks = {block for table in tables for block in table[pool].blocks.tolist()} - {-1}
            assert len(blocks) + free == made.layout.num_blocks[pool]

    def _nobody_is_lost(self) -> None:
        made = self.simulator
        assert self.ended == set(made.courses)
        assert {c.terms.arrival for c in made.courses.values()} == set(
            np.cumsum([0, *(a.samples for a in made.load[:-1])]).tolist()
        )
        assert all(course.reason in ("length", "abort", "error") for course in made.courses.values())
        assert made.memory.free_blocks == made.layout.num_blocks
        assert (len(made.queue), made.running, made.memory.sequences) == (0, [], ())

    def everybody_ended_in_time(self) -> None:
        """By the bound of the policy's clause: SCH-11, SCH-17, SCH-19 or SCH-20."""
        courses = [c for c in self.simulator.courses.values() if c.terms.arrival in self.admitted]
        budget = self.simulator.limits.token_budget
        works = np.array([work(course, budget) for course in courses])
        came = np.array([course.terms.submitted for course in courses])
        last = np.array([course.last_step for course in courses])
        first = np.array([self.simulator.courses[c.terms.arrival].first_step for c in courses])
        place = np.array([self.admitted[course.terms.arrival] for course in courses])
        arrival = np.array([course.terms.arrival for course in courses])
        policy = self.simulator.policy
        ranks = [policy.rank(course.terms) for course in courses]
        order = np.array([sorted(set(ranks)).index(rank) for rank in ranks])
        for i, course in enumerate(courses):
            met = last >= came[i]
            if policy.name == "fcfs":
                before = met & (arrival <= arrival[i])
            elif policy.name == "priority":
                before = met & (order <= order[i])
            else:
                before = met & (place <= place[i])
                overtook = before & (first >= came[i])
                if policy.name == "sjf":
                    assert (order[overtook] <= order[i]).all()
                    assert (came[overtook] <= ranks[i][0]).all()
            bound = works[before].sum()
            if policy.name == "priority":
                bound += (before & (arrival > arrival[i])).sum() * works[before].max()
            assert course.steps <= bound


def work(course: Course, budget: int) -> int:
    """Steps that a sample takes alone, if it has to compute its prompt (SCH-11)."""
    return -(-course.arrival.prompt // budget) + max(course.arrival.output, 1) - 1


@pytest.mark.parametrize("name", POLICIES)
def test_nobody_is_lost_late_or_leaves_a_block(name: str, pytestconfig: pytest.Config) -> None:
    """Aborts, failing steps and failing allocations: everybody ends once and in time, and nothing is left."""
    steps = LONG if pytestconfig.getoption("--refengine-profile") == "thorough" else SHORT
    taken, preempted, swapped = 0, 0, 0
    for seed in count():
        books = Books(simulator(POLICIES[name], seed))
        taken += books.run()
        books.everybody_ended_in_time()
        preempted += books.simulator.preemptions
        swapped += books.simulator.swaps
        if taken >= steps // len(POLICIES):
            break
    assert preempted > taken / 500, "too much memory for this to be a test"
    assert swapped > 0
