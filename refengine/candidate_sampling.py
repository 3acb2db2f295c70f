"""Sampling from candidates: the token that the whole row would give, or none where they leave a doubt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.backend.protocol import CandidateExecutable
from refengine.candidates import LEAST_VOCABULARY, Candidates
from refengine.sampling import Sampled, SamplingParams, draw_place, random_number, sample

UNIT_ROUNDOFF = 2.0**-53

SMALLEST = 2.0**-1000
"""Above what exponentials may be off by where they underflow, and below all that matters."""


def candidate_executable(
    executable: object, sampler: Callable[..., Any], vocabulary_size: int
) -> CandidateExecutable | None:
    """An executable that can tell candidates, where these are enough for a sampler, and less than rows."""
    if sampler is not sample or vocabulary_size < LEAST_VOCABULARY:
        return None
    return executable if isinstance(executable, CandidateExecutable) else None


def may_draw(params: SamplingParams) -> bool:
    """Whether candidates can be enough: a penalty changes ranks, and log-probabilities need every logit."""
    return params.repetition_penalty == 1.0 and params.logprobs is None


def sample_candidates(candidates: Candidates, row: int, params: SamplingParams, index: int) -> Sampled | None:
    """Choose the next token as `sample` does, from a row's candidates; ``None`` where it takes the whole row.

    A token is given only where it is certain to be that of `sample`, whatever the rest of the row is:

    - Without temperature it is the first candidate.
    - Scores are computed as `sample` computes them, and are the same numbers; so are the first weights and
      the first cumulative sums, as long as the candidates are the first in the rank *of scores*. That is the
      rank of logits, unless different logits have got equal scores, by rounding: candidates are sorted anew
      for that, and those that a logit outside might precede are left out (`_certain`).
    - Where top-k leaves none but such candidates, `sample` goes on from there with nothing else, and so does
      this, with the same code.
    - Otherwise what `sample` compares with is bracketed. Of the n tokens of a row, let W be the exact sum
      of weights. Its last cumulative sum and the sum that came with the candidates both differ from W by at
      most (n + 16)·u·W: n·u for the additions, in any order, 8·u for the exponentials, and some for what
      follows. So it lies within 2·(n + 16)·u·W of the latter. With another 2·(k + 16)·u·W, `_slack` makes
      room for exponentials of k candidates that differ from those of the row, for the products' roundings,
      and for what the bounds omit, which is of the order of (n·u)². Where top-k leaves more tokens than there
      are candidates, their sum lies between the candidates' and the row's.
      From an interval for that sum follows one for the number of tokens that top-p and min-p keep, and one
      for the sum of their weights: that of the first so many, or p times that sum and at most the weight of
      one more token; and from this, times the random number, one for where the draw falls. Where no
      cumulative sum of a candidate lies in the last interval, and one lies above it, the first that does is
      the token's, whatever numbers of the intervals `sample` has.

    Args:
        candidates: of a step.
        row: of the step's logits.
        params: the request's.
        index: how many tokens the request has generated.

    Clauses: SMP-15.
    """
    if not (may_draw(params) and candidates.finite[row]):
        return None
    if params.temperature == 0.0:
        return Sampled(int(candidates.tokens[row, 0]))
    tokens, scores = _certain(candidates, row, params.temperature)
    size = candidates.vocabulary_size
    limit = min(params.top_k or size, size)
    if limit <= len(tokens):
        return Sampled(int(tokens[draw_place(scores[:limit], params, index)]))
    place = _place(scores, limit, float(candidates.sums[row]), size, params, index)
    return None if place is None else Sampled(int(tokens[place]))


def _certain(
    candidates: Candidates, row: int, temperature: float
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Tokens and scores of those candidates that are surely the first by score, in this order."""
    logits, tokens = candidates.logits[row], candidates.tokens[row]
    lower = np.nextafter(logits[-1:], logits.dtype.type(-np.inf))  # the highest that may follow the last
    exact = np.concatenate([logits, lower]).astype(np.float64)
    with np.errstate(over="ignore"):
        scores = (exact - exact[0]) / temperature
    scores, next_score = scores[:-1], scores[-1]
    last = scores == scores[-1]
    if len(tokens) < candidates.vocabulary_size and (
        next_score == scores[-1] or (logits[last] != logits[-1]).any()
    ):
        tokens, scores = tokens[~last], scores[~last]
    order = np.lexsort((tokens, -scores))
    return tokens[order], scores[order]


def _place(
    scores: NDArray[np.float64], limit: int, total: float, size: int, params: SamplingParams, index: int
) -> int | None:
    """Which of the first candidates is drawn, where more tokens are left than these; ``None`` in doubt."""
    count = len(scores)
    if not count:
        return None
    weights = np.exp(scores)
    sums = np.cumsum(weights)
    slack = _slack(size, count)
    most = total * (1 + slack)
    least = total * (1 - slack) if limit == size else float(sums[-1])
    few = many = limit
    if params.top_p < 1.0:
        least, most = params.top_p * least * (1 - slack), params.top_p * most * (1 + slack)
        few = int(np.searchsorted(sums, least, side="left")) + 1
        many = int(np.searchsorted(sums, most, side="right")) + 1
        most += float(weights[-1]) * (1 + slack)  # of the token that crosses it, where that is no candidate
    if params.min_p > 0.0:
        surely = np.count_nonzero(weights >= params.min_p * (1 + slack) + SMALLEST)
        perhaps = np.count_nonzero(weights >= params.min_p * (1 - slack) - SMALLEST)
        few, many = min(few, max(1, int(surely))), min(many, int(perhaps) if perhaps < count else limit)
    if few <= count:
        least = float(sums[few - 1])
    if many <= count:
        most = float(sums[many - 1])
    uniform = random_number(params.seed, index)
    first = int(np.searchsorted(sums, uniform * least * (1 - slack), side="left"))
    last = int(np.searchsorted(sums, uniform * most * (1 + slack), side="right"))
    return first if first == last < count else None


def _slack(size: int, count: int) -> float:
    """How far apart, relative to themselves, sums of a row of ``size`` and of ``count`` candidates may be."""
    return 2 * ((size + 16) + (count + 16)) * UNIT_ROUNDOFF
