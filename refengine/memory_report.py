"""What an engine holds, by purpose, by request and by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from refengine.engine_plan import EnginePlan
from refengine.memory import KVCacheManager, PrefixStatistics, pool_use, sequence_use
from refengine.models import Model


@dataclass(frozen=True)
class Holdings:
    """Bytes held at one moment, by purpose.

    Attributes:
        weights: in the backend's own memory.
        mapped: of the model's file, read in place; and what streamed weights pass through.
        arena: intermediate values and working memory of the ops.
        logits: of the step.
        kv_cache: committed segments.
        swapped: KV blocks of pre-empted requests, where the device's memory is the host's.
        host: of the host's memory, where the device has its own, which all the others are of: weights that
            stay there, and KV blocks of pre-empted requests.
    """

    weights: int = 0
    mapped: int = 0
    arena: int = 0
    logits: int = 0
    kv_cache: int = 0
    swapped: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """All of them but ``host``: where the device's memory is the host's, that is 0."""
        return self.weights + self.mapped + self.arena + self.logits + self.kv_cache + self.swapped


@dataclass(frozen=True)
class LayerHoldings:
    """Bytes that belong to a layer: its weights as stored, and its part of the blocks in use."""

    weights: int
    kv_cache: int


@dataclass(frozen=True)
class KVStatistics:
    """How well the KV cache is used.

    Attributes:
        blocks_in_use: by pool, of how many there may be (``blocks``).
        block_bytes: by pool.
        shared_blocks: blocks in use with more than one holder, by pool.
        cached_blocks: blocks that only the prefix cache holds, by pool.
        sharing_ratio: blocks that requests refer to, over blocks that this takes: 1 where nothing is shared.
        waste: of the positions in blocks of requests, the part that is not written yet, from 0 to 1.
        fragmentation: of the bytes in committed segments, the part in free blocks, from 0 to 1.
        lookups, hit_tokens, looked_up_tokens, evictions: of the prefix cache.
    """

    blocks: tuple[int, ...]
    blocks_in_use: tuple[int, ...]
    block_bytes: tuple[int, ...]
    shared_blocks: tuple[int, ...]
    cached_blocks: tuple[int, ...]
    sharing_ratio: float
    waste: float
    fragmentation: float
    lookups: int
    looked_up_tokens: int
    hit_tokens: int
    evictions: int


@dataclass(frozen=True)
class MemoryReport:
    """What an engine holds and has held.

    Attributes:
        current: now.
        peak: at the moment when it was most, in all.
        peak_step: the step of that moment, counted from 1; 0 before the first.
        limit: what the process may hold, or its part of the device's memory, where that has its own; ``None``
            for any number.
        requests: KV bytes by request; a shared block counts for each that refers to it.
        layers: by layer.
        kv: the KV cache.
        resident, peak_resident: of the process, as the system counts them; ``None`` where it does not tell.
    """

    current: Holdings
    peak: Holdings
    peak_step: int
    limit: int | None
    requests: Mapping[int, int]
    layers: tuple[LayerHoldings, ...]
    kv: KVStatistics
    resident: int | None
    peak_resident: int | None


def report(
    plan: EnginePlan,
    model: Model,
    manager: KVCacheManager,
    owners: Mapping[int, Sequence[int]],
    current: Holdings,
    peak: Holdings,
    peak_step: int,
) -> MemoryReport:
    """Put together what an engine's parts know.

    Args:
        plan: of the engine.
        model: its model.
        manager: its KV cache's.
        owners: by request: its sequences.
        current, peak, peak_step: what the engine holds and has held.
    """
    uses = {r: [sequence_use(manager, s) for s in sequences] for r, sequences in owners.items()}
    requests = {r: sum(use.own_bytes + use.shared_bytes for use in of) for r, of in uses.items()}
    resident, peak_resident = process_memory()
    return MemoryReport(
        current,
        peak,
        peak_step,
        plan.limit,
        requests,
        _layers(plan, model, manager),
        kv_statistics(manager),
        resident,
        peak_resident,
    )


def kv_statistics(manager: KVCacheManager) -> KVStatistics:
    """How well a KV cache is used now."""
    uses = [pool_use(manager, pool) for pool in range(len(manager.pools))]
    named = sum(use.used - use.idle for use in uses)
    positions = sum((use.used - use.idle) * use.block_bytes for use in uses)
    committed = sum(use.committed * use.block_bytes for use in uses)
    cache = manager.prefix_cache.statistics if manager.prefix_cache is not None else PrefixStatistics()
    return KVStatistics(
        blocks=tuple(use.blocks for use in uses),
        blocks_in_use=tuple(use.used - use.idle for use in uses),
        block_bytes=tuple(use.block_bytes for use in uses),
        shared_blocks=tuple(use.shared for use in uses),
        cached_blocks=tuple(use.idle for use in uses),
        sharing_ratio=sum(use.references for use in uses) / named if named else 1.0,
        waste=sum(use.unwritten * use.block_bytes for use in uses) / manager.layout.block_size / positions
        if positions
        else 0.0,
        fragmentation=1 - sum(use.nbytes for use in uses) / committed if committed else 0.0,
        lookups=cache.lookups,
        looked_up_tokens=cache.tokens,
        hit_tokens=cache.hit_tokens,
        evictions=cache.evictions,
    )


def _layers(plan: EnginePlan, model: Model, manager: KVCacheManager) -> tuple[LayerHoldings, ...]:
    kv_cache = dict.fromkeys(range(len(model.spec.layers)), 0)
    for g, group in enumerate(plan.layout.groups):
        for (layer, _, _), nbytes in zip(group.layers, plan.layout.layer_bytes(g), strict=True):
            kv_cache[layer] += manager.pools[g].num_used * sum(nbytes)
    weights = dict.fromkeys(kv_cache, 0)
    for role, tensor in model.weights.items():
        if role.startswith("layers."):
            weights[int(role.split(".")[1])] += tensor.nbytes
    return tuple(LayerHoldings(weights[layer], kv_cache[layer]) for layer in kv_cache)


def process_memory() -> tuple[int | None, int | None]:
    """Resident bytes of this process, now and at most (``VmRSS``, ``VmHWM``); ``None`` where not on Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None, None
    found = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    now, most = (int(found[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most
