"""What an engine did, written down: its decisions, its requests, and a hash of all that each was answered.

A journal as `refengine.simulation.journal` describes it, with more in three kinds of lines:

- the first: ``engine``, an object with ``model`` as it was asked for, its ``fingerprint``, ``backend``, and
  ``policy``, ``kv_dtype`` and ``block_size`` of the config: what a request's bits depend on.
- ``submit``: ``request``, the fields of ``Request``.
- ``end``: ``tokens`` and ``sha256``, of what the sample was drawn from and what was drawn. See `Transcript`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from hashlib import sha256
from typing import Any, TextIO

from refengine.config import EngineConfig
from refengine.errors import FormatError
from refengine.memory import KVLayout
from refengine.models import Model
from refengine.ops import FloatArray
from refengine.request import Request
from refengine.sampling import SamplingParams
from refengine.scheduler import Decision, Terms
from refengine.simulation import Journal

CHUNK = 2**24
"""Bytes of weights hashed at once; no more of a mapped file is in memory for it."""


class Transcript:
    """A sample's tokens, and one SHA-256 over each row of logits and its token as 8 bytes, in order.

    The bytes are those in memory: of two transcripts on one kind of machine, equal hashes mean equal bits.

    Attributes:
        tokens: what was sampled.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._hash = sha256()

    def add(self, logits: FloatArray, token: int) -> None:
        """A token was sampled from a row of logits."""
        self._hash.update(logits.tobytes())
        self._hash.update(token.to_bytes(8, "little"))
        self.tokens.append(token)

    @property
    def digest(self) -> str:
        """The hash so far, in hexadecimal."""
        return self._hash.hexdigest()


class EngineJournal:
    """Writes down what an engine does. Give it to one engine only.

    Args:
        stream: gets the lines.
        model: by which name or path it was asked for.
        clock: seconds; the journal's begin with 0.
    """

    def __init__(
        self, stream: TextIO, model: str | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream, self._model, self._clock = stream, model, clock
        self._transcripts: dict[int, Transcript] = {}

    def begin(
        self,
        model: Model,
        backend: str,
        config: EngineConfig,
        layout: KVLayout,
        schedule: Callable[..., Decision],
    ) -> Callable[..., Decision]:
        """An engine starts; returns the same schedule, whose decisions are written down."""
        engine = {
            "model": self._model,
            "fingerprint": fingerprint(model),
            "backend": backend,
            "policy": config.policy,
            "kv_dtype": config.kv_dtype,
            "block_size": config.block_size,
        }
        self._start = self._clock()
        self._journal = Journal(self._stream, config.scheduling, layout, engine=engine)
        return self._journal.recording(schedule)

    def decide(self, step: int) -> None:
        """The next decision is one of this step, and is made now."""
        self._journal.step, self._journal.time = step, self._now()

    def submit(self, number: int, terms: Terms, request: Request) -> None:
        """A request was accepted."""
        content = {
            **vars(request),
            "prompt": [int(token) for token in request.prompt],  # JSON takes none of NumPy's integers
            "sampling": vars(request.sampling),
            "stop_ids": sorted(map(int, request.stop_ids)),
        }
        self._journal.submit(number, terms, self._now(), request=content)

    def sampled(self, number: int, logits: FloatArray, token: int) -> None:
        """A sequence got a token."""
        self._transcripts.setdefault(number, Transcript()).add(logits, token)

    def end(self, number: int, reason: str, generated: int) -> None:
        """A sequence ended."""
        transcript = self._transcripts.pop(number, None) or Transcript()
        told = {"tokens": transcript.tokens, "sha256": transcript.digest}
        self._journal.end(number, reason, self._now(), generated, transcript=told)

    def _now(self) -> float:
        return self._clock() - self._start


def fingerprint(model: Model) -> str:
    """SHA-256 over a model's shape and all its weights as stored."""
    digest = sha256(repr(model.spec).encode())
    for name, tensor in sorted(model.weights.items()):
        digest.update(repr((name, tensor.shape, tensor.encoding)).encode())
        data = tensor.data.reshape(-1)
        for start in range(0, data.size, CHUNK):
            digest.update(data[start : start + CHUNK].tobytes())
            tensor.pages.release(start, min(start + CHUNK, data.size))
    return digest.hexdigest()


def request_of(content: Mapping[str, Any]) -> Request:
    """The request that a journal holds.

    Raises:
        FormatError: a field is missing, there is one too many, or one breaks its form.
        RequestError: one is out of its range.
    """
    try:
        if content.keys() != (names := {field.name for field in fields(Request)}):
            raise TypeError(f"there must be other fields: {', '.join(sorted(content.keys() ^ names))}")
        given = {
            **content,
            "prompt": tuple(map(int, content["prompt"])),
            "sampling": SamplingParams(**content["sampling"]),
            "stop_ids": frozenset(map(int, content["stop_ids"])),
            "stop": tuple(map(str, content["stop"])),
        }
        return Request(**given)
    except (TypeError, AttributeError) as cause:
        raise FormatError(f"a request in the journal breaks its form: {cause}") from cause
