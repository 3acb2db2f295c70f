"""The words that all reports share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from refengine_conformance.conformance import Conformance
from refengine_conformance.outcome import Kind
from refengine_conformance.runner import Result

WORDS: Mapping[Kind, str] = MappingProxyType(
    {
        "passed": "pass",
        "unsupported": "unsupported",
        "broken": "broken",
        "unsteady": "unsteady",
        "raised": "raised an error",
        "crashed": "crashed",
        "hung": "hung",
    }
)

_WORST_FIRST: tuple[Kind, ...] = ("crashed", "hung", "raised", "unsteady", "broken", "unsupported", "passed")


def headline(run: Conformance) -> str:
    """What a person wants to know first."""
    reached = [name for name, level in run.levels.items() if level.reached]
    if run.findings:
        broken = len({r.property.clause for r in run.findings})
        return f"{run.backend} breaks {amount(broken, 'clause')}"
    if not reached:
        return f"{run.backend} reaches no level"
    levels = " and ".join(filter(None, [", ".join(reached[:-1]), reached[-1]]))
    of = " on the clauses chosen" if run.partial else ""
    return f"{run.backend} reaches {levels}{of}"


def circumstances(run: Conformance) -> str:
    """How that was found out."""
    clauses = len(run.by_clause)
    stand_ins = " Golden ops stood in for what it lacks." if run.fallback and any_lack(run) else ""
    return (
        f"{amount(len(run.results), 'check')} of {amount(clauses, 'clause')} under "
        f"{' and '.join(run.policies)}: {run.profile.examples} examples each, seed {run.seed}, "
        f"{run.seconds:.0f} s.{stand_ins}"
    )


def any_lack(run: Conformance) -> bool:
    """Whether the backend lacks anything."""
    return any(row.reason for row in run.support)


def by_property(findings: Iterable[Result]) -> list[list[Result]]:
    """Findings of one property under several policies together."""
    grouped: dict[str, list[Result]] = {}
    for finding in findings:
        grouped.setdefault(finding.property.id, []).append(finding)
    return list(grouped.values())


def worst_kind(results: Iterable[Result]) -> Kind | None:
    """The gravest of the outcomes; ``None`` where there is none."""
    return min((r.outcome.kind for r in results), key=_WORST_FIRST.index, default=None)


def worst_error(result: Result) -> str:
    """How far the result lies off, where the property told."""
    worst = result.outcome.worst
    if worst is None:
        return ""
    return "off where no error is allowed" if math.isinf(worst) else f"off by {worst:.3g} times its bound"


def again(run: Conformance, result: Result) -> str:
    """The command that shows a finding again."""
    return (
        f"refengine conform --backend {run.backend} --clause {result.property.clause} "
        f"--policy {result.policy} --profile {run.profile.name} --seed {run.seed}"
        f"{' --fallback' if run.fallback else ''}"
    )


def amount(count: int, noun: str) -> str:
    """``1 clause``, ``2 clauses``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
