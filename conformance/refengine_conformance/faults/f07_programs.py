"""Faults of tracing and of the memory plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from refengine.backend import load
from refengine.backend.interpreter import InterpretedProgram
from refengine.backend.numpy_backend import NumpyBackend
from refengine.models import Model, forward
from refengine.ops import Activation, FloatArray, ShapeError, linear
from refengine.program import (
    Instruction,
    MemoryPlan,
    Placement,
    Policy,
    Program,
    SymbolicWeights,
    Tracer,
    Value,
    plan_memory,
    symbolic_inputs,
)
from refengine_conformance.faults.fault import Fault, faulty_op
from refengine_conformance.subject import Subject


def _golden(**parts: Any) -> Subject:
    return Subject(partial(load, "numpy"), **parts)


def _traced_by(make: Callable[[], Tracer]) -> Callable[[], Subject]:
    """A subject that records everything with another tracer."""

    def trace(model: Model) -> Program:
        tracer, layers = make(), enumerate(model.spec.layers)
        weights = SymbolicWeights(tracer, {role: tensor.shape for role, tensor in model.weights.items()})
        caches = [
            tracer.symbol(f"layers.{i}.cache", "state", ("B", "P", layer.kv_heads, layer.head_size))
            for i, layer in layers
        ]
        inputs = symbolic_inputs(tracer, len(model.spec.kv_groups))
        return tracer.finish(forward(tracer, model.spec, weights, caches, inputs))

    return partial(_golden, tracer=make, trace=trace)


class _RecordsTwice(Tracer):
    def finish(self, output: Value) -> Program:
        program = super().finish(output)
        return Program((*program.instructions, program.instructions[0]), output)


class _KeepsAllRows(Tracer):
    def _record(self, op: Any, operands: Any, attributes: Any) -> Value:
        result = super()._record(op, operands, attributes)
        if op.name == "take_rows":
            result = replace(result, shape=(operands[0].shape[0], *result.shape[1:]))
            self._instructions[-1] = replace(self._instructions[-1], result=result)
        return result


class _Broadcasts(Tracer):
    def _record(self, op: Any, operands: Any, attributes: Any) -> Value:
        try:
            return super()._record(op, operands, attributes)
        except ShapeError:
            result = self.symbol(op.name, "result", operands[0].shape)
            self._instructions.append(Instruction(op, operands, attributes, result, None))
            return result


class _WritesNumbersAsText(Tracer):
    def _record(self, op: Any, operands: Any, attributes: Any) -> Value:
        short = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in attributes.items()}
        return super()._record(op, operands, short)


def _planned_by(change: Callable[[Program, MemoryPlan], MemoryPlan]) -> Callable[[], Subject]:
    """A subject whose plans are changed."""
    return partial(_golden, plan=lambda program, *rest: change(program, plan_memory(program, *rest)))


def _overwrites_at_once(program: Program, plan: MemoryPlan) -> MemoryPlan:
    places = dict(plan.placements)
    for i in program:
        first = i.operands[0] if i.operands else None
        if (
            i.op.sharing == "in_place"
            and first is not None
            and first.index in places
            and i.result.index in places
        ):
            places[i.result.index] = places[first.index]
    return replace(plan, placements=places)


def _forgets_views(program: Program, *rest: Any) -> MemoryPlan:
    """Plans as if a view were a value of its own, then gives it its source's place."""
    views = {i.result.index: i.operands[0] for i in program if i.op.sharing == "view"}
    fresh = tuple(
        replace(i, op=replace(i.op, sharing="fresh")) if i.result.index in views else i for i in program
    )
    plan = plan_memory(Program(fresh, program.output), *rest)
    places = dict(plan.placements)
    for index, source in views.items():
        if source is not None and index in places and source.index in places:
            places[index] = places[source.index]
    return replace(plan, placements=places)


def _fuses_late(program: Program, policy: Policy, sizes: Any, workspace: Any, fusions: Any) -> MemoryPlan:
    """Plans as if of what runs as one nothing ran before the last."""
    last = [replace(fusion, first=fusion.last) for fusion in fusions]
    plan = plan_memory(program, policy, sizes, workspace, last)
    first = {fusion.last: fusion.first for fusion in fusions}
    return replace(plan, workspaces={first.get(at, at): place for at, place in plan.workspaces.items()})


def _packs_tightly(program: Program, plan: MemoryPlan) -> MemoryPlan:
    places, workspaces = (
        {v: replace(p, offset=p.offset // 64 * 72) for v, p in of.items()}
        for of in (plan.placements, plan.workspaces)
    )
    end = max(_end(places), _end(workspaces))
    return replace(plan, placements=places, workspaces=workspaces, arena_bytes=end)


def _rounds_up(program: Program, plan: MemoryPlan) -> MemoryPlan:
    return replace(plan, arena_bytes=1 << plan.arena_bytes.bit_length())


def _places_the_output(program: Program, plan: MemoryPlan) -> MemoryPlan:
    size = next(iter(plan.placements.values())).nbytes
    places = {**plan.placements, program.output.index: Placement(plan.arena_bytes, size, 0, len(program))}
    return replace(plan, placements=places, arena_bytes=_end(places))


def _shares_nothing(program: Program, plan: MemoryPlan) -> MemoryPlan:
    moved: dict[tuple[int, int, int], int] = {}
    end = _end(plan.workspaces)
    for place in plan.placements.values():
        if (life := (place.offset, place.first, place.last)) not in moved:
            moved[life], end = end, end + place.nbytes
    places = {v: replace(p, offset=moved[p.offset, p.first, p.last]) for v, p in plan.placements.items()}
    return replace(plan, placements=places, arena_bytes=end)


def _end(places: Mapping[int, Placement]) -> int:
    return max((p.offset + p.nbytes for p in places.values()), default=0)


class _CountsOneToken(NumpyBackend):
    def workspace(self, instruction: Instruction, sizes: Mapping[str, int], policy: Policy) -> int:
        return super().workspace(instruction, dict.fromkeys(sizes, 1), policy)


def _overlays_workspaces(program: Program, plan: MemoryPlan) -> MemoryPlan:
    moved = {at: replace(place, offset=0) for at, place in plan.workspaces.items()}
    return replace(plan, workspaces=moved)


def _gate_in_one_expression(
    gate: FloatArray, up: FloatArray, *, activation: Activation, out: FloatArray
) -> FloatArray:
    out[...] = gate / (1 + np.exp(-gate)) * up
    return out


def _copies_weights(
    x: FloatArray, weight: FloatArray, bias: FloatArray | None = None, *, out: FloatArray | None = None
) -> FloatArray:
    return linear(x, weight.copy(), bias, out=out)


class _WritesFirst(NumpyBackend):
    """Moves every ``kv_write`` ahead of the first ``attention``."""

    def compile(self, program: Program, policy: Policy, plan: MemoryPlan, *rest: Any, **options: Any) -> Any:
        late: set[int] = set()
        for i in program:
            read = {v.index for v in i.operands if v is not None}
            if i.op.name == "attention" or (i.op.sharing != "state" and read & late):
                late.add(i.result.index)
        order = sorted(program, key=lambda i: i.result.index in late)
        reordered = Program(tuple(order), program.output)
        return super().compile(
            reordered, policy, plan_memory(reordered, policy, plan.sizes), *rest, **options
        )


class _KeepsFirstRows(NumpyBackend):
    """Keeps the places of the first step with as many tokens, whatever the number of rows."""

    def compile(self, program: Program, policy: Policy, plan: MemoryPlan, *rest: Any, **options: Any) -> Any:
        executable = super().compile(program, policy, plan, *rest, **options)
        place, rows = InterpretedProgram._place, dict[int, int]()

        def stale(sizes: Mapping[str, int]) -> Any:
            return place(executable, {**sizes, "R": rows.setdefault(sizes["T"], sizes["R"])})

        vars(executable)["_place"] = stale
        return executable


FAULTS: tuple[Fault, ...] = (
    Fault(
        "an instruction is recorded twice",
        "PRG-1",
        "A retry records again what was recorded before.",
        _traced_by(_RecordsTwice),
    ),
    Fault(
        "the rows of logits have the shape of the tokens",
        "PRG-2",
        "Prefill asks for every row, so that T and R are equal in every test.",
        _traced_by(_KeepsAllRows),
    ),
    Fault(
        "what does not fit is broadcast",
        "PRG-3",
        "A tracer that leaves the checking to the array library finds out in the middle of a step.",
        _traced_by(_Broadcasts),
    ),
    Fault(
        "an operand is overwritten though it is read again",
        "PRG-4",
        "In-place ops are marked as such, and nobody looks who else reads.",
        _planned_by(_overwrites_at_once),
    ),
    Fault(
        "keys are written ahead of the attention that must not see them",
        "PRG-5",
        "A graph optimiser that knows data dependences and no side effects.",
        partial(Subject, _WritesFirst),
    ),
    Fault(
        "attributes pass through text of six digits",
        "PRG-6",
        "A program stored as JSON with a default float format.",
        _traced_by(_WritesNumbersAsText),
    ),
    Fault(
        "a view does not keep its source alive",
        "PRG-7",
        "Liveness counts reads of names, not of memory.",
        partial(_golden, plan=_forgets_views),
    ),
    Fault(
        "places are packed without alignment",
        "PRG-8",
        "Vector loads fault, or cost twice as much.",
        _planned_by(_packs_tightly),
    ),
    Fault(
        "the arena is rounded up to a power of two",
        "PRG-9",
        "An allocator's habit, up to twice the memory.",
        _planned_by(_rounds_up),
    ),
    Fault(
        "the output lies in the arena",
        "PRG-10",
        "The next step overwrites what the caller holds.",
        _planned_by(_places_the_output),
    ),
    Fault(
        "no two values share a place",
        "PRG-11",
        "The plan of a training framework, which must keep everything.",
        _planned_by(_shares_nothing),
    ),
    Fault(
        "places are those of the first step with as many tokens",
        "PRG-12",
        "A cache of launch parameters whose key lacks one of the sizes.",
        partial(Subject, _KeepsFirstRows),
    ),
    Fault(
        "working memory is counted for a single token",
        "PRG-13",
        "The bound was measured while decoding, and prefill takes more.",
        partial(Subject, _CountsOneToken),
    ),
    Fault(
        "working memory lies on living values",
        "PRG-14",
        "A workspace at the arena's start, which was free when somebody looked.",
        _planned_by(_overlays_workspaces),
    ),
    Fault(
        "what runs as one is planned as if its last instruction did it all",
        "PRG-16",
        "What the first of them reads is given away before the kernel that reads it has run.",
        partial(_golden, plan=_fuses_late),
    ),
    Fault(
        "a gate's temporaries come from the system",
        "PRG-15",
        "An expression of arrays, each of whose parts is an array of its own.",
        faulty_op("gated", _gate_in_one_expression),
    ),
    Fault(
        "a weight is copied whole",
        "PRG-15",
        "A layout or a dtype that the library does not like is converted at every call.",
        faulty_op("linear", _copies_weights),
    ),
)
