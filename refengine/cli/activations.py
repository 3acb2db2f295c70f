"""What intermediate values would take without a plan, to hold the arena against."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from refengine.cli.charts.arena import name

if TYPE_CHECKING:
    from refengine.program import MemoryPlan, Program


@dataclass(frozen=True)
class Activations:
    """Three ways to hold intermediate values, each with the same working memory of ops.

    Attributes:
        kept: bytes where every value has memory of its own (a view has its operand's).
        named: where values of one name have one buffer in all layers, as in llama2.c's run state.
        arena: as planned.
        workspace: of that, working memory of the op that needs most.
    """

    kept: int
    named: int
    arena: int
    workspace: int


def activations(program: Program, plan: MemoryPlan) -> Activations:
    """Count them."""
    from refengine.program import concrete

    kept = 0
    named: dict[str, int] = defaultdict(int)
    for instruction in program:
        if instruction.result.index not in plan.placements or instruction.op.sharing == "view":
            continue
        nbytes = prod(concrete(instruction.result.shape, plan.sizes)) * plan.dtype.itemsize
        kept += nbytes
        if instruction.op.sharing != "in_place" or instruction.op.name == "rms_norm":
            named[name(instruction)] = max(named[name(instruction)], nbytes)
    workspace = max((place.nbytes for place in plan.workspaces.values()), default=0)
    return Activations(kept + workspace, sum(named.values()) + workspace, plan.arena_bytes, workspace)
