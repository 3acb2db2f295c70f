"""Requests: what a caller asks of the engine, and what the engine gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from refengine.errors import RequestError
from refengine.sampling import Sampled, SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]
"""Why a request ended: a stop id or stop string, its ``max_tokens``, its caller, or something that failed."""

MAX_STOP_STRINGS = 16


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: how many tokens to generate at most; 0 only computes the prompt.
        sampling: how they are chosen.
        stop_ids: tokens that end the output; the one that does is reported, but is no part of the text.
        stop: strings that end the output and are no part of it.
        logits_from: keep the logits after every prompt token from this one on; ``None`` keeps none.
        samples: how many outputs to generate; sample ``i`` is drawn with the seed plus ``i``.
        cache_salt: whose the request is: cached blocks serve requests of the same salt only.
        priority: the larger, the more urgent, where the scheduling policy asks for it.
        tenant: with whom others share, where it shares.
        expected_tokens: how many tokens will be generated, as far as the caller knows: for the order of
            requests, and to admit this one only where there is room for so many; ``None`` for no hint.
        deadline: steps of the engine within which it should end; ``None`` for any number.

    Raises:
        RequestError: an empty prompt, a negative ``max_tokens``, an empty stop string or too many,
            ``logits_from`` outside the prompt, no sample, or logits kept of several; a hint out of range.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    logits_from: int | None = None
    samples: int = 1
    cache_salt: str = ""
    priority: int = 0
    tenant: str = ""
    expected_tokens: int | None = None
    deadline: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise RequestError("the prompt is empty: it needs at least one token")
        if self.max_tokens < 0:
            raise RequestError(f"max_tokens must be at least 0, not {self.max_tokens}")
        if self.logits_from is not None and not 0 <= self.logits_from < len(self.prompt):
            raise RequestError(f"the prompt has {len(self.prompt)} tokens, and none at {self.logits_from}")
        if self.samples < 1:
            raise RequestError(f"samples must be at least 1, not {self.samples}")
        if self.expected_tokens is not None and not 0 <= self.expected_tokens <= self.max_tokens:
            raise RequestError(
                f"expected_tokens must lie between 0 and max_tokens ({self.max_tokens}), "
                f"not {self.expected_tokens}"
            )
        if self.priority < 0 or (self.deadline is not None and self.deadline < 1):
            raise RequestError("priority must be at least 0, and a deadline at least 1 step")
        if self.samples > 1 and self.logits_from is not None:
            raise RequestError("the logits of a prompt are kept for one sample, not for several")
        if len(self.stop) > MAX_STOP_STRINGS or not all(self.stop):
            raise RequestError(f"stop takes up to {MAX_STOP_STRINGS} strings, none of them empty")


@dataclass(frozen=True)
class Output:
    """One event of a request. Every generated token gives one; the last of a sample has a ``finish_reason``.

    Attributes:
        request: the request's number.
        sampled: the token, ``None`` where the request ended without one.
        text: what can be shown now: whole characters, and nothing that may be part of a stop string.
        finish_reason: ``None`` while the sample goes on.
        sample: which of the request's samples this is of.
        error: what failed, where ``finish_reason`` is ``error``.
    """

    request: int
    sampled: Sampled | None
    text: str
    finish_reason: FinishReason | None = None
    sample: int = 0
    error: Exception | None = None
