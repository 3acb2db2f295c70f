"""The report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.resources import files
from itertools import groupby

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from refengine_conformance.conformance import LEVELS, Conformance
from refengine_conformance.report.support import support_table
from refengine_conformance.report.wording import (
    WORDS,
    again,
    any_lack,
    by_property,
    circumstances,
    headline,
    worst_error,
    worst_kind,
)


def report_html(run: Conformance) -> str:
    """The page."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["markdown"] = markdown
    environment.filters["result"] = _markdown_line
    now = datetime.now(UTC)
    template = environment.from_string(
        files("refengine_conformance.report").joinpath("page.html").read_text(encoding="utf-8")
    )
    return template.render(
        run=run,
        headline=headline(run),
        circumstances=circumstances(run),
        levels=LEVELS,
        support=support_table(run),
        chapters=_chapters(run),
        words=WORDS,
        findings=by_property(run.findings),
        lacks=any_lack(run),
        worst_kind=worst_kind,
        worst_error=worst_error,
        again=lambda result: again(run, result),
        date=f"{now.day} {now:%B %Y, %H:%M} UTC",
    )


def markdown(text: str) -> Markup:
    """CommonMark with tables, as HTML; what is HTML in it is shown, not obeyed."""
    from markdown_it import MarkdownIt

    return Markup(MarkdownIt("commonmark", {"html": False}).enable("table").render(text))


def _markdown_line(text: str) -> Markup:
    from markdown_it import MarkdownIt

    return Markup(MarkdownIt("commonmark", {"html": False}).renderInline(text))


def _chapters(run: Conformance) -> list[tuple[str, list[str]]]:
    """Titles of chapters with the ids of their clauses, as far as they were tested."""

    def title(id: str) -> str:
        return run.clauses[id].chapter if id in run.clauses else "Not in the specification"

    return [(name, list(ids)) for name, ids in groupby(run.by_clause, title)]
