"""What a Program's values are bound to: weights, a KV cache, and places in the arena."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from refengine.errors import UnsupportedError
from refengine.memory import KVLayout
from refengine.ops.linear_a8 import GROUP
from refengine.program import Instruction, MemoryPlan, Placement, Program, Value, concrete
from refengine_cupy.kv import LayerPlace
from refengine_cupy.step_shape import Places, StepShape
from refengine_cupy.streaming import Passing
from refengine_cupy.weights import DeviceWeight


class Binding:
    """Where a Program's values are, and what the device is that computes it.

    Args:
        program: what is computed.
        plan: where its values lie.
        weights: by role.
        states: by name, where layers' keys and values are.
        layout: of the KV cache.
        matrix_units: whether the device has kernels for them.
        warpgroups: whether it has those for warpgroups.
        multiprocessors: of the device.
        shared_bytes: of the device, for a block of threads.
        passing: where weights are that are streamed; ``None`` where none is.
    """

    def __init__(
        self,
        program: Program,
        plan: MemoryPlan,
        weights: Callable[[str], DeviceWeight],
        states: Mapping[str, LayerPlace],
        layout: KVLayout,
        *,
        matrix_units: bool,
        warpgroups: bool,
        multiprocessors: int,
        shared_bytes: int,
        passing: Passing | None = None,
    ) -> None:
        self.program, self.plan, self.layout = program, plan, layout
        self.matrix_units, self.warpgroups = matrix_units, warpgroups
        self.multiprocessors, self.shared_bytes = multiprocessors, shared_bytes
        self.kv = "f16" if layout.dtype == np.float16 else "f32"
        self.passing = passing
        self._weights, self._states = weights, states
        self._shown = {i.result.index: operand(i, 0) for i in program if i.op.sharing in ("view", "state")}

    def root(self, value: Value) -> Value:
        """What a value shows in the end, where it is a view of another or what a write leaves; or itself."""
        while value.index in self._shown:
            value = self._shown[value.index]
        return value

    def address(self, value: Value, places: Places) -> int:
        """Where a value is in a step."""
        value = self.root(value)
        if value.kind == "input":
            return places.inputs[value.name]
        if value.kind == "weight":
            return self._weights(value.name).address
        if value is self.program.output:
            return places.output
        place = self.plan.placements[value.index]
        return places.arena + place.offset + places.moved.get(place, 0)

    def has_place(self, value: Value) -> bool:
        """Whether a value is anywhere: what is fused away may have no place."""
        root = self.root(value)
        return root.kind != "result" or root is self.program.output or root.index in self.plan.placements

    def codes(self, value: Value, shape: StepShape, places: Places) -> tuple[int, int]:
        """Addresses of codes and scalars."""
        address = self.address(value, places)
        rows, groups = concrete(value.shape, shape.sizes)[:2]
        return address, address + rows * groups * GROUP

    def weight(self, instruction: Instruction) -> DeviceWeight:
        """The weight that an instruction reads, its second operand: where it is then."""
        role = operand(instruction, 1).name
        weight = self._weights(role)
        moved = None if self.passing is None else self.passing.moved(instruction.result.index, role)
        return weight if moved is None else weight.moved(moved)

    def bias(self, instruction: Instruction) -> int | None:
        """Address of an instruction's bias, its third operand, where it has one."""
        bias = instruction.operands[2] if len(instruction.operands) > 2 else None
        return None if bias is None else self._weights(bias.name).address

    def state(self, cache: Value) -> LayerPlace:
        """Where a layer's keys and values are."""
        return self._states[self.root(cache).name]

    def same_place(self, value: Value, other: Value) -> bool:
        """Whether two values lie over each other exactly."""
        return self.plan.placements.get(value.index) == self.plan.placements.get(other.index)

    def apart(self, result: Value, *read: Value) -> bool:
        """Whether a result lies over none of the values that are read for it."""
        place = self.plan.placements.get(self.root(result).index)
        return place is None or self._free(place, *read)

    def clear(self, at: int, *values: Value) -> bool:
        """Whether the workspace of the instruction at a position lies over none of these values."""
        return self._free(self.plan.workspaces[at], *values)

    def _free(self, place: Placement, *values: Value) -> bool:
        others = (self.plan.placements.get(self.root(value).index) for value in values)
        return not any(
            other
            and other.offset < place.offset + place.nbytes
            and place.offset < other.offset + other.nbytes
            for other in others
        )


def operand(instruction: Instruction, number: int) -> Value:
    """An operand that must be there."""
    value = instruction.operands[number]
    if value is None:
        raise UnsupportedError(f"{instruction.op.name} lacks an operand that it needs")
    return value


def plane_addresses(weight: DeviceWeight | None) -> dict[str, int | None]:
    """Addresses of a weight's planes, by the names of kernels' arguments; ``None`` for those that are not."""
    held = {} if weight is None else weight.planes
    return {plane: held.get(plane) for plane in ("codes", "high", "scales", "blocks")}
