"""The flight recorder's events as a timeline: steps run to the right, each sequence has a lane."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from markupsafe import Markup

from refengine.cli.charts.svg import drawing, element, line, path, rectangle, stairs, text, ticks
from refengine.cli.figures import amount, bytes_figure

if TYPE_CHECKING:
    from refengine.memory import Event

WIDTH, LEFT, RIGHT, TOP, LANE = 1180.0, 104.0, 14.0, 10.0, 24.0
HELD, SEGMENTS, GAP, AXIS = 150.0, 74.0, 26.0, 34.0
"""Heights in pixels: bytes held, segments taken and given back, the room between panels, the axis."""

MOST_LANES = 64

LIMITS = ("preempt", "refuse")


@dataclass
class Lane:
    """What became of one sequence.

    Attributes:
        waits, runs: spells ``(from step, to step)``.
        marks: ``(step, kind, what to say)``.
    """

    waits: list[tuple[float, float]] = field(default_factory=list)
    runs: list[tuple[float, float]] = field(default_factory=list)
    marks: list[tuple[float, str, str]] = field(default_factory=list)


def lanes(events: Sequence[Event], end: float) -> dict[int, Lane]:
    """Lanes by sequence; what is still open lasts until ``end``."""
    found: dict[int, Lane] = defaultdict(Lane)
    since: dict[int, tuple[str, float]] = {}

    def turn(number: int, into: str | None, step: float) -> None:
        """Close a sequence's spell, and begin another."""
        state, start = since.pop(number, (None, step))
        if state is not None:
            (found[number].waits if state == "wait" else found[number].runs).append((start, step))
        if into is not None:
            since[number] = (into, step)

    for event in events:
        fields, step = event.fields, float(event.step)
        number = fields.get("child" if event.kind == "fork" else "request")
        if not isinstance(number, int):
            continue
        about = ", ".join(f"{key} {value}" for key, value in fields.items() if key != "request")
        kind = "hit" if event.kind == "admit" and fields.get("cached") else event.kind
        found[number].marks.append((step, kind, f"step {event.step}: {event.kind} {about}".strip()))
        spells = {"submit": "wait", "admit": "run", "fork": "run", "preempt": "wait", "end": None}
        if event.kind in spells:
            turn(number, spells[event.kind], step + (1 if event.kind == "end" else 0))
    for number in tuple(since):
        turn(number, None, end)
    return dict(sorted(found.items()))


def draw_flight(events: Sequence[Event], limit: int | None) -> Markup:
    """The picture: bytes held, then lanes, then segments."""
    return _Flight(events, limit).svg()


class _Flight:
    """Scales and parts of the picture."""

    def __init__(self, events: Sequence[Event], limit: int | None) -> None:
        self.events, self.limit = events, limit
        self.first = min((e.step for e in events), default=0)
        self.last = max((e.step for e in events), default=0) + 1
        every = lanes(events, self.last)
        self.lanes = dict(list(every.items())[-MOST_LANES:])
        self.held_bottom = TOP + HELD
        self.lanes_top = self.held_bottom + GAP
        self.lanes_bottom = self.lanes_top + LANE * max(len(self.lanes), 1)
        self.segments_top = self.lanes_bottom + GAP
        self.bottom = self.segments_top + SEGMENTS

    def svg(self) -> Markup:
        """The picture."""
        about = f"{amount(len(self.events), 'event')} of steps {self.first:,} to {self.last - 1:,}"
        parts = [*self._grounds(), *self._limits(), *self._held(), *self._lanes(), *self._segments()]
        return drawing(WIDTH, self.bottom + AXIS, about, parts, class_="fit")

    def _x(self, step: float) -> float:
        return LEFT + (step - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)

    def _grounds(self) -> list[Markup]:
        """Three panels over one axis of steps."""
        width = WIDTH - LEFT - RIGHT
        parts = [
            rectangle(LEFT, TOP, width, HELD, "ground"),
            rectangle(LEFT, self.lanes_top, width, self.lanes_bottom - self.lanes_top, "ground"),
            rectangle(LEFT, self.segments_top, width, SEGMENTS, "ground"),
            text((LEFT + WIDTH - RIGHT) / 2, self.bottom + AXIS - 4, "steps of the engine", "axis"),
        ]
        for tick in ticks(self.last - self.first - 1, 8):
            step = self.first + round(tick)
            parts.append(text(self._x(step + 0.5), self.bottom + 15, f"{step:,}", "tick middle"))
        return parts

    def _limits(self) -> list[Markup]:
        """A line through everything where a limit was hit."""
        parts = []
        for event in self.events:
            if event.kind in LIMITS:
                x = self._x(event.step + 0.5)
                title = element("title", f"step {event.step}: {event.kind}: {event.fields.get('reason', '')}")
                parts.append(element("g", title, line(x, TOP, x, self.bottom, "hit")))
        return parts

    def _held(self) -> list[Markup]:
        """Bytes that the engine holds, step by step, and the limit."""
        steps = [(e.step, e.fields["bytes"]) for e in self.events if e.kind == "step"]
        known = [(step, nbytes) for step, nbytes in steps if isinstance(nbytes, int)]
        most = max([nbytes for _, nbytes in known] + [self.limit or 0, 1]) * 1.08

        def y(nbytes: float) -> float:
            return self.held_bottom - nbytes / most * HELD

        parts = [text(LEFT, TOP - 1, "", "note")]
        for tick in ticks(most, 5):
            parts += [
                line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid"),
                text(LEFT - 8, y(tick) + 4, bytes_figure(tick) if tick else "0", "tick end"),
            ]
        if known:
            corners = stairs((self._x(step), self._x(step + 1), y(nbytes)) for step, nbytes in known)
            ground = [(corners[0][0], y(0)), *corners, (corners[-1][0], y(0))]
            parts += [path(ground, "alive-area", closed=True), path(corners, "alive-line")]
        if self.limit is not None:
            parts.append(line(LEFT, y(self.limit), WIDTH - RIGHT, y(self.limit), "over"))
            told = f"limit {bytes_figure(self.limit)}, the process included"
            parts.append(text(WIDTH - RIGHT - 6, y(self.limit) - 5, told, "note end strong"))
        parts.append(self._name("bytes held", TOP + HELD / 2))
        return parts

    def _lanes(self) -> list[Markup]:
        parts = [self._name("sequences", (self.lanes_top + self.lanes_bottom) / 2)]
        for row, (number, lane) in enumerate(self.lanes.items()):
            middle = self.lanes_top + LANE * (row + 0.5)
            parts.append(text(LEFT - 8, middle + 4, f"{number}", "tick end"))
            for start, end in lane.waits:
                parts.append(line(self._x(start), middle, self._x(end), middle, "wait"))
            for start, end in lane.runs:
                width = self._x(end) - self._x(start)
                parts.append(rectangle(self._x(start), middle - 6, width, 12, "attention", rx=3))
            for step, kind, about in lane.marks:
                parts.append(self._mark(self._x(step + 0.5), middle, kind, about))
        return parts

    def _mark(self, x: float, y: float, kind: str, about: str) -> Markup:
        size = 4.5 if kind in (*LIMITS, "fork", "hit") else 3
        return element(
            "g", element("title", about), element("circle", cx=x, cy=y, r=size, class_=f"mark {kind}")
        )

    def _segments(self) -> list[Markup]:
        """Segments taken (upwards) and given back (downwards) in each step, and blocks copied."""
        counts: dict[str, Counter[int]] = defaultdict(Counter)
        for event in self.events:
            counts[event.kind][event.step] += 1
        middle = self.segments_top + SEGMENTS / 2
        most = max(
            [*counts["commit"].values(), *counts["release"].values(), *counts["copy"].values()], default=1
        )
        scale, wide = (SEGMENTS / 2 - 6) / most, max(self._x(1) - self._x(0) - 0.5, 1.0)
        parts = [self._name("segments", middle), line(LEFT, middle, WIDTH - RIGHT, middle, "border")]
        words = {"commit": "taken", "release": "given back", "copy": "of a block copied on write"}
        for kind, sign in (("commit", -1), ("release", 1), ("copy", 0)):
            for step, count in sorted(counts[kind].items()):
                title = element("title", f"step {step}: {count} {words[kind]}")
                x, height = self._x(step), count * scale
                top = middle - height if sign < 0 else middle if sign else middle - 3
                shape = rectangle(x, top, wide, height if sign else 6, f"box {kind}")
                parts.append(element("g", title, shape))
        parts.append(text(LEFT - 8, self.segments_top + 12, f"+{most}", "tick end"))
        parts.append(text(LEFT - 8, self.bottom - 4, f"−{most}", "tick end"))
        return parts

    def _name(self, label: str, y: float) -> Markup:
        return text(16, y, label, "axis", transform=f"rotate(-90 16 {y:.1f})")
