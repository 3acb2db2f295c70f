"""Candidates: what is drawn from them is what the whole row gives, and rows are fetched only where they are needed."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from candidate_backend import CandidateBackend, any_requests, outputs_of
from tiny_model import tiny_model

from refengine import Engine, EngineConfig, Request, SamplingParams
from refengine.backend import Backend, load
from refengine.candidate_sampling import may_draw, sample_candidates
from refengine.candidates import candidates_of
from refengine.engine_journal import EngineJournal
from refengine.errors import NumericalError
from refengine.models import Model
from refengine.quantizer import LazyTensor
from refengine.sampling import random_number, sample

ROWS = np.random.default_rng(0).standard_normal((4, 3000)).astype(np.float32) * np.float32(2.5)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    list(product([0.6, 1.0, 1.7], [0, 1, 40, 128, 129, 1000], [1.0, 0.95, 0.5], [0.0, 0.05])),
)
def test_tokens_are_those_of_the_row(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Any filters; and whatever the row says that no candidate is for is left to the row."""
    found = candidates_of(ROWS, np.full(4, temperature))
    for row, index in product(range(4), range(30)):
        params = SamplingParams(temperature, top_k, top_p, min_p, seed=row)
        drawn, expected = sample_candidates(found, row, params, index), sample(ROWS[row], params, [], index)
        assert drawn is None or drawn == expected
        if drawn is None:
            assert not 1 <= top_k <= 128
        if drawn is None and (top_k == 0 and top_p == 1.0 and min_p == 0.0):
            assert expected.token not in found.tokens[row]


def test_a_threshold_within_the_error_of_the_sum_leaves_a_doubt() -> None:
    """1,024 equal logits: top-p of 1/16 keeps 64 or 65 of them, by the last bit of a sum."""
    row = np.zeros((1, 1024), np.float32)
    found, params = candidates_of(row, np.ones(1)), SamplingParams(temperature=1.0, top_p=0.0625)
    assert found.sums[0] == 1024
    draws = [sample_candidates(found, 0, params, index) for index in range(400)]
    expected = [sample(row[0], params, [], index) for index in range(400)]
    doubtful = [a for a, b in zip(draws, expected, strict=True) if a is None]
    assert doubtful, "all was certain"
    assert all(a is None or a == b for a, b in zip(draws, expected, strict=True))
    clear = replace(params, top_p=0.0629)  # 64.4 of 1,024
    assert all(sample_candidates(found, 0, clear, index) is not None for index in range(400))


def test_a_draw_within_the_error_of_the_sum_leaves_a_doubt() -> None:
    """A sum that puts the draw exactly on the end of a candidate; a little more or less, and it is clear."""
    row = np.zeros((1, 1024), np.float32)
    params = SamplingParams(temperature=1.0, seed=4)
    index = next(i for i in range(1000) if 0.02 < random_number(4, i) < 0.1)
    found = candidates_of(row, np.ones(1))
    on_the_end = 64 / random_number(4, index)
    told = [
        sample_candidates(replace(found, sums=np.array([on_the_end * (1 + e)])), 0, params, index)
        for e in (0.0, 1e-13, -1e-13, 1e-11, -1e-11)
    ]
    assert [sampled and sampled.token for sampled in told] == [None, None, None, 64, 63]


def test_scores_that_rounding_makes_equal_are_ranked_by_id() -> None:
    """Logits near 0 and far from the first: their scores are equal, and the sampler goes by their ids."""
    row = np.array([[1e-30, 3e-30, 2e-30, 8.0, 4e-30, 5e-30]], np.float32)
    params = SamplingParams(temperature=30.0, top_k=3)
    found = candidates_of(row, np.array([30.0]), 3)
    assert found.tokens[0].tolist() == [3, 5, 4]
    assert {sample(row[0], params, [], i).token for i in range(60)} == {3, 0, 1}
    drawn = [sample_candidates(found, 0, params, i) for i in range(60)]
    assert {sampled and sampled.token for sampled in drawn} == {None, 3}  # only the first is sure
    whole = candidates_of(row, np.array([30.0]))
    for index in range(60):
        assert sample_candidates(whole, 0, params, index) == sample(row[0], params, [], index)


def test_the_sampler_s_sum_is_within_its_bound_of_the_exact_one() -> None:
    """What the intervals rest on: (n + 16) units of roundoff, in exact arithmetic on the weights as rounded."""
    for row in ROWS:
        scores = np.sort(row.astype(np.float64) - float(row.max()))[::-1]
        weights = np.exp(scores)
        exact = sum(map(Fraction, weights.tolist()))
        for total in (float(np.cumsum(weights)[-1]), float(weights.sum()), float(weights[::-1].cumsum()[-1])):
            assert abs(Fraction(total) - exact) <= Fraction(len(row) - 1, 2**53) * exact


def test_an_exponential_is_the_same_wherever_it_stands() -> None:
    """The first weights of a row are those of its candidates: exactly, on every machine so far."""
    scores = np.sort(ROWS[0].astype(np.float64))[::-1]
    for count in (1, 2, 3, 7, 100, 128, 129):
        assert np.exp(scores)[:count].tobytes() == np.exp(scores[:count]).tobytes()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [4, 128])
def test_an_engine_with_candidates_gives_what_one_with_rows_gives(seed: int, count: int) -> None:
    """All outputs in all steps: tokens, log-probabilities, stops and samples, whatever needs a row."""
    model, requests = tiny_model("llama", vocabulary_size=300), any_requests(seed)
    limits = EngineConfig(token_budget=[5, 64][seed % 2], max_sequences=6, kv_tokens=200)
    backend = CandidateBackend(count)
    drawn = outputs_of(Engine(model, backend, limits), requests)
    assert drawn == outputs_of(Engine(model, load("numpy"), limits), requests)
    assert backend.steps > 0
    assert backend.fetched or all(may_draw(request.sampling) for request in requests)


def test_rows_are_fetched_for_those_alone_who_need_them() -> None:
    """Of two requests in one step, one has a penalty."""
    backend = CandidateBackend()
    plain = Request((1, 2, 3), max_tokens=4)
    penalised = replace(plain, sampling=SamplingParams(repetition_penalty=1.5))
    outputs_of(Engine(tiny_model("llama", vocabulary_size=300), backend), [plain, penalised])
    assert (backend.steps, backend.fetched) == (4, [1] * 4)


def test_a_step_in_which_nobody_can_draw_from_candidates_has_none() -> None:
    backend = CandidateBackend()
    logprobs = Request((1, 2, 3), max_tokens=4, sampling=SamplingParams(logprobs=1))
    outputs_of(Engine(tiny_model("llama", vocabulary_size=300), backend), [logprobs, logprobs])
    assert (backend.steps, backend.fetched) == (0, [])


def test_a_journal_another_sampler_and_prompt_logits_take_whole_rows() -> None:
    """A journal hashes them, another sampler is not known, and prompts' logits are what was asked for."""
    model, requests = tiny_model("llama", vocabulary_size=300), any_requests(1)
    backend = CandidateBackend()
    lines, expected = io.StringIO(), io.StringIO()
    outputs_of(Engine(model, backend, journal=EngineJournal(lines, clock=lambda: 0.0)), requests)
    outputs_of(Engine(model, load("numpy"), journal=EngineJournal(expected, clock=lambda: 0.0)), requests)
    read = [
        [json.loads(line) | {"crc": None} for line in s.getvalue().splitlines()[1:]]
        for s in (lines, expected)
    ]
    assert read[0] == read[1]
    outputs_of(Engine(model, backend, sample=lambda *arguments: sample(*arguments)), requests)
    Engine(model, backend).prompt_logits((1, 2, 3))
    assert backend.steps == 0


def test_a_row_that_is_not_finite_fails_its_own_request() -> None:
    """With the sampler's own error, as where rows are copied."""
    model = tiny_model("llama", vocabulary_size=300)
    table = model.weights["output"].decode().copy()
    embedding = model.weights["token_embedding"].decode().copy()
    embedding[5] *= np.float32(1e20)
    table[7] *= np.float32(3e38)
    weights = dict(model.weights)
    for role, values in (("output", table), ("token_embedding", embedding)):
        weights[role] = LazyTensor(role, values.shape, "f32", values.astype("<f4").view(np.uint8))
    spoiled = Model(model.spec, weights)
    requests = [Request((prompt, 3), max_tokens=2) for prompt in (1, 5)]

    def told(backend: Backend) -> list[tuple[int, type | None, str]]:
        with np.errstate(all="ignore"):
            outputs = outputs_of(Engine(spoiled, backend), requests)
        return [(o.request, type(o.error) if o.error else None, str(o.error)) for o in outputs]

    found = told(CandidateBackend())
    assert found == told(load("numpy"))
    assert any(kind is NumericalError for _, kind, _ in found)
