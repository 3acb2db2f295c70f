"""The file in which an engine's journal is written."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refengine.engine_journal import EngineJournal


class JournalFile:
    """A journal that is begun when a model is loaded, and not before; what the file held is lost then."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened = ExitStack()

    def open(self, model: str) -> EngineJournal:
        """Begin; every line reaches the file at once, so that a killed process leaves all but the last."""
        from refengine.engine_journal import EngineJournal

        stream = self._opened.enter_context(self.path.open("w", encoding="utf-8", buffering=1))
        return EngineJournal(stream, model)

    def close(self) -> None:
        """Close the file, if it was begun."""
        self._opened.close()
