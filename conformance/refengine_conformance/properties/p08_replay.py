"""Chapter *Scheduling*: journals and simulations."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from typing import Any

from hypothesis import strategies as st

from refengine.errors import FormatError
from refengine.scheduler import Decision, Limits
from refengine.simulation import Mishaps, Simulator, differences, generate, read_journal, small_layout
from refengine_conformance.registry import holds
from refengine_conformance.schedule_lives import ALL, choices
from refengine_conformance.simulated_loads import COSTS, LOADS
from refengine_conformance.subject import Subject

TROUBLES = st.builds(
    Mishaps,
    st.sampled_from([0.0, 0.05]),
    st.sampled_from([0.0, 0.05]),
    st.sampled_from([0.0, 0.1]),
    st.integers(0, 2**32),
)


@st.composite
def simulators(draw: st.DrawFn, subject: Subject, text: StringIO | None = None) -> Simulator:
    """Thirty requests in little memory, with a host or windows, and things going wrong."""
    choice = draw(choices(*ALL))
    journal = None if text is None else subject.journal(text, choice.name, **choice.parameters)
    return subject.simulator(
        generate(draw(LOADS), 30, draw(st.integers(0, 2**32))),
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
    shape, seed = data.draw(LOADS), data.draw(st.integers(0, 2**32))
    load = generate(shape, 30, seed)
    assert load == generate(shape, 30, seed) != generate(shape, 30, seed + 1)
    assert sorted(load, key=lambda arrival: arrival.time) == list(load)
    for arrival in load:
        assert 1 <= arrival.prompt <= shape.longest
        assert 1 <= arrival.output <= shape.longest
        assert 1 <= arrival.samples <= shape.samples
