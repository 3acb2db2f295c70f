"""The shortest complete backend: the golden ops behind the protocol, without a thought for speed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.backend.protocol import Device, MemoryUse
from refengine.errors import NumericalError
from refengine.memory import KVLayout
from refengine.ops import OPS, LayerCache
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

Weights = Mapping[str, NDArray[Any]]
Caches = Mapping[int, LayerCache]


class LoopbackBackend:
    """Everything at once and one thing after the other."""

    name = "loopback"

    def __init__(self) -> None:
        self._weights = self._kv_cache = self._arena = 0

    def devices(self) -> tuple[Device, ...]:
        """The CPU, by no particular name."""
        return (Device("CPU", None),)

    def support(self, op: str, *, encoding: str | None, policy: str) -> str | None:
        """Whatever exists."""
        for what, name, known in (
            ("op", op, OPS),
            ("policy", policy, POLICIES),
            ("encoding", encoding, ENCODINGS),
        ):
            if name is not None and name not in known:
                return f"there is no {what} {name!r}"
        return None

    def upload(self, weights: Mapping[str, LazyTensor], policy: Policy) -> Weights:
        """Decode them all."""
        arrays = {}
        for role, tensor in weights.items():
            arrays[role] = tensor.decode().astype(policy.activations)
            if not np.isfinite(arrays[role]).all():
                raise NumericalError(f"tensor {tensor.name} holds NaN or infinity")
            self._weights += arrays[role].nbytes
        return arrays

    def create_cache(self, layout: KVLayout) -> Caches:
        """Keys and values of every layer."""
        self._kv_cache += layout.nbytes
        return {
            number: LayerCache(*np.zeros((2, group.num_blocks, layout.block_size, heads, size), layout.dtype))
            for group in layout.groups
            for number, heads, size in group.layers
        }

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
    ) -> LoopbackProgram:
        """Nothing to prepare but the arena."""
        self._arena += plan.arena_bytes
        return LoopbackProgram(program, plan, weights, layout, cache)

    def memory(self) -> MemoryUse:
        """What was taken."""
        return MemoryUse(self._weights, self._kv_cache, self._arena)


class LoopbackProgram:
    """A Program and all that it works on."""

    def __init__(
        self, program: Program, plan: MemoryPlan, weights: Weights, layout: KVLayout, cache: Caches
    ) -> None:
        self._program, self._plan, self._layout = program, plan, layout
        self._weights, self._cache = weights, cache
        self._arena = np.zeros(plan.arena_bytes, np.uint8)

    def run(self, batch: StepBatch) -> NDArray[Any]:
        """One step: every result is computed beside the arena, then copied to its place."""
        check_step_batch(
            batch,
            vocabulary_size=self._program.vocabulary_size,
            num_blocks=self._layout.num_blocks,
            windows=self._layout.windows,
            block_size=self._layout.block_size,
            sizes=self._plan.sizes,
        )
        sizes = {"T": len(batch.token_ids), "R": len(batch.logit_rows)}
        inputs = input_arrays(batch)
        values: dict[Value | None, Any] = {None: None}
        for leaf in self._program.leaves:
            if leaf.kind == "state":
                values[leaf] = self._cache[int(leaf.name.split(".")[1])]
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
