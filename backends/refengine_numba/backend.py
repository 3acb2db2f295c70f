"""The Numba backend: the whole step as one call of compiled code in every thread."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import Any

from refengine.backend.kv_storage import HostKVStorage
from refengine.backend.protocol import Device, MemoryUse
from refengine.backend.selection import missing
from refengine.backend.weights import WeightPlan
from refengine.errors import UnsupportedError
from refengine.memory import KVLayout
from refengine.ops import OPS
from refengine.program import Instruction, MemoryPlan, Policy, Program, golden_workspace
from refengine.quantizer import ENCODINGS, LazyTensor
from refengine_numba import isa, machine_code
from refengine_numba.binding import Binding
from refengine_numba.executable import NumbaExecutable
from refengine_numba.layout import LAYOUTS
from refengine_numba.lowering import LOWERINGS, VIEWS, workspace
from refengine_numba.team import Team, thread_count
from refengine_numba.weights import TiledWeights, plan_tiles

LINKER_BYTES = 112 * 2**20
"""What LLVM's linker, the kernels and this backend's modules take in a process at most.

The linker's library is mapped in pieces as large as the system's file cache has them: 42 or 95 MB of it.
Half of that leaves the process again, as soon as all kernels are linked.
"""

COMPILER_BYTES = 288 * 2**20
"""What Numba takes besides, where it compiles in the same process, since nothing can be kept on disk."""

POLICIES = ("float32", "mixed8", "mixed16")
"""The precision policies that there are kernels for."""


class NumbaBackend:
    """Compiled kernels on the CPU, over weights repacked for its vector units.

    ``REFENGINE_THREADS`` says how many threads compute (one per core), ``REFENGINE_NUMBA_ISA`` for which
    instruction set (the best there is), ``REFENGINE_NUMBA_CACHE`` where compiled code is kept, and
    ``REFENGINE_NUMBA_TILES`` where repacked weights are, if anywhere.

    Raises:
        UnsupportedError: one of these says what cannot be.
    """

    name = "numba"

    def __init__(self) -> None:
        self._isa, self._team = isa.choose(), Team(thread_count())
        self._weights: list[TiledWeights] = []
        self._caches: list[HostKVStorage] = []
        self._arena_bytes = 0

    @property
    def import_bytes(self) -> int:
        """Little, unless this process compiles: where kernels can neither be kept nor are there."""
        here = machine_code.folder()
        ready = machine_code.can_keep() or (here is not None and any(here.glob("*.o")))
        elsewhere = ready and not machine_code.checks_bounds()
        return LINKER_BYTES if elsewhere else LINKER_BYTES + COMPILER_BYTES

    def devices(self) -> tuple[Device, ...]:
        """The CPU."""
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
        name = f"{platform.processor() or platform.machine()}, {self._isa}, {self._team.threads} threads"
        return (Device(name, pages),)

    def support(self, op: str, *, encoding: str | None, policy: str) -> str | None:
        """What has kernels."""
        if op not in OPS:
            return f"there is no op {op!r}"
        if op not in LOWERINGS and op not in VIEWS:
            return f"numba has no {op} of its own"
        if policy not in POLICIES:
            return _not_under(policy)
        if encoding is not None and encoding not in ENCODINGS:
            return f"there is no encoding {encoding!r}"
        if encoding is not None and encoding not in LAYOUTS:
            return f"numba has no kernels for {encoding}"
        return None

    def workspace(self, instruction: Instruction, sizes: Mapping[str, int], policy: Policy) -> int:
        """What an instruction's kernels take, or its golden op where there are none."""
        if instruction.op.name not in LOWERINGS:
            return golden_workspace(instruction, sizes, policy)
        return workspace(instruction, sizes, self._team.threads)

    def plan_weights(
        self, program: Program, weights: Mapping[str, LazyTensor], policy: Policy, limit: int | None
    ) -> WeightPlan:
        """Matrices repacked, vectors decoded: there is no other way, whatever the limit."""
        return plan_tiles(program, weights)

    def upload(
        self, weights: Mapping[str, LazyTensor], policy: Policy, plan: WeightPlan | None = None
    ) -> TiledWeights:
        """Take the weights; what a program needs of them is repacked when it is compiled."""
        self._weights.append(TiledWeights(weights, self._team))
        return self._weights[-1]

    def create_cache(self, layout: KVLayout) -> HostKVStorage:
        """Address space for all pools, and memory for none of their blocks."""
        self._caches.append(HostKVStorage(layout))
        return self._caches[-1]

    def compile(
        self,
        program: Program,
        policy: Policy,
        plan: MemoryPlan,
        weights: TiledWeights,
        layout: KVLayout,
        cache: Any,
        *,
        fallback: bool = False,
    ) -> NumbaExecutable:
        """Bind the Program to kernels, weights, cache and an arena.

        Raises:
            UnsupportedError: it needs what there are no kernels for, and may not, or cannot, do without.
            NumericalError: a weight is infinite or NaN, or would be where it is rounded to float16.
        """
        self._check_supported(program, policy, weights, fallback)
        binding = Binding(program, policy, plan, weights, cache)
        self._arena_bytes += plan.arena_bytes
        return NumbaExecutable(
            program, binding, plan, layout, team=self._team, threads=self._team.threads, isa=self._isa
        )

    def memory(self) -> MemoryUse:
        """Bytes of repacked and decoded weights, of the KV cache's committed segments and of the arenas."""
        return MemoryUse(
            weights=sum(w.held for w in self._weights),
            kv_cache=sum(cache.nbytes for cache in self._caches),
            arena=self._arena_bytes,
        )

    def _check_supported(
        self, program: Program, policy: Policy, weights: TiledWeights, fallback: bool
    ) -> None:
        if policy.name not in POLICIES:
            raise UnsupportedError(
                f"backend {self.name!r} cannot run this program: {_not_under(policy.name)}. "
                "Choose one of these policies, or another backend"
            )
        reasons = missing(self, program, policy, weights.encodings)
        lacking = [reason for op, reason in reasons.items() if not fallback or op in LOWERINGS]
        if lacking:
            raise UnsupportedError(
                f"backend {self.name!r} cannot run this program: {'; '.join(lacking)}. "
                "Allow golden ops in the place of missing ones with --fallback, or choose another backend"
            )


def _not_under(policy: str) -> str:
    return f"numba computes under {', '.join(POLICIES)}, not under {policy}"
