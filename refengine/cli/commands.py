"""The commands by name, in the order that ``refengine --help`` shows them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from types import MappingProxyType
from typing import Any, NoReturn

import click

from refengine import __version__
from refengine.cli.errors import WRONG_USAGE, exit_code_of

SECTIONS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "Talk to a model": {"run": "run:run", "chat": "chat:chat", "batch": "batch:batch"},
        "Keep models": {
            "pull": "models:pull",
            "list": "models:list_models",
            "show": "show:show",
            "verify": "models:verify",
            "rm": "models:remove",
            "synth": "synth:synth",
        },
        "Look inside": {
            "plan": "plan:plan",
            "inspect": "inspect:inspect",
            "tokenize": "tokenize:tokenize",
            "logits": "logits:logits",
            "program": "program:program",
            "replay": "replay:replay",
            "backends": "backends:backends",
        },
        "Hold to the specification": {"conform": "conform:conform", "spec": "spec:spec"},
    }
)
"""Heading -> command -> ``module:function`` under ``refengine.cli``."""

HOMES = {name: home for section in SECTIONS.values() for name, home in section.items()}
ALIASES = {"ls": "list"}


class Commands(click.Group):
    """A group whose commands are imported when asked for, and whose every error meets one boundary."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in order."""
        return list(HOMES)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import a command."""
        if (home := HOMES.get(ALIASES.get(name, name))) is None:
            return None
        module, _, function = home.partition(":")
        command: click.Command = getattr(import_module(f"refengine.cli.{module}"), function)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the arguments begin with; a mistyped name is told its near match."""
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            near = get_close_matches(args[0], HOMES, n=1)
            ctx.fail(f"there is no command {args[0]!r}{f'; did you mean {near[0]!r}?' if near else ''}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections, their columns aligned."""
        width = max(map(len, HOMES))
        for heading, names in SECTIONS.items():
            commands = {name: self.get_command(ctx, name) for name in names}
            with formatter.section(heading):
                formatter.write_dl(
                    [
                        (name.ljust(width), command.get_short_help_str(80))
                        for name, command in commands.items()
                        if command
                    ]
                )

    def main(self, args: Sequence[str] | None = None, *_: Any, **__: Any) -> NoReturn:
        """Run the command that ``args`` name and exit with its code."""

        def act() -> None:
            with self.make_context("refengine", list(sys.argv[1:] if args is None else args)) as context:
                self.invoke(context)

        sys.exit(exit_code_of(act))


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="MODEL is a name of `refengine list`, the path of a GGUF file, or an id of the Hugging Face Hub: "
    "owner/repo, owner/repo:Q8_0, owner/repo@revision:file.gguf.",
)
@click.version_option(__version__, "-V", "--version", message="refengine %(version)s")
@click.pass_context
def refengine(context: click.Context) -> None:
    """Run large language models in little memory, on an engine made to be read.

    \b
    refengine run smollm2 "Why is the sky blue?"
    refengine COMMAND --help
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(WRONG_USAGE)
