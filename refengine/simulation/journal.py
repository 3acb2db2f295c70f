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
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, NamedTuple, NoReturn, Protocol
from zlib import crc32

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

VERSION = 2
"""Of the form; a journal of another is refused."""

_SEAL = ',"crc":'


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
        self._stream.write(f"{text[:-1]}{_SEAL}{self._seal}}}\n")


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
        tokens: their ids, where they were recorded; of a fork, those of its own.
        sha256: of the logits and tokens, in hexadecimal; ``None`` where it was not recorded.
        samples: how many samples ended so: more than one where they had not parted.
    """

    reason: str
    generated: int
    tokens: tuple[int, ...] = ()
    sha256: str | None = None
    samples: int = 1


class Fork(NamedTuple):
    """From where a request goes on.

    Attributes:
        parent: whose tokens it has.
        generated: how many the parent had generated.
        token: what it has in place of the last one; ``None`` for the same.
        seed: with which it samples; ``None`` for the same.
    """

    parent: int
    generated: int
    token: int | None = None
    seed: int | None = None


class Part(NamedTuple):
    """What a request is in a batch: the ``place``-th request, from 0, of the row ``custom_id``."""

    custom_id: str
    place: int


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
        rows: which row of a batch a request is of, by number.
        forks: from where requests go on that were not submitted, by number.
        left_out: why lines at the end were not read; ``None`` where all were.
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
    rows: Mapping[int, Part] = field(default_factory=dict)
    forks: Mapping[int, Fork] = field(default_factory=dict)
    left_out: str | None = None


def read_journal(lines: Iterable[str], path: str | None = None, *, damaged: bool = False) -> Record:
    """Read a journal.

    A last line that breaks off is left out: whoever wrote it was killed.

    Args:
        lines: with their newlines.
        path: for the text of an error.
        damaged: leave out whatever follows the first damage, instead of refusing the journal.

    Raises:
        FormatError: no journal, one of another version, or a line that breaks the form.

    Clauses: SCH-23, JRN-5.
    """
    reader, seal, left_out = _Reader(), 0, None
    numbered = enumerate(lines, 1)
    for number, text in numbered:
        try:
            line = _parsed(text)
            if number == 1:
                _check_version(line, path)
            seal = _checked_seal(text, seal)
            reader.take(number, line)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as cause:
            why = f"line {number} {_told(cause)}"
            if number > 1 and damaged:
                left_out = f"what follows line {number - 1}, since {why}"
                break
            if number > 1 and not text.endswith("\n") and next(numbered, None) is None:
                left_out = f"line {number}, which breaks off"
                break
            if number > 1:
                why += f"; --damaged reads the {number - 1:,} before it, which are whole"
            raise FormatError(why, path=path) from cause
    if reader.head is None:
        raise FormatError("the journal is empty: nothing was written to it", path=path)
    return reader.record(left_out)


class _Reader:
    """Collects what lines tell."""

    def __init__(self) -> None:
        self.head: dict[str, Any] | None = None
        self._layout: KVLayout | None = None
        self._terms: dict[int, Terms] = {}
        self._came: dict[int, dict[str, Any]] = {}
        self._known: set[int] = set()
        self._ends: dict[int, End] = {}
        self._rows: dict[int, Part] = {}
        self._forks: dict[int, Fork] = {}
        self._entries: list[Entry] = []

    def take(self, number: int, line: dict[str, Any]) -> None:
        """Take the next line.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is not in the form.
        """
        if self.head is None:
            self._layout = _layout(line)
            self.head = line
        elif "submit" in line:
            self._submit(line)
        elif "sample" in line:
            id = _whole(line["sample"])
            if id in self._terms:
                raise ValueError(f"request {id} came before")
            self._terms[id] = _terms(line["terms"])
            self._known.add(id)  # whoever asks for decisions alone submits nothing
        elif "row" in line:
            if not isinstance(line["row"], str) or line["of"] not in self._came:
                raise ValueError("a row is called by a text, and is of a request")
            self._rows[line["of"]] = Part(line["row"], _whole(line["part"]))
        elif "fork" in line:
            self._fork(line)
        elif "step" in line:
            self._entries.append(_entry(number, line, self._terms))
        elif "end" in line:
            self._end(line)
        else:
            raise ValueError(f"there is no such kind of line: {', '.join(line)}")

    def record(self, left_out: str | None) -> Record:
        """All of it."""
        head = self.head or {}
        load = tuple(_arrival(self._terms[id], line, self._ends.get(id)) for id, line in self._came.items())
        limits = self._entries[0].arguments[2] if self._entries else None
        asked = {id: line["request"] for id, line in self._came.items() if "request" in line}
        return Record(
            head["policy"], head["parameters"], self._layout, limits, load, tuple(self._entries),
            head.get("engine", {}), asked, self._ends, self._rows, self._forks, left_out,
        )  # fmt: skip

    def _submit(self, line: dict[str, Any]) -> None:
        id, terms = _whole(line["submit"]), _terms(line["terms"])
        if not isinstance(line.get("request", {}), dict):
            raise ValueError("a request is an object")
        _seconds(line["at"])
        for name in ("output", "positions"):
            _whole(line.get(name, 0))
        self._begin(range(id, id + terms.samples))
        self._terms[id], self._came[id] = terms, line

    def _fork(self, line: dict[str, Any]) -> None:
        id, parent = _whole(line["fork"]), _whole(line["of"])
        if parent not in self._known or parent in self._ends:
            raise ValueError(f"it goes on from request {parent}, which was not there")
        _seconds(line["at"])
        token, seed = (_whole(line[name]) if name in line else None for name in ("token", "seed"))
        self._begin(range(id, id + 1))
        self._forks[id] = Fork(parent, _whole(line["generated"], 1), token, seed)

    def _begin(self, ids: range) -> None:
        if len(ids) > MOST_SAMPLES or any(id in self._known for id in ids):
            raise ValueError(f"request {ids[0]} came before, or has samples that did")
        self._known.update(ids)

    def _end(self, line: dict[str, Any]) -> None:
        id, samples = _whole(line["end"]), _whole(line.get("samples", 1), 1)
        tokens, digest = tuple(map(_whole, line.get("tokens", ()))), line.get("sha256")
        if digest is not None and not isinstance(digest, str):
            raise ValueError("a SHA-256 is a text")
        if not isinstance(line["reason"], str):
            raise ValueError("a reason is a text")
        _seconds(line["at"])
        end = End(line["reason"], _whole(line["generated"]), tokens, digest, samples)
        if samples > MOST_SAMPLES:
            raise ValueError(f"no request has {samples} samples")
        for each in range(id, id + samples):
            if each not in self._known or each in self._ends:
                raise ValueError(f"request {each} ends, which was not there or has ended")
            self._ends[each] = end


MOST_SAMPLES = 2**20
"""Of a request in a journal; so that a wrong number takes no memory."""


def _plain(value: object) -> Any:
    """What JSON takes in place of one of NumPy's numbers."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a journal holds no {type(value).__name__}")


def _parsed(text: str) -> dict[str, Any]:
    line = json.loads(text, parse_constant=_no_number)
    if not isinstance(line, dict):
        raise ValueError("a line is an object")
    return line


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _check_version(line: dict[str, Any], path: str | None) -> None:
    if "journal" not in line:
        raise ValueError("a journal begins with its version")
    if (version := line["journal"]) != VERSION:
        raise FormatError(
            f"the journal is of version {version!r}, and this refengine reads version {VERSION}: use the one "
            "that wrote it, or record anew",
            path=path,
        )


def _checked_seal(text: str, before: int) -> int:
    """The checksum that ends a line, which continues the one before."""
    content, _, seal = text.rpartition(_SEAL)
    found = crc32(f"{content}}}".encode("ascii"), before)
    if seal not in (f"{found}}}\n", f"{found}}}"):
        raise ValueError(
            "its checksum is another, so it was changed, or a line before it was lost or doubled"
        )
    return found


def _told(cause: Exception) -> str:
    """What is wrong with a line, after its number."""
    if isinstance(cause, json.JSONDecodeError):
        return f"is not JSON: {cause}"
    if isinstance(cause, KeyError):
        return f"is no line of a journal: it lacks {cause}, or speaks of a request that was not there"
    return f"is no line of a journal: {cause}"


def _whole(value: Any, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**64:
        raise ValueError(f"{value!r} stands where a whole number from {least} belongs")
    return value


def _seconds(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} stands where seconds belong")
    return value


def _terms(values: Any) -> Terms:
    arrival, submitted, prompt, output, samples, priority, tenant, deadline = values
    if not isinstance(tenant, str):
        raise ValueError("a tenant is a text")
    return Terms(
        _whole(arrival), _whole(submitted), _whole(prompt, 1), _whole(output), _whole(samples, 1),
        _whole(priority), tenant, None if deadline is None else _whole(deadline, 1),
    )  # fmt: skip


def _wholes(values: Any) -> tuple[int, ...]:
    return tuple(map(_whole, values))


def _blocks(values: Any, pools: int) -> Blocks:
    if len(blocks := _wholes(values)) != pools:
        raise ValueError(f"blocks of {len(blocks)} pools stand where there are {pools}")
    return blocks


def _layout(head: dict[str, Any]) -> KVLayout | None:
    """The cache's layout in a journal's first line, whose other fields are looked at too."""
    if not isinstance(head["policy"], str) or not isinstance(head["parameters"], dict):
        raise ValueError("a journal's first line names the policy and its parameters")
    for value in head["parameters"].values():
        _whole(value)
    if not isinstance(head.get("engine", {}), dict):
        raise ValueError("a journal's engine is an object")
    if (cache := head["cache"]) is None:
        return None
    groups = tuple(
        KVGroupLayout(
            None if window is None else _whole(window, 1),
            ((0, 1, 1),),
            _whole(blocks, 1),
            recent=bool(recent),
        )
        for window, blocks, recent in cache["pools"]
    )
    return KVLayout(_whole(cache["block_size"], 1), np.dtype(np.float32), groups)


def _packed(job: Job) -> list[Any]:
    packed: list[Any] = [job.id, job.known, job.computed, job.places, job.reserve]
    if not job.reserve:
        del packed[4:]
        if job.places == 1:
            del packed[3:]
    return packed


def _entry(number: int, line: dict[str, Any], terms: dict[int, Terms]) -> Entry:
    free = _wholes(line["free"])
    pools = len(free)

    def job(id: int, known: int, computed: int, places: int = 1, reserve: Sequence[int] = ()) -> Job:
        if _whole(computed) >= _whole(known):
            raise ValueError(f"request {id} has nothing to compute")
        blocks = _blocks(reserve, pools) if reserve else ()
        return Job(id, known, computed, _whole(places, 1), blocks, terms[id])

    missed = {(_whole(id), _whole(tokens)): _blocks(blocks, pools) for id, tokens, blocks in line["miss"]}
    gained = {_wholes(ids): _blocks(blocks, pools) for ids, blocks in line["gain"]}
    arguments = (
        [job(*each) for each in line["run"]],
        [job(*each) for each in line["wait"]],
        Limits(*(_whole(each, 1) for each in line["limits"])),
        free,
        lambda id, tokens: missed[id, tokens],
        lambda ids: gained[tuple(ids)],
    )
    decision = Decision(
        _wholes(line["pre"]),
        tuple((_whole(id), _whole(tokens, 1)) for id, tokens in line["do"]),
        _wholes(line["swap"]),
    )
    host = _host(line["host"], pools) if "host" in line else None
    return Entry(number, _whole(line["step"]), _seconds(line["at"]), arguments, host, decision)


def _host(given: dict[str, Any], pools: int) -> HostPool:
    held = {_whole(id): _blocks(blocks, pools) for id, blocks in given["held"]}
    return HostPool(
        _whole(given["room"]),
        _blocks(given["block_bytes"], pools),
        held.__getitem__,
        _seconds(given["token_seconds"]),
        _seconds(given["byte_seconds"]),
    )


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _arrival(terms: Terms, line: dict[str, Any], end: End | None) -> Arrival:
    """A request as it came; where nobody knows what it would have generated, what it did or was to."""
    output = line.get("output", terms.output if end is None else end.generated)
    return Arrival(
        line["at"], terms.prompt, output, terms.output, terms.samples, terms.priority, terms.tenant,
        terms.deadline, line.get("positions"),
    )  # fmt: skip
