"""The progress of a download, or of a file that is written, on stderr."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from refengine.cli.figures import bytes_figure
from refengine.cli.terminal import aside, harmless, say

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class TransferProgress:
    """Implements ``refengine.loader.Progress``: a bar on a terminal, elsewhere nothing."""

    def __init__(self) -> None:
        self._bar: tuple[Progress, TaskID] | None = None

    def notice(self, text: str) -> None:
        """Show a licence, or a choice made for the user."""
        say(harmless(text))

    def start(self, label: str, total_bytes: int) -> None:
        """Begin a transfer."""
        if sys.stderr.isatty():
            self._bar = _start_bar(label, total_bytes)

    def advance(self, n_bytes: int) -> None:
        """Count bytes."""
        if self._bar is not None:
            progress, task = self._bar
            progress.advance(task, n_bytes)

    def finish(self) -> None:
        """End the transfer."""
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None


class DownloadProgress(TransferProgress):
    """Leaves a line when it is done."""

    def start(self, label: str, total_bytes: int) -> None:
        """Begin a transfer."""
        self._label, self._missing, self._total = label, total_bytes, total_bytes
        self._started = time.perf_counter()
        super().start(label, total_bytes)

    def advance(self, n_bytes: int) -> None:
        """Count bytes."""
        self._missing -= n_bytes
        super().advance(n_bytes)

    def finish(self) -> None:
        """End the transfer; a broken one says nothing, since its error will."""
        super().finish()
        if self._missing <= 0:
            seconds = time.perf_counter() - self._started
            aside(f"Downloaded {harmless(self._label)}: {bytes_figure(self._total)} in {seconds:.1f} s")


def _start_bar(label: str, total_bytes: int) -> tuple[Progress, TaskID]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    progress.start()
    return progress, progress.add_task(escape(harmless(label)), total=total_bytes)
