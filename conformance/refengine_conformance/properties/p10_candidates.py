"""Chapter *Backends*: candidates, of rows of logits that are looked up in a table: so they may be any."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from refengine.backend import CandidateExecutable, Executable
from refengine.candidates import Candidates, candidates_of
from refengine.errors import RefengineError, RequestError
from refengine.ops import FloatArray
from refengine.program import StepBatch, Value, symbolic_inputs
from refengine_conformance.backend_prompts import prompts
from refengine_conformance.prompts import Prompting
from refengine_conformance.registry import holds
from refengine_conformance.subject import Subject, Weight, one_sequence

U = 2.0**-53
"""Sums are in float64, whatever the policy."""

TEMPERATURES = st.sampled_from([1.0, 0.5, 0.0, 2.0, 0.1, 100.0, 1e-310])


@st.composite
def tables(draw: st.DrawFn) -> NDArray[np.float32]:
    """Rows of logits: with ties or without, zeros of both signs among them; shorter than any candidates,
    and longer than anything is likely to treat at once.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(1, 3)), draw(st.sampled_from([60, 130, 1000, 3, 129, 5000]))
    table = rng.standard_normal(shape) * draw(st.sampled_from([1.0, 5.0, 0.3]))
    kind = draw(st.sampled_from(["any", "ties", "equal", "zeros"]))
    if kind == "ties":
        table = np.round(table)
    if kind == "equal":
        table[...] = draw(st.sampled_from([0.0, -3.0, 7.5]))
    if kind == "zeros":
        table = np.where(rng.random(shape) < 0.5, -0.0, 0.0)
        table[:, rng.integers(shape[1], size=5)] = -1.0
    return table.astype(np.float32)


def lookup(
    subject: Subject, table: NDArray[np.float32], factor: float | None = None
) -> tuple[Executable, StepBatch]:
    """A program whose logits are the rows of a table, times a factor where there is one; and its step."""
    tracer, weights = subject.tracer(), {"table": Weight(table).tensor("table")}
    inputs = symbolic_inputs(tracer, kv_groups=1)
    values: Value = tracer.embedding(inputs.token_ids, tracer.symbol("table", "weight", table.shape))
    if factor is not None:
        values = tracer.scale(values, factor=factor)
    program = subject.in_policy(tracer.finish(tracer.take_rows(values, inputs.logit_rows)), weights)
    return subject.compile(program, weights, len(table)), one_sequence(len(table))


def told(executable: Executable, batch: StepBatch, temperatures: NDArray[np.float64]) -> Candidates:
    """What an executable tells; or would, if it could and had the golden way."""
    if isinstance(executable, CandidateExecutable):
        return executable.run_candidates(batch, temperatures)
    return candidates_of(executable.run(batch), temperatures)


def drawn_temperatures(data: st.DataObject, rows: int) -> NDArray[np.float64]:
    """One for each row."""
    return np.array(data.draw(st.lists(TEMPERATURES, min_size=rows, max_size=rows)))


@holds("BCK-18", "backend", tier="models")
def candidates_are_the_first_in_rank(subject: Subject, data: st.DataObject) -> None:
    """Which they are, in Python's own order; their logits bit by bit; the sums, against exact additions."""
    executable, batch = lookup(subject, data.draw(tables()))
    logits: FloatArray = executable.run(batch)
    temperatures = drawn_temperatures(data, len(logits))
    found = told(executable, batch, temperatures)
    count = found.tokens.shape[1]
    assert count >= 1
    assert found.vocabulary_size == logits.shape[1]
    assert found.finite.all()
    for row, temperature in enumerate(temperatures.tolist()):
        numbers = logits[row].tolist()
        ranks = sorted(range(len(numbers)), key=lambda id: (-numbers[id], id))[:count]
        assert found.tokens[row].tolist() == ranks
        assert found.logits[row].tobytes() == logits[row, ranks].tobytes()
        if temperature > 0:
            top = max(numbers)
            exact = math.fsum(math.exp((number - top) / temperature) for number in numbers)
            assert abs(float(found.sums[row]) - exact) <= (len(numbers) + 16) * U * exact


@holds("BCK-18", "backend", tier="models")
def what_is_not_finite_is_told(subject: Subject, data: st.DataObject) -> None:
    """An infinity of either sign, anywhere in some of the rows, by overflow."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    size = data.draw(st.sampled_from([60, 130, 3, 5000]))
    table = rng.uniform(-0.9, 0.9, (3, size)).astype(np.float32)
    wrong = data.draw(st.lists(st.sampled_from([0.0, 2.0, -2.0]), min_size=3, max_size=3))
    for row, value in enumerate(wrong):
        if value:
            table[row, data.draw(st.integers(0, size - 1))] = value
    executable, batch = lookup(subject, table, factor=float(np.finfo(subject.policy.activations).max))
    with np.errstate(over="ignore"):
        found = told(executable, batch, drawn_temperatures(data, 3))
    assert found.finite.tolist() == [not value for value in wrong]


@holds("BCK-18", "backend", tier="models")
def a_row_is_that_of_its_step(subject: Subject, data: st.DataObject) -> None:
    """Before the next step it is that of ``run``; after it, that one still, or refused."""
    executable, batch = lookup(subject, data.draw(tables()))
    logits: FloatArray = executable.run(batch).copy()
    rows = len(logits)
    temperatures = drawn_temperatures(data, rows)
    found = told(executable, batch, temperatures)
    for row in data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=3)):
        assert found.row(row).tobytes() == logits[row].tobytes()
    other = replace(batch, token_ids=np.full_like(batch.token_ids, rows - 1))
    told(executable, other, temperatures)
    try:
        late = found.row(0)
    except RefengineError:
        return
    assert late.tobytes() == logits[0].tobytes(), "the row is a later step's"


@holds("BCK-18", "backend", level="L3", tier="models")
def candidates_depend_on_their_row_alone(subject: Subject, data: st.DataObject) -> None:
    """A row in company, and by itself: the same bits, of the sum too."""
    executable, batch = lookup(subject, data.draw(tables()))
    temperatures = drawn_temperatures(data, len(batch.logit_rows))
    together = told(executable, batch, temperatures)
    for row in data.draw(st.lists(st.sampled_from(batch.logit_rows.tolist()), min_size=1, max_size=2)):
        alone = told(
            executable, replace(batch, logit_rows=np.array([row], np.int32)), temperatures[row : row + 1]
        )
        assert _bits(alone, 0) == _bits(together, row)


def _bits(found: Candidates, row: int) -> list[bytes]:
    arrays: tuple[NDArray[Any], ...] = (found.logits, found.tokens, found.sums, found.finite)
    return [array[row].tobytes() for array in arrays]


@holds("BCK-18", "backend", tier="models")
def a_step_that_tells_candidates_is_a_step(subject: Subject, data: st.DataObject) -> None:
    """It writes the cache as ``run`` does, and refuses temperatures for other rows than there are."""
    case = data.draw(prompts(lengths=st.lists(st.integers(2, 12), min_size=1, max_size=2)))
    first = [replace(chunk, stop=1) for chunk in case.whole]
    rest = [replace(chunk, start=1) for chunk in case.whole]
    running, undisturbed = Prompting(subject, case), Prompting(subject, case)
    batch = case.batch(first)
    undisturbed.executable.run(batch)
    found = told(running.executable, batch, np.ones(len(batch.logit_rows)))
    assert found.tokens.shape[0] == len(batch.logit_rows)
    if isinstance(running.executable, CandidateExecutable):
        try:
            told(running.executable, batch, np.ones(len(batch.logit_rows) + 1))
        except RequestError:
            pass
        else:
            raise AssertionError("there are more temperatures than rows, and nobody minds")
    ends = [p.step(rest) for p in (running, undisturbed)]
    assert [part.tobytes() for part in ends[0]] == [part.tobytes() for part in ends[1]]
