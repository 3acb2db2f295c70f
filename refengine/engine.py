"""The engine: the loop that joins scheduler, memory and executable."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from refengine import scheduler
from refengine.backend import Backend
from refengine.errors import ContextLengthError, MemoryManagerError, RequestError, TokenIdError
from refengine.memory import KVCacheManager, KVGroupLayout, KVLayout
from refengine.models import Model, ModelSpec
from refengine.ops import FloatArray
from refengine.program import Policy, StepBatch, plan_memory, policy
from refengine.request import Output, Request
from refengine.sampling import Sampled, check_finite, sample
from refengine.sequence import Sequence
from refengine.tokenizer import Tokenizer


@dataclass(frozen=True)
class EngineConfig:
    """How much an engine may hold.

    Attributes:
        policy: the precision policy's name.
        token_budget: tokens computed per step at most.
        max_sequences: requests running at once at most.
        block_size: positions per KV block.
        kv_tokens: positions the KV cache holds in layers that see the whole context; ``None`` for enough for
            ``max_sequences`` full contexts, but at most 65,536 (or one context, where that is longer).
        fallback: whether golden ops may stand in for ops that the backend lacks.
    """

    policy: str = "float32"
    token_budget: int = 512
    max_sequences: int = 16
    block_size: int = 16
    kv_tokens: int | None = None
    fallback: bool = False

    def __post_init__(self) -> None:
        for name in ("token_budget", "max_sequences", "block_size"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.kv_tokens is not None and self.kv_tokens < self.block_size:
            raise RequestError(
                f"kv_tokens must be at least one block ({self.block_size}), not {self.kv_tokens}"
            )


class Engine:
    """Runs any number of requests on one model, several per step.

    Every request's tokens are what it would get alone: they depend on no other request and not on how its
    work was cut into steps.

    Args:
        model: the model.
        backend: computes its program.
        config: how much the engine may hold.
        tokenizer: turns tokens into text; without one, outputs have none.
        schedule, sample, kv_cache: the engine's other parts, each replaceable by one with the same contract.

    Clauses: SCH-12, SCH-13, SCH-14.
    """

    def __init__(
        self,
        model: Model,
        backend: Backend,
        config: EngineConfig | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        schedule: Callable[..., scheduler.Decision] = scheduler.schedule,
        sample: Callable[..., Sampled] = sample,
        kv_cache: Callable[[KVLayout], KVCacheManager] = KVCacheManager,
    ) -> None:
        self.config = config or EngineConfig()
        self.model, self.backend, self.tokenizer = model, backend, tokenizer
        self._schedule, self._sample = schedule, sample
        chosen = policy(self.config.policy)
        self.layout = kv_layout(model.spec, self.config, chosen)
        self._memory = kv_cache(self.layout)
        budget, sequences = self.config.token_budget, self.config.max_sequences
        self.plan = plan_memory(model.program, chosen, {"T": budget, "S": sequences, "R": budget})
        self._executable = backend.compile(
            model.program,
            chosen,
            self.plan,
            backend.upload(model.weights, chosen),
            self.layout,
            backend.create_cache(self.layout),
            fallback=self.config.fallback,
        )
        self._limits = scheduler.Limits(budget, sequences)
        self._sequences: dict[int, Sequence] = {}
        self._waiting: list[int] = []
        self._running: list[int] = []
        self._submitted = 0

    def submit(self, request: Request) -> int:
        """Queue a request; returns its number.

        Raises:
            TokenIdError: a prompt or stop id outside the vocabulary.
            ContextLengthError: it needs more positions than the model's context or the KV cache has.
            RequestError: stop strings without a tokenizer.
        """
        spec = self.model.spec
        for token in (*request.prompt, *request.stop_ids):
            if not 0 <= token < spec.vocabulary_size:
                raise TokenIdError(f"token id {token} is outside the vocabulary of {spec.vocabulary_size}")
        self._check_room(len(request.prompt), request.max_tokens)
        if request.stop and self.tokenizer is None:
            raise RequestError("stop strings need an engine with a tokenizer; use stop_ids")
        number, self._submitted = self._submitted, self._submitted + 1
        decoder = (
            self.tokenizer.stream_decoder(skip_special=True, continuation=True) if self.tokenizer else None
        )
        self._sequences[number] = Sequence(number, request, decoder)
        self._waiting.append(number)
        return number

    @property
    def context_length(self) -> int:
        """Positions one request may use: the model's context, or what the KV cache has room for."""
        rooms = [self._memory.capacity(g) for g, pool in enumerate(self.layout.groups) if pool.window is None]
        return min([self.model.spec.context_length, *rooms])

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._waiting or self._running)

    def step(self) -> list[Output]:
        """Advance by one step; returns an output for every token sampled and every request ended in it."""
        if not self.has_work:
            return []
        decision = self._schedule(
            [self._job(n) for n in self._running],
            [self._job(n) for n in self._waiting],
            self._limits,
            self._memory.free_blocks,
            self._memory.missing,
        )
        for number in decision.preempt:
            self._preempt(number)
        if not decision.compute:
            raise MemoryManagerError(
                "no request can advance, although each alone would fit: a scheduler's bug"
            )
        self._running = sorted({*self._running, *(n for n, _ in decision.compute)})
        self._waiting = [n for n in self._waiting if n not in self._running]
        try:
            batch, wanted = self._build_batch(decision.compute)
            logits = self._executable.run(batch)
            return self._advance(decision.compute, wanted, logits)
        except Exception:
            for number, _ in decision.compute:
                self._drop(number)
            raise

    def abort(self, number: int) -> Output | None:
        """End a request now and give back its memory; ``None`` where it has ended already."""
        if number not in self._sequences:
            return None
        self._drop(number)
        return Output(number, None, "", "abort")

    def prompt_logits(self, prompt: abc.Sequence[int], first: int = 0) -> FloatArray:
        """Logits ``[len(prompt) - first, V]`` after each token of a prompt from ``first`` on.

        In the policy's activation dtype.

        Raises:
            RequestError: the prompt cannot be served, or other requests are unfinished.
            NumericalError: a logit is NaN or infinite.
        """
        if self.has_work:
            raise RequestError("prompt logits are computed on an idle engine; finish or abort its requests")
        number = self.submit(Request(tuple(prompt), max_tokens=0, logits_from=first))
        sequence = self._sequences[number]
        while number in self._sequences:
            self.step()
        logits = np.concatenate(sequence.prompt_logits)
        check_finite(logits)
        return logits

    def _check_room(self, prompt: int, max_tokens: int) -> None:
        context = self.model.spec.context_length
        total = prompt + max_tokens
        if total > context:
            raise ContextLengthError(
                f"the prompt has {prompt} tokens and {max_tokens} more are asked for, but the model's "
                f"context is {context}: shorten the prompt or lower max_tokens"
            )
        for group, pool in enumerate(self.layout.groups):
            seen = total if pool.window is None else min(total, pool.window + self.config.token_budget)
            if seen > self._memory.capacity(group):
                raise ContextLengthError(
                    f"the request needs {seen} positions of KV cache and there are "
                    f"{self._memory.capacity(group)}: shorten the prompt, lower max_tokens or raise kv_tokens"
                )

    def _job(self, number: int) -> scheduler.Job:
        sequence = self._sequences[number]
        return scheduler.Job(number, len(sequence.tokens), sequence.computed, self._memory.held(number))

    def _build_batch(self, compute: abc.Sequence[tuple[int, int]]) -> tuple[StepBatch, list[int]]:
        """The step's arrays, and for every row of logits the request it belongs to."""
        spans = []
        for number, count in compute:
            start = self._sequences[number].computed
            self._memory.grow(number, start + count)
            spans.append((number, start, start + count))
        starts = [0, *accumulate(stop - start for _, start, stop in spans)]
        rows: list[int] = []
        wanted: list[int] = []
        for (number, start, stop), top in zip(spans, starts, strict=False):
            first = self._sequences[number].first_logits
            rows += range(top + max(first - start, 0), top + stop - start)
            wanted += [number] * (stop - max(first, start))
        groups = range(len(self.layout.groups))
        numbers = [number for number, _, _ in spans]
        batch = StepBatch(
            token_ids=_int32([t for n, start, stop in spans for t in self._sequences[n].tokens[start:stop]]),
            positions=_int32([p for _, start, stop in spans for p in range(start, stop)]),
            query_starts=_int32(starts),
            context_lens=_int32([stop for _, _, stop in spans]),
            logit_rows=_int32(rows),
            slot_mapping=tuple(
                np.concatenate([self._memory.tables(n)[g].slots(start, stop) for n, start, stop in spans])
                for g in groups
            ),
            block_tables=tuple(self._memory.padded_tables(numbers, g) for g in groups),
        )
        return batch, wanted

    def _advance(
        self, compute: abc.Sequence[tuple[int, int]], wanted: abc.Sequence[int], logits: FloatArray
    ) -> list[Output]:
        """Account for a computed step: sample where a request's tokens are all computed, release, end."""
        outputs = []
        for number, count in compute:
            sequence = self._sequences[number]
            sequence.computed += count
            self._memory.release_passed(number, sequence.computed)
            rows = logits[[i for i, owner in enumerate(wanted) if owner == number]]
            if sequence.request.logits_from is not None:
                sequence.prompt_logits.append(rows)
            if sequence.computed < len(sequence.tokens):
                continue
            sampled = None
            if sequence.generated < sequence.request.max_tokens:
                sampled = self._sample(
                    rows[-1], sequence.request.sampling, sequence.tokens, sequence.generated
                )
            output = sequence.accept(sampled)
            outputs.append(output)
            if output.finish_reason:
                self._drop(number)
        return outputs

    def _preempt(self, number: int) -> None:
        """Take a running request's memory; it will be computed again, with the same result."""
        self._memory.release(number)
        self._sequences[number].restart()
        self._running.remove(number)
        self._waiting = sorted([*self._waiting, number])

    def _drop(self, number: int) -> None:
        self._memory.release(number)
        self._sequences.pop(number, None)
        self._waiting = [n for n in self._waiting if n != number]
        self._running = [n for n in self._running if n != number]


def kv_layout(spec: ModelSpec, config: EngineConfig, chosen: Policy) -> KVLayout:
    """The KV cache of a model under a configuration: one pool per group of layers with the same window.

    A windowed group needs room for the window and one step's tokens of each running request, whatever the
    length of their contexts.
    """
    block = config.block_size
    tokens = config.kv_tokens or min(
        spec.context_length * config.max_sequences, max(spec.context_length, 65536)
    )
    full = KVGroupLayout(None, (), -(-tokens // block))
    groups = []
    for group in spec.kv_groups:
        shapes = tuple((i, spec.layers[i].kv_heads, spec.layers[i].head_size) for i in group.layers)
        blocks = full.num_blocks
        if group.window is not None:
            per_request = -(-(group.window + config.token_budget) // block) + 1
            blocks = min(blocks, per_request * config.max_sequences)
        groups.append(replace(full, window=group.window, layers=shapes, num_blocks=blocks))
    return KVLayout(block, chosen.kv, tuple(groups))


def _int32(values: abc.Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(values, np.int32)
