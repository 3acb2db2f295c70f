"""``refengine pull``, ``list``, ``verify`` and ``rm``: the models of the catalogue and the cache."""

from __future__ import annotations

import click

from refengine.cli.figures import bytes_figure
from refengine.cli.loading import fetch
from refengine.cli.options import json_option, model_argument
from refengine.cli.tables import print_table
from refengine.cli.terminal import aside, write_json


@click.command()
@model_argument
def pull(model: str) -> None:
    """Download a model unless it is here, and print its path.

    \b
    Examples:
      refengine pull smollm2
      refengine pull owner/repo:Q8_0
    """
    click.echo(fetch(model, offline=False))


@click.command("list")
@json_option
def list_models(as_json: bool) -> None:
    """List the models that have a name, and which are here.

    \b
    Examples:
      refengine list
      refengine list --json | jq -r '.[] | select(.cached) | .path'
    """
    from refengine.loader import catalogue

    listings = catalogue.list_models()
    if as_json:
        write_json(
            [
                {
                    "name": model.name,
                    "aliases": model.aliases,
                    "summary": model.summary,
                    "bytes": model.size,
                    "licence": model.licence.name,
                    "licence_url": model.licence.url,
                    "cached": listing.cached,
                    "path": str(listing.path),
                }
                for listing in listings
                for model in [listing.model]
            ]
        )
        return
    print_table(
        {"NAME": "left", "SIZE": "right", "HERE": "left", "LICENCE": "left", "WHAT IT IS": "left"},
        [
            (m.name, bytes_figure(m.size), "yes" if listing.cached else "no", m.licence.name, m.summary)
            for listing in listings
            for m in [listing.model]
        ],
    )


@click.command()
@model_argument
def verify(model: str) -> None:
    """Check that a downloaded model has not changed.

    Its SHA-256 is computed again; a file that has changed is deleted.

    \b
    Example:
      refengine verify smollm2
    """
    from refengine.loader import catalogue

    click.echo(f"{catalogue.verify(model)}: intact")


@click.command("rm")
@model_argument
def remove(model: str) -> None:
    """Delete a downloaded model.

    \b
    Example:
      refengine rm smollm2
    """
    from refengine.loader import catalogue

    freed = catalogue.remove(model)
    aside(f"Deleted {model}: {bytes_figure(freed)}" if freed else f"{model} was not here: nothing to delete")
