"""One request of a journal again, alone, on the golden backend: was it answered the same to the bit?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from refengine import backend as backends
from refengine.backend import Backend
from refengine.config import EngineConfig
from refengine.engine import Engine
from refengine.engine_journal import Transcript, fingerprint, request_of
from refengine.errors import FormatError, RequestError
from refengine.models import Model
from refengine.ops import FloatArray
from refengine.request import Request
from refengine.sampling import Sampled, SamplingParams, sample
from refengine.simulation import End, Fork, Record
from refengine.tokenizer import Tokenizer

GOLDEN = "numpy"

UNENDED = "has no end in the journal: it was still running where that breaks off"

CUT = ("abort", "error")
"""Reasons of ends that came from outside: without them, there would have been more tokens."""


@dataclass(frozen=True)
class Comparison:
    """A sample as it was recorded, and as it is now.

    Attributes:
        sample: which of the request's it is.
        end: what the journal has of it.
        tokens, sha256: the same, from now.
    """

    sample: int
    end: End
    tokens: tuple[int, ...]
    sha256: str

    @property
    def equal(self) -> bool:
        """Whether logits and tokens are the same bits."""
        return (self.end.sha256, self.end.tokens) == (self.sha256, self.tokens)

    @property
    def first_difference(self) -> int | None:
        """The place of the first token that is another, or only one has; ``None`` if all are the same."""
        if self.end.tokens == self.tokens:
            return None
        pairs = zip(self.end.tokens, self.tokens, strict=False)
        shorter = min(len(self.end.tokens), len(self.tokens))
        return next((place for place, (then, now) in enumerate(pairs) if then != now), shorter)


@dataclass(frozen=True)
class Omission:
    """A sample that cannot be compared.

    Attributes:
        sample: which of the request's it is.
        reason: why, after "the sample".
    """

    sample: int
    reason: str


@dataclass(frozen=True)
class Findings:
    """What came of a request's samples, each of which is in one of the two.

    Attributes:
        number: the request's.
        compared: those that were run again.
        omitted: those of which there is nothing to compare.
    """

    number: int
    compared: tuple[Comparison, ...]
    omitted: tuple[Omission, ...]

    @property
    def equal(self) -> bool:
        """Whether all that was compared is the same."""
        return all(each.equal for each in self.compared)


class Rerun:
    """Runs requests of a journal again, each alone.

    Args:
        record: the journal.
        model: the one that the journal was recorded with.
        tokenizer: where requests have stop strings.
        backend: computes; ``None`` for the golden one.
        fallback: let golden ops stand in for what it lacks.

    Raises:
        RequestError: the journal is of another model, or of none.
        FormatError: its first line breaks the form.

    Clauses: JRN-3.
    """

    def __init__(
        self,
        record: Record,
        model: Model,
        tokenizer: Tokenizer | None = None,
        backend: Backend | None = None,
        *,
        fallback: bool = False,
    ) -> None:
        config = replace(recorded_config(record), fallback=fallback)
        if (found := fingerprint(model)) != record.engine["fingerprint"]:
            raise RequestError(
                f"the journal is of another model: its fingerprint is {record.engine['fingerprint']}, and "
                f"this model's is {found}: name the model file that was used"
            )
        self._record, self._transcript = record, Transcript()
        golden = backend or backends.load(GOLDEN)
        self._engine = Engine(model, golden, config, tokenizer, sample=self._overheard)

    def run(self, number: int) -> Findings:
        """Run each sample of a request again and compare it.

        A sample that was aborted or failed is compared as far as it came; a request that was forked from
        another, from there on.

        Raises:
            RequestError: the journal has no such request.
            FormatError: what it holds of it breaks the form.
        """
        request, forks = origin(self._record, number)
        compared, omitted = [], []
        for index in range(1 if forks else request.samples):
            end = self._record.ends.get(number + index)
            if end is None:
                omitted.append(Omission(index, UNENDED))
            elif reason := _omission(end):
                omitted.append(Omission(index, reason))
            else:
                compared.append(self._compare(_alone(request, index, end), forks, index, end))
        return Findings(number, tuple(compared), tuple(omitted))

    def _compare(self, request: Request, forks: Sequence[Fork], index: int, end: End) -> Comparison:
        self._transcript = Transcript()
        self._run(request, forks)
        return Comparison(index, end, tuple(self._transcript.tokens), self._transcript.digest)

    def _run(self, request: Request, forks: Sequence[Fork]) -> None:
        """Run a request to its end, which is another one's after each fork."""
        number, generated = self._engine.submit(request), 0
        for fork in forks:
            while generated < fork.generated and self._engine.has_work:
                generated += self._step()
            parent, self._transcript = number, Transcript()
            if not self._engine.has_work:  # it has ended before: nothing can go on from there
                return
            number = self._engine.fork(parent, token=fork.token, seed=fork.seed)
            self._engine.abort(parent)
        while self._engine.has_work:
            self._step()

    def _step(self) -> int:
        """One step; returns how many tokens it gave."""
        outputs = self._engine.step()
        for output in outputs:
            if output.error is not None:
                raise output.error
        return sum(output.sampled is not None for output in outputs)

    def _overheard(
        self, logits: FloatArray, params: SamplingParams, tokens: Sequence[int], index: int
    ) -> Sampled:
        sampled = sample(logits, params, tokens, index)
        self._transcript.add(logits, sampled.token)
        return sampled


def rerun(record: Record, number: int, model: Model, tokenizer: Tokenizer | None = None) -> Findings:
    """Run each sample of a request alone and compare: a `Rerun` of one request.

    Raises:
        RequestError: the journal has no such request, or is of another model.
        FormatError: what it holds breaks the form.
    """
    return Rerun(record, model, tokenizer).run(number)


def recorded_config(record: Record) -> EngineConfig:
    """All of the recorded engine's config that bits depend on, for one sequence and its fork.

    Raises:
        RequestError: the journal is of no engine.
        FormatError: its first line lacks a field.
    """
    if not record.engine:
        raise RequestError("the journal is of a simulation: no model answered its requests")
    missing = {"model", "fingerprint", "backend", "policy", "kv_dtype", "block_size"} - record.engine.keys()
    if missing:
        raise FormatError(f"the journal's first line does not tell the engine's {', '.join(sorted(missing))}")
    names = ("policy", "kv_dtype", "block_size")
    forks = 1 if record.forks else 0
    return EngineConfig(**{name: record.engine[name] for name in names}, max_sequences=1 + forks)


def origin(record: Record, number: int) -> tuple[Request, tuple[Fork, ...]]:
    """What was asked with a request, and where it was forked from others, the first fork first.

    Raises:
        RequestError: the journal has no such request.
        FormatError: what it holds of it breaks the form.
    """
    forks: list[Fork] = []
    root = number
    while (fork := record.forks.get(root)) is not None:
        forks.insert(0, fork)
        root = fork.parent
    if root not in record.requests:
        raise RequestError(_unknown(record, number))
    return request_of(record.requests[root]), tuple(forks)


def _unknown(record: Record, number: int) -> str:
    for first, content in record.requests.items():
        if first < number < first + int(content.get("samples", 1)):
            return f"{number} is no request, but sample {number - first} of request {first}: ask for that"
    numbers = (*record.requests, *record.forks)
    span = f", from {min(numbers)} to {max(numbers)}" if numbers else ""
    return f"the journal has no request {number}: there are {len(numbers):,}{span}"


def _omission(end: End) -> str | None:
    """Why nothing of an ended sample can be compared; ``None`` where something can."""
    if end.sha256 is None:
        return "has an end without a hash"
    if end.tokens:
        return None
    how = {"abort": "was aborted", "error": "failed"}.get(end.reason)
    return "was to have no tokens" if how is None else f"{how} before its first token"


def _alone(request: Request, index: int, end: End) -> Request:
    """A sample as a request of its own, without hints, and no longer than what was recorded of it."""
    return replace(
        request,
        samples=1,
        sampling=replace(request.sampling, seed=request.sampling.seed + index),
        max_tokens=end.generated if end.reason in CUT else request.max_tokens,
        expected_tokens=None,
        deadline=None,
    )
