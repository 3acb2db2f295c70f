"""Bars: bytes by purpose, one row for each way of running a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from refengine.cli.charts.svg import drawing, element, line, rectangle, text, ticks
from refengine.cli.figures import bytes_figure

WIDTH, LABELS, ROW, BAR = 600.0, 8.0, 58.0, 24.0

Row = tuple[str, Mapping[str, int], str]
"""What a bar is, its parts by class, and a remark that follows the total."""


def stacked_bars(rows: Sequence[Row], names: Mapping[str, str], description: str) -> Markup:
    """One bar per row, to one scale; each part tells its name and bytes to the pointer."""
    most = max(sum(parts.values()) for _, parts, _ in rows) or 1
    scale = (WIDTH - 2 * LABELS) / most
    height = ROW * len(rows) + 20
    drawn: list[Markup] = []
    for tick in ticks(most, 5):
        x = LABELS + tick * scale
        drawn.append(line(x, 6, x, height - 18, "grid"))
        anchor = "tick" if tick == 0 else "tick middle" if x < WIDTH - 24 else "tick end"
        drawn.append(text(x, height - 4, bytes_figure(tick) if tick else "0", anchor))
    for number, (label, parts, remark) in enumerate(rows):
        top, x = number * ROW + 22, LABELS
        drawn.append(text(LABELS, top - 6, label, "strong"))
        told = f"{bytes_figure(sum(parts.values()))}{f', {remark}' if remark else ''}"
        drawn.append(text(WIDTH - LABELS, top - 6, told, "end"))
        for kind, nbytes in parts.items():
            title = element("title", f"{names[kind]}: {nbytes:,} bytes")
            width = nbytes * scale
            drawn.append(element("g", title, rectangle(x, top, width, BAR, f"box {kind}")))
            label = f"{names[kind]} {bytes_figure(nbytes)}"
            if width > 6.2 * len(label) + 12:
                drawn.append(text(x + 7, top + BAR / 2 + 4, label, f"label on-{kind}"))
            x += width
    return drawing(WIDTH, height, description, drawn, class_="fit")
