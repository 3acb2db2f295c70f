"""How the KV cache grows with the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from refengine.cli.charts.svg import drawing, line, path, rectangle, text, ticks
from refengine.cli.figures import bytes_figure

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 600.0, 250.0, 62.0, 14.0, 34.0, 12.0


@dataclass(frozen=True)
class Curve:
    """A line through points ``(positions, bytes)``."""

    name: str
    class_: str
    points: Sequence[tuple[int, int]]


def growth(curves: Sequence[Curve], description: str) -> Markup:
    """The curves, the first with its area filled, each with its name at its end."""
    far = max(x for curve in curves for x, _ in curve.points)
    most = max(y for curve in curves for _, y in curve.points) * 1.06 or 1

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + x / far * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y / most * (HEIGHT - TOP - BOTTOM)

    right, ground = at(far, 0)
    drawn = [rectangle(LEFT, TOP, right - LEFT, ground - TOP, "ground")]
    for tick in ticks(most, 4):
        _, y = at(0, tick)
        drawn += [
            line(LEFT, y, right, y, "grid"),
            text(LEFT - 8, y + 4, bytes_figure(tick) if tick else "0", "tick end"),
        ]
    for tick in ticks(far, 4):
        x, _ = at(tick, 0)
        drawn.append(text(x, ground + 16, f"{tick:,.0f}", "tick middle" if x < right - 12 else "tick end"))
    drawn.append(text((LEFT + right) / 2, HEIGHT - 3, "positions of context", "axis"))
    first = [at(*point) for point in curves[0].points]
    drawn.append(path([(LEFT, ground), *first, (right, ground)], "ours-area", closed=True))
    drawn += [path([at(*point) for point in curve.points], curve.class_) for curve in reversed(curves)]
    return drawing(WIDTH, HEIGHT, description, drawn, class_="fit")
