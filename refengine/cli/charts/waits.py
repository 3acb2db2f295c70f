"""How long requests wait: for every time, the share that waited longer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10

from markupsafe import Markup

from refengine.cli.charts.svg import drawing, line, path, rectangle, text

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 760.0, 340.0, 54.0, 14.0, 42.0, 28.0

SHORTEST = 0.01
"""Seconds; what is less stands at the left edge."""

POINTS = 240


def waits(curves: Mapping[str, Sequence[float]], description: str) -> Markup:
    """One curve for each name, from its waiting times in seconds; time on a logarithmic scale."""
    longest = max((max(times, default=0.0) for times in curves.values()), default=0.0)
    low, high = floor(log10(SHORTEST)), ceil(log10(max(longest, 10 * SHORTEST)))

    def at(exponent: float, share: float) -> tuple[float, float]:
        x = LEFT + (exponent - low) / (high - low) * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    (left, ground), (right, top) = at(low, 0), at(high, 1)
    drawn = [rectangle(left, top, right - left, ground - top, "ground")]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        _, y = at(low, share)
        drawn += [line(left, y, right, y, "grid"), text(left - 8, y + 4, f"{share:.0%}", "tick end")]
    for exponent in range(low, high + 1):
        x, _ = at(exponent, 0)
        drawn.append(line(x, top, x, ground, "grid"))
        drawn.append(text(x, ground + 16, f"{10.0**exponent:g} s", "tick middle"))
    drawn.append(text((left + right) / 2, HEIGHT - 6, "waited longer than", "axis"))
    for number, times in enumerate(curves.values()):
        steps = [low + (high - low) * step / POINTS for step in range(POINTS + 1)]
        shares = [sum(time > 10.0**exponent for time in times) / max(len(times), 1) for exponent in steps]
        end = shares.index(0) + 1 if 0 in shares else len(shares)
        drawn.append(path(list(map(at, steps[:end], shares)), f"curve curve-{number % 6}"))
    return drawing(WIDTH, HEIGHT, description, drawn, class_="fit")
