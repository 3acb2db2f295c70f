"""An answer while it comes: its text and tokens so far, and the times they came at."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from time import perf_counter
from typing import TYPE_CHECKING

from refengine.cli.terminal import write_answer
from refengine.errors import RefengineError

if TYPE_CHECKING:
    from refengine.request import FinishReason, Output
    from refengine.sampling import Sampled


class Answer:
    """What a request has given so far; still good after an interrupt.

    Attributes:
        prompt_ids: the prompt.
        sampled: every token generated, the one that ended it included.
        finish_reason: ``abort`` until the model or a limit ends it.
        first_token_s: seconds from the request to its first token: the prompt's computation, and with it
            whatever the backend leaves until weights are first used.
        decode_s: seconds from there to the end.
    """

    def __init__(self, prompt_ids: list[int]) -> None:
        self.prompt_ids = prompt_ids
        self.sampled: list[Sampled] = []
        self.finish_reason: FinishReason = "abort"
        self.first_token_s = self.decode_s = 0.0
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._texts)

    def show(self, stream: Callable[[], Generator[Output]], *watch: Callable[[Output], None]) -> None:
        """Follow a stream and write its text to stdout as it comes, with an end of line after it.

        After an interrupt, the line is left as it is: the terminal has put ``^C`` there.
        """
        try:
            follow(stream, [self], lambda output: write_answer(output.text), *watch)
        except RefengineError:
            self._end_line()
            raise
        self._end_line()

    def take(self, output: Output, elapsed_s: float) -> None:
        """Note an output that came so many seconds after the request."""
        if output.sampled is not None:
            if not self.sampled:
                self.first_token_s = elapsed_s
            self.sampled.append(output.sampled)
        self.decode_s = elapsed_s - self.first_token_s
        self.finish_reason = output.finish_reason or "abort"
        self._texts.append(output.text)

    def _end_line(self) -> None:
        if self.text and not self.text.endswith("\n"):
            write_answer("\n")


def follow(
    stream: Callable[[], Generator[Output]],
    answers: Sequence[Answer],
    *watch: Callable[[Output], None],
) -> None:
    """Start a stream and pass its outputs on as they come, each to its sample's answer and all who watch.

    Whatever ends this early aborts the request.
    """
    started = perf_counter()
    with closing(stream()) as outputs:
        for output in outputs:
            answers[output.sample].take(output, perf_counter() - started)
            for see in watch:
                see(output)
