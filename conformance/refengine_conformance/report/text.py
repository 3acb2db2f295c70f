"""The report on a terminal: the details first, the verdict last, where the eye is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from refengine_conformance.conformance import LEVELS, Conformance
from refengine_conformance.report.support import support_table
from refengine_conformance.report.wording import (
    WORDS,
    again,
    by_property,
    circumstances,
    headline,
    worst_error,
    worst_kind,
)
from refengine_conformance.runner import Result
from refengine_conformance.self_test import Verdict

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

UNBOUNDED = 1_000_000
STYLES = {"native": "green", "fallback": "yellow", "unsupported": "red", "passed": "green"}
EXAMPLE_LINES = 30


def print_report(run: Conformance, file: TextIO) -> None:
    """Write the report; in colours and fitted where ``file`` is a terminal, one line per row where not."""
    console = _console(file)
    table = support_table(run)
    _print(console, _support(run))
    for number, reason in enumerate(table.reasons, 1):
        _print(console, _text(f"  {number}  {reason}", "dim"))
    _print(console, "", _clauses(run), "")
    for findings in by_property(run.findings):
        _print(console, *_finding(run, findings), "")
    levels = _table({"LEVEL": "bold", "": None, " ": "dim"})
    for name, level in run.levels.items():
        levels.add_row(
            name,
            _text(f"{level.word}: {level.verdict}", "green" if level.reached else "yellow"),
            LEVELS[name],
        )
    style = "bold red" if run.findings else "bold"
    _print(console, levels, "", _text(headline(run), style), _text(circumstances(run)))


def print_faults(verdicts: Sequence[Verdict], file: TextIO) -> None:
    """Write the kill table of the suite's self-test."""
    console = _console(file)
    table = _table({"CLAUSE": "bold", "FAULT": None, "": None, "BY": "dim"})
    for verdict in verdicts:
        style = "green" if verdict.killed else "bold red"
        table.add_row(verdict.clause, verdict.fault, _text(verdict.word, style), verdict.by or "")
    killed = sum(verdict.killed for verdict in verdicts)
    _print(console, table, "")
    _print(console, f"{killed} of {len(verdicts)} faults killed under their clauses")


def _finding(run: Conformance, findings: Sequence[Result]) -> Iterator[RenderableType]:
    """One property's, with the example of the first policy."""
    first = findings[0]
    clause = run.clauses.get(first.property.clause)
    yield _text(f"{first.property.clause} · {clause.title}" if clause else first.property.clause, "bold red")
    for finding in findings:
        facts = filter(None, [finding.policy, WORDS[finding.outcome.kind], worst_error(finding)])
        yield _text(f"  {finding.property.name}: {', '.join(facts)}", "bold")
    example = first.outcome.example.splitlines()
    for line in [*first.outcome.message.splitlines(), *example[:EXAMPLE_LINES]]:
        yield _text(f"  {line}")
    if len(example) > EXAMPLE_LINES:
        yield _text(f"  … {len(example) - EXAMPLE_LINES} lines more are in the other reports")
    yield _text(f"  {again(run, first)}", "dim")


def _support(run: Conformance) -> Table:
    table = _table({"OP": "bold", **dict.fromkeys(run.policies)})
    for op, by_policy in support_table(run).ops.items():
        cells = []
        for standings in by_policy.values():
            lines = [
                _text(
                    " ".join(filter(None, [s.word, s.encodings, f"({s.note})" if s.note else ""])),
                    STYLES[s.word],
                )
                for s in standings
            ]
            cells.append(_joined(lines))
        table.add_row(op, *cells)
    return table


def _clauses(run: Conformance) -> Table:
    table = _table({"CLAUSE": "bold", **dict.fromkeys(run.policies), "": None})
    for id, results in run.by_clause.items():
        cells = []
        for policy in run.policies:
            kind = worst_kind(r for r in results if r.policy == policy)
            style = {None: "dim", "passed": "green", "unsupported": "yellow"}.get(kind, "bold red")
            cells.append(_text(WORDS[kind] if kind else "–", style))
        clause = run.clauses.get(id)
        table.add_row(id, *cells, clause.title if clause else "not in the specification")
    return table


def _console(file: TextIO) -> Console:
    from rich.console import Console

    width = None if file.isatty() else UNBOUNDED
    return Console(file=file, width=width, markup=False, emoji=False, highlight=False)


def _table(columns: dict[str, str | None]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for name, style in columns.items():
        table.add_column(name, style=style, overflow="fold")
    return table


def _text(text: str, style: str = "") -> RenderableType:
    from rich.text import Text

    return Text(text, style)


def _joined(lines: Iterable[RenderableType]) -> RenderableType:
    from rich.console import Group

    return Group(*lines)


def _print(console: Console, *parts: RenderableType) -> None:
    """Print without the blanks that pad a table to its right."""
    for part in parts:
        if console.is_terminal:
            console.print(part)
            continue
        with console.capture() as capture:
            console.print(part)
        console.file.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines() or [""]))
