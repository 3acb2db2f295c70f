"""The page of ``refengine replay --html``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from refengine.cli.charts.pages import render
from refengine.cli.charts.waits import waits
from refengine.cli.figures import amount

if TYPE_CHECKING:
    from refengine.simulation import Trace

COLUMNS = {
    "wait_mean": "mean wait",
    "wait_p50": "half wait at most",
    "wait_p95": "95 % wait at most",
    "wait_max": "longest wait",
    "first_token_mean": "first token after",
}


def waits_page(traces: Sequence[Trace]) -> str:
    """The page, complete."""
    curves = {
        trace.policy: [c.waited for c in trace.courses if c.number == c.terms.arrival] for trace in traces
    }
    return render(
        "waits_page.html",
        title=f"How long {amount(len(next(iter(curves.values()))), 'request')} waited",
        names=list(curves),
        picture=waits(curves, "The share of requests that waited longer than a time, for each policy."),
        columns=COLUMNS,
        rows=[(trace.policy, trace.figures) for trace in traces],
    )
