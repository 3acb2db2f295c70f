"""Chapter *Sampling*: from candidates, against the sampler of whole rows."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from refengine import SamplingParams
from refengine.candidates import Candidates, candidates_of
from refengine_conformance.registry import holds
from refengine_conformance.subject import Subject

U = 2.0**-53
"""Sampling is in float64, whatever the policy."""

DRAWS = 12
"""Tokens drawn from each row."""

COUNTS = st.sampled_from([8, 40, 3, 1, 128])
"""Candidates of a row."""


@st.composite
def rows(draw: st.DrawFn) -> NDArray[np.floating]:
    """Logits ``[V]``: any; all equal, so that sums are whole numbers; or so near each other, and so far from
    the first, that their scores are equal.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.sampled_from([64, 300, 12, 128, 2, 1, 33]))
    kind = draw(st.sampled_from(["any", "equal", "near", "ties"]))
    row = rng.standard_normal(size) * draw(st.sampled_from([1.0, 3.0, 0.5, 30.0]))
    if kind == "equal":
        row = np.full(size, draw(st.sampled_from([0.0, -2.5, 11.0])))
    if kind == "near":
        row = row * 1e-20
        row[rng.integers(size)] = draw(st.sampled_from([2.0, 0.5]))
    if kind == "ties":
        row = np.round(row)
    return row.astype(draw(st.sampled_from([np.float32, np.float32, np.float64])))


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([1.0, 0.5, 2.0, 0.1, 0.0, 1e-310]),
    top_k=st.sampled_from([0, 0, 2, 7, 50, 200]),
    top_p=st.sampled_from([1.0, 0.5, 0.9, 0.25, 0.75, 0.99]),
    min_p=st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.01, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.0, 1.0, 2.0]),
    seed=st.integers(0, 2**64 - 1),
    logprobs=st.sampled_from([None, None, None, None, 2]),
)


def as_told(row: NDArray[np.floating], temperature: float, count: int, error: float) -> Candidates:
    """The candidates of a row, their sum off by a part of its bound."""
    found = candidates_of(row[None], np.array([temperature]), count)
    if temperature == 0.0:
        return found
    top = float(row.max())
    total = math.fsum(math.exp((float(logit) - top) / temperature) for logit in row)
    return replace(found, sums=np.array([total * (1 + error * (len(row) + 16) * U)]))


@holds("SMP-15", "sampler", tier="state")
def what_candidates_give_is_what_the_row_gives(subject: Subject, data: st.DataObject) -> None:
    """Any row, parameters and number of candidates, a sum anywhere within its bound: the token, or none."""
    for _ in range(4):
        row, params, count = data.draw(rows()), data.draw(PARAMS), data.draw(COUNTS)
        error = data.draw(st.sampled_from([0.9, -0.9, 0.1, -0.3]))
        found = as_told(row, params.temperature, count, error)
        history = [int(row.argmax())]
        for index in range(DRAWS):
            sampled = subject.sample_candidates(found, 0, params, index)
            assert sampled is None or sampled == subject.sample(row, params, history, index)


@holds("SMP-15", "sampler", tier="state")
def sums_at_a_boundary_leave_a_doubt(subject: Subject, data: st.DataObject) -> None:
    """Of n equal logits, top-p keeps exactly a half or a quarter: it takes the exact sum to know how many."""
    size = data.draw(st.sampled_from([64, 128, 16]))
    row = np.full(size, data.draw(st.sampled_from([0.0, 3.0, -1.5])), np.float32)
    error = data.draw(st.sampled_from([0.9, -0.9, 0.5]))
    params = SamplingParams(
        temperature=1.0, top_p=data.draw(st.sampled_from([0.5, 0.25])), seed=data.draw(st.integers(0, 2**32))
    )
    found = as_told(row, 1.0, size - 1, error)
    for index in range(4 * DRAWS):
        sampled = subject.sample_candidates(found, 0, params, index)
        assert sampled is None or sampled == subject.sample(row, params, [], index)


@holds("SMP-15", "sampler", tier="state")
def top_k_may_leave_more_than_the_candidates(subject: Subject, data: st.DataObject) -> None:
    """What those weigh that top-k leaves and nobody tells of is open, between nothing and the row's sum."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    row = (rng.standard_normal(200) * data.draw(st.sampled_from([0.0, 0.1, 1.0]))).astype(np.float32)
    count = data.draw(st.sampled_from([40, 100]))
    params = SamplingParams(
        temperature=1.0,
        top_k=data.draw(st.integers(count + 1, 150)),
        top_p=data.draw(st.sampled_from([1.0, 0.5, 0.1])),
        min_p=data.draw(st.sampled_from([0.0, 0.0, 0.3])),
        seed=data.draw(st.integers(0, 2**32)),
    )
    found = as_told(row, 1.0, count, 0.0)
    for index in range(DRAWS):
        sampled = subject.sample_candidates(found, 0, params, index)
        assert sampled is None or sampled == subject.sample(row, params, [], index)


@holds("SMP-15", "sampler", tier="state")
def candidates_are_enough_for_greed_and_top_k(subject: Subject, data: st.DataObject) -> None:
    """A token is given at temperature 0, and where top-k leaves candidates alone: whatever the sum says."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    row = (rng.integers(1, 60, data.draw(st.sampled_from([40, 300]))) / 4).astype(np.float32)
    count = data.draw(st.sampled_from([8, 3, 30]))
    greedy = replace(data.draw(PARAMS), temperature=0.0, repetition_penalty=1.0, logprobs=None)
    few = replace(
        greedy,
        temperature=data.draw(st.sampled_from([1.0, 0.3, 5.0])),
        top_k=data.draw(st.integers(1, count)),
    )
    for params in (greedy, few):
        found = candidates_of(row[None], np.array([params.temperature]), count)
        for index in range(DRAWS):
            sampled = subject.sample_candidates(found, 0, params, index)
            assert sampled == subject.sample(row, params, [], index)


@holds("SMP-15", "sampler", tier="state")
def nothing_is_drawn_where_a_logit_is_not_finite(subject: Subject, data: st.DataObject) -> None:
    """The whole row says what is wrong with it."""
    row = data.draw(rows())
    row[data.draw(st.integers(0, len(row) - 1))] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    params = data.draw(PARAMS)
    found = candidates_of(row[None], np.array([params.temperature]), data.draw(COUNTS))
    assert subject.sample_candidates(found, 0, params, 0) is None
