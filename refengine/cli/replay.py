"""``refengine replay``: a recorded or generated load under other scheduling policies, in simulated time."""

from __future__ import annotations

from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refengine.cli.errors import FINDINGS
from refengine.cli.figures import amount
from refengine.cli.options import json_option, offline_option
from refengine.cli.rerun import compare, requests_of
from refengine.cli.tables import print_table
from refengine.cli.terminal import aside, harmless, say, write_json

if TYPE_CHECKING:
    from refengine.memory import KVLayout
    from refengine.scheduler import Limits, SchedulingPolicy
    from refengine.simulation import Load, Record, Trace


START = b'{"journal"'
"""What every journal begins with."""


@click.command()
@click.argument("journal", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="NAME",
    help="Compare this policy; repeatable. Parameters follow a colon: sjf:ageing=8,chunk=4."
    "  [default: the recorded one, fcfs, sjf and fair]",
)
@click.option("--requests", default=1000, show_default=True, metavar="N", help="Generate N requests.")
@click.option("--rate", default=3.0, show_default=True, metavar="X", help="Let X of them come per second.")
@click.option("--tenants", default=4, show_default=True, metavar="N", help="From N tenants.")
@click.option("--priorities", default=4, show_default=True, metavar="N", help="Of N levels of priority.")
@click.option("--seed", default=0, show_default=True, metavar="N", help="The same seed gives the same load.")
@click.option("--token-budget", type=click.IntRange(min=1), metavar="N", help="Tokens per step.")
@click.option("--max-sequences", type=click.IntRange(min=1), metavar="N", help="Requests at once.")
@click.option("--kv-tokens", type=click.IntRange(min=16), metavar="N", help="Positions of KV cache.")
@click.option(
    "--html",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Draw how long requests wait, on a page of its own.",
)
@click.option(
    "--request", "number", type=int, metavar="ID", help="Run this recorded request again, alone, instead."
)
@click.option(
    "--row", metavar="CUSTOM_ID", help="Run the requests of this row of a batch again, alone, instead."
)
@click.option(
    "--model", metavar="MODEL", help="With --request or --row: the model.  [default: the journal's]"
)
@click.option("--damaged", is_flag=True, help="Read a damaged journal up to the damage.")
@offline_option
@json_option
def replay(
    journal: Path | None,
    policies: tuple[str, ...],
    requests: int,
    rate: float,
    tenants: int,
    priorities: int,
    seed: int,
    html: Path | None,
    number: int | None,
    row: str | None,
    damaged: bool,
    model: str | None,
    offline: bool,
    as_json: bool,
    **limits: int | None,
) -> None:
    """Let a load come again under other scheduling policies.

    Scheduler, queue and the manager of the KV cache are the real ones; what a step costs, a formula says.
    JOURNAL is what an engine or a simulation wrote down; its decisions are made again, to see whether they
    are still the same. Without JOURNAL the load is generated: prompts are log-normal, outputs Pareto.

    With --request, one request of an engine's journal (--journal of `refengine run` and others) is run
    again: alone, on the golden NumPy backend, in the recorded precision. Its logits and tokens are
    compared by their hashes. Exits with 12 where they differ, as those of another backend may. With --row it
    is what a row of `refengine batch` asked for, found by its custom_id.

    \b
    Examples:
      refengine replay --rate 4
      refengine replay trace.jsonl --policy fcfs --policy sjf
      refengine replay trace.jsonl --policy sjf:ageing=1 --max-sequences 8 --html waits.html
      refengine replay trace.jsonl --request 3
      refengine replay trace.jsonl --row question-17
    """
    from refengine.simulation import HeavyTails, differences, generate, simulate

    one = number is not None or row is not None
    if not one and model is not None:
        raise click.UsageError("--model is for --request and --row: without these, no model is needed")
    if number is not None and row is not None:
        raise click.UsageError("--request and --row are two names of one thing: give one of them")
    if one and (journal is None or policies or html is not None):
        raise click.UsageError("--request and --row take a JOURNAL, and neither --policy nor --html")
    if damaged and journal is None:
        raise click.UsageError("--damaged takes a JOURNAL")
    if html is not None and journal is not None and html.resolve() == journal.resolve():
        raise click.UsageError("--html would overwrite the journal: give it another name")
    chosen = [_policy(text) for text in policies]  # a mistyped name is told of before anything is read
    record = None if journal is None else _read(journal, damaged=damaged)
    if record is not None and one:
        numbers = [number] if number is not None else requests_of(record, row or "")
        if not compare(record, numbers, model, row=row, offline=offline, as_json=as_json):
            raise click.exceptions.Exit(FINDINGS)
        return
    if record is None:
        if requests < 1:
            raise click.UsageError("--requests must be at least 1")
        load = generate(HeavyTails(rate=rate, tenants=tenants, priorities=priorities), requests, seed)
    else:
        load = record.load
    chosen = chosen or _usual_policies(record)
    settings = {"limits": _limits(record, limits), "layout": _layout(record, limits["kv_tokens"], load)}
    traces = [simulate(load, policy, **settings) for policy in chosen]
    changed = () if record is None else differences(record)
    if html is not None:
        from refengine.cli.charts.waits_page import waits_page

        html.write_text(waits_page(traces), encoding="utf-8")
        aside(f"Wrote {harmless(str(html))}")
    if as_json:
        write_json(_json(traces, record, changed))
    else:
        _print(traces)
        if record is not None:
            say(_sameness(record, changed))


def _policy(text: str) -> SchedulingPolicy:
    from refengine.scheduler import scheduling_policy

    return replace(scheduling_policy(text), name=text)


def _usual_policies(record: Record | None) -> list[SchedulingPolicy]:
    """Those that are compared where none is named: first the one that was in force."""
    from refengine.scheduler import scheduling_policy

    usual = [_policy(name) for name in ("fcfs", "sjf", "fair")]
    if record is None:
        return usual
    recorded = scheduling_policy(record.policy, **record.parameters)
    given = ",".join(f"{name}={value}" for name, value in record.parameters.items())
    name = f"{record.policy}:{given}" if given else record.policy
    return [replace(recorded, name=name), *(each for each in usual if each.name != name)]


def _read(path: Path, *, damaged: bool) -> Record:
    from refengine.errors import FormatError, RequestError
    from refengine.simulation import read_journal

    with path.open("rb") as file:  # once: it may be a pipe
        start = file.peek(len(START))[: len(START)]
        if not START.startswith(start):
            text = "this is no journal: --journal of `refengine run` and others writes one"
            raise FormatError(text, path=path)
        lines = TextIOWrapper(file, encoding="ascii", errors="surrogateescape")
        record = read_journal(lines, str(path), damaged=damaged)
    if record.left_out is not None:
        aside(f"Left out: {harmless(record.left_out)}")
    if not record.load:
        raise RequestError(f"the journal {str(path)!r} names no request that could come again")
    return record


def _limits(record: Record | None, given: dict[str, int | None]) -> Limits:
    from refengine.scheduler import Limits

    usual = (record.limits if record is not None else None) or Limits(512, 16)
    return Limits(given["token_budget"] or usual.token_budget, given["max_sequences"] or usual.max_sequences)


def _layout(record: Record | None, positions: int | None, load: Load) -> KVLayout:
    from refengine.simulation import small_layout

    if positions is None and record is not None and record.layout is not None:
        return record.layout
    longest = max(arrival.prompt + arrival.output for arrival in load)
    return small_layout(positions or max(16_384, longest + 16))


def _print(traces: list[Trace]) -> None:
    figures = [(trace.policy, trace.figures) for trace in traces]
    first = figures[0][1]["wait_mean"]
    print_table(
        {
            "POLICY": "left",
            "MEAN WAIT": "right",
            "": "right",
            "HALF WAIT": "right",
            "95 % WAIT": "right",
            "LONGEST": "right",
            "FIRST TOKEN": "right",
            "TOKENS/S": "right",
            "PRE-EMPTED": "right",
        },
        [
            (
                name,
                f"{each['wait_mean']:.2f} s",
                f"{100 * (each['wait_mean'] / first - 1):+.0f} %" if first and number else "",
                f"≤ {each['wait_p50']:.2f} s",
                f"≤ {each['wait_p95']:.2f} s",
                f"{each['wait_max']:.2f} s",
                f"{each['first_token_mean']:.2f} s",
                f"{each['tokens_per_second']:.1f}",
                f"{each['preemptions']:,.0f}",
            )
            for number, (name, each) in enumerate(figures)
        ],
    )


def _sameness(record: Record, changed: Any) -> str:
    made = amount(len(record.entries), "recorded decision")
    same = f"{len(changed):,} differ, the first in line {changed[0]:,}" if changed else "all the same"
    forks = amount(len(record.forks), "request")
    unforked = f"\n{forks} forked from others did not come again" if record.forks else ""
    return f"\n{made}, made again: {same}{unforked}"


def _json(traces: list[Trace], record: Record | None, changed: Any) -> dict[str, Any]:
    told: dict[str, Any] = {"policies": {trace.policy: dict(trace.figures) for trace in traces}}
    if record is not None:
        told |= {"decisions": len(record.entries), "differing_lines": list(changed)}
        told |= {"forks": len(record.forks), "left_out": record.left_out}
    return told
