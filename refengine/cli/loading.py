"""From a command's MODEL and options to what the library opens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from refengine.cli.progress import DownloadProgress

if TYPE_CHECKING:
    from refengine.llm import LLM
    from refengine.loader import Checkpoint


@dataclass(frozen=True)
class EngineOptions:
    """How a model is to be loaded and run: see ``EngineConfig``, and ``offline`` to download nothing."""

    backend: str
    policy: str
    kv_tokens: int | None
    fallback: bool = False
    offline: bool = False

    def load(self, model: str) -> tuple[LLM, float]:
        """Load a model; also tells how many seconds that took, a download before it not counted.

        Raises:
            ModelNotFoundError, DownloadError, FormatError, UnsupportedError, BackendError: see
                ``refengine.load``.
        """
        from refengine.engine import EngineConfig
        from refengine.llm import load
        from refengine.program import policy

        policy(self.policy)  # a mistyped name is told before a download, not after
        config = EngineConfig(policy=self.policy, kv_tokens=self.kv_tokens, fallback=self.fallback)
        path = fetch(model, offline=self.offline)
        started = perf_counter()
        llm = load(str(path), backend=self.backend, config=config)
        return llm, perf_counter() - started


def fetch(model: str, *, offline: bool) -> Path:
    """The model's file, downloaded where needed with a bar on stderr."""
    from refengine.loader import resolve

    return resolve(model, progress=DownloadProgress(), offline=offline)


def open_checkpoint(model: str, *, offline: bool) -> Checkpoint:
    """The model's file, opened but not read."""
    from refengine.loader import read_gguf

    return read_gguf(fetch(model, offline=offline))
