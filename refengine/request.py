"""Requests: what a caller asks of the engine, and what the engine gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from refengine.errors import RequestError
from refengine.sampling import Sampled, SamplingParams

FinishReason = Literal["stop", "length", "abort"]
"""Why a request ended: a stop id or stop string, its ``max_tokens``, or its caller."""

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

    Raises:
        RequestError: an empty prompt, a negative ``max_tokens``, an empty stop string or too many,
            ``logits_from`` outside the prompt.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    logits_from: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise RequestError("the prompt is empty: it needs at least one token")
        if self.max_tokens < 0:
            raise RequestError(f"max_tokens must be at least 0, not {self.max_tokens}")
        if self.logits_from is not None and not 0 <= self.logits_from < len(self.prompt):
            raise RequestError(f"the prompt has {len(self.prompt)} tokens, and none at {self.logits_from}")
        if len(self.stop) > MAX_STOP_STRINGS or not all(self.stop):
            raise RequestError(f"stop takes up to {MAX_STOP_STRINGS} strings, none of them empty")


@dataclass(frozen=True)
class Output:
    """One event of a request. Every generated token gives one; the last has a ``finish_reason``.

    Attributes:
        request: the request's number.
        sampled: the token, ``None`` where the request ended without one.
        text: what can be shown now: whole characters, and nothing that may be part of a stop string.
        finish_reason: ``None`` while the request goes on.
    """

    request: int
    sampled: Sampled | None
    text: str
    finish_reason: FinishReason | None = None
