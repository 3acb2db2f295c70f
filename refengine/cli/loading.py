"""From a command's MODEL and options to what the library opens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
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
    offline: bool

    def load(self, model: str) -> LLM:
        """Load a model, fetching it first where needed.

        Raises:
            ModelNotFoundError, DownloadError, FormatError, UnsupportedError, BackendError: see
                ``refengine.load``.
        """
        from refengine.engine import EngineConfig
        from refengine.llm import load
        from refengine.program import policy

        policy(self.policy)  # a mistyped name is told before a download, not after
        config = EngineConfig(policy=self.policy, kv_tokens=self.kv_tokens)
        return load(str(fetch(model, offline=self.offline)), backend=self.backend, config=config)


def fetch(model: str, *, offline: bool) -> Path:
    """The model's file, downloaded where needed with a bar on stderr."""
    from refengine.loader import resolve

    return resolve(model, progress=DownloadProgress(), offline=offline)


def open_checkpoint(model: str, *, offline: bool) -> Checkpoint:
    """The model's file, opened but not read."""
    from refengine.loader import read_gguf

    return read_gguf(fetch(model, offline=offline))
