"""The shortest complete backend: the golden ops behind the protocol, without a thought for speed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.backend.protocol import Device, MemoryUse
from refengine.backend.support import unknown
from refengine.backend.weights import WeightPlan, plan_decoded
from refengine.errors import NumericalError
from refengine.memory import KVLayout
from refengine.ops import LayerCache, SealedLayerCache
from refengine.program import (
    Instruction,
    MemoryPlan,
    Policy,
    Program,
    StepBatch,
    Value,
    check_step_batch,
    concrete,
    input_arrays,
)
from refengine.quantizer import LazyTensor

Weights = Mapping[str, NDArray[Any]]


class LoopbackBackend:
    """Everything at once and one thing after the other."""

    name = "loopback"
    import_bytes = 0

    def __init__(self) -> None:
        self._weights = self._arena = 0
        self._caches: list[LoopbackStorage] = []

    def devices(self) -> tuple[Device, ...]:
        """The CPU, by no particular name."""
        return (Device("CPU", None),)

    def support(self, op: str, *, encoding: str | None, policy: str) -> str | None:
        """Whatever exists."""
        return unknown(op, encoding=encoding, policy=policy)

    def workspace(self, instruction: Instruction, sizes: Mapping[str, int], policy: Policy) -> int:
        """Its ops take their own."""
        return 0

    def plan_weights(
        self, program: Program, weights: Mapping[str, LazyTensor], policy: Policy, limit: int | None
    ) -> WeightPlan:
        """Everything is held as numbers, whatever the limit."""
        return plan_decoded(program, weights, policy)

    def upload(
        self, weights: Mapping[str, LazyTensor], policy: Policy, plan: WeightPlan | None = None
    ) -> Weights:
        """Decode them all."""
        arrays = {}
        for role, tensor in weights.items():
            arrays[role] = tensor.decode().astype(policy.activations)
            if not np.isfinite(arrays[role]).all():
                raise NumericalError(f"tensor {tensor.name} holds NaN or infinity")
            self._weights += arrays[role].nbytes
        return arrays

    def create_cache(self, layout: KVLayout) -> LoopbackStorage:
        """Keys and values of every layer."""
        self._caches.append(LoopbackStorage(layout))
        return self._caches[-1]

    def compile(
        self,
        program: Program,
        policy: Policy,
        plan: MemoryPlan,
        weights: Weights,
        layout: KVLayout,
        cache: LoopbackStorage,
        *,
        fallback: bool = False,
    ) -> LoopbackProgram:
        """Nothing to prepare but the arena."""
        self._arena += plan.arena_bytes
        return LoopbackProgram(program, plan, weights, layout, cache)

    def memory(self) -> MemoryUse:
        """What was taken."""
        return MemoryUse(self._weights, 0, sum(cache.nbytes for cache in self._caches), self._arena)


class LoopbackStorage:
    """Arrays for all blocks there may be; what is released is spoiled."""

    def __init__(self, layout: KVLayout) -> None:
        self._layout, self._committed = layout, set[tuple[int, int]]()
        self.states: dict[str, LayerCache | SealedLayerCache] = {}
        for group, pool in enumerate(layout.groups):
            for (number, heads, size), nbytes in zip(pool.layers, layout.layer_bytes(group), strict=True):
                if pool.sealed is not None:
                    keys, values = (np.zeros((pool.num_blocks, count), np.uint8) for count in nbytes)
                    self.states[pool.state(number)] = SealedLayerCache(keys, values, pool.sealed)
                    continue
                shape = (2, pool.num_blocks, layout.block_size, heads, size)
                self.states[pool.state(number)] = LayerCache(*np.zeros(shape, layout.dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of the committed segments."""
        return sum(self._layout.segment_bytes(pool) for pool, _ in self._committed)

    def commit(self, pool: int, segment: int) -> None:
        """Count it."""
        self._committed.add((pool, segment))

    def release(self, pool: int, segment: int) -> None:
        """Count it no more, and spoil it."""
        self._committed.remove((pool, segment))
        blocks = self._layout.segment_blocks(pool)
        for block in range(segment * blocks, (segment + 1) * blocks):
            self.poison(pool, block)

    def copy(self, pool: int, source: int, destination: int) -> None:
        """Copy a block."""
        for array in self._arrays(pool):
            array[destination] = array[source]

    def poison(self, pool: int, block: int) -> None:
        """NaN, or bytes of ones, as far as the pool goes."""
        for array in self._arrays(pool):
            array[block : block + 1] = 255 if array.dtype == np.uint8 else np.nan

    def read(self, pool: int, block: int) -> NDArray[np.uint8]:
        """The bytes of a block."""
        return np.concatenate([array[block].reshape(-1).view(np.uint8) for array in self._arrays(pool)])

    def write(self, pool: int, block: int, content: NDArray[np.uint8]) -> None:
        """The same, the other way."""
        for array in self._arrays(pool):
            nbytes = array[block].nbytes
            array[block] = content[:nbytes].view(array.dtype).reshape(array.shape[1:])
            content = content[nbytes:]

    def _arrays(self, pool: int) -> list[NDArray[Any]]:
        group = self._layout.groups[pool]
        states = [self.states[group.state(number)] for number, _, _ in group.layers]
        return [array for state in states for array in (state.keys, state.values)]


class LoopbackProgram:
    """A Program and all that it works on."""

    def __init__(
        self, program: Program, plan: MemoryPlan, weights: Weights, layout: KVLayout, cache: LoopbackStorage
    ) -> None:
        self._program, self._plan, self._layout = program, plan, layout
        self._weights, self._cache = weights, cache
        self._arena = np.zeros(plan.arena_bytes, np.uint8)

    def run(self, batch: StepBatch) -> NDArray[Any]:
        """One step: every result is computed beside the arena, then copied to its place."""
        check_step_batch(
            batch,
            self._layout,
            vocabulary_size=self._program.vocabulary_size,
            sizes=self._plan.sizes,
        )
        sizes = {"T": len(batch.token_ids), "R": len(batch.logit_rows)}
        inputs = input_arrays(batch)
        values: dict[Value | None, Any] = {None: None}
        for leaf in self._program.leaves:
            if leaf.kind == "state":
                values[leaf] = self._cache.states[leaf.name]
            else:
                values[leaf] = (inputs if leaf.kind == "input" else self._weights)[leaf.name]
        for instruction in self._program:
            operands = [values[value] for value in instruction.operands]
            result = instruction.op.golden(*operands, **instruction.attributes)
            if place := self._plan.placements.get(instruction.result.index):
                shape = concrete(instruction.result.shape, sizes)
                whole = self._arena[place.offset : place.offset + place.nbytes].view(self._plan.dtype)
                memory = whole[: int(np.prod(shape))].reshape(shape)
                memory[...] = result
                result = memory
            elif instruction.result is self._program.output:
                result = np.array(result, self._plan.dtype)
            values[instruction.result] = result
        logits: NDArray[Any] = values[self._program.output]
        return logits
