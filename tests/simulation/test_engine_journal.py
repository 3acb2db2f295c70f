"""What an engine with a model writes down is what it did: its decisions come again, and its bits too."""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from dataclasses import replace
from io import StringIO
from itertools import count
from typing import Any

import numpy as np
import pytest
from journal_lines import sealed
from schedules import requests
from tiny_model import tiny_model

from refengine import Engine, EngineConfig, Request, SamplingParams
from refengine.backend.numpy_backend import NumpyBackend
from refengine.engine_journal import EngineJournal, fingerprint, request_of
from refengine.errors import FormatError, OutputError, RequestError
from refengine.rerun import rerun
from refengine.sampling import Sampled, sample
from refengine.simulation import Record, differences, read_journal, replay

MODEL = tiny_model("llama", layers=1)
TIGHT = EngineConfig(block_size=4, token_budget=13, max_sequences=4, kv_tokens=64)


def served(
    wanted: list[Request], config: EngineConfig = TIGHT, abort: int | None = None, **parts: Any
) -> tuple[str, Engine]:
    """A journal of requests that come while others run, and its engine."""
    text = StringIO()
    engine = Engine(MODEL, NumpyBackend(), config, journal=EngineJournal(text, "tiny"), **parts)
    numbers = []
    for request in wanted:
        numbers.append(engine.submit(request))
        engine.step()
    for _ in range(3):
        engine.step()
    if abort is not None:
        engine.abort(numbers[abort])
    while engine.has_work:
        engine.step()
    return text.getvalue(), engine


def read(text: str) -> Record:
    return read_journal(text.splitlines(keepends=True))


def crowd(seed: int = 1) -> list[Request]:
    return requests(random.Random(seed), count=8)


@pytest.mark.parametrize("scheduling", ["fcfs", "sjf:ageing=2", "priority:ageing=2", "fair"])
@pytest.mark.parametrize("swap", [0, 10**9])
def test_decisions_under_memory_pressure_come_again(scheduling: str, swap: int) -> None:
    """With pre-emption of both kinds and prefix hits; and the load can be let come under another policy."""
    longer = [replace(r, max_tokens=16, expected_tokens=None) for r in crowd()]
    config = replace(TIGHT, scheduling=scheduling, swap=swap, prefix_cache=True)
    text, engine = served(longer, config)
    kinds = {event.kind for event in engine.recorder.events}
    record = read(text)
    assert any(entry.decision.preempt for entry in record.entries)
    assert any(entry.decision.swap for entry in record.entries) == bool(swap)
    assert "fork" in kinds
    assert differences(record) == []
    assert [entry.step for entry in record.entries] == sorted(entry.step for entry in record.entries)
    assert max(entry.step for entry in record.entries) == engine.recorder.step
    assert (record.policy, len(record.load)) == (scheduling, len(longer))
    assert len(record.ends) == sum(request.samples for request in longer)
    assert len(replay(record, "sjf").courses) == sum(request.samples for request in longer)


def test_times_are_those_of_the_clock_since_the_start() -> None:
    """A clock that ticks at each look: the start is 0, and every line that has a time has a later one."""
    text, ticks = StringIO(), count(100)
    journal = EngineJournal(text, clock=lambda: float(next(ticks)))
    engine = Engine(MODEL, NumpyBackend(), TIGHT, journal=journal)
    engine.submit(Request((1, 2), 2))
    while engine.has_work:
        engine.step()
    lines = [json.loads(line) for line in text.getvalue().splitlines()]
    assert [line["at"] for line in lines[1:]] == [1.0, 2.0, 3.0, 4.0]


def test_each_sample_has_the_hash_of_what_it_was_drawn_from() -> None:
    """Counted apart from the journal, by the seed of each sample."""
    hashes: dict[int, Any] = defaultdict(hashlib.sha256)
    tokens: dict[int, list[int]] = defaultdict(list)

    def overheard(logits: np.ndarray, params: SamplingParams, history: list[int], index: int) -> Sampled:
        sampled = sample(logits, params, history, index)
        hashes[params.seed].update(logits.tobytes() + np.int64(sampled.token).tobytes())
        tokens[params.seed].append(sampled.token)
        return sampled

    wanted = crowd()
    record = read(served(wanted, sample=overheard)[0])
    numbers = iter(record.requests)
    for request in wanted:
        number = next(numbers)
        assert request_of(record.requests[number]) == request
        for index in range(request.samples):
            end, seed = record.ends[number + index], request.sampling.seed + index
            assert (end.sha256, list(end.tokens)) == (hashes[seed].hexdigest(), tokens[seed])
            assert end.generated == len(end.tokens) > 0


@pytest.mark.parametrize("kv_dtype", [None, "int8/int4"])
def test_each_request_run_alone_is_equal(kv_dtype: str | None) -> None:
    """Whatever company, pre-emption and prefix hits it had; one that was aborted, as far as it came."""
    wanted = [replace(r, max_tokens=16, expected_tokens=None) for r in crowd(2)]
    wanted.append(Request(tuple(np.arange(9)), 16, SamplingParams(temperature=2.0, seed=9), samples=3))
    config = replace(TIGHT, kv_dtype=kv_dtype, swap=10**9, prefix_cache=True)
    record = read(served(wanted, config, abort=0)[0])
    for number, content in record.requests.items():
        found = rerun(record, number, MODEL)
        compared = found.compared
        assert (found.equal, found.omitted) == (True, ())
        assert [each.sample for each in compared] == list(range(content["samples"]))
        assert all(each.equal and each.first_difference is None for each in compared)
    last = max(record.requests)
    assert len({record.ends[last + i].tokens for i in range(3)}) == 3
    assert record.ends[0].reason == "abort"
    assert 0 < record.ends[0].generated < 16


def test_what_was_recorded_otherwise_is_found() -> None:
    """A token, an output cut short, and logits alone."""
    record = read(served([Request((1, 2, 3), 6)])[0])
    end = record.ends[0]
    other = (*end.tokens[:2], end.tokens[2] ^ 1, *end.tokens[3:])
    for changed, place in [
        (replace(end, tokens=other), 2),
        (replace(end, tokens=end.tokens[:4]), 4),
        (replace(end, sha256="0" * 64), None),
    ]:
        (compared,) = rerun(replace(record, ends={0: changed}), 0, MODEL).compared
        assert (compared.equal, compared.first_difference) == (False, place)


def test_another_model_is_refused() -> None:
    """One whose shape is the same, and one of whose weights is not by one bit."""
    role = max(MODEL.weights)
    tensor = MODEL.weights[role]
    data = tensor.data.copy()
    data.reshape(-1)[-1] ^= 1
    other = replace(MODEL, weights={**MODEL.weights, role: replace(tensor, data=data)})
    assert fingerprint(other) != fingerprint(MODEL) == fingerprint(tiny_model("llama", layers=1))
    record = read(served([Request((1, 2, 3), 2)])[0])
    with pytest.raises(RequestError, match="of another model"):
        rerun(record, 0, other)


def test_what_cannot_be_compared_is_refused() -> None:
    """A number that nobody has, one of a sample, a broken request, and a journal of no engine."""
    record = read(served([Request((1, 2, 3), 0, samples=2)])[0])
    with pytest.raises(RequestError, match="no request 7: there are 1, from 0 to 0"):
        rerun(record, 7, MODEL)
    with pytest.raises(RequestError, match="sample 1 of request 0"):
        rerun(record, 1, MODEL)
    with pytest.raises(RequestError, match="of a simulation"):
        rerun(replace(record, engine={}), 0, MODEL)
    with pytest.raises(FormatError, match="colour"):
        rerun(replace(record, requests={0: {**record.requests[0], "colour": 1}}), 0, MODEL)
    with pytest.raises(FormatError, match="kv_dtype"):
        rerun(replace(record, engine={"model": "tiny"}), 0, MODEL)


@pytest.mark.parametrize(
    "line",
    [
        {"remark": "hello"},
        {"submit": 0, "at": 0, "terms": [0, 0, 1, 1, 1, 0, "", None]},
        {"submit": 7, "at": "now", "terms": [0, 0, 1, 1, 1, 0, "", None]},
        {"submit": 7, "at": 0, "terms": [0, 0, 1, 1, 10**9, 0, "", None]},
        {"submit": 7, "at": 0, "terms": [0, 0, 0, 1, 1, 0, "", None]},
        {"sample": 0, "terms": [0, 0, 1, 1, 1, 0, "", None]},
        {"row": 1, "of": 0, "part": 0},
        {"row": "a", "of": 9, "part": 0},
        {"fork": 7, "of": 0, "at": 0, "generated": 1},
        {"end": 0, "at": 0, "reason": "stop", "generated": 1},
        {"end": 9, "at": 0, "reason": "stop", "generated": 1},
        {"end": 1, "at": 0, "reason": "stop", "generated": 1, "sha256": 5},
        {"step": 1, "at": 0, "limits": [1, 0]},
    ],
)
def test_lines_that_no_journal_has_are_refused(line: dict[str, Any]) -> None:
    """With the number of the line, although their checksums are right; what comes before can be had."""
    text, _ = served([Request((1, 2, 3), 1)])
    lines = [*text.splitlines(keepends=True), json.dumps(line) + "\n"]
    with pytest.raises(FormatError, match=f"line {len(lines)} is no line of a journal"):
        read(sealed(lines))
    record = read_journal(sealed(lines).splitlines(keepends=True), damaged=True)
    assert replace(record, entries=(), left_out=None) == replace(read(text), entries=())
    assert str(record.left_out).startswith(f"what follows line {len(lines) - 1}, since line {len(lines)} is")


def test_a_failed_request_is_told_with_its_reason() -> None:
    """And its siblings in the journal go on."""

    def failing(logits: np.ndarray, params: SamplingParams, history: list[int], index: int) -> Sampled:
        if params.seed == 5 and index == 2:
            raise ArithmeticError("no more")
        return sample(logits, params, history, index)

    wanted = [Request((1, 2), 4, SamplingParams(seed=seed)) for seed in (5, 6)]
    record = read(served(wanted, sample=failing)[0])
    assert [(end.reason, end.generated) for end in record.ends.values()] == [("error", 2), ("length", 4)]
    assert rerun(record, 0, MODEL).equal


def test_samples_that_never_parted_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Aborted while they waited, failed before the first token, and running where the journal breaks off."""
    text = StringIO()
    engine = Engine(MODEL, NumpyBackend(), TIGHT, journal=EngineJournal(text))
    wanted = Request((1, 2, 3), 5, samples=3)
    engine.abort(engine.submit(wanted))
    failed = engine.submit(wanted)
    with monkeypatch.context() as patch:
        patch.setattr(engine._executable, "run", lambda batch: 1 / 0)
        assert [output.sample for output in engine.step()] == [0, 1, 2]
    running = engine.submit(replace(wanted, max_tokens=2))
    engine.step()
    broken_off = read(text.getvalue())
    while engine.has_work:
        engine.step()
    last = engine.submit(replace(wanted, max_tokens=0))
    engine.step()
    record = read(text.getvalue())
    for number, reason in [
        (0, "was aborted before its first token"),
        (failed, "failed before its first token"),
        (last, "was to have no tokens"),
    ]:
        found = rerun(record, number, MODEL)
        assert (found.compared, {each.reason for each in found.omitted}) == ((), {reason})
        assert [each.sample for each in found.omitted] == [0, 1, 2]
    assert len(rerun(record, running, MODEL).compared) == 3
    found = rerun(broken_off, running, MODEL)
    assert {each.reason for each in found.omitted} == {
        "has no end in the journal: it was still running where that breaks off"
    }


def test_forked_requests_are_run_alone_from_where_they_were_forked() -> None:
    """With another token, another seed, both or neither; of a fork as well; and one that was aborted."""
    text = StringIO()
    config = replace(TIGHT, max_sequences=8, kv_tokens=256)
    engine = Engine(MODEL, NumpyBackend(), config, journal=EngineJournal(text))
    parent = engine.submit(Request((1, 2, 3), 12, SamplingParams(temperature=1.5, seed=3)))
    other = engine.submit(Request((4,), 12, SamplingParams(temperature=1.5, seed=4)))
    for _ in range(3):
        engine.step()
    same, token = engine.fork(parent), engine.fork(parent, token=5)
    seed = engine.fork(other, seed=77)
    engine.step()
    grandchild = engine.fork(token, token=6, seed=78)
    cut = engine.fork(same)
    empty = engine.fork(same, seed=5)
    engine.abort(empty)
    engine.step()
    engine.abort(cut)
    while engine.has_work:
        engine.step()
    record = read(text.getvalue())
    assert len(record.ends[same].tokens) == 9
    assert record.ends[same].tokens == record.ends[parent].tokens[3:]
    assert record.ends[token].tokens != record.ends[same].tokens != record.ends[seed].tokens
    assert (record.forks[grandchild].parent, record.forks[grandchild].generated) == (token, 4)
    assert (record.ends[cut].reason, len(record.ends[cut].tokens)) == ("abort", 1)
    for number in (parent, other, same, token, seed, grandchild, cut):
        found = rerun(record, number, MODEL)
        assert (len(found.compared), found.omitted, found.equal) == (1, (), True)
    assert rerun(record, empty, MODEL).omitted[0].reason == "was aborted before its first token"
    wrong = {**record.forks, same: record.forks[same]._replace(token=record.ends[parent].tokens[2] ^ 1)}
    assert not rerun(replace(record, forks=wrong), same, MODEL).equal
    late = {**record.forks, same: record.forks[same]._replace(generated=99)}
    (compared,) = rerun(replace(record, forks=late), same, MODEL).compared
    assert (compared.equal, compared.first_difference) == (False, 0)


def test_numbers_of_numpy_are_written_as_numbers() -> None:
    """In a prompt, in hints and in parameters."""
    text = StringIO()
    engine = Engine(MODEL, NumpyBackend(), TIGHT, journal=EngineJournal(text))
    sampling = SamplingParams(temperature=np.float32(0.5), seed=np.int64(3))  # type: ignore[arg-type]
    request = Request(tuple(np.arange(1, 4)), np.int64(3), sampling, priority=np.int32(2))  # type: ignore[arg-type]
    engine.submit(request)
    while engine.has_work:
        engine.step()
    record = read(text.getvalue())
    assert request_of(record.requests[0]) == request
    assert rerun(record, 0, MODEL).equal


class Filling:
    """A disk with room for so many lines."""

    name = "some.jsonl"

    def __init__(self, room: int) -> None:
        self.room, self.lines = room, list[str]()

    def write(self, line: str) -> None:
        if len(self.lines) == self.room:
            raise OSError(28, "No space left on device")
        self.lines.append(line)


def outputs(engine: Engine) -> list[tuple[int, int, int | None]]:
    """All that an engine gives, whoever complains on the way."""
    told = []
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            told.append((output.request, output.sample, output.sampled and output.sampled.token))
    return told


def test_a_full_disk_takes_nothing_from_the_answers() -> None:
    """Wherever it is full: who asked to be told is told once, and every token comes as without a journal."""
    wanted = crowd()[:4]

    def engine(journal: EngineJournal | None) -> Engine:
        made = Engine(MODEL, NumpyBackend(), TIGHT, journal=journal)
        for request in wanted:
            made.submit(request)
        return made

    plain, text = outputs(engine(None)), StringIO()
    outputs(engine(EngineJournal(text, clock=lambda: 0.0)))
    whole = text.getvalue().splitlines(keepends=True)
    for room in range(len(whole)):
        disk, told = Filling(room), list[OutputError]()
        journal = EngineJournal(disk, clock=lambda: 0.0, on_failure=told.append)
        assert outputs(engine(journal)) == plain
        assert (disk.lines, [journal.failure]) == (whole[:room], told)
        assert "some.jsonl cannot be written: No space left on device" in str(told[0])
        assert (f"first {room:,} lines" if room else "Nothing of it") in str(told[0])


def test_a_full_disk_stops_the_engine_where_nobody_asked_for_less() -> None:
    """The next step raises it, or `check`, once; then requests go on, and their tokens are the same."""
    wanted = Request((1, 2, 3), 6)
    plain = Engine(MODEL, NumpyBackend(), TIGHT)
    plain.submit(wanted)
    with pytest.raises(OutputError, match="Nothing of it"):
        Engine(MODEL, NumpyBackend(), TIGHT, journal=EngineJournal(Filling(0)))
    journal = EngineJournal(Filling(3))
    engine = Engine(MODEL, NumpyBackend(), TIGHT, journal=journal)
    engine.submit(wanted)
    told = [*engine.step(), *engine.step()]
    with pytest.raises(OutputError, match="first 3 lines are whole"):
        engine.step()
    rest = [(o.request, o.sample, o.sampled and o.sampled.token) for o in told] + outputs(engine)
    assert rest == outputs(plain)
    journal.check()
    last = EngineJournal(Filling(3))
    engine = Engine(MODEL, NumpyBackend(), TIGHT, journal=last)
    engine.submit(replace(wanted, max_tokens=1))
    assert len(outputs(engine)) == 1
    with pytest.raises(OutputError, match=r"some\.jsonl"):
        last.check()


def test_without_a_journal_nothing_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No method of a journal is called, no weight is read for a fingerprint."""

    def never(*_: object) -> None:
        raise AssertionError("hashed although nobody asked")

    for name in ("begin", "decide", "submit", "sampled", "end"):
        monkeypatch.setattr(EngineJournal, name, never)
    monkeypatch.setattr("refengine.engine_journal.fingerprint", never)
    monkeypatch.setattr("refengine.engine_journal.sha256", never)
    engine = Engine(MODEL, NumpyBackend(), TIGHT)
    engine.submit(Request((1, 2), 3))
    while engine.has_work:
        assert all(output.error is None for output in engine.step())
