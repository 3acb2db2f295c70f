"""The light half of a backend: what can be said of it without importing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class BackendInfo:
    """An entry of the group ``refengine.backend_info``.

    Attributes:
        description: one line.
        install: the command that installs what the backend needs.
        probe: cheap check, without importing the backend: ``None`` where it can run here, else the reason.
        priority: ``auto`` takes the highest among those that can run.
    """

    description: str
    install: str
    probe: Callable[[], str | None]
    priority: int
