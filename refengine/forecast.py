"""What an engine will hold at a given context and number of sequences, told before it holds anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from refengine.engine_plan import EnginePlan
from refengine.errors import ContextLengthError
from refengine.memory import KVCacheManager
from refengine.memory_report import Holdings
from refengine.scheduler import Job, Limits, schedule


@dataclass(frozen=True)
class Forecast:
    """The most that is held while sequences of so many positions run.

    Attributes:
        plan: of the engine.
        context: positions of each sequence.
        batch: sequences.
        peak: bytes by purpose at the moment when most is held.
        moment: that moment, in words.
        position_bytes: KV bytes of one more position of one sequence, where no window has been filled.
    """

    plan: EnginePlan
    context: int
    batch: int
    peak: Holdings
    moment: str
    position_bytes: int

    @property
    def process_bytes(self) -> int:
        """Of the host's memory, with Python, NumPy and refengine themselves."""
        if self.plan.device.own_memory:
            return self.plan.process_bytes + self.peak.host + self.peak.logits
        return self.plan.process_bytes + self.peak.total

    @property
    def limited_bytes(self) -> int:
        """Of the memory that a limit is about: the device's with its context, where it has its own, or the
        process's.
        """
        device = self.plan.device
        return device.context_bytes + self.peak.total if device.own_memory else self.process_bytes


def forecast(plan: EnginePlan, context: int, batch: int, prompt: int | None = None) -> Forecast:
    """Let the engine's own scheduler and manager bring sequences to a context, on paper.

    All begin at once with prompts of ``prompt`` tokens, and all stay when they have reached ``context``.

    Args:
        plan: of the engine.
        context: positions of each sequence at the end.
        batch: sequences.
        prompt: tokens of each prompt; ``None`` for the whole context.

    Raises:
        ContextLengthError: the plan's KV cache has no room for them.
    """
    row_bytes = plan.logits_bytes // plan.activations.sizes["R"]
    moments = _moments(plan, context, batch, context if prompt is None else prompt)
    kv_cache, rows, moment = max(moments, key=lambda found: found[0] + found[1] * row_bytes)
    weights = plan.weights
    peak = Holdings(
        weights=weights.held,
        mapped=weights.mapped + weights.streamed,
        arena=plan.activations.arena_bytes,
        logits=rows * row_bytes,
        kv_cache=kv_cache,
        host=weights.host,
    )
    layout = plan.layout
    whole = (g for g, pool in enumerate(layout.groups) if not pool.recent)
    position_bytes = sum(layout.block_bytes(g) for g in whole) // layout.block_size
    return Forecast(plan, context, batch, peak, moment, position_bytes)


def _moments(plan: EnginePlan, context: int, batch: int, prompt: int) -> Iterator[tuple[int, int, str]]:
    """KV bytes and rows of logits at every step of the way, and what the step computes."""
    layout = plan.layout
    manager, pools = KVCacheManager(layout), range(len(layout.groups))
    limits = Limits(plan.config.token_budget, plan.config.max_sequences)
    computed = dict.fromkeys(range(batch), 0)
    while unfinished := [n for n, done in computed.items() if done < context]:
        jobs = [Job(n, max(prompt, computed[n] + 1), computed[n]) for n in unfinished]
        running = [job for job in jobs if job.computed]
        waiting = [job for job in jobs if not job.computed]
        decision = schedule(
            running, waiting, limits, manager.free_blocks, manager.missing, manager.reclaimable
        )
        if decision.preempt or not decision.compute:
            raise ContextLengthError(
                f"{batch} sequences of {context} positions do not fit into the KV cache of "
                f"{layout.num_blocks[0]} blocks of {layout.block_size}"
            )
        for number, tokens in decision.compute:
            manager.grow(number, computed[number] + tokens)
        held = sum(len(manager.segments(g)) * layout.segment_bytes(g) for g in pools)
        rows = sum(computed[n] + tokens >= prompt for n, tokens in decision.compute)
        yield held, rows, _words(decision.compute, computed, batch)
        for number, tokens in decision.compute:
            computed[number] += tokens
            manager.release_passed(number, computed[number])


def _words(compute: Sequence[tuple[int, int]], computed: Mapping[int, int], batch: int) -> str:
    number, tokens = compute[-1]
    first = computed[number]
    positions = f"position {first:,}" if tokens == 1 else f"positions {first:,} to {first + tokens - 1:,}"
    return positions if batch == 1 else f"{positions} of sequence {number + 1} of {batch}"
