"""The precision pass: a Program as traced becomes the Program that a precision policy computes."""

from __future__ import annotations

from collections.abc import Mapping

from refengine.ops import OPS
from refengine.program.ir import Instruction, Program, Value
from refengine.program.precision import Policy
from refengine.quantizer import GROUP, GROUPED


def apply_policy(program: Program, policy: Policy, encodings: Mapping[str, str]) -> Program:
    """The Program with its products as the policy computes them; all else stays as it is.

    Under ``a8`` products of codes take the place of every ``linear`` whose weight is stored as integers, in
    whole groups: one ``quantize_a8`` per activation, right before the first product that reads it, and a
    ``linear_a8`` for each product. Under ``a16`` every ``linear`` becomes ``linear_a16``.

    Args:
        program: as traced.
        policy: the precision policy.
        encodings: of the weights, by role.

    Returns:
        A Program with values of its own; ``program`` itself where there is nothing to change.

    Clauses: MIX-1.
    """
    if policy.products == "plain":
        return program
    rewriting = _Rewriting()
    for instruction in program:
        if instruction.op.name != "linear":
            rewriting.keep(instruction)
        elif policy.products == "a16":
            rewriting.keep(instruction, op="linear_a16")
        elif _is_coded(instruction, encodings):
            rewriting.code(instruction)
        else:
            rewriting.keep(instruction)
    return rewriting.finish(program.output)


def _is_coded(instruction: Instruction, encodings: Mapping[str, str]) -> bool:
    weight = instruction.operands[1]
    return (
        weight is not None
        and weight.kind == "weight"
        and encodings[weight.name] in GROUPED
        and int(weight.shape[1]) % GROUP == 0
    )


class _Rewriting:
    """A Program in the making, whose values are numbered anew."""

    def __init__(self) -> None:
        self._instructions: list[Instruction] = []
        self._values: dict[int, Value] = {}  # by the index they had
        self._codes: dict[int, Value] = {}  # by the index that the coded value had
        self._defined = 0

    def keep(self, instruction: Instruction, op: str | None = None) -> None:
        """The instruction, or another op in its place."""
        operands = [None if v is None else self._value(v) for v in instruction.operands]
        self._append(instruction, op or instruction.op.name, operands, instruction.result)

    def code(self, instruction: Instruction) -> None:
        """A product of codes in the place of ``linear``."""
        x, *others = instruction.operands
        if x is None:
            raise ValueError("linear without activations")
        if x.index not in self._codes:
            self._codes[x.index] = self._append(instruction, "quantize_a8", [self._value(x)], None)
        operands = [self._codes[x.index], *(None if v is None else self._value(v) for v in others)]
        self._append(instruction, "linear_a8", operands, instruction.result)

    def finish(self, output: Value) -> Program:
        """The new Program."""
        return Program(tuple(self._instructions), self._values[output.index])

    def _value(self, old: Value) -> Value:
        """The new value in the place of an old one; leaves are numbered when they are first read."""
        if old.index not in self._values:
            self._values[old.index] = self._new(old.name, old)
        return self._values[old.index]

    def _new(self, name: str, like: Value) -> Value:
        self._defined += 1
        return Value(self._defined - 1, name, like.kind, like.shape, like.dtype)

    def _append(
        self, instruction: Instruction, name: str, operands: list[Value | None], old: Value | None
    ) -> Value:
        op = OPS[name]
        attributes = instruction.attributes if old is not None else {}
        shapes = [None if v is None else v.shape for v in operands]
        self._defined += 1
        shape = op.signature.infer(name, shapes, attributes)
        result = Value(self._defined - 1, name, "result", shape, op.dtype)
        if old is not None:
            self._values[old.index] = result
        self._instructions.append(Instruction(op, tuple(operands), attributes, result, instruction.layer))
        return result
