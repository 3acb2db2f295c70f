"""The progress of a batch on stderr: a bar on a terminal, elsewhere nothing."""

from __future__ import annotations

import sys
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from refengine.batch import Tally


class BatchProgress:
    """Shows rows done and failed, tokens per second, and the time that is left. Use as a context manager.

    Args:
        rows: of the input.
        done: how many of them had been done before.
        failed: how many of these with an error.
    """

    def __init__(self, rows: int, done: int, failed: int) -> None:
        self._rows, self._done, self._failed = rows, done, failed
        self._bar: tuple[Progress, TaskID] | None = None
        self._started = perf_counter()

    def __enter__(self) -> BatchProgress:
        if sys.stderr.isatty():
            self._bar = _start_bar(self._rows, self._done, self._figures(0, 0.0))
        self._started = perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar[0].stop()

    def show(self, tally: Tally) -> None:
        """Show what has been done in this run."""
        if self._bar is not None:
            progress, task = self._bar
            rate = tally.sampled / (perf_counter() - self._started)
            progress.update(
                task, completed=self._done + tally.rows, figures=self._figures(tally.failed, rate)
            )

    def _figures(self, failed: int, tokens_per_s: float) -> str:
        return f"{self._failed + failed:,} failed  {tokens_per_s:.1f} tok/s"


def _start_bar(rows: int, done: int, figures: str) -> tuple[Progress, TaskID]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    progress = Progress(
        TextColumn("Answering"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    progress.start()
    return progress, progress.add_task("", total=rows, completed=done, figures=figures)
