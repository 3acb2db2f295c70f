"""The NumPy backend with executables that tell candidates, the golden way; and requests that need rows now and then."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine import Engine, Output, Request, SamplingParams
from refengine.backend.numpy_backend import NumpyBackend
from refengine.candidates import Candidates, candidates_of
from refengine.program import StepBatch


class CandidateBackend(NumpyBackend):
    """Of each row so many candidates.

    Attributes:
        steps: by candidates.
        fetched: rows asked for, by their token's place in the step.
    """

    name = "candidates"

    def __init__(self, count: int = 128) -> None:
        super().__init__()
        self.count, self.steps, self.fetched = count, 0, list[int]()

    def compile(self, *arguments: Any, **options: Any) -> Any:
        executable = super().compile(*arguments, **options)

        def run_candidates(batch: StepBatch, temperatures: NDArray[np.float64]) -> Candidates:
            assert len(temperatures) == len(batch.logit_rows)
            logits = executable.run(batch)
            self.steps += 1

            def row(number: int) -> NDArray[Any]:
                self.fetched.append(number)
                fetched: NDArray[Any] = logits[number]
                return fetched

            found = candidates_of(logits, temperatures, self.count)
            return Candidates(
                found.logits, found.tokens, found.sums, found.finite, found.vocabulary_size, row
            )

        vars(executable)["run_candidates"] = run_candidates
        return executable


def any_requests(seed: int, count: int = 8) -> list[Request]:
    """Prompts of many lengths, with any sampling."""
    rng = random.Random(seed)
    return [
        Request(
            tuple(rng.randrange(97) for _ in range(rng.choice([1, 2, 7, 20]))),
            max_tokens=rng.randint(1, 8),
            sampling=SamplingParams(
                temperature=rng.choice([0.0, 0.7, 1.0, 3.0]),
                top_k=rng.choice([0, 0, 5, 20, 200]),
                top_p=rng.choice([1.0, 0.9, 0.3]),
                min_p=rng.choice([0.0, 0.0, 0.2]),
                repetition_penalty=rng.choice([1.0, 1.0, 1.0, 1.3]),
                logprobs=rng.choice([None, None, None, 2]),
                seed=rng.randrange(2**32),
            ),
            stop_ids=frozenset(rng.sample(range(97), 3)),
            samples=rng.choice([1, 1, 3]),
        )
        for _ in range(count)
    ]


def outputs_of(engine: Engine, requests: list[Request]) -> list[Output]:
    """Everything that all of them give, together."""
    for request in requests:
        engine.submit(request)
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step()
    return outputs
