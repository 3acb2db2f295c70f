"""The memory plan: one arena in which every intermediate value has a place for as long as it lives.

A value lives from the instruction that gives it to the last one that reads it. Values whose lives
overlap lie apart; others share memory, so that all layers reuse the space of one. Places are chosen
greedily, largest value first, at the lowest free offset (Pisarchyk & Lee, 2020, arXiv:2001.03288).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from refengine.program.ir import Program, concrete
from refengine.program.precision import Policy

ALIGNMENT = 64
"""Offsets are multiples of a cache line (bytes)."""


@dataclass(frozen=True)
class Placement:
    """Where a value lies (``nbytes`` from ``offset``) and when (instructions ``first`` to ``last``)."""

    offset: int
    nbytes: int
    first: int
    last: int


@dataclass(frozen=True)
class MemoryPlan:
    """Places for the intermediate values of a Program at given sizes.

    Attributes:
        sizes: the largest size of each symbol that the plan holds for.
        dtype: of every value.
        placements: by the index of a value. A value that shares another's memory (a view, a result that
            overwrites its operand) has that value's offset.
        arena_bytes: size of the arena.
    """

    sizes: Mapping[str, int]
    dtype: np.dtype[np.floating]
    placements: Mapping[int, Placement]
    arena_bytes: int


@dataclass
class _Buffer:
    """Memory that one or more values occupy in turn."""

    nbytes: int
    first: int
    last: int
    values: list[int]
    offset: int = -1


def plan_memory(program: Program, policy: Policy, sizes: Mapping[str, int]) -> MemoryPlan:
    """Plan the arena of a Program for at most these sizes of its symbols.

    The output is not placed: it is given to the caller.

    Clauses: OPS-4, CNV-14, PRG-7, PRG-8, PRG-9, PRG-10, PRG-11, PRG-12.
    """
    buffers = _buffers(program, policy.activations, sizes)
    arena_bytes = _place(buffers)
    placements = {
        value: Placement(b.offset, b.nbytes, b.first, b.last) for b in buffers for value in b.values
    }
    return MemoryPlan(dict(sizes), policy.activations, placements, arena_bytes)


def last_uses(program: Program) -> dict[int, int]:
    """Where each value is read last: an instruction's position, or the program's end for the output."""
    uses = {v.index: at for at, i in enumerate(program) for v in i.operands if v is not None}
    return uses | {program.output.index: len(program)}


def _buffers(program: Program, dtype: np.dtype[np.floating], sizes: Mapping[str, int]) -> list[_Buffer]:
    """One buffer per group of values that share memory, with the time it is needed."""
    uses = last_uses(program)
    holder: dict[int, _Buffer] = {}
    for at, instruction in enumerate(program):
        result, sharing = instruction.result, instruction.op.sharing
        if sharing == "state" or result is program.output:
            continue
        last = uses.get(result.index, at)
        source = instruction.operands[0] if instruction.operands else None
        shared = holder.get(source.index) if source is not None else None
        if shared is not None and (sharing == "view" or (sharing == "in_place" and shared.last <= at)):
            shared.last = max(shared.last, last)
            shared.values.append(result.index)
            holder[result.index] = shared
            continue
        nbytes = prod(concrete(result.shape, sizes)) * dtype.itemsize
        holder[result.index] = _Buffer(-(-nbytes // ALIGNMENT) * ALIGNMENT, at, last, [result.index])
    return list({id(buffer): buffer for buffer in holder.values()}.values())


def _place(buffers: list[_Buffer]) -> int:
    """Give every buffer the lowest offset free during its life, largest first; returns the arena's size."""
    placed: list[_Buffer] = []
    for buffer in sorted(buffers, key=lambda b: (-b.nbytes, b.first)):
        offset = 0
        for other in placed:  # in order of offset
            if other.first <= buffer.last and buffer.first <= other.last:
                if offset + buffer.nbytes <= other.offset:
                    break
                offset = max(offset, other.offset + other.nbytes)
        buffer.offset = offset
        insort(placed, buffer, key=lambda b: b.offset)
    return max((b.offset + b.nbytes for b in buffers), default=0)
