"""What a backend must provide. Anything with these methods is one; nothing need be inherited."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from refengine.memory import KVLayout
from refengine.ops import FloatArray
from refengine.program import MemoryPlan, Policy, Program, StepBatch
from refengine.quantizer import LazyTensor


@dataclass(frozen=True)
class Device:
    """A place where a backend computes.

    Attributes:
        name: as its vendor calls it.
        total_bytes: its memory, ``None`` where unknown.
    """

    name: str
    total_bytes: int | None


@dataclass(frozen=True)
class MemoryUse:
    """Bytes a backend holds now, by purpose."""

    weights: int = 0
    kv_cache: int = 0
    arena: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.kv_cache + self.arena


class Executable(Protocol):
    """A compiled Program with its weights and its cache."""

    def run(self, batch: StepBatch) -> FloatArray:
        """One step: writes keys and values, and returns logits ``[R, V]`` in the policy's activation dtype.

        Raises:
            TokenIdError, RequestError: the batch is out of range; nothing has been read or written then.

        Clauses: BCK-3, BCK-4, BCK-5, BCK-6, BCK-7, BCK-8, BCK-9, BCK-10, BCK-11.
        """
        ...


class Backend(Protocol):
    """Computes Programs. Found through the entry-point group ``refengine.backends``.

    Clauses: BCK-1.
    """

    name: str

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

    def upload(self, weights: Mapping[str, LazyTensor], policy: Policy) -> Any:
        """Take the weights, by role; what it returns is opaque and goes to ``compile``.

        Raises:
            NumericalError: at once, or in the first step that uses it: a weight is not finite.

        Clauses: BCK-14.
        """
        ...

    def create_cache(self, layout: KVLayout) -> Any:
        """Make the KV cache's pools; what it returns is opaque and goes to ``compile``."""
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
