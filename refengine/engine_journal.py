"""What an engine did, written down: its decisions, its requests, and a hash of all that each was answered.

A journal as `refengine.simulation.journal` describes it, with more in three kinds of lines:

- the first: ``engine``, an object with ``model`` as it was asked for, its ``fingerprint``, ``backend``, and
  ``policy``, ``kv_dtype`` and ``block_size`` of the config: what a request's bits depend on.
- ``submit``: ``request``, the fields of ``Request``.
- ``end``: ``tokens`` and ``sha256``, of what the sample was drawn from and what was drawn. See `Transcript`.

Where a line cannot be written, the journal ends with the line before it, and the engine holds what it should.
Then either the engine's next step raises, and those after it go on without a journal; or somebody asked to be
told instead, and the engine goes on at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from hashlib import sha256
from typing import Any

from refengine.config import EngineConfig
from refengine.errors import FormatError, OutputError
from refengine.memory import KVLayout
from refengine.models import Model
from refengine.ops import FloatArray
from refengine.request import Request
from refengine.sampling import SamplingParams
from refengine.scheduler import Decision, Terms
from refengine.simulation import Journal, LineStream

CHUNK = 2**24
"""Bytes of weights hashed at once; no more of a mapped file is in memory for it."""


class Transcript:
    """A sample's tokens, and one SHA-256 over each row of logits and its token as 8 bytes, in order.

    The bytes are those in memory: of two transcripts on one kind of machine, equal hashes mean equal bits.

    Attributes:
        tokens: what was sampled.

    Clauses: JRN-2.
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
        stream: gets the lines, each in one piece; what it raises ends the journal.
        model: by which name or path it was asked for.
        clock: seconds; the journal's begin with 0.
        on_failure: called once, with the reason, where a line cannot be written, and the engine goes on;
            ``None`` to have the engine raise it.

    Attributes:
        failure: why a line could not be written; ``None`` while all have been.

    Clauses: JRN-1, JRN-6, JRN-7.
    """

    def __init__(
        self,
        stream: LineStream,
        model: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_failure: Callable[[OutputError], None] | None = None,
    ) -> None:
        self._stream, self._model, self._clock, self._on_failure = stream, model, clock, on_failure
        self._transcripts: dict[int, Transcript] = {}
        self._lines, self._told = 0, False
        self.failure: OutputError | None = None

    def begin(
        self,
        model: Model,
        backend: str,
        config: EngineConfig,
        layout: KVLayout,
        schedule: Callable[..., Decision],
    ) -> Callable[..., Decision]:
        """An engine starts; returns the same schedule, whose decisions are written down.

        Raises:
            OutputError: not even the first line can be written.
        """
        engine = {
            "model": self._model,
            "fingerprint": fingerprint(model),
            "backend": backend,
            "policy": config.policy,
            "kv_dtype": config.kv_dtype,
            "block_size": config.block_size,
        }
        self._start = self._clock()
        self._journal = Journal(self, config.scheduling, layout, engine=engine)
        self.check()
        return self._journal.recording(schedule)

    def write(self, line: str) -> None:
        """A line is complete: hand it on, unless one before it could not be."""
        if self.failure is not None:
            return
        try:
            self._stream.write(line)
            self._lines += 1
        except (OSError, ValueError) as error:  # the disk is full; the stream is closed
            self.failure = OutputError(self._reason(error))
            self._transcripts.clear()
            if self._on_failure is not None:
                self._told = True
                self._on_failure(self.failure)

    def check(self) -> None:
        """Raise the failure, if there is one of which nobody has been told.

        Raises:
            OutputError: a line could not be written.
        """
        if self.failure is not None and not self._told:
            self._told = True
            raise self.failure

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

    def row(self, number: int, custom_id: str, part: int) -> None:
        """A request belongs to a row of a batch, and is its part with this place, from 0."""
        self._journal.row(number, custom_id, part)

    def fork(self, number: int, parent: int, generated: int, token: int | None, seed: int | None) -> None:
        """A sequence goes on from another, which has generated so much; see ``Engine.fork``."""
        self._journal.fork(number, parent, self._now(), generated, token, seed)

    def sampled(self, number: int, logits: FloatArray, token: int) -> None:
        """A sequence got a token."""
        if self.failure is None:
            self._transcripts.setdefault(number, Transcript()).add(logits, token)

    def end(self, number: int, reason: str, generated: int, samples: int = 1) -> None:
        """A sequence ended, and with it all samples that it stood for."""
        transcript = self._transcripts.pop(number, None) or Transcript()
        told = {"tokens": transcript.tokens, "sha256": transcript.digest}
        self._journal.end(number, reason, self._now(), generated, transcript=told, samples=samples)

    def _now(self) -> float:
        return self._clock() - self._start

    def _reason(self, error: OSError | ValueError) -> str:
        name = getattr(self._stream, "name", None)
        named = f"the journal {name}" if isinstance(name, str) else "the journal"
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        kept = f"Its first {self._lines:,} lines are whole and stay; what came after is not in it."
        return f"{named} cannot be written: {why}\n{kept if self._lines else 'Nothing of it is there.'}"


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
