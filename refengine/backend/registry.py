"""Finding backends: by entry point, imported only when chosen, with errors that say how to go on."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from refengine.backend.info import BackendInfo
from refengine.backend.protocol import Backend
from refengine.errors import (
    BackendFailedError,
    BackendNotInstalledError,
    RefengineError,
    UnknownBackendError,
)

BACKENDS, INFOS = "refengine.backends", "refengine.backend_info"


@dataclass(frozen=True)
class BackendStatus:
    """A registered backend.

    Attributes:
        name: what the user types.
        info: its light half, ``None`` where that is missing or broken.
        problem: why it cannot be used here, ``None`` where it can.
    """

    name: str
    info: BackendInfo | None
    problem: str | None


def registered() -> tuple[BackendStatus, ...]:
    """Every registered backend and whether it can be used, without importing any."""
    return tuple(_status(name) for name in sorted(_points(BACKENDS)))


def load(name: str) -> Backend:
    """Import and start a backend.

    Args:
        name: a registered name.

    Raises:
        UnknownBackendError: no such name.
        BackendNotInstalledError: what it needs is not installed.
        BackendFailedError: it is installed, but failed to import or to start.

    Clauses: BCK-13.
    """
    points = _points(BACKENDS)
    if name not in points:
        near = difflib.get_close_matches(name, points, n=1)
        raise UnknownBackendError(
            state=f"backend {name!r} is unknown",
            available=_available(),
            why=f"no installed package registers it under {BACKENDS!r}",
            mend=f"choose one of these{f', perhaps {near[0]!r}' if near else ''}, with --backend NAME",
        )
    status = _status(name)
    install = status.info.install if status.info else f"reinstall the package that provides {name!r}"
    if status.problem:
        raise BackendNotInstalledError(
            state=f"backend {name!r} is not installed",
            available=_available(),
            why=status.problem,
            mend=install,
        )
    try:
        backend: Backend = points[name].load()()
    except Exception as cause:
        known = isinstance(cause, RefengineError)  # a setting that cannot be; else the installation is broken
        raise BackendFailedError(
            state=f"backend {name!r} is installed but failed to start",
            available=_available(),
            why=str(cause) if known else f"{type(cause).__name__}: {cause}",
            mend="change what the reason names, and start again" if known else install,
        ) from cause
    return backend


def _status(name: str) -> BackendStatus:
    point = _points(INFOS).get(name)
    if point is None:
        return BackendStatus(name, None, f"it has no entry under {INFOS!r}")
    try:
        info: BackendInfo = point.load()
        return BackendStatus(name, info, info.probe())
    except Exception as cause:  # a broken plug-in is reported; it does not break the others
        return BackendStatus(name, None, f"its description failed to load: {type(cause).__name__}: {cause}")


def _points(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


def _available() -> str:
    return ", ".join(status.name for status in registered() if not status.problem) or "none"
