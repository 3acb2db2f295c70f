"""``refengine spec``: the specification, to read and to look things up in."""

from __future__ import annotations

import sys
from difflib import get_close_matches

import click

from refengine.cli.suite import require_suite
from refengine.cli.tables import print_table
from refengine.errors import RequestError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def spec() -> None:
    """Read the specification, clause by clause."""


@spec.command("list")
def list_clauses() -> None:
    """List the clauses.

    \b
    Example:
      refengine spec list
    """
    from refengine.specification import clauses

    rows = [(clause.id, clause.chapter, clause.title) for clause in clauses().values()]
    print_table({"CLAUSE": "left", "CHAPTER": "left", "TITLE": "left"}, rows)


@spec.command()
@click.argument("id")
def show(id: str) -> None:
    """Print a clause: what it demands, whose word that is, and an example.

    \b
    Example:
      refengine spec show ATT-1
    """
    from rich.console import Console
    from rich.markdown import Markdown

    from refengine.specification import clauses

    known = clauses()
    if (clause := known.get(id.upper())) is None:
        near = get_close_matches(id.upper(), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; `refengine spec list` lists them"
        raise RequestError(f"there is no clause {id!r}{hint}")
    text = (
        f"## {clause.id} · {clause.title}\n\n**Result:** {clause.result}\n\n**Source:** {clause.source}\n\n"
        f"{clause.text}\n\n```python\n{clause.example}```\n"
    )
    if sys.stdout.isatty():
        Console().print(Markdown(text))
    else:
        click.echo(text, nl=False)


@spec.command()
def coverage() -> None:
    """List the properties that prove each clause.

    \b
    Example:
      refengine spec coverage
    """
    require_suite()
    from refengine.specification import clauses
    from refengine_conformance.registry import all_properties

    names: dict[str, list[str]] = {id: [] for id in clauses()}
    for item in all_properties():
        names.setdefault(item.clause, []).append(item.name)
    rows = [(id, name) for id, found in names.items() for name in found or ["nothing proves it"]]
    print_table({"CLAUSE": "left", "PROPERTY": "left"}, rows)
