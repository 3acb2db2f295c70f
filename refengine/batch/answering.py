"""Many rows at once: as many as the engine takes, and no more of the file in memory than that needs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from refengine.batch.answer import SERVER_ERROR, Choice, Teller, failure
from refengine.batch.body import Prepared, refusal
from refengine.batch.read_ahead import ReadAhead
from refengine.batch.row import Fault, Row
from refengine.engine import Engine
from refengine.errors import RequestError
from refengine.request import Output, Request


@dataclass
class Tally:
    """What a run has done so far.

    Attributes:
        answered: rows written with an answer.
        failed: rows written with an error.
        prompt_tokens, generated_tokens: of the answers written.
        sampled: tokens sampled, those of rows under way included.
    """

    answered: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    sampled: int = 0

    @property
    def rows(self) -> int:
        """Rows written."""
        return self.answered + self.failed


class _Answer:
    """A row on its way: the samples of all its requests."""

    def __init__(self, prepared: Prepared) -> None:
        self.row, self.requests = prepared.row, prepared.requests
        self.choices = [Choice(each.stop_ids) for each in self.requests for _ in range(each.samples)]
        self.unfinished = len(self.choices)


class _Part(NamedTuple):
    """The ``place``-th request of a row; ``first`` is the place of its first sample among the row's."""

    answer: _Answer
    request: Request
    place: int
    first: int


class BatchRun:
    """Answers rows on an engine, and writes each when it is complete: the order is that of completion.

    The engine is kept full: requests are submitted while it has places for their samples, and others enter as
    these end. What a request gets does not depend on that.

    Args:
        engine: nobody else uses it meanwhile.
        work: rows that are ready for it.
        teller: makes rows of answers.
        write: gets each row of the output, and whether it tells an error.
        tally: counts what has been done.
        note: told the number of each request, its row, and which of the row's requests it is.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        engine: Engine,
        work: ReadAhead[Prepared],
        teller: Teller,
        write: Callable[[Mapping[str, Any], bool], None],
        tally: Tally,
        clock: Callable[[], float] = time.time,
        *,
        note: Callable[[int, Row, int], None] = lambda number, row, place: None,
    ) -> None:
        self._engine, self._work, self._teller, self._write = engine, work, teller, write
        self._tally, self._clock, self._note = tally, clock, note
        self._queued = deque[_Part]()
        self._running = dict[int, _Part]()
        self._places = 0

    def run(self, watch: Callable[[Tally], None] = lambda tally: None) -> None:
        """Answer all rows; ``watch`` is called after each step.

        Raises:
            RequestError: the input changed while it was read.
            OutputError: a row cannot be written, or the engine's journal.
        """
        while self._fill():
            for output in self._engine.step():
                self._take(output)
            watch(self._tally)

    def _fill(self) -> bool:
        """Submit what there are places for; tells whether anything is under way."""
        limit = self._engine.config.max_sequences
        while True:
            if self._queued:
                if self._running and self._places + self._queued[0].request.samples > limit:
                    return True
                self._submit(self._queued.popleft())
            elif self._running and self._places >= limit:
                return True
            elif (prepared := self._work.get(wait=not self._running)) is not None:
                self._begin(prepared)
            else:
                return bool(self._running)

    def _begin(self, prepared: Prepared) -> None:
        answer = _Answer(prepared)
        if prepared.fault is not None:
            self._fail(answer, prepared.fault)
            return
        first = 0
        for place, request in enumerate(prepared.requests):
            self._queued.append(_Part(answer, request, place, first))
            first += request.samples

    def _submit(self, part: _Part) -> None:
        try:
            number = self._engine.submit(part.request)
        except RequestError as error:
            self._fail(part.answer, refusal(error))
            return
        self._note(number, part.answer.row, part.place)
        self._running[number] = part
        self._places += part.request.samples

    def _take(self, output: Output) -> None:
        part = self._running.get(output.request)
        if part is None:  # of a row that has failed in this step
            return
        if output.finish_reason == "error":
            text = f"{type(output.error).__name__}: {output.error}"
            self._fail(part.answer, Fault(text, "engine_error", SERVER_ERROR))
            return
        answer = part.answer
        answer.choices[part.first + output.sample].take(output)
        self._tally.sampled += output.sampled is not None
        if output.finish_reason is None:
            return
        answer.unfinished -= 1
        self._places -= 1
        if not any(c.finish_reason is None for c in self._choices(part)):
            del self._running[output.request]
        if not answer.unfinished:
            self._finish(answer)

    @staticmethod
    def _choices(part: _Part) -> list[Choice]:
        return part.answer.choices[part.first : part.first + part.request.samples]

    def _finish(self, answer: _Answer) -> None:
        row = self._teller.answer(answer.row, answer.requests, answer.choices, int(self._clock()))
        self._write(row, False)
        self._tally.answered += 1
        self._tally.prompt_tokens += sum(len(request.prompt) for request in answer.requests)
        self._tally.generated_tokens += sum(len(choice.sampled) for choice in answer.choices)

    def _fail(self, answer: _Answer, fault: Fault) -> None:
        """Write an error instead of an answer, and give up what else the row has asked for."""
        for number in [n for n, part in self._running.items() if part.answer is answer]:
            self._engine.abort(number)
            part = self._running.pop(number)
            self._places -= sum(choice.finish_reason is None for choice in self._choices(part))
        self._queued = deque(part for part in self._queued if part.answer is not answer)
        self._write(failure(answer.row, fault), True)
        self._tally.failed += 1
