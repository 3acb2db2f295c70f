"""Where a Program's values are: in the arena, among the weights, in the cache, or in a step's own arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.backend.kv_storage import HostKVStorage
from refengine.program import Instruction, MemoryPlan, Policy, Program, Value
from refengine_numba.repack import aligned
from refengine_numba.weights import TiledWeights


class Binding:
    """Arrays for the values of a Program, for the largest step that is planned.

    A step's inputs and its output are arrays of the step's own; here stand-ins have their places, whose
    memory is never touched.

    Args:
        program: whose values.
        policy: gives their dtype.
        plan: their places in the arena.
        weights: as kernels read them.
        cache: the KV cache.
    """

    def __init__(
        self,
        program: Program,
        policy: Policy,
        plan: MemoryPlan,
        weights: TiledWeights,
        cache: HostKVStorage,
    ) -> None:
        self._plan, self._policy, self._weights, self._cache = plan, policy, weights, cache
        self._sizes = {**plan.sizes, "S1": plan.sizes["S"] + 1, "M": 1}
        self._halves = frozenset(
            value.name
            for instruction in program
            if instruction.op.name == "linear_a16" and (value := instruction.operands[1]) is not None
        )
        self._arena = aligned(plan.arena_bytes)
        self._arrays: dict[int, Any] = {}
        for leaf in program.leaves:
            if leaf.kind == "input":
                self._arrays[leaf.index] = np.zeros(self._shape(leaf), np.int32)
            elif leaf.kind == "state":
                self._arrays[leaf.index] = cache.states[leaf.name]
        for instruction in program:
            self._arrays[instruction.result.index] = self._result(instruction, program.output)

    def operands(self, instruction: Instruction) -> tuple[Any, ...]:
        """What an instruction is applied to: arrays, caches; vectors and matrices among the weights."""
        return tuple(None if value is None else self.array(value) for value in instruction.operands)

    def array(self, value: Value) -> Any:
        """A value's array; a matrix in tiles where it is one among the weights."""
        if value.kind != "weight":
            return self._arrays[value.index]
        if len(value.shape) == 1:
            return self._weights.vector(value.name)
        return self._weights.matrix(value.name, halves=value.name in self._halves)

    def golden_weight(self, role: str) -> Any:
        """A weight as a golden op takes it."""
        return self._weights.golden(role)

    def workspace(self, at: int) -> NDArray[np.uint8]:
        """The working memory of the instruction at this position."""
        place = self._plan.workspaces.get(at)
        return self._arena[place.offset : place.offset + place.nbytes] if place else self._arena[:0]

    def _result(self, instruction: Instruction, output: Value) -> Any:
        value, sharing = instruction.result, instruction.op.sharing
        source = instruction.operands[0] if instruction.operands else None
        if sharing == "state" and source is not None:
            return self._arrays[source.index]
        if sharing == "view" and source is not None:
            return self._arrays[source.index].reshape(self._shape(value))
        dtype = self._dtype(value)
        if value is output:
            return np.empty(self._shape(value), dtype)
        place = self._plan.placements[value.index]
        nbytes = math.prod(self._shape(value)) * dtype.itemsize
        return self._arena[place.offset : place.offset + nbytes].view(dtype).reshape(self._shape(value))

    def _dtype(self, value: Value) -> np.dtype[Any]:
        own: np.dtype[Any] | None = getattr(value, "dtype", None)
        return own or self._policy.activations

    def _shape(self, value: Value) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else self._sizes[d] for d in value.shape)
