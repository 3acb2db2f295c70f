"""The memory plan: one arena in which every intermediate value has a place for as long as it lives.

A value lives from the instruction that gives it to the last one that reads it. Values whose lives
overlap lie apart; others share memory, so that all layers reuse the space of one. Working memory of an
instruction lies there too, and lives as long as that. Where a backend computes several instructions as one,
what any of them reads lives until the last. Places are chosen greedily at the lowest free offset, in each of
a few orders (Pisarchyk & Lee, 2020, arXiv:2001.03288), and the smallest arena is taken.
"""

from __future__ import annotations

from bisect import insort
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from refengine.ops.scratch import aligned
from refengine.program.fusion import Fusion
from refengine.program.ir import Instruction, Program, concrete
from refengine.program.precision import Policy

WorkspaceOf = Callable[[Instruction, Mapping[str, int]], int]
"""``workspace(instruction, sizes)``: bytes of working memory that an instruction needs at most."""


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
        dtype: of every value that has none of its own.
        placements: by the index of a value. A value that shares another's memory (a view, a result that
            overwrites its operand) has that value's offset; one that is never written has none.
        workspaces: by the position of an instruction: its working memory, where it needs any; that of
            instructions that run as one by the first one's.
        fusions: instructions that run as one.
        arena_bytes: size of the arena.
    """

    sizes: Mapping[str, int]
    dtype: np.dtype[np.floating]
    placements: Mapping[int, Placement]
    arena_bytes: int
    workspaces: Mapping[int, Placement] = field(default_factory=dict)
    fusions: tuple[Fusion, ...] = ()

    @property
    def least_bytes(self) -> int:
        """The most bytes that live at one instruction: no arena can be smaller."""
        places = {(p.offset, p.nbytes, p.first, p.last) for p in self.placements.values()}
        places |= {(p.offset, p.nbytes, p.first, p.last) for p in self.workspaces.values()}
        return max(
            (sum(n for _, n, a, b in places if a <= at <= b) for at in {first for _, _, first, _ in places}),
            default=0,
        )


@dataclass
class _Buffer:
    """Memory that one or more values occupy in turn, or an instruction's working memory."""

    nbytes: int
    first: int
    last: int
    values: list[int]


def plan_memory(
    program: Program,
    policy: Policy,
    sizes: Mapping[str, int],
    workspace: WorkspaceOf | None = None,
    fusions: Sequence[Fusion] = (),
) -> MemoryPlan:
    """Plan the arena of a Program for at most these sizes of its symbols.

    The output is not placed: it is given to the caller.

    Args:
        program: what will be computed.
        policy: gives the dtype of values that have none of their own.
        sizes: the most there may be of T, S and R.
        workspace: tells the working memory of each instruction; ``None`` where none is to be planned.
        fusions: instructions that run as one, no instruction in two of them; their own working memory is
            told there.

    Clauses: OPS-4, CNV-14, PRG-7, PRG-8, PRG-9, PRG-10, PRG-11, PRG-12, PRG-13, PRG-14, PRG-16.
    """
    buffers = _buffers(program, policy.activations, sizes, fusions)
    working = {}
    for fusion in fusions:
        if fusion.workspace:
            until = fusion.last if fusion.needed_until is None else fusion.needed_until
            working[fusion.first] = _Buffer(aligned(fusion.workspace), fusion.first, until, [])
    if workspace is not None:
        fused = {at for fusion in fusions for at in fusion.positions}
        for at, instruction in enumerate(program):
            if at not in fused and (nbytes := workspace(instruction, sizes)):
                working[at] = _Buffer(aligned(nbytes), at, at, [])
    offsets, arena_bytes = _place([*buffers, *working.values()])

    def placement(buffer: _Buffer) -> Placement:
        return Placement(offsets[id(buffer)], buffer.nbytes, buffer.first, buffer.last)

    return MemoryPlan(
        dict(sizes),
        policy.activations,
        {value: placement(buffer) for buffer in buffers for value in buffer.values},
        arena_bytes,
        {at: placement(buffer) for at, buffer in working.items()},
        tuple(fusions),
    )


def golden_workspace(instruction: Instruction, sizes: Mapping[str, int], policy: Policy) -> int:
    """Bytes of working memory that an instruction's golden function takes at most, for steps up to ``sizes``.

    A symbol that ``sizes`` does not name counts as 1: the numbers of blocks, on which no working memory
    depends. Positions per block (``P``) must be named for a sealed KV cache.

    Clauses: PRG-13.
    """
    if instruction.op.workspace is None:
        return 0
    named = {"S1": sizes.get("S", 1) + 1, **sizes}
    shapes = [
        None if v is None else tuple(d if isinstance(d, int) else named.get(d, 1) for d in v.shape)
        for v in instruction.operands
    ]
    shapes += [None] * (len(instruction.op.signature.operands) - len(shapes))
    return instruction.op.workspace(shapes, instruction.attributes, policy.activations.itemsize)


def last_uses(program: Program) -> dict[int, int]:
    """Where each value is read last: an instruction's position, or the program's end for the output."""
    uses = {v.index: at for at, i in enumerate(program) for v in i.operands if v is not None}
    return uses | {program.output.index: len(program)}


def _buffers(
    program: Program, dtype: np.dtype[np.floating], sizes: Mapping[str, int], fusions: Sequence[Fusion]
) -> list[_Buffer]:
    """One buffer per group of values that share memory, with the time it is needed."""
    uses = last_uses(program)
    fusion_at = {at: fusion for fusion in fusions for at in fusion.positions}
    unwritten = {index for fusion in fusions for index in fusion.unwritten}
    holder: dict[int, _Buffer] = {}

    def ends(at: int) -> int:
        return fusion_at[at].last if at in fusion_at else at

    def read_by_others(buffer: _Buffer, at: int) -> bool:
        """Whether instructions that run as one with that at a position read what it may overwrite."""
        others = (program.instructions[other] for other in fusion_at[at].positions if other != at)
        return any(v is not None and holder.get(v.index) is buffer for i in others for v in i.operands)

    for at, instruction in enumerate(program):
        result, sharing = instruction.result, instruction.op.sharing
        if sharing == "state" or result is program.output or result.index in unwritten:
            continue
        last = ends(uses.get(result.index, at))
        source = instruction.operands[0] if instruction.operands else None
        shared = holder.get(source.index) if source is not None else None
        if shared is not None and (
            sharing == "view"
            or (
                sharing == "in_place"
                and shared.last <= ends(at)
                and not (at in fusion_at and read_by_others(shared, at))
            )
        ):
            shared.last = max(shared.last, last)
            shared.values.append(result.index)
            holder[result.index] = shared
            continue
        nbytes = prod(concrete(result.shape, sizes)) * (result.dtype or dtype).itemsize
        holder[result.index] = _Buffer(aligned(nbytes), at, last, [result.index])
    return list({id(buffer): buffer for buffer in holder.values()}.values())


def _place(buffers: list[_Buffer]) -> tuple[dict[int, int], int]:
    """Offsets of buffers, by their ids, and the size of the arena: the smallest of several orders'."""
    living = defaultdict[int, int](int)
    for buffer in buffers:
        for at in range(buffer.first, buffer.last + 1):
            living[at] += buffer.nbytes
    orders: tuple[Callable[[_Buffer], tuple[int, ...]], ...] = (
        lambda b: (-b.nbytes, b.first),
        lambda b: (b.first, -b.nbytes),
        lambda b: (b.first - b.last, -b.nbytes),
        lambda b: (-max(living[at] for at in range(b.first, b.last + 1)), b.first - b.last, -b.nbytes),
    )
    found: list[tuple[dict[int, int], int]] = []
    for order in orders:
        found.append(_placed(sorted(buffers, key=order)))
        if found[-1][1] == max(living.values(), default=0):  # all that lives at once: none is smaller
            break
    return min(found, key=lambda placed: placed[1])


def _placed(buffers: list[_Buffer]) -> tuple[dict[int, int], int]:
    """Give every buffer, in this order, the lowest offset that is free during its life."""
    placed: list[tuple[int, _Buffer]] = []  # in order of offset
    end = 0
    for buffer in buffers:
        offset = 0
        for start, other in placed:
            if other.first <= buffer.last and buffer.first <= other.last:
                if offset + buffer.nbytes <= start:
                    break
                offset = max(offset, start + other.nbytes)
        insort(placed, (offset, buffer), key=lambda p: p[0])
        end = max(end, offset + buffer.nbytes)
    return {id(buffer): offset for offset, buffer in placed}, end
