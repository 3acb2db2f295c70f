"""The file in which an engine's journal is written."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from refengine.errors import OutputError

if TYPE_CHECKING:
    from refengine.engine_journal import EngineJournal


class JournalFile:
    """A journal that is begun when a model is loaded, and not before; a file that is there is left alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened = ExitStack()

    def open(self, model: str) -> EngineJournal:
        """Begin; every line reaches the file at once, so that a killed process leaves all but the last.

        Raises:
            OutputError: the file exists: a batch that goes on after a kill would lose what led there.
        """
        from refengine.engine_journal import EngineJournal

        try:
            opened = self.path.open("x", encoding="utf-8", buffering=1)
        except FileExistsError:
            raise OutputError(f"{self.path} exists already: give the journal another name") from None
        stream = self._opened.enter_context(opened)
        return EngineJournal(stream, model)

    def close(self) -> None:
        """Close the file, if it was begun."""
        self._opened.close()
