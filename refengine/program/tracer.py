"""Recording a decoder: the same function that runs eagerly, given symbols, yields its Program."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from refengine.ops import OPS, Op, Shape
from refengine.program.ir import Instruction, Kind, Program, Value
from refengine.program.step_batch import StepInputs

LAYER = re.compile(r"layers\.(\d+)\.")
"""What the name of a layer's value begins with."""


class Tracer:
    """A namespace with the names of ``refengine.ops``, whose calls are recorded instead of computed.

    Clauses: PRG-6.
    """

    def __init__(self) -> None:
        self._instructions: list[Instruction] = []
        self._defined = 0
        self._layer: int | None = None

    def symbol(self, name: str, kind: Kind, shape: Shape) -> Value:
        """A new value that no instruction gives."""
        return self._defined_as(name, kind, shape, None)

    def __getattr__(self, name: str) -> Callable[..., Value]:
        if name not in OPS:
            raise AttributeError(f"no op is called {name!r}; there are {', '.join(OPS)}")
        op = OPS[name]
        return lambda *operands, **attributes: self._record(op, operands, attributes)

    def finish(self, output: Value) -> Program:
        """The recorded Program."""
        return Program(tuple(self._instructions), output)

    def _defined_as(self, name: str, kind: Kind, shape: Shape, dtype: np.dtype[Any] | None) -> Value:
        self._defined += 1
        return Value(self._defined - 1, name, kind, shape, dtype)

    def _record(self, op: Op, operands: Sequence[Value | None], attributes: Mapping[str, object]) -> Value:
        shapes = [None if value is None else value.shape for value in operands]
        shape = op.signature.infer(op.name, shapes, attributes)
        result = self._defined_as(op.name, "result", shape, op.dtype)
        for value in operands:
            if value is not None and (found := LAYER.match(value.name)):
                self._layer = int(found[1])
        self._instructions.append(Instruction(op, tuple(operands), dict(attributes), result, self._layer))
        return result


class SymbolicWeights(Mapping[str, Value]):
    """The weights of a model as symbols: each made when the decoder first asks for it."""

    def __init__(self, tracer: Tracer, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._tracer, self._shapes = tracer, shapes
        self._made: dict[str, Value] = {}

    def __getitem__(self, name: str) -> Value:
        if name not in self._made:
            self._made[name] = self._tracer.symbol(name, "weight", self._shapes[name])
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def symbolic_inputs(tracer: Tracer, kv_groups: int) -> StepInputs[Value]:
    """The arrays of a step as symbols: T tokens, S sequences (S1 = S + 1), R rows of logits, M blocks.

    Args:
        tracer: what makes the symbols.
        kv_groups: pools of the KV cache: one per KV group, two where it is sealed.
    """

    def symbol(name: str, *shape: str) -> Value:
        return tracer.symbol(name, "input", shape)

    return StepInputs(
        token_ids=symbol("token_ids", "T"),
        positions=symbol("positions", "T"),
        query_starts=symbol("query_starts", "S1"),
        context_lens=symbol("context_lens", "S"),
        logit_rows=symbol("logit_rows", "R"),
        slot_mapping=tuple(symbol(f"slot_mapping.{g}", "T") for g in range(kv_groups)),
        block_tables=tuple(symbol(f"block_tables.{g}", "S", "M") for g in range(kv_groups)),
    )


def input_arrays(inputs: StepInputs[Any]) -> dict[str, Any]:
    """The arrays of a step under the names their symbols have."""
    named = {
        name: getattr(inputs, name)
        for name in ("token_ids", "positions", "query_starts", "context_lens", "logit_rows")
    }
    for name in ("slot_mapping", "block_tables"):
        named |= {f"{name}.{group}": array for group, array in enumerate(getattr(inputs, name))}
    return named
