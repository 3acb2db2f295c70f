"""Interpreting a Program op by op, in one planned arena: the plainest way to be a backend."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from refengine.backend.kv_storage import HostKVStorage
from refengine.backend.protocol import Device, MemoryUse
from refengine.backend.support import unknown
from refengine.backend.weights import WeightPlan, Weights, plan_weights
from refengine.errors import UnsupportedError
from refengine.memory import KVLayout
from refengine.ops import OPS, FloatArray
from refengine.ops.scratch import Scratch
from refengine.program import (
    Instruction,
    MemoryPlan,
    Policy,
    Program,
    StepBatch,
    check_step_batch,
    concrete,
    golden_workspace,
    input_arrays,
)
from refengine.quantizer import LazyTensor

OpFunction = Callable[..., Any]
"""``function(*operands, **attributes, out=None)``, as the golden op of the same name."""


class InterpretedBackend:
    """A backend made of functions on NumPy arrays, one per op it computes natively.

    Subclasses set ``name`` and ``native``. Ops without a native function are refused, or run on the golden op
    where ``compile`` is told to fall back.
    """

    name: str
    import_bytes = 0
    native: ClassVar[Mapping[str, OpFunction]]

    def __init__(self) -> None:
        self._weights: list[Weights] = []
        self._caches: list[HostKVStorage] = []
        self._arena_bytes = 0

    def devices(self) -> tuple[Device, ...]:
        """The CPU."""
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
        return (Device(platform.processor() or platform.machine(), pages),)

    def support(self, op: str, *, encoding: str | None, policy: str) -> str | None:
        """What has a native function, in every encoding and policy."""
        if reason := unknown(op, encoding=encoding, policy=policy):
            return reason
        return None if op in self.native else f"{self.name} has no {op} of its own"

    def workspace(self, instruction: Instruction, sizes: Mapping[str, int], policy: Policy) -> int:
        """What the golden function takes, where it runs; another function's memory is its own affair."""
        name, golden = instruction.op.name, instruction.op.golden
        return golden_workspace(instruction, sizes, policy) if self.native.get(name, golden) is golden else 0

    def plan_weights(
        self, program: Program, weights: Mapping[str, LazyTensor], policy: Policy, limit: int | None
    ) -> WeightPlan:
        """Decoded where there is room, else mapped, else streamed."""
        return plan_weights(program, weights, policy, limit)

    def upload(
        self, weights: Mapping[str, LazyTensor], policy: Policy, plan: WeightPlan | None = None
    ) -> Weights:
        """Take the weights; what is to be decoded is decoded when a step first needs it.

        So the first step reaches what is planned.
        """
        self._weights.append(Weights(weights, policy, plan))
        return self._weights[-1]

    def create_cache(self, layout: KVLayout) -> HostKVStorage:
        """Address space for all pools, and memory for none of their blocks."""
        self._caches.append(HostKVStorage(layout))
        return self._caches[-1]

    def compile(
        self,
        program: Program,
        policy: Policy,
        plan: MemoryPlan,
        weights: Weights,
        layout: KVLayout,
        cache: HostKVStorage,
        *,
        fallback: bool = False,
    ) -> InterpretedProgram:
        """Bind the Program to functions, weights, cache and an arena."""
        reasons = {op: self.support(op, encoding=None, policy=policy.name) for op in program.op_counts}
        missing = {op: reason for op, reason in reasons.items() if reason}
        if missing and not fallback:
            raise UnsupportedError(
                f"backend {self.name!r} cannot run this program: {'; '.join(missing.values())}. "
                "Allow golden ops in their place with --fallback, or choose another backend"
            )
        functions = {op: OPS[op].golden for op in missing} | dict(self.native)
        weights.settle(program)
        self._arena_bytes += plan.arena_bytes
        return InterpretedProgram(program, functions, policy, plan, weights, layout, cache)

    def memory(self) -> MemoryUse:
        """Bytes of decoded weights, of the KV cache's committed segments and of the arenas."""
        return MemoryUse(
            weights=sum(w.held for w in self._weights),
            mapped=sum(w.mapped for w in self._weights),
            kv_cache=sum(cache.nbytes for cache in self._caches),
            arena=self._arena_bytes,
        )


class InterpretedProgram:
    """A Program bound to weights, a KV cache and an arena."""

    def __init__(
        self,
        program: Program,
        functions: Mapping[str, OpFunction],
        policy: Policy,
        plan: MemoryPlan,
        weights: Weights,
        layout: KVLayout,
        cache: HostKVStorage,
    ) -> None:
        self._program, self._functions, self._plan, self._layout = program, functions, plan, layout
        self._weights, self._cache = weights, cache
        self._dtype = policy.activations
        self._arena = np.empty(plan.arena_bytes, np.uint8)
        self._constants: dict[int, Any] = {}
        self._places: dict[int, FloatArray] = {}
        self._placed_for: dict[str, int] = {}

    def run(self, batch: StepBatch) -> FloatArray:
        """One step; see the protocol."""
        check_step_batch(
            batch,
            self._layout,
            vocabulary_size=self._program.vocabulary_size,
            sizes=self._plan.sizes,
        )
        if not self._constants:
            self._constants = self._bind()
        sizes = {"T": len(batch.token_ids), "R": len(batch.logit_rows)}
        if sizes != self._placed_for:
            self._places, self._placed_for = self._place(sizes), sizes

        inputs = input_arrays(batch)
        values = self._constants | {
            leaf.index: inputs[leaf.name] for leaf in self._program.leaves if leaf.kind == "input"
        }
        logits = np.empty(concrete(self._program.output.shape, sizes), self._dtype)
        with np.errstate(all="ignore"):  # what overflows has a defined value; nothing here may print
            self._interpret(values, logits)
        return logits

    def _interpret(self, values: dict[int, Any], logits: FloatArray) -> None:
        """Run all instructions; the output lands in ``logits``."""
        for at, instruction in enumerate(self._program):
            op, result = instruction.op, instruction.result.index
            operands = [None if v is None else values[v.index] for v in instruction.operands]
            function, options = self._functions[op.name], dict(instruction.attributes)
            if function is op.golden and (working := self._plan.workspaces.get(at)):
                buffer = self._arena[working.offset : working.offset + working.nbytes]
                options["scratch"] = Scratch(buffer)
            if op.sharing in ("view", "state"):
                values[result] = function(*operands, **options)
                if instruction.result is self._program.output:  # it must not stay in the arena
                    logits[...] = values[result]
            else:
                out = self._places.get(result, logits)
                value = function(*operands, **options, out=out)
                if value is not out:  # a function may ignore the place it is offered; its result lands there
                    out[...] = value
                values[result] = out

    def _bind(self) -> dict[int, Any]:
        """Weights and caches by the index of their values."""
        constants: dict[int, Any] = {}
        for leaf in self._program.leaves:
            if leaf.kind == "state":
                constants[leaf.index] = self._cache.states[leaf.name]
            elif leaf.kind == "weight":
                constants[leaf.index] = self._weights.operand(leaf.name)
        return constants

    def _place(self, sizes: Mapping[str, int]) -> dict[int, FloatArray]:
        """The planned places of all results, as arrays of a step's shape."""
        places = {}
        for instruction in self._program:
            value = instruction.result
            if placement := self._plan.placements.get(value.index):
                shape = concrete(value.shape, sizes)
                dtype = value.dtype or self._dtype
                place = self._arena[placement.offset : placement.offset + math.prod(shape) * dtype.itemsize]
                places[value.index] = place.view(dtype).reshape(shape)
        return places
