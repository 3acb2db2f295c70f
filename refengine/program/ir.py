"""The Program: a decoder as a flat list of instructions in static single assignment form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from refengine.ops import OPS, Dim, Op, Shape

Kind = Literal["input", "weight", "state", "result"]


@dataclass(frozen=True)
class Value:
    """Something an instruction reads or gives.

    Attributes:
        index: position in the order of definition; unique in its program.
        name: the input's, weight's or cache's name, or the op that gives it.
        kind: ``input`` (an array of the step), ``weight``, ``state`` (a layer's KV cache) or ``result``.
        shape: numbers and the symbols ``"T"``, ``"S"``, ``"R"`` …
        dtype: of a result that is not in the policy's activations; ``None`` of all others.
    """

    index: int
    name: str
    kind: Kind
    shape: Shape
    dtype: np.dtype[Any] | None = None

    def __str__(self) -> str:
        name = f"%{self.index}" if self.kind == "result" else self.name
        return f"{name}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Instruction:
    """One op, applied: ``result = op(*operands, **attributes)``."""

    op: Op
    operands: tuple[Value | None, ...]
    attributes: Mapping[str, object]
    result: Value
    layer: int | None

    def __str__(self) -> str:
        operands = ", ".join("none" if v is None else str(v) for v in self.operands)
        attributes = "".join(f", {k}={_brief(v)}" for k, v in self.attributes.items())
        return f"{self.result} = {self.op.name}({operands}{attributes})"


@dataclass(frozen=True)
class Program:
    """A traced decoder.

    Attributes:
        instructions: in order; each value is defined before it is used. A ``state`` is changed in place, so
            the order of instructions on one state is part of the meaning.
        output: the logits ``[R, V]``.

    Clauses: PRG-1, PRG-5.
    """

    instructions: tuple[Instruction, ...]
    output: Value

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions)

    def __len__(self) -> int:
        return len(self.instructions)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.instructions), f"return {self.output}"])

    @cached_property
    def leaves(self) -> tuple[Value, ...]:
        """Inputs, weights and states, each once, in order of first use."""
        found = (v for i in self for v in i.operands if v is not None and v.kind != "result")
        return tuple({v.index: v for v in found}.values())

    @cached_property
    def vocabulary_size(self) -> int:
        """Token ids must lie below this: rows of the smallest table they look up."""
        tables = (i.operands[1] for i in self if i.op.name == "embedding")
        return min((int(table.shape[0]) for table in tables if table is not None), default=2**31)

    @cached_property
    def op_counts(self) -> Mapping[str, int]:
        """How often each op occurs, in the instruction set's order."""
        counts = {name: sum(i.op.name == name for i in self) for name in OPS}
        return MappingProxyType({name: n for name, n in counts.items() if n})


def concrete(shape: Shape, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape with every symbol replaced by its size."""
    return tuple(_size(dim, sizes) for dim in shape)


def _size(dim: Dim, sizes: Mapping[str, int]) -> int:
    return dim if isinstance(dim, int) else sizes[dim]


def _brief(attribute: object) -> str:
    text = repr(attribute)
    return text if len(text) <= 40 else f"{text[:32]}…{text[-4:]}"
