"""Faults of chapter *Sampling*: in drawing from candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np

from refengine import backend, candidate_sampling
from refengine.candidate_sampling import sample_candidates
from refengine.candidates import Candidates
from refengine.sampling import Sampled, SamplingParams
from refengine_conformance.faults.fault import Fault
from refengine_conformance.subject import Subject

Draw = Callable[[Candidates, int, SamplingParams, int], Sampled | None]


def _exact_sums(candidates: Candidates, row: int, params: SamplingParams, index: int) -> Sampled | None:
    with patch.object(candidate_sampling, "_slack", lambda size, count: 0.0):
        return sample_candidates(candidates, row, params, index)


def _rank_of_logits(candidates: Candidates, row: int, params: SamplingParams, index: int) -> Sampled | None:
    def all_of_them(candidates: Candidates, row: int, temperature: float) -> Any:
        exact = candidates.logits[row].astype(np.float64)
        with np.errstate(over="ignore"):
            return candidates.tokens[row], (exact - exact[0]) / temperature

    with patch.object(candidate_sampling, "_certain", all_of_them):
        return sample_candidates(candidates, row, params, index)


def _sum_of_all(candidates: Candidates, row: int, params: SamplingParams, index: int) -> Sampled | None:
    top_k = params.top_k if params.top_k <= candidates.tokens.shape[1] else 0
    return sample_candidates(candidates, row, replace(params, top_k=top_k), index)


def _last_candidate(candidates: Candidates, row: int, params: SamplingParams, index: int) -> Sampled | None:
    sampled = sample_candidates(candidates, row, params, index)
    return Sampled(int(candidates.tokens[row, -1])) if sampled is None else sampled


def _no_penalty(candidates: Candidates, row: int, params: SamplingParams, index: int) -> Sampled | None:
    return sample_candidates(candidates, row, replace(params, repetition_penalty=1.0), index)


def _always_finite(candidates: Candidates, row: int, params: SamplingParams, index: int) -> Sampled | None:
    finite = np.ones_like(candidates.finite)
    return sample_candidates(replace(candidates, finite=finite), row, params, index)


def _only_greedy(candidates: Candidates, row: int, params: SamplingParams, index: int) -> Sampled | None:
    return None if params.temperature else sample_candidates(candidates, row, params, index)


def _drawn_by(draw: Draw) -> Callable[[], Subject]:
    return lambda: Subject(lambda: backend.load("numpy"), sample_candidates=draw)


FAULTS: tuple[Fault, ...] = (
    Fault(
        "the device's sum is taken for the sampler's",
        "SMP-15",
        "Two sums of the same numbers, added up in different orders.",
        _drawn_by(_exact_sums),
    ),
    Fault(
        "candidates are ranked by logits",
        "SMP-15",
        "Scores far from the first are rounded, and what differed before has one score.",
        _drawn_by(_rank_of_logits),
    ),
    Fault(
        "the sum is that of the whole row, whatever top-k",
        "SMP-15",
        "Top-k asks for more tokens than there are candidates.",
        _drawn_by(_sum_of_all),
    ),
    Fault(
        "the last candidate stands for all after it",
        "SMP-15",
        "The draw is clipped, as it rightly is to the last token of a row.",
        _drawn_by(_last_candidate),
    ),
    Fault(
        "the penalty is forgotten",
        "SMP-15",
        "The device knows no history.",
        _drawn_by(_no_penalty),
    ),
    Fault(
        "candidates that are finite are enough",
        "SMP-15",
        "An infinity below the others is seen by nobody.",
        _drawn_by(_always_finite),
    ),
    Fault(
        "nothing is drawn but the first",
        "SMP-15",
        "The row is fetched for every draw at random: right, and as slow as before.",
        _drawn_by(_only_greedy),
    ),
)
