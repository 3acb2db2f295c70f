"""A backend on the strict device: the golden ops are its kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.backend.protocol import Device as DeviceName
from refengine.backend.protocol import MemoryUse
from refengine.errors import NumericalError
from refengine.memory import KVLayout
from refengine.ops import OPS
from refengine.program import (
    POLICIES,
    MemoryPlan,
    Policy,
    Program,
    StepBatch,
    Value,
    check_step_batch,
    concrete,
    input_arrays,
)
from refengine.quantizer import ENCODINGS, LazyTensor
from refengine_conformance.standins.device import Device, DeviceArray, DeviceCache

Weights = Mapping[str, DeviceArray]
Caches = Mapping[int, DeviceCache]


class DeviceStrictBackend:
    """Weights and inputs are copied to the device, where no kernel can write them.

    Arena and cache begin as NaN, the arena again before every step, and every result's place again before
    it is written. A step is queued as a whole and waited for once.
    """

    name = "device-strict"

    def __init__(self) -> None:
        self._device = Device()
        self._weights = self._kv_cache = self._arena = 0

    def devices(self) -> tuple[DeviceName, ...]:
        """The one that is played."""
        return (DeviceName("a strict device, played by the CPU", None),)

    def support(self, op: str, *, encoding: str | None, policy: str) -> str | None:
        """Everything there is."""
        if op not in OPS:
            return f"there is no op {op!r}"
        if policy not in POLICIES:
            return f"there is no policy {policy!r}"
        return None if encoding is None or encoding in ENCODINGS else f"there is no encoding {encoding!r}"

    def upload(self, weights: Mapping[str, LazyTensor], policy: Policy) -> Weights:
        """Decode and copy, tensor by tensor."""
        arrays = {}
        for role, tensor in weights.items():
            decoded = tensor.decode()
            if not np.isfinite(decoded).all():
                raise NumericalError(f"tensor {tensor.name} holds NaN or infinity")
            arrays[role] = self._device.to_device(decoded, policy.activations)
            self._weights += arrays[role].nbytes
        return arrays

    def create_cache(self, layout: KVLayout) -> Caches:
        """Poison, until it is written."""
        caches = {}
        for group in layout.groups:
            for number, heads, size in group.layers:
                shape = (group.num_blocks, layout.block_size, heads, size)
                keys, values = (self._device.empty(shape, layout.dtype) for _ in range(2))
                caches[number] = DeviceCache(keys, values)
                self._kv_cache += keys.nbytes + values.nbytes
        return caches

    def compile(
        self,
        program: Program,
        policy: Policy,
        plan: MemoryPlan,
        weights: Weights,
        layout: KVLayout,
        cache: Caches,
        *,
        fallback: bool = False,
    ) -> DeviceStrictProgram:
        """Take the arena."""
        arena = self._device.empty((plan.arena_bytes // plan.dtype.itemsize,), plan.dtype)
        self._arena += arena.nbytes
        return DeviceStrictProgram(self._device, program, plan, arena, weights, layout, cache)

    def memory(self) -> MemoryUse:
        """What lies on the device."""
        return MemoryUse(self._weights, self._kv_cache, self._arena)


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
        cache: Caches,
    ) -> None:
        self._device, self._program, self._plan, self._arena = device, program, plan, arena
        self._weights, self._layout, self._cache = weights, layout, cache

    def run(self, batch: StepBatch) -> NDArray[Any]:
        """One step: copied in, queued, waited for, copied out."""
        check_step_batch(
            batch,
            vocabulary_size=self._program.vocabulary_size,
            num_blocks=self._layout.num_blocks,
            windows=self._layout.windows,
            block_size=self._layout.block_size,
            sizes=self._plan.sizes,
        )
        sizes = {"T": len(batch.token_ids), "R": len(batch.logit_rows)}
        inputs = {name: self._device.to_device(array) for name, array in input_arrays(batch).items()}
        values: dict[Value | None, Any] = {None: None}
        for leaf in self._program.leaves:
            if leaf.kind == "state":
                values[leaf] = self._cache[int(leaf.name.split(".")[1])]
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
