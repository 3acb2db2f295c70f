"""Tables on stdout: fitted to a terminal, one line per row in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from refengine.cli.terminal import harmless

if TYPE_CHECKING:
    from typing import TextIO

    from rich.table import Table

UNBOUNDED = 1_000_000


def print_table(
    columns: Mapping[str, Literal["left", "right"]],
    rows: Iterable[Sequence[str]],
    *,
    file: TextIO | None = None,
) -> None:
    """A table with headings; ``columns`` says how each is justified."""
    table = _table(show_header=True)
    for name, justify in columns.items():
        table.add_column(name, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*map(harmless, row))
    _print(table, file or sys.stdout)


def print_fields(fields: Mapping[str, str], *, file: TextIO | None = None) -> None:
    """Names and what they stand for, one below the other."""
    table = _table(show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields.items():
        table.add_row(name, harmless(value))
    _print(table, file or sys.stdout)


def _table(*, show_header: bool) -> Table:
    from rich.table import Table

    return Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold", show_header=show_header)


def _print(table: Table, file: TextIO) -> None:
    from rich.console import Console

    width = None if file.isatty() else UNBOUNDED
    console = Console(file=file, width=width, markup=False, emoji=False, highlight=False)
    with console.capture() as capture:
        console.print(table)
    file.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))
    file.flush()
