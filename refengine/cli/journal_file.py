"""The file in which an engine's journal is written."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from refengine.errors import OutputError

if TYPE_CHECKING:
    from refengine.engine_journal import EngineJournal


class JournalFile:
    """A journal that is begun when a model is loaded, and not before; a file that is there is left alone.

    Use as a context manager; leaving it raises what went wrong with the journal, unless that has been told or
    something else is being raised. A journal without a line leaves no file.

    Args:
        path: of the file.
        optional: where the journal cannot be written, say so and go on without it.

    Attributes:
        path: the same.
        name: the same as text.
        journal: the journal, once it is begun.
    """

    def __init__(self, path: Path, *, optional: bool = False) -> None:
        self.path, self.name, self._optional = path, str(path), optional
        self._descriptor: int | None = None
        self.journal: EngineJournal | None = None

    def __enter__(self) -> JournalFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            empty = not os.fstat(self._descriptor).st_size
            os.close(self._descriptor)
            self._descriptor = None
            if empty:
                self.path.unlink(missing_ok=True)
        if kind is None and self.journal is not None:
            self.journal.check()

    def open(self, model: str) -> EngineJournal:
        """Begin; every line reaches the file at once and whole: a killed process leaves all but the last.

        Raises:
            OutputError: the file cannot be made, or exists: a batch that goes on after a kill would lose what
                led there.
        """
        from refengine.engine_journal import EngineJournal

        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | getattr(os, "O_BINARY", 0)
        try:
            self._descriptor = os.open(self.path, flags, 0o666)
        except FileExistsError:
            raise OutputError(f"{self.path} exists already: give the journal another name") from None
        except OSError as error:
            raise OutputError(f"the journal {self.path} cannot be begun: {error.strerror}") from error
        self.journal = EngineJournal(self, model, on_failure=_go_on if self._optional else None)
        return self.journal

    def write(self, line: str) -> None:
        """Append a line, whole or not at all.

        Raises:
            OSError: the system refuses.
        """
        from refengine.whole_lines import append_whole

        if self._descriptor is None:
            raise ValueError("the file is closed")
        append_whole(self._descriptor, line.encode())


def _go_on(failure: OutputError) -> None:
    from refengine.cli.errors import warn

    warn(f"{failure}\nThe engine goes on without it.")
