"""Reads journals, whose form is told in `refengine.simulation.journal`, and refuses what breaks it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn
from zlib import crc32

import numpy as np

from refengine.errors import FormatError
from refengine.memory import KVGroupLayout, KVLayout
from refengine.scheduler import Blocks, Decision, HostPool, Job, Limits, Terms
from refengine.simulation.journal import SEAL, VERSION
from refengine.simulation.loads import Arrival
from refengine.simulation.record import End, Entry, Fork, Part, Record

MOST_SAMPLES = 2**20
"""Of a request in a journal; so that a wrong number takes no memory."""


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
    content, _, seal = text.rpartition(SEAL)
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


def _arrival(terms: Terms, line: dict[str, Any], end: End | None) -> Arrival:
    """A request as it came; where nobody knows what it would have generated, what it did or was to."""
    output = line.get("output", terms.output if end is None else end.generated)
    return Arrival(
        line["at"], terms.prompt, output, terms.output, terms.samples, terms.priority, terms.tenant,
        terms.deadline, line.get("positions"),
    )  # fmt: skip
