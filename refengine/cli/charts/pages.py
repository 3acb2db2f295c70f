"""Pages: a template, the style that all share, and what goes in."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from refengine import __version__
from refengine.cli.charts.svg import drawing, element, rectangle
from refengine.cli.figures import bytes_figure


def render(template: str, **contents: object) -> str:
    """A page of this package's template."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["bytes"] = bytes_figure
    page = environment.from_string(_text(template))
    return page.render(
        style=Markup(_text("style.css")),
        version=__version__,
        hatching=hatching(),
        swatch=swatch,
        line_swatch=line_swatch,
        **contents,
    )


def hatching() -> Markup:
    """The pattern that ``workspace`` is filled with; a page has it once, where it is never hidden."""
    stroke = element("path", d="M-1 1 L1 -1 M0 6 L6 0 M5 7 L7 5", class_="hatch-line")
    paper = rectangle(0, 0, 6, 6, "hatch-paper")
    pattern = element("pattern", paper, stroke, id="hatch", width=6, height=6, patternUnits="userSpaceOnUse")
    return element("svg", element("defs", pattern), width=0, height=0, class_="unseen", aria_hidden="true")


def swatch(kind: str) -> Markup:
    """A piece of a kind's colour, for a legend."""
    return drawing(14, 14, "", [rectangle(1, 1, 12, 12, f"box {kind}", rx=2.5)])


def line_swatch(class_: str) -> Markup:
    """A piece of a curve, for a legend."""
    return drawing(14, 14, "", [element("path", d="M0 7 H14", class_=class_)])


def _text(name: str) -> Any:
    return files("refengine.cli.charts").joinpath(name).read_text(encoding="utf-8")
