"""Faults of chapter *The journal*."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any
from zlib import crc32

import numpy as np

from refengine import backend
from refengine.engine_journal import EngineJournal
from refengine.errors import FormatError
from refengine.ops import FloatArray
from refengine.request import Request
from refengine.rerun import Comparison, Findings, Rerun
from refengine.scheduler import Terms
from refengine.simulation import Journal, Record, Trace, read_journal, replay
from refengine_conformance.faults.fault import Fault
from refengine_conformance.subject import Subject


def with_part(**part: Any) -> Callable[[], Subject]:
    """Makes a subject with another part."""
    return lambda: Subject(lambda: backend.load("numpy"), **part)


class Unparted(EngineJournal):
    """An end is an end."""

    def end(self, number: int, reason: str, generated: int, samples: int = 1) -> None:
        """Of one sample."""
        super().end(number, reason, generated)


class Hopeful(EngineJournal):
    """Writes down what was completed."""

    def end(self, number: int, reason: str, generated: int, samples: int = 1) -> None:
        """Unless it was aborted."""
        if reason != "abort":
            super().end(number, reason, generated, samples)


class Stepless(EngineJournal):
    """Counts no steps."""

    def decide(self, step: int) -> None:
        """Time is enough."""
        super().decide(1)


class Simplified(EngineJournal):
    """Leaves out what it takes for hints."""

    def submit(self, number: int, terms: Terms, request: Request) -> None:
        """Stop ids are the model's, after all."""
        super().submit(number, terms, replace(request, stop_ids=frozenset()))


class Unforked(EngineJournal):
    """Writes down where a fork comes from, and not what is different about it."""

    def fork(self, number: int, parent: int, generated: int, token: int | None, seed: int | None) -> None:
        """With the same token and seed."""
        super().fork(number, parent, generated, None, None)


class Selfish(EngineJournal):
    """Draws the first of a step's decisions again, to be sure."""

    def sampled(self, number: int, logits: FloatArray, token: int) -> None:
        """In place, since it is faster."""
        logits /= 2
        super().sampled(number, logits, token)


class TokensOnly(EngineJournal):
    """Hashes what the user sees."""

    def sampled(self, number: int, logits: FloatArray, token: int) -> None:
        """And no logits."""
        super().sampled(number, logits[:0], token)


class Rounded(EngineJournal):
    """Hashes logits in half precision, for noise's sake."""

    def sampled(self, number: int, logits: FloatArray, token: int) -> None:
        """Rounded."""
        super().sampled(number, logits.astype(np.float16).astype(logits.dtype), token)


class OneSeed(Rerun):
    """Runs each sample with the request's own seed."""

    def run(self, number: int) -> Findings:
        """Found for the first, and said of all."""
        found = super().run(number)
        return replace(
            found, compared=tuple(replace(c, tokens=found.compared[0].tokens) for c in found.compared)
        )


class Silent(Rerun):
    """Leaves out what cannot be compared."""

    def run(self, number: int) -> Findings:
        """And does not say so."""
        return replace(super().run(number), omitted=())


class Lenient(Rerun):
    """Compares tokens."""

    def run(self, number: int) -> Findings:
        """Equal tokens, equal hash."""
        found = super().run(number)
        return replace(found, compared=tuple(map(forgiven, found.compared)))


def forgiven(each: Comparison) -> Comparison:
    """With the recorded hash, where the tokens are the same."""
    same = each.tokens == each.end.tokens
    return replace(each, sha256=each.end.sha256 or "") if same else each


class AnyModel(Rerun):
    """Takes the user's word for the model."""

    def __init__(self, record: Record, model: Any, *given: Any, **named: Any) -> None:
        from refengine.engine_journal import fingerprint

        engine = {**record.engine, "fingerprint": fingerprint(model)}
        super().__init__(replace(record, engine=engine), model, *given, **named)


def first_come(record: Record, policy: Any = "fcfs", **settings: Any) -> Trace:
    """The policy is the default one."""
    return replay(record, policy, **settings)


def roomy(record: Record, policy: Any = None, **settings: Any) -> Trace:
    """The limits are the default ones."""
    return replay(replace(record, limits=None), policy, **settings)


class Hasty(Journal):
    """Writes down when requests were read, not when they came."""

    def submit(self, id: int, terms: Terms, time: float, *given: Any, **named: Any) -> None:
        """In whole seconds."""
        super().submit(id, terms, float(int(time)), *given, **named)


def trusting(lines: Iterable[str], *given: Any, **named: Any) -> Record:
    """Reads lines whatever their checksums: each gets the one it should have."""
    return read_journal(resealed(lines), *given, **named)


def resealed(lines: Iterable[str]) -> Iterable[str]:
    """Lines with the checksums that they should have, as far as they are lines of a journal."""
    seal = 0
    for line in lines:
        content, _, rest = line.rpartition(',"crc":')
        seal = crc32(f"{content}}}".encode(errors="replace"), seal)
        yield f'{content},"crc":{seal}}}\n' if content and rest.endswith("}\n") else line


def passing_over(lines: Iterable[str], path: str | None = None, **named: Any) -> Record:
    """Reads as far as it can, and is content."""
    return read_journal(lines, path, damaged=True)


def whole_or_nothing(lines: Iterable[str], path: str | None = None, **named: Any) -> Record:
    """Refuses what breaks off."""
    record = read_journal(lines, path, **named)
    if record.left_out is not None and not named:
        raise FormatError("the journal breaks off", path=path)
    return record


class Stripped(EngineJournal):
    """Tidies names up."""

    def row(self, number: int, custom_id: str, part: int) -> None:
        """Without spaces around."""
        super().row(number, custom_id.strip() or custom_id, part)


class Partless(EngineJournal):
    """A row is a request."""

    def row(self, number: int, custom_id: str, part: int) -> None:
        """Its first."""
        super().row(number, custom_id, 0)


class Numbered(EngineJournal):
    """Counts rows in the place of requests."""

    def row(self, number: int, custom_id: str, part: int) -> None:
        """The next one."""
        self.rows = getattr(self, "rows", -1) + 1
        super().row(self.rows, custom_id, part)


class Breaking(EngineJournal):
    """Lets the stream's error out, wherever the engine is."""

    def write(self, line: str) -> None:
        """Of a full disk."""
        self._stream.write(line)


class Swallowing(EngineJournal):
    """Writes what it can."""

    def check(self) -> None:
        """And says nothing."""

    def write(self, line: str) -> None:
        """Whatever happens."""
        try:
            self._stream.write(line)
        except OSError:
            return


class Nagging(EngineJournal):
    """Tells of the failure at every look."""

    def check(self) -> None:
        """Again."""
        if self.failure is not None:
            raise self.failure


class Gapped(EngineJournal):
    """Goes on writing as soon as there is room again."""

    def write(self, line: str) -> None:
        """The failure is that of one line."""
        failure, self.failure = self.failure, None
        super().write(line)
        self.failure = self.failure or failure


FAULTS = (
    Fault(
        "samples that never parted end as one",
        "JRN-1",
        "The end is written where the sequence is dropped, which stands for all of its samples.",
        with_part(engine_journal=Unparted),
    ),
    Fault(
        "the aborted do not end",
        "JRN-1",
        "The way out by abort was written later than the journal.",
        with_part(engine_journal=Hopeful),
    ),
    Fault(
        "decisions are of no step",
        "JRN-1",
        "The number is the recorder's, and somebody removed the recorder.",
        with_part(engine_journal=Stepless),
    ),
    Fault(
        "stop ids are left out",
        "JRN-1",
        "The request is written down before the model's defaults are filled in.",
        with_part(engine_journal=Simplified),
    ),
    Fault(
        "the journal changes logits",
        "JRN-1",
        "A view of the step's logits is worked on in place.",
        with_part(engine_journal=Selfish),
    ),
    Fault(
        "tokens are hashed alone",
        "JRN-2",
        "Equal texts are taken for equal bits.",
        with_part(engine_journal=TokensOnly),
    ),
    Fault(
        "logits are hashed in half precision",
        "JRN-2",
        "So that the hash does not change with every library.",
        with_part(engine_journal=Rounded),
    ),
    Fault(
        "forks are run without what is their own",
        "JRN-3",
        "A fork was the same request at first; token and seed came later.",
        with_part(engine_journal=Unforked),
    ),
    Fault(
        "samples are drawn with one seed",
        "JRN-3",
        "The seed of a sample is its request's plus its place, and nobody said so.",
        with_part(rerun=OneSeed),
    ),
    Fault(
        "what cannot be compared is left out",
        "JRN-3",
        "`continue` in the loop over samples.",
        with_part(rerun=Silent),
    ),
    Fault(
        "equal tokens are equal bits",
        "JRN-3",
        "The texts are compared, and greedy decoding hides all but large differences.",
        with_part(rerun=Lenient),
    ),
    Fault(
        "any model will do",
        "JRN-3",
        "The fingerprint takes a while, and is skipped.",
        with_part(rerun=AnyModel),
    ),
    Fault(
        "the policy is the default one",
        "JRN-4",
        "The name in the first line is for people.",
        with_part(replay=first_come),
    ),
    Fault(
        "the limits are the default ones",
        "JRN-4",
        "They stand in the decisions, and who reads the first line alone does not see them.",
        with_part(replay=roomy),
    ),
    Fault(
        "requests come at whole seconds",
        "JRN-4",
        "Times are rounded to save space.",
        with_part(journal=Hasty),
    ),
    Fault(
        "checksums are not looked at",
        "JRN-5",
        "What can be parsed is taken.",
        with_part(read_journal=trusting),
    ),
    Fault(
        "damage is passed over",
        "JRN-5",
        "A reader that is liberal in what it accepts.",
        with_part(read_journal=passing_over),
    ),
    Fault(
        "what breaks off is refused",
        "JRN-5",
        "Strict to the last byte, and no journal of a crash can be read.",
        with_part(read_journal=whole_or_nothing),
    ),
    Fault(
        "names are tidied up",
        "JRN-6",
        "A form strips its fields.",
        with_part(engine_journal=Stripped),
    ),
    Fault(
        "a row is one request",
        "JRN-6",
        "Completions of several prompts came later.",
        with_part(engine_journal=Partless),
    ),
    Fault(
        "rows are counted instead of requests",
        "JRN-6",
        "Right until a request has two samples.",
        with_part(engine_journal=Numbered),
    ),
    Fault(
        "a full disk breaks the step",
        "JRN-7",
        "Nobody thinks of `write` as something that fails.",
        with_part(engine_journal=Breaking),
    ),
    Fault(
        "a full disk goes unnoticed",
        "JRN-7",
        "The error is caught, since the answers matter more.",
        with_part(engine_journal=Swallowing),
    ),
    Fault(
        "every step complains",
        "JRN-7",
        "The failure is raised for as long as it is there, and no request is served again.",
        with_part(engine_journal=Nagging),
    ),
    Fault(
        "a journal with a gap",
        "JRN-7",
        "There is room again, and lines go on as if none were missing.",
        with_part(engine_journal=Gapped),
    ),
)
