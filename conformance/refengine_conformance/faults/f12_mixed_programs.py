"""Faults of chapter *Mixed precision*: in the program that a policy makes, its plan, and its execution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from refengine import ops
from refengine.backend.interpreter import InterpretedProgram
from refengine.backend.numpy_backend import NumpyBackend
from refengine.ops import FloatArray
from refengine.program import (
    POLICIES,
    Instruction,
    MemoryPlan,
    Policy,
    Program,
    Value,
    apply_policy,
    plan_memory,
)
from refengine_conformance.faults.fault import Fault
from refengine_conformance.subject import Subject


def _pass(change: Callable[..., Program]) -> Callable[[], Subject]:
    """A subject whose precision pass is another."""
    return lambda: Subject(NumpyBackend, policy=POLICIES["mixed8"], apply_policy=change)


def _codes_for_each(program: Program, policy: Policy, encodings: Mapping[str, str]) -> Program:
    """Codes an activation anew for every product."""
    instructions: list[Instruction] = []
    made: dict[int, Instruction] = {}
    used: set[int] = set()
    number = 10_000
    for instruction in apply_policy(program, policy, encodings):
        codes = instruction.operands[0] if instruction.op.name == "linear_a8" else None
        if instruction.op.name == "quantize_a8":
            made[instruction.result.index] = instruction
        if codes is not None and codes.index in used:
            number += 1
            again = replace(codes, index=number)
            instructions.append(replace(made[codes.index], result=again))
            instruction = replace(instruction, operands=(again, *instruction.operands[1:]))
        elif codes is not None:
            used.add(codes.index)
        instructions.append(instruction)
    return Program(tuple(instructions), instructions[-1].result)


def _no_biases(program: Program, policy: Policy, encodings: Mapping[str, str]) -> Program:
    found = apply_policy(program, policy, encodings)
    kept = tuple(
        replace(i, operands=i.operands[:2]) if i.op.name in ("linear_a8", "linear_a16") else i for i in found
    )
    return Program(kept, found.output)


def _all_but_the_logits(program: Program, policy: Policy, encodings: Mapping[str, str]) -> Program:
    """Leaves the last product alone, as some engines do."""
    last = [i for i in program if i.op.name == "linear"][-1]
    weight = last.operands[1]
    spared = {} if weight is None else {weight.name: "f32"}
    return apply_policy(program, policy, {**encodings, **spared})


class _StaleCodes(NumpyBackend):
    """Reads the first codes of their shape for every product."""

    name = "suspect"

    def compile(self, program: Program, *rest: Any, **options: Any) -> InterpretedProgram:
        first: dict[tuple[Any, ...], Value] = {}
        for i in program:
            if i.op.name == "quantize_a8":
                first.setdefault(i.result.shape, i.result)
        changed = tuple(
            replace(i, operands=(first[i.operands[0].shape], *i.operands[1:]))
            if i.op.name == "linear_a8" and i.operands[0] is not None
            else i
            for i in program
        )
        policy, plan, *others = rest
        changed_program = Program(changed, program.output)
        plan = plan_memory(changed_program, policy, plan.sizes, lambda i, s: self.workspace(i, s, policy))
        return super().compile(changed_program, policy, plan, *others, **options)


class _HalfNorm(NumpyBackend):
    """Computes norms in float16 too, under policies that are mixed."""

    name = "suspect"

    def compile(self, program: Program, policy: Policy, *rest: Any, **options: Any) -> InterpretedProgram:
        executable = super().compile(program, policy, *rest, **options)
        if policy.products != "plain":
            functions = vars(executable)["_functions"]
            functions["rms_norm"] = _half_norm
        return executable


def _half_norm(
    x: FloatArray, weight: FloatArray, *, eps: float, out: FloatArray, scratch: Any = None
) -> FloatArray:
    ops.rms_norm(x, weight, eps=eps, out=out)
    out[...] = out.astype(np.float16)
    return out


def _plan(change: Callable[..., MemoryPlan]) -> Callable[[], Subject]:
    return lambda: Subject(NumpyBackend, policy=POLICIES["mixed8"], plan=change)


def _codes_as_activations(program: Program, policy: Policy, *rest: Any) -> MemoryPlan:
    """Counts every element of a value four bytes."""
    plain = tuple(replace(i, result=replace(i.result, dtype=None)) for i in program)
    output = plain[-1].result if program.output is program.instructions[-1].result else program.output
    return plan_memory(Program(plain, output), policy, *rest)


def _codes_die_young(program: Program, policy: Policy, *rest: Any) -> MemoryPlan:
    """Lets codes live to the first product that reads them."""
    seen: set[int] = set()
    shortened = []
    for i in program:
        codes = i.operands[0] if i.op.name == "linear_a8" else None
        if codes is not None and codes.index in seen:
            i = replace(i, operands=(None, *i.operands[1:]))
        elif codes is not None:
            seen.add(codes.index)
        shortened.append(i)
    return plan_memory(Program(tuple(shortened), program.output), policy, rest[0])


FAULTS: tuple[Fault, ...] = (
    Fault(
        "codes are made for each product",
        "MIX-1",
        "Query, key and value each quantize the same activations: three times the work.",
        _pass(_codes_for_each),
    ),
    Fault(
        "biases are lost",
        "MIX-1",
        "Models without biases are tested, and one family has some.",
        _pass(_no_biases),
    ),
    Fault(
        "logits are computed plainly",
        "MIX-1",
        "The last product is left in full precision, as other engines do: not what is specified.",
        _pass(_all_but_the_logits),
    ),
    Fault(
        "norms are rounded to float16 too",
        "MIX-12",
        "A policy for products is taken for one for everything.",
        lambda: Subject(_HalfNorm, policy=POLICIES["mixed16"]),
    ),
    Fault(
        "codes of the first norm are read again",
        "MIX-13",
        "Codes are kept by their size, and another activation has the same.",
        lambda: Subject(_StaleCodes, policy=POLICIES["mixed8"]),
    ),
    Fault(
        "codes take four times their place",
        "MIX-15",
        "Every value is counted in the policy's dtype.",
        _plan(_codes_as_activations),
    ),
    Fault(
        "codes give way after their first product",
        "MIX-15",
        "Their life is that of an operand read once: keys are computed from what was written over them.",
        _plan(_codes_die_young),
    ),
)
