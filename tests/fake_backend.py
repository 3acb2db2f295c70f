"""A backend that computes nothing and forgives nothing: its KV cache holds what tokens were written, and where.

Every slot holds a token, its position, and a hash of all tokens up to it. A step reads every slot that its
queries see, by the rules for windows and sealed blocks, and finds there one unbroken history; its logits are a
function of that history alone. So whoever knows a request's tokens knows its logits, whatever the schedule.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine import SamplingParams
from refengine.backend import Device, MemoryUse
from refengine.backend.numpy_backend import NumpyBackend
from refengine.errors import MemoryManagerError
from refengine.memory import KVLayout
from refengine.program import MemoryPlan, Policy, Program, StepBatch
from refengine.sampling import Sampled

SLOT = np.dtype([("history", "<u8"), ("position", "<i4"), ("token", "<i4")])
"""What a slot holds."""

NOTHING = 0x9E3779B97F4A7C15
"""The history before the first token."""

MASK = 2**64 - 1


class Broken(BaseException):
    """The engine broke a rule. No mere ``Exception``: an engine survives those."""


class Mishap(Exception):  # noqa: N818
    """A fault that was asked for."""


class OutOfMemory(Mishap, MemoryManagerError):  # noqa: N818
    """The same, where memory is taken."""


class Mishaps:
    """Faults by chance, from a seed.

    Args:
        rates: by kind (``executor``, ``commit``, ``sampler``): the chance of one per call.
        seed: of the chances.

    Attributes:
        met: how many of each there were.
    """

    def __init__(self, rates: dict[str, float], seed: int = 0) -> None:
        self._rates, self._random = rates, random.Random(seed)
        self.met: Counter[str] = Counter()

    def come(self, kind: str) -> bool:
        """Whether one happens now."""
        rate = self._rates.get(kind, 0.0)
        happens = rate > 0 and self._random.random() < rate
        self.met[kind] += happens
        return happens


def history(before: int, token: int) -> int:
    """The hash of a history with one more token (the finaliser of SplitMix64, Steele et al., 2014)."""
    x = (before ^ ((token + 1) * NOTHING)) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def histories(before: NDArray[np.uint64], tokens: NDArray[np.int32]) -> NDArray[np.uint64]:
    """The same of many."""
    x = before ^ ((tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(NOTHING))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def logits_after(found: NDArray[np.uint64], vocabulary_size: int) -> NDArray[np.float32]:
    """Logits ``[R, V]`` in ``0 … 1`` after histories ``[R]``."""
    bits = histories(found[:, None], np.arange(vocabulary_size, dtype=np.int32)[None])
    return ((bits >> np.uint64(40)).astype(np.float32)) / np.float32(2**24)


def choose(logits: NDArray[np.float32], params: SamplingParams, generated: int) -> int:
    """A token, by logits, seed and place in the output."""
    return (int(logits.argmax()) + 7 * params.seed + generated * (params.temperature > 0)) % len(logits)


def sampler(mishaps: Mishaps) -> Callable[..., Sampled]:
    """``choose`` in the place of the engine's sampler."""

    def sample(logits: NDArray[Any], params: SamplingParams, tokens: list[int], generated: int) -> Sampled:
        if mishaps.come("sampler"):
            raise Mishap("the sampler fails")
        return Sampled(choose(logits, params, generated), 0.0)

    return sample


class FakeBackend(NumpyBackend):
    """Its storage and executable are fakes; it plans as the NumPy backend does."""

    name = "fake"

    def __init__(self, mishaps: Mishaps | None = None) -> None:
        super().__init__()
        self.mishaps = mishaps or Mishaps({})
        self.storage: FakeStorage
        self.executable: FakeExecutable

    def devices(self) -> tuple[Device, ...]:
        return (Device("none", None),)

    def create_cache(self, layout: KVLayout) -> FakeStorage:  # type: ignore[override]
        self.storage = FakeStorage(layout, self.mishaps)
        return self.storage

    def compile(  # type: ignore[override]
        self,
        program: Program,
        policy: Policy,
        plan: MemoryPlan,
        weights: Any,
        layout: KVLayout,
        cache: FakeStorage,
        *,
        fallback: bool = False,
    ) -> FakeExecutable:
        self.executable = FakeExecutable(plan, layout, cache, program.vocabulary_size, self.mishaps)
        return self.executable

    def memory(self) -> MemoryUse:
        return MemoryUse(kv_cache=self.storage.nbytes)


class FakeStorage:
    """Slots in blocks of as many bytes as the real ones; what is not committed cannot be touched."""

    def __init__(self, layout: KVLayout, mishaps: Mishaps) -> None:
        self.layout, self._mishaps = layout, mishaps
        self._blocks, self.slots, self.committed = [], [], []
        for pool, count in enumerate(layout.num_blocks):
            blocks = np.full((count, layout.block_bytes(pool)), 0xFF, np.uint8)
            self._blocks.append(blocks)
            self.slots.append(blocks[:, : layout.block_size * SLOT.itemsize].view(SLOT))
            self.committed.append(np.zeros(count, bool))
        self._segments: set[tuple[int, int]] = set()

    @property
    def nbytes(self) -> int:
        return sum(self.layout.segment_bytes(pool) for pool, _ in self._segments)

    def commit(self, pool: int, segment: int) -> None:
        if (pool, segment) in self._segments or not 0 <= segment < self.layout.num_segments(pool):
            raise Broken(f"segment {segment} of pool {pool} is committed twice or does not exist")
        if self._mishaps.come("commit"):
            raise OutOfMemory("no memory is left")
        self._segments.add((pool, segment))
        self._spoil(pool, segment, committed=True)

    def release(self, pool: int, segment: int) -> None:
        if (pool, segment) not in self._segments:
            raise Broken(f"segment {segment} of pool {pool} is released and not committed")
        self._segments.remove((pool, segment))
        self._spoil(pool, segment, committed=False)

    def copy(self, pool: int, source: int, destination: int) -> None:
        self._touch(pool, source, destination)
        self._blocks[pool][destination] = self._blocks[pool][source]

    def poison(self, pool: int, block: int) -> None:
        self._touch(pool, block)
        self._blocks[pool][block] = 0xFF

    def read(self, pool: int, block: int) -> NDArray[np.uint8]:
        self._touch(pool, block)
        content: NDArray[np.uint8] = self._blocks[pool][block].copy()
        return content

    def write(self, pool: int, block: int, content: NDArray[np.uint8]) -> None:
        self._touch(pool, block)
        self._blocks[pool][block] = content

    def _touch(self, pool: int, *blocks: int) -> None:
        for block in blocks:
            if block < 0 or not self.committed[pool][block]:
                raise Broken(f"block {block} of pool {pool} is used and its segment is not committed")

    def _spoil(self, pool: int, segment: int, *, committed: bool) -> None:
        size = self.layout.segment_blocks(pool)
        self._blocks[pool][segment * size : (segment + 1) * size] = 0xFF
        self.committed[pool][segment * size : (segment + 1) * size] = committed


class FakeExecutable:
    """Writes what a step brings, reads all that it sees, and checks it.

    Attributes:
        tokens: computed by all steps so far.
    """

    def __init__(
        self, plan: MemoryPlan, layout: KVLayout, storage: FakeStorage, vocabulary_size: int, mishaps: Mishaps
    ) -> None:
        self._sizes, self._layout, self._storage = plan.sizes, layout, storage
        self._vocabulary_size, self._mishaps = vocabulary_size, mishaps
        self._plain = len(layout.groups) // 2 if layout.groups[-1].recent else len(layout.groups)
        self.tokens = 0

    def run(self, batch: StepBatch) -> NDArray[np.float32]:
        """One step; or a mishap, before anything is written or in the middle of it."""
        self._keeps_to_its_limits(batch)
        if self._mishaps.come("executor"):
            raise Mishap("the step fails before it begins")
        found = self._histories(batch)
        if self._mishaps.come("executor"):
            self._write(batch, ~found)
            raise Mishap("the step fails and leaves nonsense")
        self._write(batch, found)
        self._look(batch)
        self.tokens += len(found)
        return logits_after(found[batch.logit_rows], self._vocabulary_size)

    def _keeps_to_its_limits(self, batch: StepBatch) -> None:
        counts = {"T": len(batch.token_ids), "S": len(batch.context_lens), "R": len(batch.logit_rows)}
        for symbol, count in counts.items():
            if count > self._sizes[symbol]:
                raise Broken(f"a step has {symbol} = {count}, and {self._sizes[symbol]} at most are allowed")

    def _histories(self, batch: StepBatch) -> NDArray[np.uint64]:
        """After each token of the step, from the slot in front of its sequence's first one."""
        starts, found = batch.query_starts.tolist(), []
        for row, (top, stop) in enumerate(pairwise(starts)):
            position = int(batch.positions[top])
            before = self._before(batch, row, position) if position else NOTHING
            tokens = batch.token_ids[top:stop].tolist()
            found += list(accumulate(tokens, history, initial=before))[1:]
        return np.array(found, np.uint64)

    def _before(self, batch: StepBatch, row: int, position: int) -> int:
        """The history in front of a position, as its query sees it."""
        size = self._layout.block_size
        block, offset = divmod(position - 1, size)
        exact = block == 0 or block == position // size
        pool = next((g for g in range(self._plain) if self._layout.windows[g] is None), 0)
        pool += self._plain if exact and self._plain < len(self._layout.groups) else 0
        name = int(batch.block_tables[pool][row, block])
        slot = self._storage.slots[pool][name, offset]
        if name < 0 or slot["position"] != position - 1:
            raise Broken(f"position {position - 1} of row {row} is seen and was never written")
        return int(slot["history"])

    def _write(self, batch: StepBatch, found: NDArray[np.uint64]) -> None:
        size = self._layout.block_size
        for g, pool in enumerate(self._layout.groups):
            if pool.sealed is not None:
                continue
            blocks, offsets = np.divmod(batch.slot_mapping[g], size)
            self._committed(g, blocks)
            slots = self._storage.slots[g]
            slots["history"][blocks, offsets] = found
            slots["position"][blocks, offsets] = batch.positions
            slots["token"][blocks, offsets] = batch.token_ids
        if self._plain < len(self._layout.groups):
            rows = np.repeat(np.arange(len(batch.context_lens)), np.diff(batch.query_starts))
            ends = batch.positions % size == size - 1
            rows, full = rows[ends], batch.positions[ends] // size
            for g in range(self._plain):
                sealed, exact = (batch.block_tables[pool][rows, full] for pool in (g, g + self._plain))
                self._committed(g, sealed)
                self._storage.slots[g][sealed] = self._storage.slots[g + self._plain][exact]

    def _look(self, batch: StepBatch) -> None:
        """Every slot that a query of the step sees."""
        size, stops = self._layout.block_size, batch.context_lens[:, None]
        firsts = stops - np.diff(batch.query_starts)[:, None]
        for g in range(self._plain):
            positions = np.arange(batch.block_tables[g].shape[1] * size, dtype=np.int32)[None]
            blocks, window = positions // size, self._layout.windows[g] or 2**30
            seen = (positions < stops) & (positions > firsts - window)
            if self._plain == len(self._layout.groups):
                self._one_history(*self._slots(batch, g, seen), positions)
                continue
            later = np.maximum(firsts, (blocks + 1) * size)  # the first query that sees the block sealed
            sealed = (blocks > 0) & (later < stops) & (positions > later - window)
            exact = seen & ((blocks == 0) | (blocks >= firsts // size))
            old, _ = self._slots(batch, g, sealed)
            new, _ = self._slots(batch, g + self._plain, exact)
            self._one_history(old, sealed, positions)
            self._one_history(np.where(exact, new, old), exact | sealed, positions)

    def _slots(
        self, batch: StepBatch, pool: int, seen: NDArray[np.bool_]
    ) -> tuple[NDArray[np.void], NDArray[np.bool_]]:
        """What a pool holds for the positions of each sequence ``[S, positions]``; and which of it is seen."""
        tables = batch.block_tables[pool]
        used = seen.reshape(*tables.shape, -1).any(axis=2)
        self._committed(pool, tables[used])
        slots = self._storage.slots[pool][tables].reshape(len(tables), -1)
        return slots, seen

    def _one_history(
        self, slots: NDArray[np.void], seen: NDArray[np.bool_], positions: NDArray[np.int32]
    ) -> None:
        if (seen & (slots["position"] != positions)).any():
            row, position = np.argwhere(seen & (slots["position"] != positions))[0].tolist()
            raise Broken(f"row {row} sees at position {position} what is not there: {slots[row, position]}")
        before = np.roll(slots["history"], 1, axis=1)
        before[:, 0] = NOTHING
        linked = seen & np.roll(seen, 1, axis=1)
        linked[:, 0] = seen[:, 0]
        broken = linked & (histories(before, slots["token"]) != slots["history"])
        if broken.any():
            row, position = np.argwhere(broken)[0].tolist()
            raise Broken(f"row {row} sees another's tokens at position {position}")

    def _committed(self, pool: int, blocks: NDArray[np.int32]) -> None:
        if (blocks < 0).any() or not self._storage.committed[pool][blocks].all():
            raise Broken(f"a step uses blocks of pool {pool} that are released or not committed: {blocks}")
