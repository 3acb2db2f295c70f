"""``refengine backends``: what can compute here."""

from __future__ import annotations

import click

from refengine.cli.options import json_option
from refengine.cli.tables import print_table
from refengine.cli.terminal import harmless, write_json


@click.command()
@json_option
def backends(as_json: bool) -> None:
    """List the backends: which can be used, and what others need.

    None is imported.

    \b
    Example:
      refengine backends
    """
    from refengine.backend import registered

    statuses = registered()
    if as_json:
        write_json(
            [
                {
                    "name": status.name,
                    "description": status.info and status.info.description,
                    "usable": status.problem is None,
                    "problem": status.problem,
                    "install": status.info and status.info.install,
                }
                for status in statuses
            ]
        )
        return
    print_table(
        {"NAME": "left", "USABLE": "left", "DESCRIPTION": "left"},
        [
            (s.name, "no" if s.problem else "yes", s.info.description if s.info else "unknown")
            for s in statuses
        ],
    )
    for status in statuses:
        if status.problem:
            mend = f"\n  to mend it: {status.info.install}" if status.info else ""
            click.echo(harmless(f"\n{status.name}: {status.problem}{mend}"))
