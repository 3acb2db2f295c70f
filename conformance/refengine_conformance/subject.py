"""The subject: a backend, a precision policy, and the engine's other parts, each replaceable by a suspect."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from refengine.backend import Backend, Executable, KVStorage, load, plan_activations
from refengine.candidate_sampling import sample_candidates
from refengine.engine_journal import EngineJournal
from refengine.loader.checkpoint import Checkpoint
from refengine.loader.gguf import parse_gguf
from refengine.memory import (
    BlockAllocator,
    KVCacheManager,
    KVGroupLayout,
    KVLayout,
    PrefixCache,
    SealedFormat,
)
from refengine.models import Model
from refengine.ops import FloatArray, Shape
from refengine.program import (
    POLICIES,
    MemoryPlan,
    Policy,
    Program,
    StepBatch,
    StepInputs,
    Tracer,
    Value,
    apply_policy,
    plan_memory,
    symbolic_inputs,
)
from refengine.quantizer import (
    SEALED_KEYS,
    SEALED_VALUES,
    LazyTensor,
    StoredRows,
    decode,
    from_awq,
    from_gptq,
)
from refengine.rerun import Rerun
from refengine.sampling import sample
from refengine.scheduler import Queue, SchedulingPolicy, schedule, scheduling_policy
from refengine.simulation import Journal, Record, Simulator, Trace, read_journal, replay

NO_CACHE = KVLayout(1, np.dtype(np.float32), (KVGroupLayout(None, (), 1),))
"""The layout of a program without attention."""


@dataclass(frozen=True)
class Weight:
    """An operand that a backend is given as a weight.

    Attributes:
        array: float values, stored as F32; or the bytes of an encoding, uint8 ``[*shape[:-1], row_bytes]``.
        shape: in weights, where ``array`` is bytes.
        encoding: of ``array``.
    """

    array: NDArray[Any]
    shape: tuple[int, ...] | None = None
    encoding: str = "f32"

    def tensor(self, name: str) -> LazyTensor:
        """The weight as a checkpoint would hold it."""
        if self.shape is not None:
            return LazyTensor(name, self.shape, self.encoding, self.array)
        data = np.ascontiguousarray(self.array, "<f4").view(np.uint8)
        return LazyTensor(name, self.array.shape, "f32", data)


@dataclass(frozen=True)
class Input:
    """An operand that is one of the step's arrays: ``positions``, ``token_ids`` or ``logit_rows``."""

    name: str


Operand = NDArray[Any] | Weight | Input | None
"""An array is an activation: float ``[T, N]`` or ``[T, H, D]``, exact in float32."""


KVPart = Literal["keys", "values"]


def golden_kv_format(part: KVPart, name: str) -> SealedFormat:
    """The format of this name."""
    return (SEALED_KEYS if part == "keys" else SEALED_VALUES)[name]


KVFormats = Callable[[KVPart, str], SealedFormat]
"""Gives the format of sealed keys, or values, that has a name."""


def sealed_formats(
    names: tuple[str, str] | None, kv_format: KVFormats = golden_kv_format
) -> tuple[SealedFormat, SealedFormat] | None:
    """The formats of keys and of values, where these are sealed."""
    return None if names is None else (kv_format("keys", names[0]), kv_format("values", names[1]))


@dataclass(frozen=True)
class Subject:
    """What is being tested.

    Attributes:
        start: starts the backend; a property may start it more than once.
        policy: the precision policy.
        fallback: whether golden ops may stand in for what the backend lacks.
        allocator, kv_cache, prefix_cache, kv_format, schedule, scheduling, queue, journal, engine_journal,
            read_journal, replay, rerun, simulator, sample, sample_candidates, decode, from_gptq, from_awq,
            parse, tracer, trace, trace_sealed, apply_policy, plan, load: the engine's other parts.
    """

    start: Callable[[], Backend]
    policy: Policy = POLICIES["float32"]
    fallback: bool = False
    allocator: Callable[[int], BlockAllocator] = BlockAllocator
    kv_cache: Callable[..., KVCacheManager] = KVCacheManager
    prefix_cache: Callable[..., PrefixCache] = PrefixCache
    kv_format: KVFormats = golden_kv_format
    schedule: Callable[..., Any] = schedule
    scheduling: Callable[..., SchedulingPolicy] = scheduling_policy
    queue: Callable[[SchedulingPolicy], Queue] = Queue
    journal: Callable[..., Journal] = Journal
    engine_journal: Callable[..., EngineJournal] = EngineJournal
    read_journal: Callable[..., Record] = read_journal
    replay: Callable[..., Trace] = replay
    rerun: Callable[..., Rerun] = Rerun
    simulator: Callable[..., Simulator] = Simulator
    sample: Callable[..., Any] = sample
    sample_candidates: Callable[..., Any] = sample_candidates
    decode: Callable[..., Any] = decode
    from_gptq: Callable[..., StoredRows] = from_gptq
    from_awq: Callable[..., StoredRows] = from_awq
    parse: Callable[..., Checkpoint] = parse_gguf
    tracer: Callable[[], Tracer] = Tracer
    trace: Callable[[Model], Program] = attrgetter("program")
    trace_sealed: Callable[[Model], Program] = attrgetter("sealed_program")
    apply_policy: Callable[[Program, Policy, Mapping[str, str]], Program] = apply_policy
    load: Callable[[str], Backend] = load
    plan: Callable[..., MemoryPlan] = plan_memory

    @property
    def unit_roundoff(self) -> float:
        """u of the policy's activations: half the distance from 1 to the next number."""
        return float(np.finfo(self.policy.activations).eps) / 2

    def program(self, model: Model, *, sealed: bool = False) -> Program:
        """A model's program in the policy."""
        traced = (self.trace_sealed if sealed else self.trace)(model)
        return self.in_policy(traced, model.weights)

    def in_policy(self, program: Program, weights: Mapping[str, LazyTensor]) -> Program:
        """A traced program in the policy."""
        return self.apply_policy(program, self.policy, {name: t.encoding for name, t in weights.items()})

    def apply(
        self, op: str, *operands: Operand, rows: Sequence[int] | None = None, **attributes: object
    ) -> FloatArray:
        """One op, through the whole contract: traced, planned, compiled and run.

        Activations reach the backend as rows of an F32 table that the op ``embedding`` looks up, so that
        nothing but the public contract is needed. A product is that of the policy.

        Args:
            op: its name.
            operands: in the order of its signature.
            rows: the step's ``logit_rows``, for ops that take them.
            attributes: of the op.

        Returns:
            The result, in the policy's activation dtype.
        """
        tokens = next((len(a) for a in operands if isinstance(a, np.ndarray)), None)
        if tokens is None:  # nothing but a table: all of its rows are looked up
            tokens = next(o.tensor("").shape[0] for o in operands if isinstance(o, Weight))
        tracer, weights = self.tracer(), {}
        inputs = symbolic_inputs(tracer, kv_groups=1)
        values: list[Value | None] = []
        for number, operand in enumerate(operands):
            name = f"operand{number}"
            if operand is None:
                values.append(None)
            elif isinstance(operand, Input):
                values.append(getattr(inputs, operand.name))
            elif isinstance(operand, Weight):
                weights[name] = operand.tensor(name)
                values.append(tracer.symbol(name, "weight", weights[name].shape))
            else:
                weights[name] = Weight(operand.reshape(tokens, -1)).tensor(name)
                values.append(activation(tracer, inputs, name, operand.shape))
        traced = tracer.finish(getattr(tracer, op)(*values, **attributes))
        program = self.in_policy(traced, weights)
        batch = one_sequence(tokens, rows)
        return self.compile(program, weights, tokens, rows=len(batch.logit_rows)).run(batch)

    def compile(
        self,
        program: Program,
        weights: Mapping[str, LazyTensor],
        tokens: int,
        layout: KVLayout = NO_CACHE,
        rows: int | None = None,
    ) -> Executable:
        """A program on a backend started for it.

        Planned for up to ``tokens`` tokens and sequences, and as many rows of logits, or ``rows``.
        """
        backend = self.start()
        sizes = {"T": tokens, "S": tokens, "R": tokens if rows is None else rows, "P": layout.block_size}
        cache = backend.create_cache(layout)
        commit_all(cache, layout)
        return backend.compile(
            program,
            self.policy,
            plan_activations(backend, program, self.policy, sizes, weights, self.plan),
            backend.upload(weights, self.policy),
            layout,
            cache,
            fallback=self.fallback,
        )


def commit_all(cache: KVStorage, layout: KVLayout) -> None:
    """Take the memory of every segment."""
    for pool in range(len(layout.groups)):
        for segment in range(layout.num_segments(pool)):
            cache.commit(pool, segment)


def activation(tracer: Tracer, inputs: StepInputs[Value], name: str, shape: Shape) -> Value:
    """A value whose row for token id ``t`` is row ``t`` of the weight ``name``; ``shape`` counts the rows."""
    width = int(np.prod([int(dim) for dim in shape[1:]]))
    table = tracer.symbol(name, "weight", (shape[0], width))
    value = tracer.embedding(inputs.token_ids, table)
    return value if len(shape) == 2 else tracer.split_heads(value, heads=shape[1])


def one_sequence(tokens: int, rows: Sequence[int] | None = None) -> StepBatch:
    """A step of one sequence whose token ids and positions are 0, 1, 2 …"""
    ascending = np.arange(tokens, dtype=np.int32)
    return StepBatch(
        token_ids=ascending,
        positions=ascending,
        query_starts=np.array([0, tokens], np.int32),
        context_lens=np.array([tokens], np.int32),
        logit_rows=ascending if rows is None else np.array(rows, np.int32),
        slot_mapping=(np.zeros(tokens, np.int32),),
        block_tables=(np.zeros((1, tokens), np.int32),),
    )
