"""Faults of chapter *Sampling*."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine import backend
from refengine.errors import NumericalError
from refengine.sampling import Sampled, SamplingParams, log_softmax
from refengine_conformance.faults.fault import Fault
from refengine_conformance.subject import Subject

Row = NDArray[np.float64]


class Sampler:
    """The steps of the chapter, each a method that a fault can replace. As it stands it is correct."""

    def __call__(
        self, logits: NDArray[Any], params: SamplingParams, history: Sequence[int], index: int
    ) -> Sampled:
        """Sample."""
        raw = self.checked(logits.astype(np.float64))
        scores = self.penalised(raw, params.repetition_penalty, self.seen(history, index))
        if params.temperature == 0.0:
            token = self.greedy(scores)
        else:
            scores = (scores - scores.max()) / params.temperature
            token = self.drawn(self.kept(self.ranked(scores), scores, params), scores, params, index)
        if params.logprobs is None:
            return Sampled(token)
        logprobs = log_softmax(self.reported(raw, scores))
        top = self.alternatives(raw, scores, params.logprobs)
        return Sampled(token, float(logprobs[token]), tuple((int(t), float(logprobs[t])) for t in top))

    def checked(self, raw: Row) -> Row:
        """SMP-2."""
        if not np.isfinite(raw).all():
            raise NumericalError("the logits are not finite")
        return raw

    def seen(self, history: Sequence[int], index: int) -> Sequence[int]:
        """SMP-3: the ids to penalise."""
        return sorted(set(history))

    def penalised(self, scores: Row, penalty: float, seen: Sequence[int]) -> Row:
        """SMP-3."""
        scores = scores.copy()
        for id in seen:
            scores[id] = scores[id] / penalty if scores[id] > 0 else scores[id] * penalty
        return np.nan_to_num(scores)

    def greedy(self, scores: Row) -> int:
        """SMP-4."""
        return int(scores.argmax())

    def ranked(self, scores: Row) -> NDArray[np.intp]:
        """Ids by falling score."""
        return np.argsort(-scores, kind="stable")

    def kept(self, ranks: NDArray[np.intp], scores: Row, params: SamplingParams) -> NDArray[np.intp]:
        """SMP-6 to SMP-8."""
        return self.min_p(
            self.top_p(self.top_k(ranks, params.top_k), scores, params.top_p), scores, params.min_p
        )

    def top_k(self, ranks: NDArray[np.intp], k: int) -> NDArray[np.intp]:
        """SMP-6."""
        return ranks[: k or None]

    def top_p(self, ranks: NDArray[np.intp], scores: Row, p: float) -> NDArray[np.intp]:
        """SMP-7."""
        sums = np.cumsum(np.exp(scores[ranks]))
        return ranks if p == 1.0 else ranks[: int(np.searchsorted(sums, p * sums[-1])) + 1]

    def min_p(self, ranks: NDArray[np.intp], scores: Row, m: float) -> NDArray[np.intp]:
        """SMP-8."""
        return ranks[np.exp(scores[ranks]) >= m]

    def uniform(self, seed: int, index: int) -> float:
        """SMP-9."""
        return float(np.random.Generator(np.random.Philox(key=seed, counter=index)).random())

    def drawn(self, kept: NDArray[np.intp], scores: Row, params: SamplingParams, index: int) -> int:
        """SMP-10."""
        sums = np.cumsum(np.exp(scores[kept]))
        place = int(np.searchsorted(sums, self.uniform(params.seed, index) * sums[-1], side="right"))
        return int(kept[min(place, len(kept) - 1)])

    def reported(self, raw: Row, scores: Row) -> Row:
        """SMP-11: the logits whose log-probabilities are reported."""
        return raw

    def alternatives(self, raw: Row, scores: Row, count: int) -> NDArray[np.intp]:
        """SMP-12."""
        return np.argsort(-raw, kind="stable")[:count]


class TemperatureLast(Sampler):
    """Filters before temperature."""

    def __call__(
        self, logits: NDArray[Any], params: SamplingParams, history: Sequence[int], index: int
    ) -> Sampled:
        """Filters at temperature 1, then draws at the temperature asked for."""
        sampled = super().__call__(logits, params, history, index)
        if params.temperature == 0.0:
            return sampled
        scores = self.penalised(
            logits.astype(np.float64), params.repetition_penalty, self.seen(history, index)
        )
        scores -= scores.max()
        kept = self.kept(self.ranked(scores), scores, params)
        return replace(sampled, token=self.drawn(kept, scores / params.temperature, params, index))


class NanAsLowest(Sampler):
    """NaN counts as the lowest number."""

    def checked(self, raw: Row) -> Row:
        """Cleans what should be refused."""
        return np.nan_to_num(raw, nan=-1e300, posinf=1e300, neginf=-1e300)


class DividesNegatives(Sampler):
    """The penalty divides whatever the sign."""

    def penalised(self, scores: Row, penalty: float, seen: Sequence[int]) -> Row:
        """Divide."""
        scores = scores.copy()
        scores[list(seen)] /= penalty
        return np.nan_to_num(scores)


class OutputOnly(Sampler):
    """The penalty forgets the prompt."""

    def seen(self, history: Sequence[int], index: int) -> Sequence[int]:
        """The generated ids."""
        return sorted(set(history[len(history) - index :]))


class OncePerOccurrence(Sampler):
    """An id is penalised as often as it occurs."""

    def seen(self, history: Sequence[int], index: int) -> Sequence[int]:
        """All ids, repeated ones too."""
        return history


class LastOfEquals(Sampler):
    """Ties go to the highest id."""

    def greedy(self, scores: Row) -> int:
        """The last place of the maximum."""
        return int(np.flatnonzero(scores == scores.max())[-1])


class OneMore(Sampler):
    """Top-k keeps one more."""

    def top_k(self, ranks: NDArray[np.intp], k: int) -> NDArray[np.intp]:
        """k + 1."""
        return ranks[: k + 1 if k else None]


class TiesExtend(Sampler):
    """Top-k keeps all that are as high as the k-th."""

    def kept(self, ranks: NDArray[np.intp], scores: Row, params: SamplingParams) -> NDArray[np.intp]:
        """Compares with a threshold, as `scores < topk(scores)[-1]` does."""
        if params.top_k:
            ranks = ranks[scores[ranks] >= scores[ranks[: params.top_k]][-1]]
        return super().kept(ranks, scores, replace(params, top_k=0))


class Multiplies(Sampler):
    """Temperature the wrong way round."""

    def __call__(
        self, logits: NDArray[Any], params: SamplingParams, history: Sequence[int], index: int
    ) -> Sampled:
        """Sample with the inverse."""
        inverse = 1 / params.temperature if params.temperature > 1e-300 else 0.0
        return super().__call__(logits, replace(params, temperature=inverse), history, index)


class WithoutCrossing(Sampler):
    """Top-p leaves out the token that crosses it."""

    def top_p(self, ranks: NDArray[np.intp], scores: Row, p: float) -> NDArray[np.intp]:
        """One fewer, but the first."""
        kept = super().top_p(ranks, scores, p)
        return kept if p == 1.0 else kept[: max(1, len(kept) - 1)]


class TopPOfAll(Sampler):
    """Top-p sums over the whole vocabulary."""

    def kept(self, ranks: NDArray[np.intp], scores: Row, params: SamplingParams) -> NDArray[np.intp]:
        """Top-p before top-k."""
        return self.min_p(
            self.top_k(self.top_p(ranks, scores, params.top_p), params.top_k), scores, params.min_p
        )


class Absolute(Sampler):
    """Min-p compares probabilities, not their ratio to the top's."""

    def min_p(self, ranks: NDArray[np.intp], scores: Row, m: float) -> NDArray[np.intp]:
        """Relative to 1, keeping the first."""
        weights = np.exp(scores[ranks])
        kept = ranks[weights / weights.sum() >= m]
        return kept if len(kept) else ranks[:1]


class SharedStream(Sampler):
    """One stream for all tokens: the place in it is not the request's."""

    def uniform(self, seed: int, index: int) -> float:
        """The same number for every index."""
        return super().uniform(seed, 0)


class Seedless(Sampler):
    """The seed is dropped."""

    def uniform(self, seed: int, index: int) -> float:
        """The stream of seed 0."""
        return super().uniform(0, index)


class HalfASeed(Sampler):
    """The seed goes through a 32-bit integer."""

    def uniform(self, seed: int, index: int) -> float:
        """The stream of its low half."""
        return super().uniform(seed & 0xFFFFFFFF, index)


class InOrderOfIds(Sampler):
    """The sum runs over ids, not ranks."""

    def drawn(self, kept: NDArray[np.intp], scores: Row, params: SamplingParams, index: int) -> int:
        """Sorts before drawing."""
        return super().drawn(np.sort(kept), scores, params, index)


class Processed(Sampler):
    """Log-probabilities after penalty and temperature."""

    def reported(self, raw: Row, scores: Row) -> Row:
        """What the draw was made from."""
        return scores


class ProcessedAlternatives(Sampler):
    """Alternatives by processed logits."""

    def alternatives(self, raw: Row, scores: Row, count: int) -> NDArray[np.intp]:
        """The first in rank."""
        return super().alternatives(scores, raw, count)


def sampled_by(sampler: Callable[[], Sampler]) -> Callable[[], Subject]:
    """Makes a subject with another sampler."""
    return lambda: Subject(lambda: backend.load("numpy"), sample=sampler())


FAULTS: tuple[Fault, ...] = (
    Fault(
        "temperature after the filters",
        "SMP-1",
        "Engines disagree about this order, and say so only in their code.",
        sampled_by(TemperatureLast),
    ),
    Fault(
        "NaN is replaced by a low number",
        "SMP-2",
        "`nan_to_num`, added to silence a crash.",
        sampled_by(NanAsLowest),
    ),
    Fault(
        "the penalty divides negatives too",
        "SMP-3",
        "The formula as the paper prints it, which makes a token with a negative logit more likely.",
        sampled_by(DividesNegatives),
    ),
    Fault(
        "the penalty forgets the prompt",
        "SMP-3",
        "Only generated tokens are counted, as for presence penalties.",
        sampled_by(OutputOnly),
    ),
    Fault(
        "the penalty counts occurrences",
        "SMP-3",
        "Applied in a loop over the history.",
        sampled_by(OncePerOccurrence),
    ),
    Fault(
        "ties go to the highest id",
        "SMP-4",
        "The last place of an ascending sort.",
        sampled_by(LastOfEquals),
    ),
    Fault(
        "temperature multiplies",
        "SMP-5",
        "The reciprocal is computed once, and then once more.",
        sampled_by(Multiplies),
    ),
    Fault(
        "top-k keeps one more",
        "SMP-6",
        "`<=` for `<` on the rank.",
        sampled_by(OneMore),
    ),
    Fault(
        "ties extend top-k",
        "SMP-6",
        "The k-th score is used as a threshold.",
        sampled_by(TiesExtend),
    ),
    Fault(
        "top-p leaves out the crossing token",
        "SMP-7",
        "The mask `cumulative > p` is not shifted by one.",
        sampled_by(WithoutCrossing),
    ),
    Fault(
        "top-p before top-k",
        "SMP-7",
        "Probabilities are not summed anew after top-k.",
        sampled_by(TopPOfAll),
    ),
    Fault(
        "min-p relative to 1",
        "SMP-8",
        "The probability itself is compared with the threshold.",
        sampled_by(Absolute),
    ),
    Fault(
        "one number for all tokens",
        "SMP-9",
        "The index does not reach the generator.",
        sampled_by(SharedStream),
    ),
    Fault(
        "the seed is ignored",
        "SMP-9",
        "A parameter that no line reads.",
        sampled_by(Seedless),
    ),
    Fault(
        "half of the seed is ignored",
        "SMP-9",
        "A 64-bit seed passes through a 32-bit one.",
        sampled_by(HalfASeed),
    ),
    Fault(
        "the sum runs over ids",
        "SMP-10",
        "The filter leaves a mask, and the draw goes over the vocabulary.",
        sampled_by(InOrderOfIds),
    ),
    Fault(
        "log-probabilities of processed logits",
        "SMP-11",
        "Temperature and penalty were applied in place.",
        sampled_by(Processed),
    ),
    Fault(
        "alternatives by processed logits",
        "SMP-12",
        "The order of the draw is used again.",
        sampled_by(ProcessedAlternatives),
    ),
)
