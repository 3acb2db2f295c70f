"""The journal: every decision of the scheduler with all that it was made from, one JSON object a line.

The first line says what the journal is: ``{"journal": 2, "policy": …, "parameters": …, "cache": …}``; of the
KV cache, where it is known, the block size and of each pool the window, the number of blocks, and whether it
keeps what is recent only. Then, in the order in which they happened:

- ``{"submit": number, "at": seconds, "terms": […], "output": tokens, "positions": …}``: a request comes; its
  terms in the order of ``Terms``. ``output`` is there where it is known what will come, as in simulations.
- ``{"row": custom_id, "of": number, "part": place}``: the request belongs to this row of a batch, and is its
  first, second … part, counted from 0.
- ``{"sample": number, "terms": […]}``: a sample goes on as a request of its own.
- ``{"fork": number, "of": number, "at": seconds, "generated": tokens, "token": id, "seed": seed}``: a request
  goes on from where another is that has generated so much; with another last token or seed, where these are
  given.
- ``{"step": number, "at": seconds, …}``: a decision. ``limits``, ``free``; ``run`` and ``wait``, the running
  requests and those waiting that were read, each ``[number, known, computed, places, reserve]`` without what
  is 1 or empty at the end; ``miss`` and ``gain``, what was asked and answered: ``[number, tokens, blocks]``
  and ``[[numbers], blocks]``; ``host``, where there was one; and the decision: ``pre``, ``swap``, ``do``.
- ``{"end": number, "at": seconds, "reason": …, "generated": tokens, "samples": count}``; ``samples`` where it
  is the end of several samples, because they had not parted.

Every line ends with ``"crc"``: CRC-32 (ISO 3309, as zlib's) over all lines up to this one, each without its
newline and its own ``,"crc":…``. So a byte that has changed is found, and a line that is missing or doubled.

A journal of an engine with a model has more in its first line and in those of ``submit`` and ``end``: see
`refengine.engine_journal`. Here that is only carried along.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from typing import Any, Protocol
from zlib import crc32

import numpy as np

from refengine.memory import KVLayout
from refengine.scheduler import (
    FCFS,
    Blocks,
    Decision,
    HostPool,
    Job,
    Limits,
    Missing,
    Reclaim,
    SchedulingPolicy,
    Terms,
    schedule,
)

VERSION = 2
"""Of the form; a journal of another is refused."""

SEAL = ',"crc":'
"""Before the checksum that ends a line."""


class LineStream(Protocol):
    """Takes lines, each whole and with its newline."""

    def write(self, text: str, /) -> object:
        """Take a line."""


class Journal:
    """Writes down what happens.

    Args:
        stream: gets the lines, each in one piece.
        policy: the name of the policy in force.
        layout: of the KV cache; ``None`` where a replay is to be told.
        engine: of which engine it is; ``None`` of none.
        parameters: of the policy, if not the default ones.

    Attributes:
        step, time: of the next decision, as its caller counts.

    Clauses: SCH-23, JRN-1, JRN-5.
    """

    def __init__(
        self,
        stream: LineStream,
        policy: str = "fcfs",
        layout: KVLayout | None = None,
        *,
        engine: Mapping[str, Any] | None = None,
        **parameters: int,
    ) -> None:
        self.step, self.time = 0, 0.0
        self._stream, self._known, self._seal = stream, set[int](), 0
        cache = None
        if layout is not None:
            pools = [(group.window, group.num_blocks, group.recent) for group in layout.groups]
            cache = {"block_size": layout.block_size, "pools": pools}
        head = {"journal": VERSION, "policy": policy, "parameters": parameters, "cache": cache}
        self._write(head | _given(engine=engine))

    def submit(
        self,
        id: int,
        terms: Terms,
        time: float,
        output: int | None = None,
        positions: int | None = None,
        request: Mapping[str, Any] | None = None,
    ) -> None:
        """A request comes; ``request`` is its content, where there is any."""
        self._known.add(id)
        line = {"submit": id, "at": time, "terms": astuple(terms)}
        self._write(line | _given(output=output, positions=positions, request=request))

    def row(self, id: int, custom_id: str, part: int) -> None:
        """A request belongs to a row of a batch, as its ``part``."""
        self._write({"row": custom_id, "of": id, "part": part})

    def fork(
        self, id: int, parent: int, time: float, generated: int, token: int | None, seed: int | None
    ) -> None:
        """A request goes on from where another is, with another last token or seed where these are given."""
        line = {"fork": id, "of": parent, "at": time, "generated": generated}
        self._write(line | _given(token=token, seed=seed))

    def end(
        self,
        id: int,
        reason: str,
        time: float,
        generated: int,
        transcript: Mapping[str, Any] | None = None,
        samples: int = 1,
    ) -> None:
        """A request ends, or some of its samples; ``transcript`` has their ``tokens`` and ``sha256``."""
        line: dict[str, Any] = {"end": id, "at": time, "reason": reason, "generated": generated}
        if samples > 1:
            line["samples"] = samples
        self._write(line | dict(transcript or {}))

    def recording(self, schedule: Callable[..., Decision] = schedule) -> Callable[..., Decision]:
        """The same schedule, whose decisions are written down."""

        def recorded(
            running: Sequence[Job],
            waiting: Iterable[Job],
            limits: Limits,
            free: Blocks,
            missing: Missing,
            reclaim: Reclaim,
            policy: SchedulingPolicy = FCFS,
            host: HostPool | None = None,
        ) -> Decision:
            read: list[Job] = []
            missed: list[tuple[int, int, Blocks]] = []
            gained: list[tuple[list[int], Blocks]] = []
            held: dict[int, Blocks] = {}

            def reading() -> Iterator[Job]:
                for job in waiting:
                    read.append(job)
                    yield job

            def asked(id: int, tokens: int) -> Blocks:
                missed.append((id, tokens, missing(id, tokens)))
                return missed[-1][2]

            def given(ids: Sequence[int]) -> Blocks:
                gained.append((list(ids), reclaim(ids)))
                return gained[-1][1]

            def holding(id: int) -> Blocks:
                held[id] = host.held(id) if host is not None else ()
                return held[id]

            watched = None if host is None else HostPool(**{**vars(host), "held": holding})
            decision = schedule(running, reading(), limits, free, asked, given, policy, watched)
            for job in (*running, *read):
                if job.id not in self._known:
                    self._known.add(job.id)
                    self._write({"sample": job.id, "terms": astuple(job.terms)})
            line: dict[str, Any] = {
                "step": self.step,
                "at": self.time,
                "limits": astuple(limits),
                "free": free,
            }
            line |= {"run": list(map(_packed, running)), "wait": list(map(_packed, read))}
            line |= {"miss": missed, "gain": gained}
            if host is not None:
                line["host"] = {**vars(host), "held": list(held.items())}
            line |= {"pre": decision.preempt, "swap": decision.swap, "do": decision.compute}
            self._write(line)
            return decision

        return recorded

    def _write(self, line: dict[str, Any]) -> None:
        text = json.dumps(line, separators=(",", ":"), default=_plain)
        self._seal = crc32(text.encode(), self._seal)
        self._stream.write(f"{text[:-1]}{SEAL}{self._seal}}}\n")


def _plain(value: object) -> Any:
    """What JSON takes in place of one of NumPy's numbers."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a journal holds no {type(value).__name__}")


def _packed(job: Job) -> list[Any]:
    packed: list[Any] = [job.id, job.known, job.computed, job.places, job.reserve]
    if not job.reserve:
        del packed[4:]
        if job.places == 1:
            del packed[3:]
    return packed


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
