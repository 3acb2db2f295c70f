"""The flight recorder's file."""

from __future__ import annotations

import json
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import click

from refengine.cli.figures import amount
from refengine.cli.terminal import aside, harmless

if TYPE_CHECKING:
    from refengine.memory import FlightRecorder

FORMATS = (".json", ".html")

INTERVAL_S = 1.0
"""Seconds between two writes while limits are hit; what comes in between is written at the end."""


class FlightLog:
    """Writes the last events of an engine's memory manager to a file, when a limit is hit and at the end.

    Args:
        path: ``.json`` for the events, ``.html`` for a timeline.
        limit: bytes that the engine may hold, drawn in the timeline.

    Raises:
        click.UsageError: another suffix.
    """

    def __init__(self, path: Path, limit: int | None = None) -> None:
        if path.suffix.lower() not in FORMATS:
            raise click.UsageError(f"--flight-recorder writes {' or '.join(FORMATS)}, not {path.name!r}")
        self._path, self._limit = path, limit
        self._recorder: FlightRecorder | None = None
        self._reason = ""
        self._written_s: float | None = None

    def write(self, recorder: FlightRecorder, reason: str) -> None:
        """Take note of a limit that was hit, and write unless that was done just now."""
        self._recorder, self._reason = recorder, reason
        if self._written_s is None or monotonic() - self._written_s >= INTERVAL_S:
            self._dump(recorder)

    def close(self) -> None:
        """Write the last state, where a limit was hit at all, and tell where."""
        if (recorder := self._recorder) is None:
            return
        self._dump(recorder)
        aside(
            f"A limit was hit {amount(recorder.limits_hit, 'time')}, last because: {harmless(self._reason)}\n"
            f"Wrote {amount(len(recorder.events), 'event')} to {harmless(str(self._path))}"
        )

    def _dump(self, recorder: FlightRecorder) -> None:
        if self._path.suffix.lower() == ".json":
            text = json.dumps(flight_json(recorder, self._limit), ensure_ascii=False) + "\n"
        else:
            from refengine.cli.charts.flight_page import flight_page

            text = flight_page(recorder.events, recorder.limits_hit, self._limit, self._reason)
        self._path.write_text(text, encoding="utf-8")
        self._written_s = monotonic()


def flight_json(recorder: FlightRecorder, limit: int | None) -> dict[str, Any]:
    """The events as JSON has them: step, kind and what each was about."""
    return {
        "limit": limit,
        "limits_hit": recorder.limits_hit,
        "events": [{"step": e.step, "kind": e.kind, **e.fields} for e in recorder.events],
    }
