"""Weights that the device has no room for: which they are, where they pass, and when they are copied.

They lie packed in pinned memory of the host. In every step each is copied to the device before the launch
that reads it, in a queue of copies, while earlier launches run. Weights that one launch may read together are
a *unit*. Streamed units go through one stretch of the device's memory, the *passage*, in turn at its lower
and at its upper end; it is as large as any two that follow each other. So the copy of a unit waits for what
reads the last unit but one before it, and not for what reads the last.

Tables that are only looked up stay where they are: the device reads pinned memory at its address, and a step
reads a row for each token, which the bus brings sooner than the whole table.

A step uses every weight in turn, and the next step again: which units are streamed is chosen once (see
``refengine.backend.weights.plan_weights``), and so are their places and the order of copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType

from refengine.backend.weights import PlannedWeight, WeightPlan
from refengine.program import Instruction, Program
from refengine_cupy.packing import held_as
from refengine_cupy.runtime import Await, Fetch, Launch, Work

FUSED = ("linear_a8", "linear_a16")
"""Products of which several are computed by one launch, where they read the same activations."""

PRODUCTS = (*FUSED, "linear")
"""Ops that read all of a matrix; ``embedding`` reads rows of one."""


@dataclass(frozen=True)
class Unit:
    """Products that one launch may compute, so that their weights are on the device at once.

    Attributes:
        products: the instructions, by the index of their results.
        roles: of their matrices, each once.
    """

    products: tuple[int, ...]
    roles: tuple[str, ...]


@dataclass(frozen=True)
class Stretch:
    """A unit's streamed weights on their way: where they are in the host's memory, and in the passage.

    Attributes:
        number: of the use, in a step.
        start, stop: bytes of the passage.
        copies: source, destination and size of each weight.
    """

    number: int
    start: int
    stop: int
    copies: tuple[tuple[int, int, int], ...]

    def meets(self, other: Stretch) -> bool:
        """Whether they lie over each other."""
        return self.start < other.stop and other.start < self.stop


def units(program: Program, encodings: Mapping[str, str]) -> tuple[Unit, ...]:
    """A program's products in their order, those together that may become one launch.

    These follow each other, views between them aside, and have the same activations and the encoding in which
    the device holds their weights. Lowering fuses no others, and of these perhaps fewer.

    Args:
        encodings: of weights as stored, by role.
    """
    found: list[list[Instruction]] = []
    last: Instruction | None = None
    for instruction in program:
        if instruction.op.sharing == "view":
            continue
        if instruction.op.name in PRODUCTS:
            if last is not None and found and _together(last, instruction, encodings):
                found[-1].append(instruction)
            else:
                found.append([instruction])
        last = instruction
    return tuple(
        Unit(tuple(i.result.index for i in run), tuple(dict.fromkeys(_role(i) for i in run))) for run in found
    )


def _together(last: Instruction, instruction: Instruction, encodings: Mapping[str, str]) -> bool:
    return (
        last.op.name == instruction.op.name
        and instruction.op.name in FUSED
        and last.operands[0] is instruction.operands[0]
        and held_as(encodings[_role(last)]) == held_as(encodings[_role(instruction)])
    )


def _role(product: Instruction) -> str:
    weight = product.operands[1]
    return "" if weight is None else weight.name


def plan_streamed(
    program: Program, planned: Mapping[str, PlannedWeight], shapes: Mapping[str, tuple[int, ...]], limit: int
) -> WeightPlan:
    """Choose what of a program's weights is on the device, within ``limit`` bytes of it.

    Matrices that are multiplied are streamed and those that are only looked up are pinned, where there is no
    room; vectors, and what any other op reads, are on the device always. Room goes first to units, in van der
    Corput's order of their places in the program (the first, the middle, the quarters …), each that fits;
    then to tables, of which a step reads few rows. So those that are streamed stand apart, and copies go on
    throughout a step. Where the limit is too small all are streamed, and the total shows what is needed.

    Holding one more unit never takes less in all, so one round finds all that fit.

    Args:
        planned: every weight as it is held on the device, by role.
        shapes: of weights.
    """
    runs = [unit.roles for unit in units(program, {role: w.encoding for role, w in planned.items()})]
    movable = _movable(program, shapes)
    multiplied = {role for roles in runs for role in roles}
    away = {role for role in planned if role in movable}
    sizes = {role: weight.nbytes for role, weight in planned.items()}

    def needed(candidates: set[str]) -> int:
        streamed = [[role for role in roles if role in candidates] for roles in runs]
        here = sum(nbytes for role, nbytes in sizes.items() if role not in candidates)
        return here + _passage([sum(sizes[role] for role in roles) for roles in streamed if roles])

    chances = [set(runs[place]) for place in _spread(len(runs))]
    chances += [{role} for role in planned if role in away - multiplied]
    for roles in chances:
        if roles & away and needed(away - roles) <= limit:
            away -= roles
    passing = dict[str, int]()
    for roles_of in runs:
        together = [role for role in roles_of if role in away]
        for role in together:
            passing[role] = max(passing.get(role, 0), sum(sizes[other] for other in together))
    held = {
        role: weight
        if role not in away
        else replace(weight, holding="streamed", nbytes=passing[role], host=sizes[role])
        if role in passing
        else replace(weight, holding="pinned", nbytes=0, host=sizes[role])
        for role, weight in planned.items()
    }
    streamed = [sum(sizes[role] for role in roles if role in away) for roles in runs]
    return WeightPlan(MappingProxyType(held), passage=_passage([nbytes for nbytes in streamed if nbytes]))


def _passage(sizes: Sequence[int]) -> int:
    """Bytes of any two that follow each other, or of the only one."""
    return max((a + b for a, b in pairwise(sizes)), default=sum(sizes))


def _movable(program: Program, shapes: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    """Roles of matrices that are multiplied or looked up, and read by nothing else."""
    ways = (*PRODUCTS, "embedding")
    elsewhere = {program.output.name}
    for instruction in program:
        matrix = 1 if instruction.op.name in ways else None
        read = enumerate(instruction.operands)
        elsewhere |= {value.name for at, value in read if value is not None and at != matrix}
    return frozenset(role for role, shape in shapes.items() if len(shape) == 2 and role not in elsewhere)


def _spread(count: int) -> list[int]:
    """Numbers below ``count``, the first few of them spread evenly: by their bits, read backwards."""
    bits = max(1, (count - 1).bit_length())
    backwards = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(1 << bits))
    return [number for number in backwards if number < count]


class Passing:
    """Where streamed weights are when a launch reads them.

    Args:
        program: what is computed.
        encodings: of its weights as stored, by role.
        sources: of streamed weights, address in the host's memory and size, by role.
        address: of the passage.
        nbytes: of the passage.
    """

    def __init__(
        self,
        program: Program,
        encodings: Mapping[str, str],
        sources: Mapping[str, tuple[int, int]],
        address: int,
        nbytes: int,
    ) -> None:
        self._stretches: dict[int, Stretch] = {}
        self._places: dict[tuple[int, str], int] = {}
        number = 0
        for unit in units(program, encodings) if sources else ():
            roles = [role for role in unit.roles if role in sources]
            size = sum(sources[role][1] for role in roles)
            if not 0 < size <= nbytes:  # of another program: read where they lie, over the bus
                continue
            start = 0 if number % 2 == 0 else nbytes - size
            copies, at = [], address + start
            for role in roles:
                source, count = sources[role]
                copies.append((source, at, count))
                self._places |= {(product, role): at - source for product in unit.products}
                at += count
            stretch = Stretch(number, start, start + size, tuple(copies))
            self._stretches |= dict.fromkeys(unit.products, stretch)
            number += 1

    def moved(self, product: int, role: str) -> int | None:
        """How much further on a weight is when a product (by its result) reads it; ``None``: it stays."""
        return self._places.get((product, role))

    def read_by(self, instructions: Iterable[Instruction]) -> tuple[Stretch, ...]:
        """What these read in passing."""
        found = {self._stretches.get(i.result.index) for i in instructions}
        return tuple(sorted((s for s in found if s is not None), key=lambda s: s.number))


def with_fetches(parts: Sequence[tuple[Sequence[Launch], Sequence[Stretch]]]) -> list[Work]:
    """Launches with the copies of what they read, each as early as the launches before it allow.

    Args:
        parts: launches in their order, with what they read in passing; what is read by no launch is not
            copied.
    """
    parts = [(launches, read) for launches, read in parts if launches]
    first, last = dict[Stretch, int](), dict[Stretch, int]()
    for at, (_, read) in enumerate(parts):
        for stretch in read:
            first.setdefault(stretch, at)
            last[stretch] = at
    order = sorted(first, key=lambda stretch: stretch.number)
    before: list[list[Stretch]] = [[] for _ in parts]
    begun = 0
    for n, stretch in enumerate(order):
        begun = max([begun, *(last[other] + 1 for other in order[:n] if other.meets(stretch))])
        before[begun].append(stretch)
    work: list[Work] = []
    fetched, done = 0, dict[Stretch, int]()
    for at, (launches, read) in enumerate(parts):
        for stretch in before[at]:
            work += [Fetch(*copy) for copy in stretch.copies]
            fetched += len(stretch.copies)
            done[stretch] = fetched
        work += [Await(done[stretch]) for stretch in read if first[stretch] == at]
        work += launches
    return work
