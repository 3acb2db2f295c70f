"""What a backend must provide. Anything with these methods is one; nothing need be inherited."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from refengine.backend.weights import WeightPlan
from refengine.candidates import Candidates
from refengine.memory import KVLayout
from refengine.ops import FloatArray
from refengine.program import Fusion, Instruction, MemoryPlan, Policy, Program, StepBatch
from refengine.quantizer import LazyTensor


@dataclass(frozen=True)
class Device:
    """A place where a backend computes.

    Attributes:
        name: as its vendor calls it.
        total_bytes: its memory, ``None`` where unknown.
        own_memory: whether that is its own; else it is the host's.
        free_bytes: of its own memory, what weights, KV cache, arena and logits may still take; ``None`` where
            unknown.
        context_bytes: of its own memory, what its driver and the kernels' code take: a constant that plans
            add.
    """

    name: str
    total_bytes: int | None
    own_memory: bool = False
    free_bytes: int | None = None
    context_bytes: int = 0


@dataclass(frozen=True)
class MemoryUse:
    """Bytes a backend holds now, by purpose.

    Attributes:
        weights: in memory of its own: decoded, repacked or copied.
        mapped: of the model's file, read in place; and what streamed weights pass through.
        kv_cache: committed segments.
        arena: intermediate values and working memory.
        host: of the host's memory, where all the others are of a device that has its own.
    """

    weights: int = 0
    mapped: int = 0
    kv_cache: int = 0
    arena: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """All of them but ``host``: where the devices' memory is the host's, that is 0."""
        return self.weights + self.mapped + self.kv_cache + self.arena


class KVStorage(Protocol):
    """The memory of a KV cache, taken and given back by segments (see ``KVLayout``).

    A step reads and writes blocks of committed segments only. What a segment holds after ``commit``, and what
    it held before ``release``, is nobody's business.

    Clauses: KVC-14, BCK-17.
    """

    def commit(self, pool: int, segment: int) -> None:
        """Take the memory of a segment.

        Raises:
            MemoryManagerError: there is none left, or the segment is committed already.
        """
        ...

    def release(self, pool: int, segment: int) -> None:
        """Give the memory of a segment back.

        Raises:
            MemoryManagerError: the segment is not committed.
        """
        ...

    def copy(self, pool: int, source: int, destination: int) -> None:
        """Copy a block onto another of the same pool."""
        ...

    def poison(self, pool: int, block: int) -> None:
        """Fill a block with NaN, so that a read of it shows."""
        ...

    def read(self, pool: int, block: int) -> NDArray[np.uint8]:
        """What a block holds, in memory of the host: uint8 ``[layout.block_bytes(pool)]``, a copy."""
        ...

    def write(self, pool: int, block: int, content: NDArray[np.uint8]) -> None:
        """Let a block hold what ``read`` gave, of this or another block of the pool."""
        ...


@runtime_checkable
class RunKVStorage(KVStorage, Protocol):
    """A storage, besides, that takes and gives back the memory of segments that follow each other at once,
    where that is faster than one by one. None need be one.

    Clauses: KVC-14.
    """

    def commit_run(self, pool: int, segments: range) -> None:
        """Take the memory of segments: of all or none.

        Raises:
            MemoryManagerError: there is none left, or one of them is committed already.
        """
        ...

    def release_run(self, pool: int, segments: range) -> None:
        """Give the memory of segments back: of all or none.

        Raises:
            MemoryManagerError: one of them is not committed.
        """
        ...


class Executable(Protocol):
    """A compiled Program with its weights and its cache."""

    def run(self, batch: StepBatch) -> FloatArray:
        """One step: writes keys and values, and returns logits ``[R, V]`` in the policy's activation dtype.

        Raises:
            TokenIdError, RequestError: the batch is out of range; nothing has been read or written then.

        Clauses: BCK-3, BCK-4, BCK-5, BCK-6, BCK-7, BCK-8, BCK-9, BCK-10, BCK-11.
        """
        ...


@runtime_checkable
class CandidateExecutable(Executable, Protocol):
    """An executable, besides, that can keep a step's logits where they are, and tell what comes first in each
    row. None need be one.
    """

    def run_candidates(self, batch: StepBatch, temperatures: NDArray[np.float64]) -> Candidates:
        """One step, as by ``run``; returns the candidates of its logits, and these row by row where asked.

        Args:
            temperatures: ``[R]``, of each row of logits; 0 where no sum is wanted.

        Raises:
            TokenIdError, RequestError: the batch is out of range, or there are other temperatures than rows;
                nothing has been read or written then.
            UnsupportedError: the program's result is no rows of logits.

        Clauses: BCK-18.
        """
        ...


class Backend(Protocol):
    """Computes Programs. Found through the entry-point group ``refengine.backends``.

    Attributes:
        name: what the user types.

    Clauses: BCK-1.
    """

    name: str

    @property
    def import_bytes(self) -> int:
        """What its code takes in a process once it has run, beside all that ``memory`` tells."""
        ...

    def devices(self) -> tuple[Device, ...]:
        """The devices it can use, best first."""
        ...

    def support(self, op: str, *, encoding: str | None, policy: str) -> str | None:
        """``None`` where it computes ``op`` natively, else the reason why not.

        Args:
            op: a name in ``refengine.ops.OPS``.
            encoding: of the op's weight, ``None`` for an op without one.
            policy: a name in ``refengine.program.POLICIES``.

        Clauses: BCK-2, CNV-11.
        """
        ...

    def workspace(self, instruction: Instruction, sizes: Mapping[str, int], policy: Policy) -> int:
        """Bytes of working memory that an instruction needs, which the plan then places in the arena.

        Args:
            instruction: of the Program that will be compiled.
            sizes: the most there may be of T, S and R.
        """
        ...

    def plan_weights(
        self, program: Program, weights: Mapping[str, LazyTensor], policy: Policy, limit: int | None
    ) -> WeightPlan:
        """How each weight will be held, before any is.

        Args:
            program: what will be computed with them.
            limit: bytes that they may take in all, of the device's memory where it has its own; ``None`` for
                as many as make it fastest. Where the limit is too small, the smallest plan there is.
        """
        ...

    def upload(
        self, weights: Mapping[str, LazyTensor], policy: Policy, plan: WeightPlan | None = None
    ) -> Any:
        """Take the weights, by role; what it returns is opaque and goes to ``compile``.

        Args:
            plan: how to hold them, from ``plan_weights``; ``None`` for whatever is fastest.

        Raises:
            NumericalError: at once, or in the first step that uses it: a weight is not finite.

        Clauses: BCK-14.
        """
        ...

    def create_cache(self, layout: KVLayout) -> KVStorage:
        """Prepare the KV cache's pools, no segment committed; what it returns also goes to ``compile``."""
        ...

    def compile(
        self,
        program: Program,
        policy: Policy,
        plan: MemoryPlan,
        weights: Any,
        layout: KVLayout,
        cache: Any,
        *,
        fallback: bool = False,
    ) -> Executable:
        """Make a Program executable for steps up to the plan's sizes.

        Args:
            fallback: whether ops that the backend does not support may run on the golden op.

        Raises:
            UnsupportedError: an op is not supported and may not, or cannot, fall back.
        """
        ...

    def memory(self) -> MemoryUse:
        """Bytes held now.

        Clauses: BCK-12.
        """
        ...


@runtime_checkable
class PreparingBackend(Backend, Protocol):
    """A backend, besides, that has slow work to do on a machine before it is fast there, such as to compile
    kernels. None need be one: without ``prepare``, such work is done when it is first needed.
    """

    def prepare(self, policy: str) -> None:
        """Do all such work that steps under a policy may need, and keep what comes of it on disk, where other
        processes find it. What was done before is not done again. Results are the same with and without it.

        The conformance suite calls it before its properties, whose time is limited.

        Args:
            policy: a name in ``refengine.program.POLICIES``.
        """
        ...


@runtime_checkable
class FusingBackend(Backend, Protocol):
    """A backend, besides, that computes several instructions as one, and tells so before places are planned.
    None need be one: without ``fusions``, every result has a place, and operands live until they are read
    last.
    """

    def fusions(
        self, program: Program, sizes: Mapping[str, int], encodings: Mapping[str, str]
    ) -> Iterable[Fusion]:
        """Instructions that it computes as one, in steps of any size; none is in two of them.

        It must also compute programs whose plan knows nothing of them.

        Args:
            program: what will be compiled.
            sizes: the most there may be of T, S and R.
            encodings: of weights, by role.

        Clauses: PRG-16.
        """
        ...
