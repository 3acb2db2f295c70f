"""The page of ``refengine plan --html``."""

from __future__ import annotations

from dataclasses import replace

from markupsafe import Markup

from refengine.cli.baseline import BASIS, baselines
from refengine.cli.charts.arena import KINDS, draw, overview, whole
from refengine.cli.charts.bars import stacked_bars
from refengine.cli.charts.growth import Curve, growth
from refengine.cli.charts.pages import render
from refengine.cli.figures import amount, bytes_figure
from refengine.cli.plan_summary import PlanSummary, headline, kv_name, purposes, versus

PURPOSES = {
    "weights": "weights, decoded",
    "mapped": "weights, as stored",
    "arena": "arena",
    "logits": "logits",
    "kv": "KV cache",
    "process": "process",
}

POINTS = 48
"""Contexts at which the KV cache's growth is computed, about."""


def plan_page(summary: PlanSummary) -> str:
    """The page, complete."""
    program, activations = summary.plan.program, summary.plan.activations
    kinds = {kind: KINDS[kind] for kind in KINDS if kind != "workspace" or activations.workspaces}
    return render(
        "plan_page.html",
        summary=summary,
        found=summary.forecast,
        headline=headline(summary),
        lead=_lead(summary),
        kinds=kinds,
        purposes=PURPOSES,
        rows=purposes(summary),
        overview=draw(program, activations, overview(program), class_="fit"),
        values=_values_alone(summary),
        whole=draw(program, activations, whole(program)),
        totals=_totals(summary),
        unplanned=_unplanned(summary),
        growth=_growth(summary),
        kv_name=kv_name(summary),
        basis=BASIS,
        tokens=amount(summary.plan.config.token_budget, "token"),
    )


def _values_alone(summary: PlanSummary) -> Markup | None:
    """The arena planned without working memory, where there is any."""
    from refengine.program import plan_memory

    plan = summary.plan
    if not plan.activations.workspaces:
        return None
    fusions = [replace(fusion, workspace=0) for fusion in plan.activations.fusions]
    values = plan_memory(plan.program, plan.policy, plan.activations.sizes, fusions=fusions)
    return draw(plan.program, values, overview(plan.program), class_="fit")


def _lead(summary: PlanSummary) -> str:
    """The circumstances in a sentence."""
    found, plan = summary.forecast, summary.plan
    return (
        f"{amount(found.batch, 'sequence').capitalize()} of {amount(found.context, 'position')}, computed in "
        f"{plan.policy.name} on {summary.backend}, {amount(plan.config.token_budget, 'token')} per step at "
        f"most, keys and values kept in {kv_name(summary)}."
    )


def _totals(summary: PlanSummary) -> str:
    peak, purposes = summary.forecast.peak, summary.purposes
    ours = {
        "weights": peak.weights,
        "mapped": peak.mapped,
        "arena": peak.arena,
        "logits": peak.logits,
        "kv": peak.kv_cache,
        "process": purposes["process"],
    }
    rows = [("refengine, as planned", ours, "with everything")]
    rows += [
        (
            each.name,
            {"weights theirs": each.weights, "kv": each.kv_cache},
            f"weights and KV cache alone; ours {versus(summary.weights_and_kv, each.total)}",
        )
        for each in summary.baselines
    ]
    return stacked_bars(
        rows, PURPOSES | {"weights theirs": "weights"}, "Bytes by purpose, and two ways to count Transformers"
    )


def _unplanned(summary: PlanSummary) -> str:
    found = summary.activations
    rest = found.arena - found.workspace

    def row(name: str, total: int) -> tuple[str, dict[str, int], str]:
        remark = "" if total == found.arena else f"the arena takes {1 - found.arena / total:.1%} less"
        return name, {"arena": total - found.workspace, "workspace": found.workspace}, remark

    rows = [
        ("this arena", {"arena": rest, "workspace": found.workspace}, ""),
        row("one buffer per name, shared by all layers", found.named),
        row("every value kept", found.kept),
    ]
    names = {"arena": "intermediate values", "workspace": "working memory of the op that needs most"}
    return stacked_bars(rows, names, "The arena beside two ways without a plan")


def _growth(summary: PlanSummary) -> str:
    """KV bytes over the context: ours at each block, and Transformers in float16."""
    from refengine.forecast import forecast

    plan, batch, most = summary.plan, summary.forecast.batch, summary.forecast.context
    contexts = sorted({*range(1, most, max(1, most // POINTS)), most})
    ours = [(c, forecast(plan, c, batch).peak.kv_cache) for c in contexts]
    theirs = [(c, baselines(summary.model, plan, c, batch)[0].kv_cache) for c in contexts]
    curves = [
        Curve("refengine", "ours", [(0, 0), *ours]),
        Curve("Transformers, float16", "other", [(0, 0), *theirs]),
    ]
    return growth(curves, f"KV cache over the context, up to {bytes_figure(ours[-1][1])}")
