"""The page of ``--flight-recorder FILE.html``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from refengine.cli.charts.flight import MOST_LANES, draw_flight
from refengine.cli.charts.pages import render
from refengine.cli.figures import amount

if TYPE_CHECKING:
    from refengine.memory import Event

LISTED = 200
"""Events in the table at the end; the JSON file has all that were kept."""

LEGEND = {
    "attention": "running",
    "mark admit": "admitted",
    "mark hit": "found in the prefix cache",
    "mark fork": "forked",
    "mark preempt": "memory taken away, or refused",
    "mark end": "ended",
    "box commit": "segment taken",
    "box release": "segment given back",
    "box copy": "block copied on write",
}


def flight_page(events: Sequence[Event], limits_hit: int, limit: int | None, reason: str) -> str:
    """The page, complete.

    Args:
        events: from the oldest to the last.
        limits_hit: how often a limit was.
        limit: bytes that the process might hold; ``None`` where nobody said.
        reason: of the last time.
    """
    return render(
        "flight_page.html",
        title=f"A limit was hit {amount(limits_hit, 'time')}",
        reason=reason,
        picture=draw_flight(events, limit),
        legend=LEGEND,
        counts=", ".join(f"{kind} {count:,}" for kind, count in Counter(e.kind for e in events).items()),
        lanes=MOST_LANES,
        events=[
            (event.step, event.kind, ", ".join(f"{key} {value}" for key, value in event.fields.items()))
            for event in events[-LISTED:]
        ],
    )
