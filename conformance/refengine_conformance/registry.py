"""Properties: checks that name the clause they prove."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from hypothesis.strategies import DataObject

    from refengine_conformance.subject import Subject

Level = Literal["L1", "L2", "L3", "M"]
"""L1 values, L2 deterministic, L3 independent of the schedule, M memory."""

Tier = Literal["ops", "models", "state"]
"""Single ops; whole tiny models; the parts that remember (allocator, KV cache, scheduler, sampler)."""

PLAIN = ("float32", "float64")
"""Policies whose products are those of decoded weights."""

Check = Callable[["Subject", "DataObject"], None]


@dataclass(frozen=True)
class Property:
    """One check.

    Attributes:
        clause: the clause it proves.
        name: of the function, unique within its clause.
        check: draws what it needs and raises ``AssertionError`` where the clause is broken.
        level: what is reached where it holds.
        tier: how much it takes together.
        parts: which parts of a subject it exercises: names of ops, or ``allocator``, ``kv_cache``,
            ``scheduler``, ``sampler``, ``decoder``, ``relayout``, ``loader``, ``backend``, ``memory_plan``. A
            fault in one of these is looked for here.
        policies: names of the precision policies that it is about: under others it is not held.
    """

    clause: str
    name: str
    check: Check
    level: Level
    tier: Tier
    parts: frozenset[str]
    policies: tuple[str, ...] = PLAIN

    @property
    def id(self) -> str:
        """``ATT-1:hidden_keys_have_no_weight``."""
        return f"{self.clause}:{self.name}"


def holds(
    clause: str,
    *parts: str,
    level: Level = "L1",
    tier: Tier = "ops",
    policies: tuple[str, ...] = PLAIN,
) -> Callable[[Check], Check]:
    """Declare a check as a property of a clause; the function stays an ordinary function."""

    def declare(check: Check) -> Check:
        check.__dict__["property"] = Property(
            clause, check.__name__, check, level, tier, frozenset(parts), policies
        )
        return check

    return declare


@cache
def all_properties() -> tuple[Property, ...]:
    """All properties of the suite, in the order of their modules and lines."""
    package: Any = import_module("refengine_conformance.properties")
    modules = [import_module(f"{package.__name__}.{m.name}") for m in iter_modules(package.__path__)]
    return tuple(
        item.__dict__["property"]
        for module in modules
        for item in vars(module).values()
        if callable(item) and isinstance(getattr(item, "__dict__", {}).get("property"), Property)
    )
