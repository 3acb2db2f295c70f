"""What a request must get, from an engine over the fake backend, whatever else that is asked."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from fake_backend import NOTHING, choose, history, logits_after

from refengine import Output, Request, SamplingParams

VOCABULARY = 97


@dataclass
class Expected:
    """A sample as it would go alone.

    Attributes:
        request: what it belongs to.
        sampling: with its own seed.
        known: the history of its prompt and output.
        generated: tokens of output.
    """

    request: Request
    sampling: SamplingParams
    known: int
    generated: int = 0

    def next(self) -> int:
        """The token that comes now."""
        logits = logits_after(np.array([self.known], np.uint64), VOCABULARY)[0]
        return choose(logits, self.sampling, self.generated)

    def take(self, output: Output) -> None:
        """An output must be the next one, and end the sample if and only if that is over."""
        if self.request.max_tokens == 0:
            assert (output.sampled, output.finish_reason) == (None, "length")
            return
        assert output.sampled is not None
        token = output.sampled.token
        assert token == self.next(), "another token than alone"
        self.known, self.generated = history(self.known, token), self.generated + 1
        reason = "length" if self.generated == self.request.max_tokens else None
        assert output.finish_reason == ("stop" if token in self.request.stop_ids else reason)


def expected(request: Request) -> dict[int, Expected]:
    """All samples of a request, by their numbers."""
    known = NOTHING
    for token in request.prompt:
        known = history(known, token)
    return {
        i: Expected(request, replace(request.sampling, seed=request.sampling.seed + i), known)
        for i in range(request.samples)
    }
