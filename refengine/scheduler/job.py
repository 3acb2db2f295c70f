"""What the scheduler sees of a request, and what a step may hold: plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

Blocks = tuple[int, ...]
"""A number of KV blocks in each pool."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What is known of a request when it is submitted, and stays as it is.

    Attributes:
        arrival: its place in the order of arrival.
        submitted: the number of the step before which it came.
        prompt: tokens of its prompt.
        output: tokens it will generate: as expected by its caller, or else at most.
        samples: how many outputs it has.
        priority: the larger, the more urgent.
        tenant: whom its tokens are charged to.
        deadline: steps after its submission within which it should end; ``None`` for any number.
    """

    arrival: int = 0
    submitted: int = 0
    prompt: int = 1
    output: int = 0
    samples: int = 1
    priority: int = 0
    tenant: str = ""
    deadline: int | None = None

    def work(self, token_budget: int) -> int:
        """Steps that it takes alone, with so many tokens of the prompt in each.

        Clauses: SCH-11.
        """
        return -(-self.prompt // token_budget) + max(self.output, 1) - 1

    @property
    def tokens(self) -> int:
        """Tokens to be computed for it: of the prompt, and of all outputs.

        Clauses: SCH-20.
        """
        return self.prompt + self.samples * self.output


NO_TERMS = Terms()


class Job(NamedTuple):
    """A request as the scheduler sees it in one step.

    A tuple, because one is made for every running request in every step.

    Attributes:
        id: the request.
        known: tokens whose ids are known: the prompt and what was generated.
        computed: of these, how many are in the KV cache.
        places: sequences that it takes the place of: all samples of a request, before they part.
        reserve: blocks of each pool that it is expected to take yet; empty where nobody knows.
        terms: what the policy ranks it by.
    """

    id: int
    known: int
    computed: int
    places: int = 1
    reserve: Blocks = ()
    terms: Terms = NO_TERMS

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return self.known - self.computed


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step may hold: ``token_budget`` tokens, of at most ``max_sequences`` running sequences."""

    token_budget: int
    max_sequences: int
