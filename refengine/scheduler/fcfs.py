"""First come, first served: what the next step computes, as a pure function of plain state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Blocks = tuple[int, ...]
"""A number of KV blocks in each group."""


@dataclass(frozen=True)
class Job:
    """A request as the scheduler sees it.

    Attributes:
        id: the request.
        known: tokens whose ids are known: the prompt and what was generated.
        computed: of these, how many are in the KV cache.
        held: KV blocks it holds.
    """

    id: int
    known: int
    computed: int
    held: Blocks

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return self.known - self.computed


@dataclass(frozen=True)
class Limits:
    """What a step may hold: ``token_budget`` tokens, of at most ``max_sequences`` running requests."""

    token_budget: int
    max_sequences: int


@dataclass(frozen=True)
class Decision:
    """What to do next, in this order.

    Attributes:
        preempt: requests that give back all blocks and return to the head of the queue.
        compute: ``(request, tokens)``: the next tokens of each to compute, in the batch's order.
    """

    preempt: tuple[int, ...]
    compute: tuple[tuple[int, int], ...]


def schedule(
    running: Sequence[Job],
    waiting: Sequence[Job],
    limits: Limits,
    free: Blocks,
    missing: Callable[[int, int], Blocks],
) -> Decision:
    """Build the next step.

    Running requests come first: those that need one token (decode), then those still in their prompt, each
    in order of arrival, prompts cut to the token budget. Where blocks run short, the last arrived of the
    running requests is pre-empted for the earlier ones. Waiting requests are admitted in order of arrival,
    while budget, places and blocks last, and only in a step that pre-empts nobody.

    Args:
        running: in order of arrival.
        waiting: in order of arrival.
        limits: of the step.
        free: free blocks of each group.
        missing: ``missing(id, tokens)``, the blocks that a request lacks to hold so many positions.

    Clauses: SCH-1, SCH-2, SCH-3, SCH-4, SCH-5, SCH-6, SCH-7, SCH-8, SCH-9, SCH-10, SCH-11.
    """
    budget = limits.token_budget
    preempted: list[int] = []
    compute: list[tuple[int, int]] = []
    standing = list(running)

    for job in sorted(running, key=lambda job: job.remaining > 1):  # stable: decode first, then by arrival
        tokens = min(job.remaining, budget)
        if tokens == 0 or job not in standing:
            continue
        needed = missing(job.id, job.computed + tokens)
        while job in standing and not _fits(needed, free):
            victim = _last_uncomputed(standing, compute)
            standing.remove(victim)
            preempted.append(victim.id)
            free = tuple(map(sum, zip(free, victim.held, strict=True)))
        if job in standing:
            free = _less(free, needed)
            compute.append((job.id, tokens))
            budget -= tokens

    if not preempted:
        places = limits.max_sequences - len(standing)
        for job in waiting[:places]:
            tokens = min(job.remaining, budget)
            needed = missing(job.id, job.computed + tokens)
            if tokens == 0 or not _fits(needed, free):
                break
            free = _less(free, needed)
            compute.append((job.id, tokens))
            budget -= tokens
    return Decision(tuple(preempted), tuple(compute))


def _last_uncomputed(standing: Sequence[Job], compute: Sequence[tuple[int, int]]) -> Job:
    chosen = {id for id, _ in compute}
    return next(job for job in reversed(standing) if job.id not in chosen)


def _fits(needed: Blocks, free: Blocks) -> bool:
    return all(n <= f for n, f in zip(needed, free, strict=True))


def _less(free: Blocks, needed: Blocks) -> Blocks:
    return tuple(f - n for f, n in zip(free, needed, strict=True))
