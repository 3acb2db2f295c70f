"""Chapter *The journal*: engines on tiny models that write down what they do, and what is read of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from io import StringIO
from typing import Any

from hypothesis import strategies as st

from refengine import Engine, EngineConfig, Output, Request, SamplingParams
from refengine.engine_journal import EngineJournal, fingerprint, request_of
from refengine.errors import FormatError, OutputError, RequestError, SequenceStateError
from refengine.memory import KVCacheManager
from refengine.models import Model
from refengine.ops import FloatArray
from refengine.sampling import Sampled
from refengine.scheduler import Decision, Limits
from refengine.simulation import End, Record, differences, generate, simulate, small_layout
from refengine_conformance.registry import holds
from refengine_conformance.schedule_lives import ALL, choices
from refengine_conformance.simulated_loads import COSTS, LOADS
from refengine_conformance.subject import Subject
from refengine_conformance.tiny_model import tiny_model

FAMILIES = st.sampled_from(["llama", "gemma3"])

CONFIGS = st.fixed_dictionaries(
    {
        "token_budget": st.sampled_from([16, 5, 3]),
        "max_sequences": st.sampled_from([4, 3]),
        "block_size": st.sampled_from([3, 4]),
        "kv_tokens": st.sampled_from([36, 48, 200]),
        "prefix_cache": st.booleans(),
        "swap": st.sampled_from([0, 10**9]),
        "scheduling": st.sampled_from(["fcfs", "sjf:ageing=2", "priority:ageing=2", "fair"]),
    }
)
"""Little memory, in which every one of ``REQUESTS`` fits alone."""

REQUESTS = st.builds(
    Request,
    st.builds(
        lambda length, first, step: tuple((first + step * i) % 97 for i in range(length)),
        *(st.sampled_from([4, 12, 9, 1]), st.integers(0, 96), st.sampled_from([1, 0, 7])),
    ),
    max_tokens=st.sampled_from([6, 9, 1, 0]),
    sampling=st.builds(
        SamplingParams, temperature=st.sampled_from([0.9, 0.0]), seed=st.integers(0, 2**64 - 4)
    ),
    stop_ids=st.sampled_from([frozenset[int](), frozenset({3, 50})]),
    samples=st.sampled_from([1, 3, 2]),
    priority=st.integers(0, 3),
    tenant=st.sampled_from(["", "a", "ü\n"]),
    deadline=st.sampled_from([None, 9]),
)


@cache
def model(family: str) -> Model:
    """One of each family."""
    return tiny_model(family, layers=1 if family == "llama" else 3)


@dataclass
class Served:
    """What an engine gave, noted beside its journal.

    Attributes:
        engine: the engine.
        memory: its manager of the KV cache.
        asked: requests by number.
        forked: by the number of a fork, whom it goes on from and what that had generated.
        decisions: all that were made.
        drawn: logits and tokens in the order in which they were drawn, of each step.
        outputs: in order.
        aborted: the numbers of requests that were aborted.
    """

    engine: Engine
    memory: KVCacheManager
    asked: dict[int, Request] = field(default_factory=dict)
    forked: dict[int, tuple[int, int]] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    drawn: dict[int, list[tuple[FloatArray, int]]] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)
    aborted: set[int] = field(default_factory=set)

    def submit(self, request: Request) -> int:
        """Submit and note it."""
        number = self.engine.submit(request)
        self.asked[number] = request
        return number

    def step(self) -> None:
        """Step and note what comes."""
        self.outputs += self.engine.step()

    def fork(self, number: int, token: int | None, seed: int | None) -> int | None:
        """Fork, where that is possible."""
        given = [o for o in self.outputs if o.request == number and o.sampled is not None]
        try:
            child = self.engine.fork(number, token=token, seed=seed)
        except (SequenceStateError, RequestError):
            return None
        before = self.forked[number][1] if number in self.forked else 0
        self.forked[child] = (number, before + len(given))
        return child

    def abort(self, number: int) -> None:
        """Abort and note it."""
        if self.engine.abort(number) is not None:
            self.aborted.add(number)

    def finish(self) -> None:
        """Step until nothing is left."""
        while self.engine.has_work:
            self.step()

    def samples(self) -> Iterator[tuple[int, int, int]]:
        """Of each sample, its number, its request's, and which it is."""
        for number, request in self.asked.items():
            for sample in range(request.samples):
                yield number + sample, number, sample
        for number in self.forked:
            yield number, number, 0

    def tokens(self, number: int, sample: int) -> list[int]:
        """What was given of a sample."""
        return [
            o.sampled.token
            for o in self.outputs
            if (o.request, o.sample) == (number, sample) and o.sampled is not None
        ]

    def reason(self, number: int, sample: int) -> str:
        """Why a sample ended."""
        ends = [o.finish_reason for o in self.outputs if (o.request, o.sample) == (number, sample)]
        return next((str(reason) for reason in ends if reason is not None), "abort")


def served(
    subject: Subject, family: str, limits: Mapping[str, Any], journal: EngineJournal | None, fail: int = -1
) -> Served:
    """An engine of the subject's parts; the draw with the number ``fail`` fails."""
    managers: list[KVCacheManager] = []
    notes: list[Served] = []
    draws = 0

    def kv_cache(*given: Any) -> KVCacheManager:
        managers.append(subject.kv_cache(*given))
        return managers[-1]

    def schedule(*given: Any, **named: Any) -> Decision:
        decision: Decision = subject.schedule(*given, **named)
        notes[0].decisions.append(decision)
        return decision

    def sample(logits: FloatArray, params: SamplingParams, *given: Any) -> Sampled:
        nonlocal draws
        draws += 1
        if draws - 1 == fail:
            raise ArithmeticError("this draw fails")
        drawn: Sampled = subject.sample(logits, params, *given)
        notes[0].drawn.setdefault(params.seed, []).append((logits.copy(), drawn.token))
        return drawn

    engine = Engine(
        model(family),
        subject.start(),
        EngineConfig(subject.policy.name, fallback=subject.fallback, **limits),
        journal=journal,
        schedule=schedule,
        sample=sample,
        kv_cache=kv_cache,
    )
    notes.append(Served(engine, managers[-1]))
    return notes[0]


def live(data: st.DataObject, served: Served, requests: list[Request], forks: bool = True) -> None:
    """Requests come, are aborted and forked at random, and end."""
    for request in requests:
        served.submit(request)
        for _ in range(data.draw(st.sampled_from([0, 1, 3]))):
            served.step()
        if data.draw(st.sampled_from([False, False, True])):
            served.abort(data.draw(st.sampled_from(sorted(served.asked))))
        if forks and data.draw(st.booleans()):
            parent = data.draw(st.sampled_from([*served.asked, *served.forked]))
            served.fork(parent, data.draw(st.sampled_from([None, 5])), data.draw(st.sampled_from([None, 77])))
            served.step()
    served.finish()


@st.composite
def journals(draw: st.DrawFn, subject: Subject, forks: bool = True) -> tuple[Served, str]:
    """What an engine did, and its journal."""
    text = StringIO()
    family, limits = draw(FAMILIES), draw(CONFIGS)
    made = served(
        subject, family, limits, subject.engine_journal(text, "tiny"), draw(st.sampled_from([-1, -1, 0, 4]))
    )
    live(draw(st.data()), made, draw(st.lists(REQUESTS, min_size=2, max_size=4)), forks)
    return made, text.getvalue()


def read(subject: Subject, text: str, **named: Any) -> Record:
    """A journal, read line by line."""
    return subject.read_journal(StringIO(text), **named)


@holds("JRN-1", "scheduler", "kv_cache", tier="state")
def everything_is_in_it(subject: Subject, data: st.DataObject) -> None:
    """What was asked, decided, forked and given, against notes that were taken beside it."""
    made, text = data.draw(journals(subject))
    record = read(subject, text)
    engine: dict[str, Any] = {"model": "tiny", "fingerprint": fingerprint(made.engine.model)}
    engine |= {"backend": made.engine.backend.name, "policy": subject.policy.name, "kv_dtype": None}
    assert record.engine == engine | {"block_size": made.engine.config.block_size}
    assert {number: request_of(content) for number, content in record.requests.items()} == made.asked
    assert {number: fork[:2] for number, fork in record.forks.items()} == made.forked
    assert [entry.decision for entry in record.entries] == made.decisions
    assert {entry.step for entry in record.entries} == set(range(1, made.engine.recorder.step + 1))
    assert list(differences(record, subject.schedule)) == []
    for sample, number, index in made.samples():
        end = record.ends[sample]
        assert (list(end.tokens), end.reason) == (made.tokens(number, index), made.reason(number, index))
    assert len(record.ends) == len(list(made.samples()))


@holds("JRN-1", "scheduler", "kv_cache", tier="state", level="L3")
def to_write_it_changes_nothing(subject: Subject, data: st.DataObject) -> None:
    """The same requests with a journal and without one get the same tokens from the same decisions."""
    family, limits = data.draw(FAMILIES), data.draw(CONFIGS)
    requests = data.draw(st.lists(REQUESTS, min_size=1, max_size=3))
    found = []
    for journal in (None, subject.engine_journal(StringIO())):
        made = served(subject, family, limits, journal)
        for request in requests:
            made.submit(request)
            made.step()
        made.finish()
        found.append((made.decisions, [(o.request, o.sample, o.sampled) for o in made.outputs]))
    assert found[0] == found[1]


@holds("JRN-2", "sampler", tier="state")
def the_hash_is_over_logits_and_tokens(subject: Subject, data: st.DataObject) -> None:
    """Of what samples were drawn from, put together from the bytes by hand."""
    made, text = data.draw(journals(subject, forks=False))
    seeds = [
        made.asked[number].sampling.seed + index
        for _, number, index in made.samples()
        if made.asked[number].max_tokens
    ]
    for sample, end in read(subject, text).ends.items():
        number = max(n for n in made.asked if n <= sample)
        seed = made.asked[number].sampling.seed + sample - number
        if seeds.count(seed) > 1:  # two samples with one seed cannot be told apart here
            continue
        message = b""
        drawn = made.drawn.get(seed, []) if end.generated else []
        for logits, token in drawn[: len(end.tokens)]:
            assert logits.dtype == subject.policy.activations
            message += logits.tobytes() + bytes((token >> 8 * i) & 255 for i in range(8))
        assert end.sha256 == sha256(message).hexdigest()


@holds("JRN-3", "scheduler", "kv_cache", "sampler", "backend", level="L3", tier="state")
def alone_it_has_the_same_bits(subject: Subject, data: st.DataObject) -> None:
    """Every sample is run again and equal, or named with a reason; forks as well."""
    made, text = data.draw(journals(subject))
    record = read(subject, text)
    rerun = subject.rerun(record, made.engine.model, backend=subject.start(), fallback=subject.fallback)
    for number in (*made.asked, *made.forked):
        found = rerun.run(number)
        samples = [s for s, whose, _ in made.samples() if whose == number]
        without = [at for at, sample in enumerate(samples) if not record.ends[sample].tokens]
        assert [omitted.sample for omitted in found.omitted] == without
        assert all(omitted.reason for omitted in found.omitted)
        compared = [each.sample for each in found.compared]
        assert compared == [at for at in range(len(samples)) if at not in without]
        assert found.equal
        for each in found.compared:
            assert each.tokens == record.ends[samples[each.sample]].tokens


@holds("JRN-3", "scheduler", "kv_cache", "sampler", "backend", level="L3", tier="state")
def a_fork_is_run_from_where_it_was_forked(subject: Subject, data: st.DataObject) -> None:
    """With its token and seed, and a fork of the fork, in the company of the others."""
    text = StringIO()
    limits = {**data.draw(CONFIGS), "max_sequences": 4, "kv_tokens": 200}
    made = served(subject, data.draw(FAMILIES), limits, subject.engine_journal(text))
    sampling = SamplingParams(temperature=1.5, seed=data.draw(st.integers(0, 99)))
    made.submit(Request((1, 2, 3), 9, sampling))
    made.submit(data.draw(REQUESTS.filter(lambda request: request.samples == 1)))
    number: int | None = 0
    for _ in range(2):
        while len(made.tokens(0, 0)) < 2:
            made.step()
        assert number is not None
        token, seed = (data.draw(st.sampled_from([None, value])) for value in (5, 1000))
        number = made.fork(number, token, seed)
        made.step()
    made.finish()
    record = read(subject, text.getvalue())
    rerun = subject.rerun(record, made.engine.model, backend=subject.start(), fallback=subject.fallback)
    assert len(made.forked) == 2
    for child, (_, before) in made.forked.items():
        (compared,) = rerun.run(child).compared
        assert (compared.equal, len(compared.tokens)) == (True, 9 - before)


@holds("JRN-3", "scheduler", "kv_cache", "sampler", "backend", level="L3", tier="state")
def what_was_recorded_otherwise_is_found(subject: Subject, data: st.DataObject) -> None:
    """A token, the hash, a missing token, a seed, another model; the first difference is told."""
    text = StringIO()
    made = served(subject, data.draw(FAMILIES), {}, subject.engine_journal(text))
    number = made.submit(replace(data.draw(REQUESTS), max_tokens=6, stop_ids=frozenset()))
    made.finish()
    record = read(subject, text.getvalue())

    def found(changed: Record) -> Any:
        rerun = subject.rerun(changed, made.engine.model, backend=subject.start(), fallback=subject.fallback)
        return rerun.run(number).compared[0]

    end, place = record.ends[number], data.draw(st.integers(0, 5))
    changes: list[tuple[End, int | None]] = [
        (replace(end, tokens=(*end.tokens[:place], end.tokens[place] ^ 1, *end.tokens[place + 1 :])), place),
        (replace(end, tokens=end.tokens[:place]), place),
        (replace(end, sha256=sha256(b"").hexdigest()), None),
    ]
    for other, first in changes:
        if other.tokens:
            each = found(replace(record, ends={**record.ends, number: other}))
            assert (each.equal, each.first_difference) == (False, first)
    try:
        subject.rerun(record, tiny_model("llama", layers=1, seed=1), backend=subject.start())
    except RequestError as error:
        assert record.engine["fingerprint"] in str(error)
    else:
        raise AssertionError("another model was run")


@holds("JRN-4", "scheduler", "kv_cache", tier="state")
def a_load_comes_again_as_it_came(subject: Subject, data: st.DataObject) -> None:
    """Line for line, under any policy, with little memory and with a host or windows."""
    choice = data.draw(choices(*ALL))
    limits = Limits(data.draw(st.sampled_from([16, 8, 64])), data.draw(st.sampled_from([4, 3, 8])))
    layout = small_layout(data.draw(st.sampled_from([96, 256])), 4, data.draw(st.sampled_from([None, 6])))
    settings = {"costs": COSTS, "host_bytes": data.draw(st.sampled_from([0, 1000]))}
    first, again = StringIO(), StringIO()
    simulate(
        generate(data.draw(LOADS), 30, data.draw(st.integers(0, 2**32))),
        subject.scheduling(choice.name, **choice.parameters),
        limits=limits,
        layout=layout,
        journal=subject.journal(first, choice.name, layout, **choice.parameters),
        **settings,
    )
    record = read(subject, first.getvalue())
    subject.replay(
        record,
        journal=subject.journal(again, choice.name, layout, **choice.parameters),
        **settings,
    )
    assert again.getvalue() == first.getvalue()


@cache
def some_journal(family: str) -> str:
    """An engine's, with requests of several samples, rows, an abort and a fork."""
    text = StringIO()
    journal = EngineJournal(text, "tiny", clock=lambda: 0.5)
    subject = Subject(start_golden)
    made = served(subject, family, {"token_budget": 5, "max_sequences": 6, "block_size": 4}, journal)
    journal.row(made.submit(Request((1, 2, 3), 4, samples=2)), "one", 0)
    second = made.submit(Request((4, 5), 6))
    made.step()
    made.step()
    made.fork(second, 5, 7)
    made.abort(second)
    made.finish()
    return text.getvalue()


def start_golden() -> Any:
    """The golden backend."""
    from refengine import backend

    return backend.load("numpy")


def damage(data: st.DataObject, text: str) -> tuple[str, int]:
    """A journal with a byte changed, or a line lost, doubled or moved; and the first line that is wrong."""
    lines = text.splitlines(keepends=True)
    at = data.draw(st.integers(0, len(lines) - 2))
    kind = data.draw(st.sampled_from(["byte", "lost", "doubled", "moved", "foreign"]))
    if kind == "byte":
        place = data.draw(st.integers(0, len(lines[at]) - 2))
        other = data.draw(st.sampled_from('09 ,"}]x\xff').filter(lambda sign: sign != lines[at][place]))
        lines[at] = lines[at][:place] + other + lines[at][place + 1 :]
    elif kind == "lost":
        del lines[at]
    elif kind == "doubled":
        lines.insert(at, lines[at])
        at += 1
    elif kind == "moved":
        lines[at], lines[at + 1] = lines[at + 1], lines[at]
    else:
        lines.insert(at, data.draw(st.sampled_from(["\n", "{}\n", "[]\n", "null\n", '{"step":0}\n'])))
    return "".join(lines), at + 1


def lines_of(record: Record) -> Any:
    """What of a record can be compared: all but functions."""
    entries = [(entry.line, entry.step, entry.time, entry.decision) for entry in record.entries]
    return replace(record, entries=(), left_out=None), entries


@holds("JRN-5", "scheduler", tier="state")
def damage_is_refused_with_its_line(subject: Subject, data: st.DataObject) -> None:
    """Wherever it is; and what stands before it can be had, and made again."""
    text = some_journal(data.draw(FAMILIES))
    damaged, line = damage(data, text)
    try:
        read(subject, damaged)
    except FormatError as error:
        assert f"line {line} " in str(error)
    else:
        raise AssertionError("a damaged journal was read")
    if line == 1:
        return
    before = text.splitlines(keepends=True)[: line - 1]
    record = read(subject, damaged, damaged=True)
    assert f"line {line} " in str(record.left_out)
    assert lines_of(record) == lines_of(read(subject, "".join(before)))
    assert list(differences(record)) == []


@holds("JRN-5", "scheduler", tier="state")
def what_breaks_off_is_read_up_to_there(subject: Subject, data: st.DataObject) -> None:
    """Cut behind any byte after the first line, with zeros after it or without: its whole lines are read."""
    text = some_journal(data.draw(FAMILIES))
    cut = data.draw(st.integers(text.index("\n") + 1, len(text)))
    zeros = data.draw(st.sampled_from(["", "\0" * 40]))
    left = text[:cut] + zeros
    whole = left[: left.rfind("\n") + 1]
    if text[cut : cut + 1] == "\n" and not zeros:  # its last line is whole
        whole = left + "\n"
    record = read(subject, left)
    assert lines_of(record) == lines_of(read(subject, whole))
    assert (record.left_out is None) == (len(whole) >= len(left))


NAMES = st.text(min_size=1, max_size=12) | st.sampled_from(['"', "\n", " a ", "ﬀ", "\ud800", "\0"])


@holds("JRN-6", "scheduler", tier="state")
def names_of_rows_are_kept(subject: Subject, data: st.DataObject) -> None:
    """Rows of one part and of several, by the numbers of their requests."""
    text = StringIO()
    journal = subject.engine_journal(text)
    made = served(subject, "llama", {}, journal)
    given = {}
    for name in data.draw(st.lists(NAMES, min_size=1, max_size=4, unique=True)):
        for part in range(data.draw(st.integers(1, 3))):
            number = made.submit(Request((1, 2), 1, samples=data.draw(st.integers(1, 2))))
            journal.row(number, name, part)
            given[number] = (name, part)
    assert dict(read(subject, text.getvalue()).rows) == given


class Disk:
    """Has room for so many lines, and is called ``disk.jsonl``."""

    name = "disk.jsonl"

    def __init__(self, room: int) -> None:
        self.lines, self._room = list[str](), room

    def write(self, line: str) -> None:
        """Take a line, if there is room; a moment later there is room again."""
        self._room -= 1
        if self._room == -1:
            raise OSError(28, "No space left on device")
        self.lines.append(line)


@dataclass
class Told:
    """Who is told of failures, and what the engine raised."""

    failures: list[OutputError] = field(default_factory=list)
    raised: list[OutputError] = field(default_factory=list)


def outputs(made: Served, requests: list[Request], journal: EngineJournal, told: Told, *, abort: bool) -> Any:
    """All that an engine gives, and the blocks that are free in the end; what a step raises is noted.

    One request is aborted, unless a step that raises might have given it more before that.
    """

    def attempt(act: Callable[[], object]) -> None:
        try:
            act()
        except OutputError as error:
            told.raised.append(error)

    for request in requests:
        made.submit(request)
        attempt(made.step)
    if abort:
        made.abort(0)
    while made.engine.has_work and len(told.raised) < 2:  # one that is raised for ever is enough once more
        attempt(made.step)
    attempt(journal.check)
    given = sorted((o.request, o.sample, str(o.sampled), str(o.finish_reason)) for o in made.outputs)
    return given, made.memory.free_blocks


@holds("JRN-7", "scheduler", "kv_cache", tier="state", level="L3")
def no_answer_suffers_from_a_full_disk(subject: Subject, data: st.DataObject) -> None:
    """Wherever it is full, and whether somebody is to be told or the engine raises it, once."""
    family, limits = data.draw(FAMILIES), {**data.draw(CONFIGS), "prefix_cache": False}
    limits |= {"max_sequences": 4}
    asked = data.draw(st.lists(REQUESTS, min_size=1, max_size=3))
    heard = data.draw(st.booleans())
    whole, told = Disk(10**9), Told()
    journal = subject.engine_journal(whole, clock=lambda: 0.0)
    plain = outputs(served(subject, family, limits, journal), asked, journal, told, abort=heard)
    assert (told.failures, told.raised) == ([], [])
    room = data.draw(st.integers(0, len(whole.lines) - 1))
    disk = Disk(room)
    journal = subject.engine_journal(
        disk, clock=lambda: 0.0, **({"on_failure": told.failures.append} if heard else {})
    )
    if not room and not heard:
        try:
            served(subject, family, limits, journal)
        except OutputError as error:
            assert "disk.jsonl" in str(error)
        else:
            raise AssertionError("an engine without the journal that was asked for")
        return
    given = outputs(served(subject, family, limits, journal), asked, journal, told, abort=heard)
    (failure,) = told.failures if heard else told.raised
    assert len(told.failures) + len(told.raised) == 1
    assert "disk.jsonl" in str(failure)
    assert disk.lines == whole.lines[:room]
    assert f"{room:,} lines" in str(failure) or not room
    assert given == plain
