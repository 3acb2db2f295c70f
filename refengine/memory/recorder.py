"""The flight recorder: the last events of the memory manager, for when something goes wrong."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

CAPACITY = 4096
"""Events kept."""


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        step: the engine's step in which it did, counted from 1; 0 before the first.
        kind: ``step``, ``submit``, ``admit``, ``hit``, ``fork``, ``preempt``, ``copy``, ``commit``,
            ``release``, ``evict``, ``end``, ``refuse``.
        fields: what it was about: requests, blocks, bytes.
    """

    step: int
    kind: str
    fields: Mapping[str, object]


class FlightRecorder:
    """Keeps the last ``CAPACITY`` events, and tells somebody when a limit is hit.

    Args:
        on_limit: called with the recorder and the reason, after the event that hit a limit.

    Attributes:
        step: the current step.
        limits_hit: how often a limit was.
    """

    def __init__(self, on_limit: Callable[[FlightRecorder, str], None] | None = None) -> None:
        self.step = self.limits_hit = 0
        self._events: deque[Event] = deque(maxlen=CAPACITY)
        self._on_limit = on_limit

    @property
    def events(self) -> tuple[Event, ...]:
        """From the oldest kept to the last."""
        return tuple(self._events)

    def record(self, kind: str, **fields: object) -> None:
        """Add an event."""
        self._events.append(Event(self.step, kind, MappingProxyType(fields)))

    def limit(self, kind: str, reason: str, **fields: object) -> None:
        """Add an event that came of a limit."""
        self.record(kind, reason=reason, **fields)
        self.limits_hit += 1
        if self._on_limit is not None:
            self._on_limit(self, reason)
