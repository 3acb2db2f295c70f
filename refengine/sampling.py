"""Sampling: from one row of logits to a token, by a request's own parameters and seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.errors import NumericalError, RequestError

MAX_LOGPROBS = 20
"""Most alternatives reported per token (the OpenAI API's limit)."""


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen.

    The steps, in order, each leaving out what its neutral value says: ``repetition_penalty``,
    ``temperature``, ``top_k``, ``top_p``, ``min_p``, then one draw.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token (the lowest id among equals).
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens until their probabilities sum to at least this (the token that
            crosses it included); 1 keeps all (Holtzman et al., 2019, arXiv:1904.09751).
        min_p: keep tokens at least this many times as likely as the most likely one; 0 keeps all
            (Nguyen et al., 2024, arXiv:2407.01082).
        repetition_penalty: logits of tokens seen in prompt or output are divided by it where positive and
            multiplied where negative (Keskar et al., 2019, arXiv:1909.05858); 1 leaves them.
        seed: of the request's own random stream; the same seed gives the same tokens in any batch.
        logprobs: how many most likely tokens to report with each token, beside its own log-probability;
            ``None`` reports nothing.

    Raises:
        RequestError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0 <= self.temperature < math.inf, "finite and at least 0")
        _check("top_k", self.top_k, self.top_k >= 0, "at least 0")
        _check("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0 and at most 1")
        _check("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "between 0 and 1")
        _check("repetition_penalty", self.repetition_penalty, 0.0 < self.repetition_penalty < math.inf,
               "finite and above 0")  # fmt: skip
        _check("seed", self.seed, 0 <= self.seed < 2**64, "between 0 and 2**64 - 1")
        _check("logprobs", self.logprobs, self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
               f"between 0 and {MAX_LOGPROBS}")  # fmt: skip


@dataclass(frozen=True)
class Sampled:
    """A chosen token.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability under the raw logits, before any parameter; ``None``
            where nobody asked: over a large vocabulary it costs more than everything else here.
        top_logprobs: the most likely tokens and theirs, in falling order, where asked for.
    """

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def sample(logits: NDArray[Any], params: SamplingParams, history: Sequence[int], index: int) -> Sampled:
    """Choose the next token.

    Args:
        logits: ``[V]``, any float dtype.
        params: the request's.
        history: ids of prompt and output so far, for the repetition penalty.
        index: how many tokens the request has generated: its place in the random stream.

    Raises:
        NumericalError: a logit is NaN or infinite.

    Clauses: SMP-1, SMP-2, SMP-4, SMP-5, SMP-12.
    """
    check_finite(logits)
    if params.temperature == 0.0 and params.repetition_penalty == 1.0 and params.logprobs is None:
        return Sampled(int(logits.argmax()))  # of these, as of float64 numbers
    raw = logits.astype(np.float64)
    scores = _penalised(raw, params.repetition_penalty, history)
    if params.temperature == 0.0:
        token = int(scores.argmax())
    else:
        with np.errstate(over="ignore"):  # a tiny temperature leaves only the top
            token = _draw((scores - scores.max()) / params.temperature, params, index)
    if params.logprobs is None:
        return Sampled(token)
    logprobs = log_softmax(raw)
    top = np.lexsort((np.arange(len(raw)), -raw))[: params.logprobs]
    return Sampled(token, float(logprobs[token]), tuple((int(t), float(logprobs[t])) for t in top))


def check_finite(logits: NDArray[Any]) -> None:
    """Raise `NumericalError` where a logit is NaN or infinite.

    Clauses: SMP-2.
    """
    if not (math.isfinite(logits.max(initial=0)) and math.isfinite(logits.min(initial=0))):  # NaN is both
        raise NumericalError("the logits are not finite: the weights or the arithmetic overflowed")


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """``logits - log Σ exp(logits)`` over the last axis, in float64.

    Clauses: SMP-11.
    """
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _penalised(scores: NDArray[np.float64], penalty: float, history: Sequence[int]) -> NDArray[np.float64]:
    """Scores with those of ids in ``history`` less likely, by whichever of product and quotient does it.

    Clauses: SMP-3.
    """
    if penalty == 1.0:
        return scores
    seen = np.unique(np.asarray(history, np.int64))
    scores = scores.copy()
    with np.errstate(over="ignore"):
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    return np.nan_to_num(scores)  # what overflows is the largest number of its sign


def _draw(scores: NDArray[np.float64], params: SamplingParams, index: int) -> int:
    """One draw from the filtered distribution; the highest score is 0.

    Clauses: SMP-6.
    """
    order = np.lexsort((np.arange(len(scores)), -scores))  # most likely first, lower id first among equals
    if params.top_k:
        order = order[: params.top_k]
    return int(order[draw_place(scores[order], params, index)])


def draw_place(scores: NDArray[np.float64], params: SamplingParams, index: int) -> int:
    """Which of the tokens that top-k left is drawn, by inverting their cumulative sum.

    Args:
        scores: theirs, in rank; the first is 0.
        params, index: as in `sample`.

    Clauses: SMP-7, SMP-8, SMP-10.
    """
    weights = np.exp(scores)
    cumulative = np.cumsum(weights)
    kept = len(scores)
    if params.top_p < 1.0:
        kept = int(np.searchsorted(cumulative, params.top_p * cumulative[-1], side="left")) + 1
    if params.min_p > 0.0:
        kept = min(kept, int(np.count_nonzero(weights >= params.min_p)))
    uniform = random_number(params.seed, index)
    place = np.searchsorted(cumulative[:kept], uniform * cumulative[kept - 1], side="right")
    return min(int(place), kept - 1)  # the product may round up to the whole sum


def random_number(seed: int, index: int) -> float:
    """A token's own random number, of [0, 1).

    Clauses: SMP-9.
    """
    return float(np.random.Generator(np.random.Philox(key=seed, counter=index)).random())


def _check(name: str, value: object, holds: bool, rule: str) -> None:
    if not holds or isinstance(value, bool):
        raise RequestError(f"{name} must be {rule}, not {value!r}")
