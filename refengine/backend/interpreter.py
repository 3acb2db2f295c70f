"""Interpreting a Program op by op, in one planned arena: the plainest way to be a backend."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from refengine.backend.protocol import Device, MemoryUse
from refengine.errors import NumericalError, UnsupportedError
from refengine.memory import KVLayout
from refengine.ops import OPS, FloatArray, IndexArray, LayerCache
from refengine.program import (
    POLICIES,
    MemoryPlan,
    Policy,
    Program,
    StepBatch,
    check_step_batch,
    concrete,
    input_arrays,
)
from refengine.quantizer import ENCODINGS, LazyTensor

OpFunction = Callable[..., Any]
"""``function(*operands, **attributes, out=None)``, as the golden op of the same name."""


class InterpretedBackend:
    """A backend made of functions on NumPy arrays, one per op it computes natively.

    Subclasses set ``name`` and ``native``. Ops without a native function are refused, or run on the golden op
    where ``compile`` is told to fall back.
    """

    name: str
    native: ClassVar[Mapping[str, OpFunction]]

    def __init__(self) -> None:
        self._weights: list[DecodedWeights] = []
        self._kv_cache_bytes = self._arena_bytes = 0

    def devices(self) -> tuple[Device, ...]:
        """The CPU."""
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
        return (Device(platform.processor() or platform.machine(), pages),)

    def support(self, op: str, *, encoding: str | None, policy: str) -> str | None:
        """What has a native function, in every encoding and policy."""
        if op not in OPS:
            return f"there is no op {op!r}"
        if policy not in POLICIES:
            return f"there is no policy {policy!r}"
        if encoding is not None and encoding not in ENCODINGS:
            return f"there is no encoding {encoding!r}"
        return None if op in self.native else f"{self.name} has no {op} of its own"

    def upload(self, weights: Mapping[str, LazyTensor], policy: Policy) -> DecodedWeights:
        """Take the weights; each is decoded when a step first needs it."""
        self._weights.append(DecodedWeights(weights, policy))
        return self._weights[-1]

    def create_cache(self, layout: KVLayout) -> dict[int, LayerCache]:
        """One pair of arrays per layer. The system commits their pages when blocks are first written."""
        caches: dict[int, LayerCache] = {}
        for group in layout.groups:
            for layer, heads, size in group.layers:
                shape = (group.num_blocks, layout.block_size, heads, size)
                caches[layer] = LayerCache(np.empty(shape, layout.dtype), np.empty(shape, layout.dtype))
        self._kv_cache_bytes += layout.nbytes
        return caches

    def compile(
        self,
        program: Program,
        policy: Policy,
        plan: MemoryPlan,
        weights: DecodedWeights,
        layout: KVLayout,
        cache: dict[int, LayerCache],
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
        self._arena_bytes += plan.arena_bytes
        return InterpretedProgram(program, functions, policy, plan, weights, layout, cache)

    def memory(self) -> MemoryUse:
        """Bytes of decoded weights, of the KV cache's pools and of the arenas."""
        return MemoryUse(sum(w.nbytes for w in self._weights), self._kv_cache_bytes, self._arena_bytes)


class DecodedWeights:
    """Weights, decoded to the policy's dtype at first use and kept."""

    def __init__(self, stored: Mapping[str, LazyTensor], policy: Policy) -> None:
        self._stored, self._dtype = stored, policy.activations
        self._decoded: dict[str, FloatArray] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of what is decoded now."""
        return sum(array.nbytes for array in self._decoded.values())

    def table(self, role: str) -> DecodedRows:
        """A weight whose rows are decoded as they are named."""
        return DecodedRows(self._stored[role])

    def decoded(self, role: str) -> FloatArray:
        """A weight as numbers.

        Raises:
            NumericalError: it holds NaN or infinity.
        """
        if role not in self._decoded:
            array = _finite(self._stored[role].decode(), self._stored[role].name)
            self._decoded[role] = array.astype(self._dtype, copy=False)
        return self._decoded[role]


class DecodedRows:
    """A table still as stored, whose rows are decoded as they are named."""

    def __init__(self, stored: LazyTensor) -> None:
        self._stored = stored

    def __getitem__(self, rows: IndexArray) -> FloatArray:
        return _finite(self._stored[rows], self._stored.name)


def _finite(array: FloatArray, name: str) -> FloatArray:
    if not np.isfinite(array).all():
        raise NumericalError(
            f"tensor {name} holds NaN or infinity: the file is damaged, "
            "or was quantized from damaged weights; get it again or use another one"
        )
    return array


class InterpretedProgram:
    """A Program bound to weights, a KV cache and an arena."""

    def __init__(
        self,
        program: Program,
        functions: Mapping[str, OpFunction],
        policy: Policy,
        plan: MemoryPlan,
        weights: DecodedWeights,
        layout: KVLayout,
        cache: dict[int, LayerCache],
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
            vocabulary_size=self._program.vocabulary_size,
            num_blocks=self._layout.num_blocks,
            windows=self._layout.windows,
            block_size=self._layout.block_size,
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
        for instruction in self._program:
            op, result = instruction.op, instruction.result.index
            operands = [None if v is None else values[v.index] for v in instruction.operands]
            function = self._functions[op.name]
            if op.sharing in ("view", "state"):
                values[result] = function(*operands, **instruction.attributes)
                if instruction.result is self._program.output:  # it must not stay in the arena
                    logits[...] = values[result]
            else:
                out = self._places.get(result, logits)
                value = function(*operands, **instruction.attributes, out=out)
                if value is not out:  # a function may ignore the place it is offered; its result lands there
                    out[...] = value
                values[result] = out

    def _bind(self) -> dict[int, Any]:
        """Weights and caches by the index of their values.

        A table that is only ever looked up stays as stored: its rows are decoded as tokens name them.
        """
        looked_up = {i.operands[1] for i in self._program if i.op.name == "embedding"}
        computed = {v for i in self._program if i.op.name != "embedding" for v in i.operands}
        constants: dict[int, Any] = {}
        for leaf in self._program.leaves:
            if leaf.kind == "state":
                constants[leaf.index] = self._cache[int(leaf.name.split(".")[1])]
            elif leaf.kind == "weight" and leaf in looked_up - computed:
                constants[leaf.index] = self._weights.table(leaf.name)
            elif leaf.kind == "weight":
                constants[leaf.index] = self._weights.decoded(leaf.name)
        return constants

    def _place(self, sizes: Mapping[str, int]) -> dict[int, FloatArray]:
        """The planned places of all results, as arrays of a step's shape."""
        places = {}
        for instruction in self._program:
            value = instruction.result
            if placement := self._plan.placements.get(value.index):
                shape = concrete(value.shape, sizes)
                nbytes = math.prod(shape) * self._dtype.itemsize
                place = self._arena[placement.offset : placement.offset + nbytes]
                places[value.index] = place.view(self._dtype).reshape(shape)
        return places
