"""One request of a journal again, alone, on the golden backend: was it answered the same to the bit?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from refengine import backend as backends
from refengine.config import EngineConfig
from refengine.engine import Engine
from refengine.engine_journal import Transcript, fingerprint, request_of
from refengine.errors import FormatError, RequestError
from refengine.models import Model
from refengine.ops import FloatArray
from refengine.request import Request
from refengine.sampling import Sampled, SamplingParams, sample
from refengine.simulation import End, Record
from refengine.tokenizer import Tokenizer

GOLDEN = "numpy"


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


def rerun(record: Record, number: int, model: Model, tokenizer: Tokenizer | None = None) -> list[Comparison]:
    """Run each sample of a request alone and compare; those that never got a token are left out.

    A sample that was aborted or failed is compared as far as it came.

    Args:
        record: the journal.
        number: the request's.
        model: the one that the journal was recorded with.
        tokenizer: where the request has stop strings.

    Raises:
        RequestError: the journal has no such request, is of another model, or holds nothing to compare.
        FormatError: what it holds breaks the form.
    """
    config = recorded_config(record)
    request = _asked(record, number)
    found = fingerprint(model)
    if found != record.engine["fingerprint"]:
        raise RequestError(
            f"the journal is of another model: its fingerprint is {record.engine['fingerprint']}, and this "
            f"model's is {found}: name the model file that was used"
        )
    samples = [(i, end) for i in range(request.samples) if (end := record.ends.get(number + i))]
    samples = [(i, end) for i, end in samples if end.sha256 is not None and end.tokens]
    if not samples:
        raise RequestError(
            f"request {number} got no token, or did not end in the journal: nothing to compare"
        )
    transcript = Transcript()

    def overheard(logits: FloatArray, params: SamplingParams, tokens: Sequence[int], index: int) -> Sampled:
        sampled = sample(logits, params, tokens, index)
        transcript.add(logits, sampled.token)
        return sampled

    engine = Engine(model, backends.load(GOLDEN), config, tokenizer, sample=overheard)
    compared = []
    for i, end in samples:
        transcript = Transcript()
        _run(engine, _alone(request, i, end))
        compared.append(Comparison(i, end, tuple(transcript.tokens), transcript.digest))
    return compared


def recorded_config(record: Record) -> EngineConfig:
    """All of the recorded engine's config that bits depend on, for one sequence.

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
    return EngineConfig(**{name: record.engine[name] for name in names}, max_sequences=1)


def _asked(record: Record, number: int) -> Request:
    if number not in record.requests:
        raise RequestError(
            f"the journal has no request {number}: there are {len(record.requests):,}"
            + (f", from {min(record.requests)} to {max(record.requests)}" if record.requests else "")
        )
    return request_of(record.requests[number])


def _alone(request: Request, index: int, end: End) -> Request:
    """A sample as a request of its own, without hints, and no longer than what was recorded of it."""
    cut = end.reason in ("abort", "error")
    return replace(
        request,
        samples=1,
        sampling=replace(request.sampling, seed=request.sampling.seed + index),
        max_tokens=len(end.tokens) if cut else request.max_tokens,
        expected_tokens=None,
        deadline=None,
    )


def _run(engine: Engine, request: Request) -> None:
    engine.submit(request)
    while engine.has_work:
        for output in engine.step():
            if output.error is not None:
                raise output.error
