"""SVG as text: elements, ticks and bytes on an axis."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, floor, log10

from markupsafe import Markup, escape


def element(name: str, *children: str, **attributes: object) -> Markup:
    """An element. ``class_`` is ``class``, and an underscore in a name is a hyphen; text is escaped."""
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _number(value))
        for key, value in attributes.items()
        if value is not None
    )
    inner = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, inner)


def drawing(
    width: float, height: float, description: str, children: Iterable[str], **attributes: object
) -> Markup:
    """A picture of this size, with what it shows in words."""
    return element(
        "svg", *children, viewBox=f"0 0 {_number(width)} {_number(height)}", width=width, height=height,
        role="img", aria_label=description, **attributes,
    )  # fmt: skip


def text(x: float, y: float, content: str, class_: str = "", **attributes: object) -> Markup:
    """A line of text."""
    return element("text", content, x=x, y=y, class_=class_ or None, **attributes)


def rectangle(
    x: float, y: float, width: float, height: float, class_: str, *children: str, **attributes: object
) -> Markup:
    """A rectangle; a ``title`` among its children is shown when the pointer rests on it."""
    return element(
        "rect", *children, x=x, y=y, width=max(width, 0), height=max(height, 0), class_=class_, **attributes
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def path(points: Iterable[tuple[float, float]], class_: str, *, closed: bool = False) -> Markup:
    """A line through points, or the area that it closes."""
    steps = " L".join(f"{_number(x)} {_number(y)}" for x, y in points)
    return element("path", d=f"M{steps}{' Z' if closed else ''}", class_=class_)


def stairs(steps: Iterable[tuple[float, float, float]]) -> list[tuple[float, float]]:
    """The corners of a line that is level from ``x1`` to ``x2`` at ``y``, step after step."""
    return [point for x1, x2, y in steps for point in ((x1, y), (x2, y))]


def ticks(most: float, count: int = 4) -> list[float]:
    """About so many round numbers from 0 to ``most``."""
    if most <= 0:
        return [0]
    rough = most / count
    magnitude = 10 ** floor(log10(rough))
    step = next(magnitude * f for f in (1, 2, 5, 10) if magnitude * f >= rough * 0.999)
    return [step * i for i in range(ceil(most / step) + 1) if step * i <= most * 1.0001]


def _number(value: object) -> object:
    """Numbers with as few digits as a picture needs."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
