"""``refengine plan``: what a model will take, told before it is loaded."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from refengine.cli.baseline import BASIS
from refengine.cli.figures import amount, bytes_figure, count_figure
from refengine.cli.loading import check_precision, open_checkpoint
from refengine.cli.options import (
    backend_option,
    json_option,
    memory_options,
    model_argument,
    offline_option,
    policy_option,
)
from refengine.cli.plan_summary import PlanSummary, headline, plan_json, purposes, summarize, versus
from refengine.cli.sections import SectionedCommand
from refengine.cli.tables import print_table
from refengine.cli.terminal import aside, write_json
from refengine.config import EngineConfig
from refengine.errors import ContextLengthError, MemoryLimitError

USUAL_CONTEXT = 2048


@click.command(cls=SectionedCommand)
@model_argument
@click.option(
    "--context",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Positions of each sequence.  [default: {USUAL_CONTEXT:,}, or the model's where that is less]",
)
@click.option(
    "--batch",
    "--max-sequences",
    "batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="B",
    help="Sequences at once.",
)
@backend_option
@policy_option
@memory_options
@click.option(
    "--html",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Draw the arena as a timeline, with all other memory beside it, on a page of its own.",
)
@offline_option
@json_option
def plan(
    model: str,
    context: int | None,
    batch: int,
    backend: str,
    html: Path | None,
    offline: bool,
    as_json: bool,
    **config: Any,
) -> None:
    """Print what a model will take, to the byte, before anything is loaded.

    The figures come from the code that allocates: `refengine run --memory-report` measures the same. Weights
    are decoded as the backend is fastest, or as far as --memory and --weight-cache allow.

    \b
    Examples:
      refengine plan smollm2
      refengine plan smollm2 --context 1024 --batch 8 --kv-dtype float16
      refengine plan gemma3-270m --weight-cache 0 --token-budget 64
      refengine plan smollm2 --html plan.html
    """
    summary = _summary(model, context, batch, backend, offline, config)
    if html is not None:
        from refengine.cli.charts.plan_page import plan_page

        html.write_text(plan_page(summary), encoding="utf-8")
        aside(f"Wrote {html}")
    if as_json:
        write_json(plan_json(summary))
    else:
        _print(summary)


def _summary(
    model: str, context: int | None, batch: int, backend: str, offline: bool, fields: dict[str, Any]
) -> PlanSummary:
    """Open the file and plan.

    Raises:
        ContextLengthError: the model does not take so many positions.
        MemoryLimitError: they do not fit the limit.
    """
    config = EngineConfig(max_sequences=batch, **fields)
    check_precision(config)
    checkpoint = open_checkpoint(model, offline=offline)
    from refengine.engine_plan import choose_backend, plan_engine
    from refengine.forecast import forecast
    from refengine.models import build

    built = build(checkpoint)
    most = built.spec.context_length
    if context is None:
        context = min(USUAL_CONTEXT, most)
    if context > most:
        raise ContextLengthError(f"the model's context is {amount(most, 'position')}, not {context:,}")
    blocks = -(-context // config.block_size)
    config = replace(config, kv_tokens=batch * blocks * config.block_size)
    chosen = choose_backend(backend, built, config)
    try:
        planned = plan_engine(built, chosen, config)
    except MemoryLimitError as error:  # here, the KV cache has the size that context and batch give it
        raise MemoryLimitError(
            re.sub(r"--kv-tokens (\d+)", lambda found: f"--context {int(found[1]) // batch}", str(error)),
            needed=error.needed,
        ) from None
    return summarize(model, built, chosen.name, forecast(planned, context, batch))


def _holding(summary: PlanSummary, holding: str) -> str:
    """How weights are held, in words."""
    if summary.plan.device.own_memory:
        return {"streamed": "streamed from the host", "pinned": "pinned on the host"}.get(holding, holding)
    return "streamed, a tile at a time" if holding == "streamed" else holding


def _print(summary: PlanSummary) -> None:
    """Weights by encoding, bytes by purpose, and the comparison."""
    click.echo(headline(summary))
    click.echo()
    print_table(
        {
            "WEIGHTS": "left",
            "TENSORS": "right",
            "COUNT": "right",
            "STORED": "right",
            "HELD": "right",
            "AS": "left",
        },
        [
            (
                row.encoding,
                f"{row.tensors:,}",
                count_figure(row.weights),
                bytes_figure(row.stored),
                bytes_figure(row.held),
                _holding(summary, row.holding),
            )
            for row in summary.weights
        ],
    )
    click.echo()
    print_table(
        {"PURPOSE": "left", "BYTES": "right", "SIZE": "right", "": "left"},
        [(name, f"{nbytes:,}", bytes_figure(nbytes), about) for name, nbytes, about in purposes(summary)],
    )
    click.echo(f"\nThe peak is at {summary.forecast.moment}.")
    click.echo()
    ours = summary.weights_and_kv
    print_table(
        {
            "FOR COMPARISON": "left",
            "WEIGHTS": "right",
            "KV CACHE": "right",
            "BOTH": "right",
            "THIS PLAN": "right",
            " ": "left",
        },
        [
            (
                each.name,
                bytes_figure(each.weights),
                bytes_figure(each.kv_cache),
                bytes_figure(each.total),
                bytes_figure(ours),
                versus(ours, each.total),
            )
            for each in summary.baselines
        ],
    )
    click.echo(BASIS)
