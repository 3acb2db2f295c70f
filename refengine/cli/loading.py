"""From a command's MODEL and options to what the library opens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from refengine.cli.flight import FlightLog
from refengine.cli.journal_file import JournalFile
from refengine.cli.progress import DownloadProgress
from refengine.config import EngineConfig

if TYPE_CHECKING:
    from refengine.llm import LLM
    from refengine.loader import Checkpoint


@dataclass(frozen=True)
class EngineOptions:
    """How a model is to be loaded and run.

    Attributes:
        backend: its name, or ``auto``.
        config: the engine's limits.
        offline: download nothing.
        flight: writes the flight recorder out when a limit is hit; ``None`` where nobody asked for that.
        journal: where the engine writes down what it does; ``None`` for nowhere.
    """

    backend: str
    config: EngineConfig
    offline: bool = False
    flight: FlightLog | None = None
    journal: JournalFile | None = None

    def adjusted(self, **changes: Any) -> EngineOptions:
        """The same with other fields of the config."""
        return replace(self, config=replace(self.config, **changes))

    def load(self, model: str) -> tuple[LLM, float]:
        """Load a model; also tells how many seconds that took, a download before it not counted.

        Raises:
            ModelNotFoundError, DownloadError, FormatError, UnsupportedError, BackendError, MemoryLimitError:
                see ``refengine.load``.
        """
        from refengine.llm import load

        check_precision(self.config)
        path = fetch(model, offline=self.offline)
        started = perf_counter()
        on_limit = self.flight.write if self.flight else None
        journal = self.journal.open(model) if self.journal else None
        llm = load(str(path), backend=self.backend, config=self.config, on_limit=on_limit, journal=journal)
        return llm, perf_counter() - started


def check_precision(config: EngineConfig) -> None:
    """Tell of a mistyped policy or KV dtype before a download, not after.

    Raises:
        UnsupportedError: there is none of this name.
    """
    from refengine.program import kv_formats, policy

    kv_formats(config.kv_dtype, policy(config.policy))


def fetch(model: str, *, offline: bool) -> Path:
    """The model's file, downloaded where needed with a bar on stderr."""
    from refengine.loader import resolve

    return resolve(model, progress=DownloadProgress(), offline=offline)


def open_checkpoint(model: str, *, offline: bool) -> Checkpoint:
    """The model's file, opened but not read."""
    from refengine.loader import read_gguf

    return read_gguf(fetch(model, offline=offline))
