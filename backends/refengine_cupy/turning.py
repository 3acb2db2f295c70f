"""Attention of one token of each sequence, with what leads to it: by one kernel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import prod

from refengine.program import Instruction, Placement, Value, concrete
from refengine_cupy.attention import Attending, attention, halves_kernels, rope_write
from refengine_cupy.binding import Binding, operand
from refengine_cupy.launches import launch
from refengine_cupy.runtime import Launch
from refengine_cupy.step_shape import Places, StepShape

ALIGNMENT = 256
"""What is moved begins at a multiple of so many bytes."""


class TurningAttention:
    """Queries and keys are turned, keys and values stored, and attention reads them.

    One kernel does all of it where each sequence has one token and matrix units can be used. What the first
    instructions read is then read to the end, when its memory may belong to the result or to what partitions
    leave. A step of few tokens takes little of either's place, which is as large as the largest step needs:
    so there is room beside what is read, and where there is none the instructions go one by one.

    Args:
        binding: where everything is.
        at: the position of the last instruction.
        q, k, write, instruction: that turn queries and keys, store keys and values, and attend.
    """

    def __init__(
        self,
        binding: Binding,
        at: int,
        q: Instruction,
        k: Instruction,
        write: Instruction,
        instruction: Instruction,
    ) -> None:
        self._binding, self._q, self._result = binding, q, instruction.result
        state = binding.state(operand(write, 0))
        self._attending = Attending(binding, at, instruction, state, operand(instruction, 2))
        self._kernels = halves_kernels(binding, self._attending.size)
        self._read = operand(q, 0), operand(k, 0), operand(write, 2), operand(q, 1)
        self._slots = operand(write, 3)
        self._apart = rope_write(binding, q, k, write), attention(binding, at, instruction)

    def __call__(self, shape: StepShape, places: Places) -> Iterable[Launch]:
        """The launches of a step; see ``Emit``."""
        partials = self._partials(shape)
        if self._kernels is None or partials is None or self.moved(shape) is None:
            for each in self._apart:
                yield from each(shape, places)
            return
        x, new_keys, new_values, turns = (self._binding.address(value, places) for value in self._read)
        given = self._attending.arguments(shape, places) | {
            "q": x, "new_keys": new_keys, "new_values": new_values, "turns": turns,
            "slots": self._binding.address(self._slots, places), "partials": places.arena + partials,
            "dims": int(self._read[3].shape[1]), "halves": int(self._q.attributes["pairing"] == "halves"),
        }  # fmt: skip
        kernel = self._kernels[0](self._attending.split(shape))
        turning = replace(kernel, name=kernel.name.replace("halves", "halves_turning"))
        yield launch(turning, self._attending.halves_grid(shape), **given)

    def moved(self, shape: StepShape) -> tuple[Placement, int] | None:
        """The result's place, and how far behind its beginning the result lies in a step where one kernel
        does it all; ``None`` in others.
        """
        if self._kernels is None or shape.tokens != shape.sequences or self._partials(shape) is None:
            return None
        place = self._place(self._result)
        if place is None:
            return None
        start = self._room(place, self._nbytes(self._result, shape), shape)
        return None if start is None else (place, start - place.offset)

    def _partials(self, shape: StepShape) -> int | None:
        """Where in the arena a step's partitions leave what is to be joined; ``None`` for want of room."""
        attending = self._attending
        if attending.workspace is None or not attending.split(shape):
            return 0
        needed = shape.tokens * shape.partitions * attending.heads * (attending.size + 2) * 4
        return self._room(attending.workspace, needed, shape)

    def _room(self, place: Placement, needed: int, shape: StepShape) -> int | None:
        """The first bytes of a place that a step reads nothing from."""
        at, end = place.offset, place.offset + place.nbytes
        for start, stop in sorted(self._span(value, shape) for value in self._read):
            if start < at + needed and at < stop:
                at = -(-stop // ALIGNMENT) * ALIGNMENT
        return at if at + needed <= end else None

    def _span(self, value: Value, shape: StepShape) -> tuple[int, int]:
        """The bytes of the arena that a value takes in a step; none, where it lies elsewhere."""
        place = self._place(value)
        return (0, 0) if place is None else (place.offset, place.offset + self._nbytes(value, shape))

    def _place(self, value: Value) -> Placement | None:
        return self._binding.plan.placements.get(self._binding.root(value).index)

    @staticmethod
    def _nbytes(value: Value, shape: StepShape) -> int:
        return 4 * prod(concrete(value.shape, shape.sizes))
