"""``refengine program``: the list of operations that a model is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from refengine.cli.figures import bytes_figure
from refengine.cli.loading import open_checkpoint
from refengine.cli.options import model_argument, offline_option, policy_option
from refengine.cli.tables import print_table
from refengine.cli.terminal import harmless

if TYPE_CHECKING:
    from refengine.program import MemoryPlan, Program


@click.command()
@model_argument
@click.option(
    "--plan",
    "tokens",
    type=click.IntRange(min=1),
    metavar="T",
    help="Add each value's place in the arena, for a step of T tokens.",
)
@policy_option
@offline_option
def program(model: str, tokens: int | None, policy: str, offline: bool) -> None:
    """Print the operations that the model is, and their memory plan.

    Shapes are symbolic: T tokens, S sequences, R rows of logits. A place in the arena is an offset and a
    length in bytes; values whose lives do not overlap share memory, and so does the working memory of the
    golden ops. The plan is for one sequence, and one row of logits. `refengine plan --html` draws it.

    \b
    Examples:
      refengine program smollm2
      refengine program smollm2 --plan 512
    """
    from refengine import program as programs
    from refengine.models import build

    chosen = programs.policy(policy)
    traced = build(open_checkpoint(model, offline=offline)).program_for(chosen)
    if tokens is None:
        click.echo(harmless(str(traced)))
    else:
        plan = programs.plan_memory(
            traced,
            chosen,
            {"T": tokens, "S": 1, "R": 1},
            lambda instruction, sizes: programs.golden_workspace(instruction, sizes, chosen),
        )
        click.echo("\n".join(_planned(traced, plan)))
        click.echo(f"\narena: {plan.arena_bytes:,} bytes ({bytes_figure(plan.arena_bytes)})")
    click.echo()
    counts = [(name, f"{count:,}") for name, count in traced.op_counts.items()]
    print_table({"OP": "left", "TIMES": "right"}, [*counts, ("all", f"{len(traced):,}")])


def _planned(traced: Program, plan: MemoryPlan) -> Iterator[str]:
    """The lines of a Program, each after its result's place."""
    found = [plan.placements.get(instruction.result.index) for instruction in traced]
    places = [f"{place.offset:,} +{place.nbytes:,}" if place else "-" for place in found]
    width = max(map(len, places))
    lines = harmless(str(traced)).splitlines()
    for at, (place, line) in enumerate(zip([*places, ""], lines, strict=True)):
        working = plan.workspaces.get(at)
        beside = f"  with {working.nbytes:,} bytes at {working.offset:,}" if working else ""
        yield f"{place:>{width}}  {line}{beside}"
