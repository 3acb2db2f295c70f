"""From a command's MODEL and options to what the library opens."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
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

    def load(self, model: str, *, chat: bool = False) -> tuple[LLM, float]:
        """Load a model; also tells how many seconds that took, a download before it not counted.

        Args:
            model: its name, path or id.
            chat: whether a conversation follows at once; see ``refengine.load``.

        Raises:
            ModelNotFoundError, DownloadError, FormatError, UnsupportedError, BackendError, MemoryLimitError:
                see ``refengine.load``.
        """
        check_precision(self.config)
        path = fetch(model, offline=self.offline)
        with collector_at_rest():
            from refengine.llm import load

            started = perf_counter()
            on_limit = self.flight.write if self.flight else None
            journal = self.journal.open(model) if self.journal else None
            llm = load(
                str(path),
                backend=self.backend,
                config=self.config,
                on_limit=on_limit,
                journal=journal,
                chat=chat,
            )
            return llm, perf_counter() - started


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Nobody looks for reference cycles inside the block.

    To load a model makes hundreds of thousands of objects that stay, and some hundred that do not: to visit
    all of them over and over took a tenth of a start. Afterwards they are the collector's, as those it has
    visited several times.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()  # straight to the oldest generation
        gc.enable()


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
