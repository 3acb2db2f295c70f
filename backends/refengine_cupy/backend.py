"""The CuPy backend: a Program as launches of kernels, over weights and a KV cache on a GPU."""

from __future__ import annotations

from collections.abc import Mapping

from refengine.backend.protocol import Device, MemoryUse
from refengine.backend.selection import missing
from refengine.backend.support import unknown
from refengine.backend.weights import WeightPlan
from refengine.errors import UnsupportedError
from refengine.memory import KVLayout
from refengine.program import Instruction, MemoryPlan, Policy, Program
from refengine.program import policy as policy_named
from refengine.quantizer import LazyTensor
from refengine_cupy.attention import attention_workspace
from refengine_cupy.executable import CupyExecutable
from refengine_cupy.fusions import Fusions
from refengine_cupy.half_products import rounded_workspace
from refengine_cupy.kv import DeviceKVStorage
from refengine_cupy.lowering import COMPUTED
from refengine_cupy.modules import modules_for
from refengine_cupy.packing import LAYOUTS
from refengine_cupy.runtime import Runtime
from refengine_cupy.weights import DeviceWeights, plan_packed

POLICIES = ("float32", "mixed16", "mixed8")
"""The precision policies that there are kernels for."""

IMPORT_BYTES = 384 * 2**20
"""What CuPy, the driver and the compiler of kernels take of the host's memory."""

CONTEXT_BYTES = 576 * 2**20
"""What the driver takes of the device's memory, kernels' code included: 553 MB on an H200."""

UNPLANNED_BYTES = 128 * 2**20
"""What is left free beside all that is planned: for kernels not loaded yet, a step's arrays, and pieces of
the KV cache that are larger than segments."""


class CupyBackend:
    """Kernels on a GPU, over weights repacked for wide loads.

    Args:
        runtime: the device; ``None`` for the first GPU.

    Raises:
        BackendFailedError: the GPU does not start.
    """

    name = "cupy"
    import_bytes = IMPORT_BYTES

    def __init__(self, runtime: Runtime | None = None) -> None:
        if runtime is None:
            from refengine_cupy.cupy_runtime import CupyRuntime

            runtime = CupyRuntime()
        self._runtime = runtime
        self._weights: list[DeviceWeights] = []
        self._taken = MemoryUse()  # by these
        self._caches: list[DeviceKVStorage] = []
        self._arena_bytes = 0

    def devices(self) -> tuple[Device, ...]:
        """The GPU."""
        name, total = self._runtime.name, self._runtime.total_bytes
        free = max(0, self._runtime.free_bytes() - UNPLANNED_BYTES)
        return (Device(name, total, own_memory=True, free_bytes=free, context_bytes=CONTEXT_BYTES),)

    def support(self, op: str, *, encoding: str | None, policy: str) -> str | None:
        """What has kernels."""
        if reason := unknown(op, encoding=encoding, policy=policy):
            return reason
        if op not in COMPUTED:
            return f"cupy has no {op} of its own"
        if policy not in POLICIES:
            return f"cupy computes under {', '.join(POLICIES)}, not under {policy}"
        if op == "linear_a8" and encoding is not None and encoding not in LAYOUTS:
            return f"cupy has no kernels for products of codes with {encoding}"
        return None

    def prepare(self, policy: str) -> None:
        """Compile all kernels that programs under a policy may need, side by side, into the cache on disk."""
        self._runtime.compile(modules_for(policy_named(policy)))

    def workspace(self, instruction: Instruction, sizes: Mapping[str, int], policy: Policy) -> int:
        """What attention keeps of the parts of a context; activations in float16."""
        match instruction.op.name:
            case "attention" | "sealed_attention":
                return attention_workspace(instruction, sizes)
            case "linear_a16":
                return rounded_workspace(instruction, sizes, warpgroups=self._runtime.warpgroups)
            case _:
                return 0

    def fusions(self, program: Program, sizes: Mapping[str, int], encodings: Mapping[str, str]) -> Fusions:
        """Products with norms before them, and with sums or what is gated after them."""
        return Fusions(program, sizes, encodings, self._runtime)

    def plan_weights(
        self, program: Program, weights: Mapping[str, LazyTensor], policy: Policy, limit: int | None
    ) -> WeightPlan:
        """On the device; what a limit leaves no room for there, in pinned memory of the host."""
        return plan_packed(program, weights, limit)

    def upload(
        self, weights: Mapping[str, LazyTensor], policy: Policy, plan: WeightPlan | None = None
    ) -> DeviceWeights:
        """Repack and copy, tensor by tensor."""
        halves = policy.products == "a16"
        uploaded, taken = DeviceWeights(self._runtime, weights, plan, halves=halves), self._taken
        self._weights.append(uploaded)
        self._taken = MemoryUse(
            weights=taken.weights + uploaded.held,
            mapped=taken.mapped + uploaded.passage,
            host=taken.host + uploaded.host,
        )
        return uploaded

    def create_cache(self, layout: KVLayout) -> DeviceKVStorage:
        """Addresses for all pools, and memory for none of their blocks."""
        self._caches.append(DeviceKVStorage(self._runtime, layout))
        return self._caches[-1]

    def compile(
        self,
        program: Program,
        policy: Policy,
        plan: MemoryPlan,
        weights: DeviceWeights,
        layout: KVLayout,
        cache: DeviceKVStorage,
        *,
        fallback: bool = False,
    ) -> CupyExecutable:
        """Bind the Program to kernels, weights, cache and an arena.

        Raises:
            UnsupportedError: it needs what there are no kernels for; golden ops cannot stand in, as they do
                not reach the device's memory.
            NumericalError: a weight would be infinite where it is rounded to float16.
        """
        reasons = dict.fromkeys(missing(self, program, policy, weights.encodings).values())
        if reasons:
            raise UnsupportedError(
                f"backend {self.name!r} cannot run this program: {'; '.join(reasons)}. Golden ops "
                "cannot take their place on a GPU: choose another backend, policy or KV dtype"
            )
        weights.check_float16(program)
        executable = CupyExecutable(self._runtime, program, plan, weights, layout, cache)
        self._arena_bytes += plan.arena_bytes
        return executable

    def memory(self) -> MemoryUse:
        """Bytes of weights, of the KV cache's committed segments and of the arenas; and of pinned weights."""
        return MemoryUse(
            weights=self._taken.weights,
            mapped=self._taken.mapped,
            host=self._taken.host,
            kv_cache=sum([cache.nbytes for cache in self._caches]),
            arena=self._arena_bytes,
        )
