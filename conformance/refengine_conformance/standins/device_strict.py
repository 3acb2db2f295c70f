"""A backend on the strict device: the golden ops are its kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.backend.protocol import Device as DeviceName
from refengine.backend.protocol import MemoryUse
from refengine.backend.support import unknown
from refengine.backend.weights import WeightPlan, plan_decoded
from refengine.errors import NumericalError
from refengine.memory import KVLayout
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
from refengine_conformance.standins.device import Device, DeviceArray, DeviceCache, DeviceSealedCache

Weights = Mapping[str, DeviceArray]


class DeviceStrictBackend:
    """Weights and inputs are copied to the device, where no kernel can write them.

    Arena and cache begin as NaN, the arena again before every step, and every result's place again before
    it is written. A step is queued as a whole and waited for once.
    """

    name = "device-strict"
    import_bytes = 0

    def __init__(self) -> None:
        self._device = Device()
        self._weights = self._arena = 0
        self._caches: list[DeviceStorage] = []

    def devices(self) -> tuple[DeviceName, ...]:
        """The one that is played."""
        return (DeviceName("a strict device, played by the CPU", None, own_memory=True),)

    def support(self, op: str, *, encoding: str | None, policy: str) -> str | None:
        """Everything there is."""
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
        """Decode and copy, tensor by tensor."""
        arrays = {}
        for role, tensor in weights.items():
            decoded = tensor.decode()
            if not np.isfinite(decoded).all():
                raise NumericalError(f"tensor {tensor.name} holds NaN or infinity")
            arrays[role] = self._device.to_device(decoded, policy.activations)
            self._weights += arrays[role].nbytes
        return arrays

    def create_cache(self, layout: KVLayout) -> DeviceStorage:
        """Poison, until it is written."""
        self._caches.append(DeviceStorage(self._device, layout))
        return self._caches[-1]

    def compile(
        self,
        program: Program,
        policy: Policy,
        plan: MemoryPlan,
        weights: Weights,
        layout: KVLayout,
        cache: DeviceStorage,
        *,
        fallback: bool = False,
    ) -> DeviceStrictProgram:
        """Take the arena."""
        arena = self._device.empty((plan.arena_bytes // plan.dtype.itemsize,), plan.dtype)
        self._arena += arena.nbytes
        return DeviceStrictProgram(self._device, program, plan, arena, weights, layout, cache)

    def memory(self) -> MemoryUse:
        """What lies on the device."""
        return MemoryUse(self._weights, 0, sum(cache.nbytes for cache in self._caches), self._arena)


class DeviceStorage:
    """Keys and values on the device; what is not committed is poison."""

    def __init__(self, device: Device, layout: KVLayout) -> None:
        self._device, self._layout, self._committed = device, layout, set[tuple[int, int]]()
        self.states: dict[str, DeviceCache | DeviceSealedCache] = {}
        for group, pool in enumerate(layout.groups):
            for (number, heads, size), nbytes in zip(pool.layers, layout.layer_bytes(group), strict=True):
                if pool.sealed is not None:
                    keys, values = (device.empty((pool.num_blocks, count), np.uint8) for count in nbytes)
                    self.states[pool.state(number)] = DeviceSealedCache(keys, values, pool.sealed)
                    continue
                shape = (pool.num_blocks, layout.block_size, heads, size)
                keys, values = (device.empty(shape, layout.dtype) for _ in range(2))
                self.states[pool.state(number)] = DeviceCache(keys, values)

    @property
    def nbytes(self) -> int:
        """Bytes of the committed segments."""
        return sum(self._layout.segment_bytes(pool) for pool, _ in self._committed)

    def commit(self, pool: int, segment: int) -> None:
        """Count it."""
        self._committed.add((pool, segment))

    def release(self, pool: int, segment: int) -> None:
        """Count it no more, and queue its poisoning."""
        self._committed.remove((pool, segment))
        first = segment * self._layout.segment_blocks(pool)
        end = min(first + self._layout.segment_blocks(pool), self._layout.num_blocks[pool])
        for block in range(first, end):
            self.poison(pool, block)

    def copy(self, pool: int, source: int, destination: int) -> None:
        """Queue: copy a block."""
        for array in self._arrays(pool):
            self._device.copy(_block(array, source), _block(array, destination))

    def poison(self, pool: int, block: int) -> None:
        """Queue: spoil a block."""
        for array in self._arrays(pool):
            self._device.poison(_block(array, block))

    def read(self, pool: int, block: int) -> NDArray[np.uint8]:
        """Wait for what is queued, and copy a block out."""
        self._device.synchronise()
        parts = [self._device.to_host(_block(array, block)) for array in self._arrays(pool)]
        return np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])

    def write(self, pool: int, block: int, content: NDArray[np.uint8]) -> None:
        """Copy a block in, and queue its way to its place."""
        for array in self._arrays(pool):
            place = _block(array, block)
            part = content[: place.nbytes].view(array.dtype).reshape(place.shape)
            self._device.copy(self._device.to_device(part), place)
            content = content[place.nbytes :]

    def _arrays(self, pool: int) -> list[DeviceArray]:
        group = self._layout.groups[pool]
        states = [self.states[group.state(number)] for number, _, _ in group.layers]
        return [array for state in states for array in (state.keys, state.values)]


def _block(array: DeviceArray, block: int) -> DeviceArray:
    return array.part(block * array.nbytes // array.shape[0], array.shape[1:])


class DeviceStrictProgram:
    """A Program, and the device's memory that it works on."""

    def __init__(
        self,
        device: Device,
        program: Program,
        plan: MemoryPlan,
        arena: DeviceArray,
        weights: Weights,
        layout: KVLayout,
        cache: DeviceStorage,
    ) -> None:
        self._device, self._program, self._plan, self._arena = device, program, plan, arena
        self._weights, self._layout, self._cache = weights, layout, cache

    def run(self, batch: StepBatch) -> NDArray[Any]:
        """One step: copied in, queued, waited for, copied out."""
        check_step_batch(
            batch,
            self._layout,
            vocabulary_size=self._program.vocabulary_size,
            sizes=self._plan.sizes,
        )
        sizes = {"T": len(batch.token_ids), "R": len(batch.logit_rows)}
        inputs = {name: self._device.to_device(array) for name, array in input_arrays(batch).items()}
        values: dict[Value | None, Any] = {None: None}
        for leaf in self._program.leaves:
            if leaf.kind == "state":
                values[leaf] = self._cache.states[leaf.name]
            else:
                values[leaf] = (inputs if leaf.kind == "input" else self._weights)[leaf.name]
        logits = self._device.empty(concrete(self._program.output.shape, sizes), self._plan.dtype)
        self._device.poison(self._arena)
        for instruction in self._program:
            op, operands = instruction.op, [values[value] for value in instruction.operands]
            if op.sharing == "state":
                self._device.launch(op.golden, operands, instruction.attributes)
                values[instruction.result] = operands[0]
                continue
            place = self._place(instruction.result, sizes)
            result = logits if place is None else place
            values[instruction.result] = result
            if op.sharing == "view":
                if result is logits:
                    self._device.copy(operands[0], logits)
                continue
            if not any(result.overlaps(operand) for operand in operands if isinstance(operand, DeviceArray)):
                self._device.poison(result)
            self._device.launch(op.golden, operands, instruction.attributes, out=result)
        self._device.synchronise()
        return self._device.to_host(logits)

    def _place(self, value: Value, sizes: Mapping[str, int]) -> DeviceArray | None:
        """Where the plan puts a value."""
        place = self._plan.placements.get(value.index)
        return None if place is None else self._arena.part(place.offset, concrete(value.shape, sizes))
