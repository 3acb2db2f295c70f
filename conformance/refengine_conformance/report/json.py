"""The report as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from refengine_conformance.conformance import Conformance
from refengine_conformance.runner import Result


def report_json(run: Conformance) -> dict[str, Any]:
    """The report as what ``json`` can write; an infinite ``worst`` is the string ``"inf"``."""
    return {
        "backend": {"name": run.backend, "description": run.description, "devices": list(run.devices)},
        "refengine": run.version,
        "python": run.python,
        "numpy": run.numpy,
        "system": run.system,
        "profile": asdict(run.profile),
        "seed": run.seed,
        "fallback": run.fallback,
        "partial": run.partial,
        "policies": list(run.policies),
        "seconds": round(run.seconds, 3),
        "levels": {name: {**asdict(level), "reached": level.reached} for name, level in run.levels.items()},
        "support": [{**asdict(row), "standing": run.standing(row)} for row in run.support],
        "results": [_result(result) for result in run.results],
    }


def _result(result: Result) -> dict[str, Any]:
    item, outcome = result.property, result.outcome
    worst = "inf" if outcome.worst is not None and math.isinf(outcome.worst) else outcome.worst
    return {
        "property": item.id,
        "clause": item.clause,
        "level": item.level,
        "tier": item.tier,
        "parts": sorted(item.parts),
        "policy": result.policy,
        "outcome": outcome.kind,
        "seconds": round(outcome.seconds, 3),
        "message": outcome.message,
        "example": outcome.example,
        "worst": worst,
    }
