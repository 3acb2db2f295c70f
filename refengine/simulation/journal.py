"""The journal: every decision of the scheduler with all that it was made from, one JSON object a line.

The first line says what the journal is: ``{"journal": 1, "policy": …, "parameters": …, "cache": …}``; of the
KV cache, where it is known, the block size and of each pool the window, the number of blocks, and whether it
keeps what is recent only. Then, in the order in which they happened:

- ``{"submit": number, "at": seconds, "terms": […], "output": tokens, "positions": …}``: a request comes; its
  terms in the order of ``Terms``. ``output`` is there where it is known what will come, as in simulations.
- ``{"sample": number, "terms": […]}``: a sample goes on as a request of its own.
- ``{"step": number, "at": seconds, …}``: a decision. ``limits``, ``free``; ``run`` and ``wait``, the running
  requests and those waiting that were read, each ``[number, known, computed, places, reserve]`` without what
  is 1 or empty at the end; ``miss`` and ``gain``, what was asked and answered: ``[number, tokens, blocks]``
  and ``[[numbers], blocks]``; ``host``, where there was one; and the decision: ``pre``, ``swap``, ``do``.
- ``{"end": number, "at": seconds, "reason": …, "generated": tokens}``.

A journal of an engine with a model has more in its first line and in those of ``submit`` and ``end``: see
`refengine.engine_journal`. Here that is only carried along.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, TextIO

import numpy as np

from refengine.errors import FormatError
from refengine.memory import KVGroupLayout, KVLayout
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
from refengine.simulation.loads import Arrival, Load

VERSION = 1


class Journal:
    """Writes down what happens.

    Args:
        stream: gets the lines.
        policy: the name of the policy in force.
        layout: of the KV cache; ``None`` where a replay is to be told.
        engine: of which engine it is; ``None`` of none.
        parameters: of the policy, if not the default ones.

    Attributes:
        step, time: of the next decision, as its caller counts.

    Clauses: SCH-23.
    """

    def __init__(
        self,
        stream: TextIO,
        policy: str = "fcfs",
        layout: KVLayout | None = None,
        *,
        engine: Mapping[str, Any] | None = None,
        **parameters: int,
    ) -> None:
        self.step, self.time = 0, 0.0
        self._stream, self._known = stream, set[int]()
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

    def end(
        self,
        id: int,
        reason: str,
        time: float,
        generated: int,
        transcript: Mapping[str, Any] | None = None,
    ) -> None:
        """A request ends, or one of its samples; ``transcript`` has its ``tokens`` and their ``sha256``."""
        line = {"end": id, "at": time, "reason": reason, "generated": generated}
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
        self._stream.write(json.dumps(line, separators=(",", ":")) + "\n")


@dataclass(frozen=True)
class Entry:
    """A decision in a journal.

    Attributes:
        line: where it stands, counted from 1.
        step, time: as its caller counted.
        arguments: what it was made from, for ``schedule``, up to and without the policy.
        host: the pool on the host, ``None`` where there was none.
        decision: what it was.
    """

    line: int
    step: int
    time: float
    arguments: tuple[Any, ...]
    host: HostPool | None
    decision: Decision

    def decide(self, policy: SchedulingPolicy, schedule: Callable[..., Decision] = schedule) -> Decision:
        """Make it again.

        Raises:
            LookupError: the schedule asks what was not asked before, so that it decides otherwise.
        """
        return schedule(*self.arguments, policy, self.host)


@dataclass(frozen=True)
class End:
    """What became of a request or sample.

    Attributes:
        reason: why it ended.
        generated: tokens of output.
        tokens: their ids, where they were recorded.
        sha256: of the logits and tokens, in hexadecimal; ``None`` where it was not recorded.
    """

    reason: str
    generated: int
    tokens: tuple[int, ...] = ()
    sha256: str | None = None


@dataclass(frozen=True)
class Record:
    """A journal that was read.

    Attributes:
        policy, parameters: as its first line has them.
        layout: the pools of the KV cache, with blocks of a few bytes; ``None`` where they are not recorded.
        limits: of the first decision; ``None`` where there is none.
        load: the requests, with the outputs that they had.
        entries: the decisions.
        engine: of which engine it is; empty where it is of none.
        requests: what was asked, by number; empty where that is not recorded.
        ends: what became of requests and samples, by number.
    """

    policy: str
    parameters: dict[str, int]
    layout: KVLayout | None
    limits: Limits | None
    load: Load
    entries: tuple[Entry, ...]
    engine: Mapping[str, Any] = field(default_factory=dict)
    requests: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    ends: Mapping[int, End] = field(default_factory=dict)


def read_journal(lines: Iterable[str], path: str | None = None) -> Record:
    """Read a journal.

    A last line that breaks off is left out: whoever wrote it was killed.

    Raises:
        FormatError: no journal, one of another version, or a line that breaks the form.

    Clauses: SCH-23.
    """
    head: dict[str, Any] = {}
    layout: KVLayout | None = None
    terms: dict[int, Terms] = {}
    came: dict[int, dict[str, Any]] = {}
    ends: dict[int, End] = {}
    entries: list[Entry] = []
    numbered = enumerate(lines, 1)
    for number, text in numbered:
        try:
            line = json.loads(text)
            if number == 1:
                if line.get("journal") != VERSION:
                    raise ValueError(f"a journal of version {VERSION} begins with its version")
                head, layout = line, _layout(line)
            elif "submit" in line or "sample" in line:
                id = line["submit"] if "submit" in line else line["sample"]
                terms[id] = Terms(*line["terms"])
                if "submit" in line:
                    if not isinstance(line.get("request", {}), dict):
                        raise ValueError("a request is an object")
                    came[id] = line
            elif "step" in line:
                entries.append(_entry(number, line, terms))
            elif "end" in line:
                ends[line["end"]] = _end(line)
            else:
                raise ValueError(f"there is no such kind of line: {', '.join(line)}")
        except json.JSONDecodeError as cause:
            if number > 1 and not text.endswith("\n") and next(numbered, None) is None:
                break
            raise FormatError(f"line {number} is not JSON: {cause}", path=path) from cause
        except (ValueError, TypeError, KeyError, AttributeError) as cause:
            raise FormatError(f"line {number} is no line of a journal: {cause!r}", path=path) from cause
    if not head:
        raise FormatError("the journal is empty", path=path)
    load = tuple(_arrival(terms[id], line, ends.get(id)) for id, line in came.items())
    limits = entries[0].arguments[2] if entries else None
    asked = {id: line["request"] for id, line in came.items() if "request" in line}
    return Record(
        head["policy"], head["parameters"], layout, limits, load, tuple(entries), head.get("engine", {}),
        asked, ends,
    )  # fmt: skip


def _layout(head: dict[str, Any]) -> KVLayout | None:
    """The cache's layout in a journal's first line, whose other fields are looked at too."""
    if not isinstance(head["policy"], str) or not isinstance(head["parameters"], dict):
        raise ValueError("a journal's first line names the policy and its parameters")
    if not isinstance(head.get("engine", {}), dict):
        raise ValueError("a journal's engine is an object")
    if (cache := head["cache"]) is None:
        return None
    groups = tuple(
        KVGroupLayout(window, ((0, 1, 1),), blocks, recent=recent)
        for window, blocks, recent in cache["pools"]
    )
    return KVLayout(cache["block_size"], np.dtype(np.float32), groups)


def _packed(job: Job) -> list[Any]:
    packed: list[Any] = [job.id, job.known, job.computed, job.places, job.reserve]
    if not job.reserve:
        del packed[4:]
        if job.places == 1:
            del packed[3:]
    return packed


def _entry(number: int, line: dict[str, Any], terms: dict[int, Terms]) -> Entry:
    def job(id: int, known: int, computed: int, places: int = 1, reserve: Sequence[int] = ()) -> Job:
        return Job(id, known, computed, places, tuple(reserve), terms[id])

    missed = {(id, tokens): tuple(blocks) for id, tokens, blocks in line["miss"]}
    gained = {tuple(ids): tuple(blocks) for ids, blocks in line["gain"]}
    host = None
    if "host" in line:
        held = {id: tuple(blocks) for id, blocks in line["host"]["held"]}
        host = HostPool(
            **{**line["host"], "block_bytes": tuple(line["host"]["block_bytes"]), "held": held.__getitem__}
        )
    arguments = (
        [job(*each) for each in line["run"]],
        [job(*each) for each in line["wait"]],
        Limits(*line["limits"]),
        tuple(line["free"]),
        lambda id, tokens: missed[id, tokens],
        lambda ids: gained[tuple(ids)],
    )
    decision = Decision(
        tuple(line["pre"]), tuple((id, tokens) for id, tokens in line["do"]), tuple(line["swap"])
    )
    return Entry(number, line["step"], line["at"], arguments, host, decision)


def _end(line: dict[str, Any]) -> End:
    tokens, digest = tuple(map(int, line.get("tokens", ()))), line.get("sha256")
    if digest is not None and not isinstance(digest, str):
        raise ValueError("a SHA-256 is a text")
    return End(line["reason"], line["generated"], tokens, digest)


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _arrival(terms: Terms, line: dict[str, Any], end: End | None) -> Arrival:
    """A request as it came; where nobody knows what it would have generated, what it did or was to."""
    output = line.get("output", terms.output if end is None else end.generated)
    return Arrival(
        line["at"], terms.prompt, output, terms.output, terms.samples, terms.priority, terms.tenant,
        terms.deadline, line.get("positions"),
    )  # fmt: skip
