"""Sampling: the parameters do what they say, and the random stream is the request's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refengine import SamplingParams
from refengine.errors import NumericalError, RequestError
from refengine.sampling import log_softmax, sample

LOGITS = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32))


def support(logits: np.ndarray, draws: int = 400, **fields: float) -> set[int]:
    """Every token that comes up in many draws."""
    params = SamplingParams(**{"temperature": 1.0} | fields)
    return {sample(logits, params, [], index).token for index in range(draws)}


@given(LOGITS)
def test_greedy_takes_the_lowest_of_the_most_likely(logits: np.ndarray) -> None:
    """Temperature 0 is argmax; among equals the lowest id."""
    token = sample(logits, SamplingParams(), [], 0).token
    assert logits[token] == logits.max()
    assert (logits[:token] < logits[token]).all()


@given(LOGITS)
def test_logprobs_are_those_of_the_raw_logits(logits: np.ndarray) -> None:
    """Whatever the parameters, the reported numbers are log-softmax of what the model said, in float64."""
    params = SamplingParams(temperature=0.5, top_k=3, repetition_penalty=2.0, logprobs=5)
    chosen = sample(logits, params, [0], 7)
    total = math.fsum(math.exp(float(v) - float(logits.max())) for v in logits)
    for token, logprob in [(chosen.token, chosen.logprob), *chosen.top_logprobs]:
        expected = float(logits[token]) - float(logits.max()) - math.log(total)
        assert abs(logprob - expected) <= 2.0**-53 * 8 * (len(logits) + abs(expected) + 60)
    assert len(chosen.top_logprobs) == min(5, len(logits))
    assert [p for _, p in chosen.top_logprobs] == sorted((p for _, p in chosen.top_logprobs), reverse=True)


def test_log_softmax_sums_to_one() -> None:
    """A law: probabilities sum to 1 (n roundings of float64)."""
    logits = np.random.default_rng(0).standard_normal((3, 1000)) * 10
    assert (np.abs(np.exp(log_softmax(logits)).sum(axis=-1) - 1) <= 1000 * 2.0**-52).all()


def test_filters_keep_what_they_say() -> None:
    """top_k counts, top_p includes the token that crosses it, min_p is relative to the most likely."""
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    assert support(logits) == {0, 1, 2, 3}
    assert support(logits, top_k=2) == {0, 1}
    assert support(logits, top_p=0.39) == {0}
    assert support(logits, top_p=0.41) == {0, 1}
    assert support(logits, top_p=0.69) == {0, 1}
    assert support(logits, top_p=0.71) == {0, 1, 2}
    assert support(logits, min_p=0.6) == {0, 1}
    assert support(logits, min_p=0.2) == {0, 1, 2, 3}
    assert support(logits, top_k=3, top_p=0.7) == {0, 1}
    assert support(logits, temperature=1e-3) == {0}


def test_draws_follow_the_distribution() -> None:
    """Over 20,000 draws every frequency lies within six standard deviations of its probability."""
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    params = SamplingParams(temperature=1.0, seed=5)
    draws = 20_000
    tokens = [sample(np.log(probabilities), params, [], index).token for index in range(draws)]
    for token, p in enumerate(probabilities):
        assert abs(tokens.count(token) / draws - p) <= 6 * math.sqrt(p * (1 - p) / draws)


def test_the_stream_belongs_to_the_request() -> None:
    """Same seed and place, same token; another seed gives another stream."""
    logits = np.zeros(1000)

    def stream(seed: int) -> list[int]:
        return [sample(logits, SamplingParams(temperature=1.0, seed=seed), [], i).token for i in range(20)]

    assert stream(1) == stream(1)
    assert stream(1) != stream(2)
    assert len(set(stream(1))) > 15


def test_repetition_penalty_works_on_both_signs() -> None:
    """A seen token's logit is divided where positive and multiplied where negative: less likely either way."""
    params = SamplingParams(repetition_penalty=3.0)
    assert sample(np.array([2.0, 1.0]), params, [0], 0).token == 1
    assert sample(np.array([-1.0, -2.0]), params, [0, 0], 0).token == 1
    assert sample(np.array([2.0, 1.0]), params, [], 0).token == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    """A NaN must not become a token."""
    with pytest.raises(NumericalError):
        sample(np.array([0.0, bad]), SamplingParams(), [], 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": True},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"seed": -1},
        {"seed": 2**64},
        {"logprobs": -1},
        {"logprobs": 21},
    ],
)
def test_parameters_out_of_range_are_refused(fields: dict) -> None:
    """Each names its rule."""
    with pytest.raises(RequestError, match=next(iter(fields))):
        SamplingParams(**fields)


@given(
    LOGITS,
    st.floats(0.01, 5),
    st.integers(0, 5),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.integers(0, 2**64 - 1),
)
@settings(max_examples=50)
def test_any_parameters_give_a_token(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    """There is always at least one candidate, and it lies in the vocabulary."""
    params = SamplingParams(temperature, top_k, top_p, min_p, seed=seed)
    assert 0 <= sample(logits, params, [], 3).token < len(logits)
