"""Help in sections: options that belong together stand together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

OTHERS = "Options"


class SectionedOption(click.Option):
    """An option that stands under a heading of its own in the help."""

    def __init__(self, *args: Any, section: str = OTHERS, **kwargs: Any) -> None:
        self.section = section
        super().__init__(*args, **kwargs)


class SectionedCommand(click.Command):
    """A command whose help shows its options under their headings, those without one first."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections."""
        sections: dict[str, list[tuple[str, str]]] = {OTHERS: []}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
                sections.setdefault(getattr(parameter, "section", OTHERS), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def section(heading: str) -> Callable[..., Callable[[Callable[..., None]], Callable[..., None]]]:
    """``click.option`` for options under a heading."""

    def option(*names: str, **attributes: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
        return click.option(*names, cls=SectionedOption, section=heading, **attributes)

    return option
