"""All that ``refengine plan`` tells, as data."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from refengine.cli.activations import Activations, activations
from refengine.cli.baseline import BASIS, Baseline, baselines
from refengine.cli.figures import amount, bytes_figure

if TYPE_CHECKING:
    from refengine.backend.weights import PlannedWeight
    from refengine.engine_plan import EnginePlan
    from refengine.forecast import Forecast
    from refengine.models import Model


@dataclass(frozen=True)
class WeightRow:
    """Weights of one encoding that are held in one way.

    Attributes:
        encoding: as they are stored.
        holding: ``decoded``, ``mapped``, ``streamed``, ``repacked`` or ``pinned``.
        tensors, weights: their numbers.
        stored: bytes in the file.
        held: bytes that this takes, of pinned ones on the host.
    """

    encoding: str
    holding: str
    tensors: int
    weights: int
    stored: int
    held: int


@dataclass(frozen=True)
class PlanSummary:
    """A forecast, its parts by name, and what to hold it against.

    Attributes:
        name: the model's, as the user calls it.
        model: it.
        backend: its name.
        forecast: what will be held.
        weights: by encoding and holding, the most bytes first.
        activations: the arena beside two ways without a plan.
        baselines: Transformers in float16, and at equal precision.
    """

    name: str
    model: Model
    backend: str
    forecast: Forecast
    weights: tuple[WeightRow, ...]
    activations: Activations
    baselines: tuple[Baseline, ...]

    @property
    def plan(self) -> EnginePlan:
        """The engine's plan."""
        return self.forecast.plan

    @property
    def purposes(self) -> dict[str, int]:
        """Bytes at the peak by purpose, the process itself included, or a device's context."""
        found = {**asdict(self.forecast.peak), "process": self.plan.process_bytes}
        if self.plan.device.own_memory:
            return {**found, "context": self.plan.device.context_bytes}
        del found["host"]
        return found

    @property
    def weights_and_kv(self) -> int:
        """What the baselines count, of this plan."""
        peak = self.forecast.peak
        return peak.weights + peak.mapped + peak.kv_cache


def summarize(name: str, model: Model, backend: str, found: Forecast) -> PlanSummary:
    """Gather what a plan says."""
    plan = found.plan
    return PlanSummary(
        name,
        model,
        backend,
        found,
        _weight_rows(model, plan),
        activations(plan.program, plan.activations),
        baselines(model, plan, found.context, found.batch),
    )


def headline(summary: PlanSummary) -> str:
    """What is planned, in a line."""
    found, plan = summary.forecast, summary.plan
    return (
        f"{summary.name}: {amount(found.batch, 'sequence')} of {amount(found.context, 'position')}, "
        f"{plan.policy.name} on {summary.backend}, KV cache in {kv_name(summary)}, "
        f"{amount(plan.config.token_budget, 'token')} per step at most"
    )


def kv_name(summary: PlanSummary) -> str:
    """The KV cache's precision."""
    return summary.plan.config.kv_dtype or summary.plan.layout.dtype.name


def purposes(summary: PlanSummary) -> list[tuple[str, int, str]]:
    """Name, bytes and a remark for every purpose, then the sums."""
    found, plan = summary.forecast, summary.plan
    by_purpose, working = summary.purposes, summary.activations.workspace
    limit, own = plan.limit, plan.device.own_memory
    allowed = "" if limit is None else f"of {bytes_figure(limit)} allowed"
    rows = [
        ("weights, repacked" if own else "weights, decoded", by_purpose["weights"], ""),
        ("weights, in passage" if own else "weights, as stored", by_purpose["mapped"], ""),
        ("arena", by_purpose["arena"], f"working memory of ops: up to {bytes_figure(working)} of it"),
        ("logits", by_purpose["logits"], f"{amount(found.batch, 'row')} of {plan.program.vocabulary_size:,}"),
        ("KV cache", by_purpose["kv_cache"], f"{bytes_figure(found.position_bytes)} a position"),
        ("engine", found.peak.total, ""),
    ]
    process = ("process", by_purpose["process"], "Python, NumPy and refengine, a constant")
    if not own:
        return [*rows, process, ("peak", found.limited_bytes, allowed)]
    return [
        *rows,
        ("context", by_purpose["context"], "driver and code of kernels, a constant"),
        ("peak on the device", found.limited_bytes, allowed),
        ("weights on the host", by_purpose["host"], ""),
        ("logits on the host", by_purpose["logits"], ""),
        process,
        ("peak on the host", found.process_bytes, "beside the device, in no limit"),
    ]


def versus(ours: int, theirs: int) -> str:
    """How much less or more we take."""
    change = ours / theirs - 1
    return "the same" if ours == theirs else f"{abs(change):.0%} {'less' if change < 0 else 'more'}"


def plan_json(summary: PlanSummary) -> dict[str, Any]:
    """The summary as JSON has it; all sizes in bytes."""
    found, plan = summary.forecast, summary.plan
    return {
        "model": summary.name,
        "backend": summary.backend,
        "policy": plan.policy.name,
        "kv_dtype": plan.config.kv_dtype or plan.layout.dtype.name,
        "context": found.context,
        "batch": found.batch,
        "token_budget": plan.config.token_budget,
        "limit": plan.limit,
        "weights": [asdict(row) for row in summary.weights],
        "peak": {
            **summary.purposes,
            "engine": found.peak.total,
            "total": found.limited_bytes,
            **({"host_total": found.process_bytes} if plan.device.own_memory else {}),
            "moment": found.moment,
        },
        "kv_bytes_per_position": found.position_bytes,
        "activations": asdict(summary.activations),
        "baselines": [{**asdict(each), "total": each.total} for each in summary.baselines],
        "baselines_basis": BASIS,
        "weights_and_kv": summary.weights_and_kv,
    }


def _weight_rows(model: Model, plan: EnginePlan) -> tuple[WeightRow, ...]:
    groups = defaultdict[tuple[str, str], list["PlannedWeight"]](list)
    sizes = defaultdict[tuple[str, str], int](int)
    for role, weight in plan.weights.weights.items():
        groups[weight.encoding, weight.holding].append(weight)
        sizes[weight.encoding, weight.holding] += model.weights[role].size
    rows = [
        WeightRow(
            encoding,
            holding,
            len(group),
            sizes[encoding, holding],
            sum(weight.stored for weight in group),
            max(w.nbytes for w in group)
            if holding == "streamed"
            else sum(w.host if holding == "pinned" else w.nbytes for w in group),
        )
        for (encoding, holding), group in groups.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.stored))
