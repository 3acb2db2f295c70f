"""The engine: the loop that joins scheduler, memory and executable."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from refengine import scheduler
from refengine.backend import Backend
from refengine.candidate_sampling import candidate_executable, may_draw, sample_candidates
from refengine.candidates import Candidates
from refengine.config import EngineConfig
from refengine.engine_plan import plan_engine
from refengine.errors import (
    ContextLengthError,
    MemoryManagerError,
    RequestError,
    SequenceStateError,
    TokenIdError,
)
from refengine.memory import FlightRecorder, KVCacheManager, KVGroupLayout
from refengine.memory.block_table import slots_of
from refengine.memory.heap import trim_heap
from refengine.memory.prefix_cache import PrefixCache
from refengine.memory_report import Holdings, MemoryReport, report
from refengine.models import Model
from refengine.ops import FloatArray
from refengine.paged_cache import PagedCache
from refengine.program import StepBatch
from refengine.program.step_batch import IndexArray, StepInputs
from refengine.request import FinishReason, Output, Request
from refengine.sampling import Sampled, check_finite, sample
from refengine.sequence import Sequence
from refengine.tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from refengine.engine_journal import EngineJournal

HOST_OPERATIONS = 50e9
"""Operations per second at which a token is taken to be computed again, where swapping is weighed against it.
A constant, and no measurement: the same requests must be scheduled alike in every run."""

HOST_BANDWIDTH = 5e9
"""Bytes per second at which blocks are taken to be copied to the host or back."""


class Engine:
    """Runs any number of requests on one model, several per step.

    Every request's tokens are what it would get alone: they depend on no other request and not on how its
    work was cut into steps.

    Args:
        model: the model.
        backend: computes its program.
        config: how much the engine may hold.
        tokenizer: turns tokens into text; without one, outputs have none.
        on_limit: called with the flight recorder and the reason when a limit of memory is hit.
        journal: where requests, decisions and hashes of the answers are written down; ``None`` for nowhere.
        schedule, sample, kv_cache: the engine's other parts, each replaceable by one with the same contract.

    Attributes:
        plan: what it holds; decided before anything is loaded.
        recorder: the last events of its memory manager.

    Raises:
        RequestError: there is no such scheduling policy.
        MemoryLimitError: the model does not fit ``config.memory``.
        UnsupportedError: the backend cannot compute it.

    Clauses: SCH-12, SCH-13, SCH-14.
    """

    def __init__(
        self,
        model: Model,
        backend: Backend,
        config: EngineConfig | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        on_limit: Callable[[FlightRecorder, str], None] | None = None,
        journal: EngineJournal | None = None,
        schedule: Callable[..., scheduler.Decision] = scheduler.schedule,
        sample: Callable[..., Sampled] = sample,
        kv_cache: Callable[..., KVCacheManager] = KVCacheManager,
    ) -> None:
        self.config = config = config or EngineConfig()
        self.model, self.backend, self.tokenizer = model, backend, tokenizer
        self._queue = scheduler.Queue(scheduler.scheduling_policy(config.scheduling))
        self.plan = plan = plan_engine(model, backend, config)
        self._schedule, self._sample, self._journal = schedule, sample, journal
        if journal is not None:
            self._schedule = journal.begin(model, backend.name, config, plan.layout, schedule)
        self.recorder = FlightRecorder(on_limit)
        self._memory = kv_cache(plan.layout, PrefixCache()) if config.prefix_cache else kv_cache(plan.layout)
        storage = backend.create_cache(plan.layout)
        self._sequences: dict[int, Sequence] = {}
        self._cache = PagedCache(self._memory, storage, self.recorder, self._tokens if config.check else None)
        self._cache.reserve(config.reserve)
        self._executable = backend.compile(
            plan.program,
            plan.policy,
            plan.activations,
            backend.upload(model.weights, plan.policy, plan.weights),
            plan.layout,
            storage,
            fallback=config.fallback,
        )
        self._candidates = None  # a journal hashes every row that is drawn from
        if journal is None:
            self._candidates = candidate_executable(self._executable, sample, model.spec.vocabulary_size)
        self._peak, self._peak_step = Holdings(), 0
        self._requests: dict[int, set[int]] = {}
        self._running: list[int] = []  # in order of admission
        self._keep_logits: set[int] = set()  # requests that keep the logits of their prompt
        self._submitted = 0
        self._observe(logits=0)

    def submit(self, request: Request) -> int:
        """Queue a request; returns its number.

        Raises:
            TokenIdError: a prompt or stop id outside the vocabulary.
            ContextLengthError: it needs more positions than the model's context or the KV cache has.
            RequestError: stop strings without a tokenizer, or more samples than may run at once.
        """
        spec = self.model.spec
        for token in (*request.prompt, *request.stop_ids):
            if not 0 <= token < spec.vocabulary_size:
                raise TokenIdError(f"token id {token} is outside the vocabulary of {spec.vocabulary_size}")
        self._check_room(len(request.prompt), request.max_tokens)
        if request.stop and self.tokenizer is None:
            raise RequestError("stop strings need an engine with a tokenizer; use stop_ids")
        if request.samples > self.config.max_sequences:
            raise RequestError(
                f"{request.samples} samples are asked for, and {self.config.max_sequences} sequences may run "
                "at once: ask for fewer, or raise max_sequences"
            )
        number, self._submitted = self._submitted, self._submitted + request.samples
        self._sequences[number] = Sequence(number, request, self._decoder())
        self._requests[number] = {number}
        if request.logits_from is not None:
            self._keep_logits.add(number)
        terms = self._terms(number, request)
        self._queue.submit(number, terms)
        self.recorder.record("submit", request=number, prompt=len(request.prompt), samples=request.samples)
        if self._journal is not None:
            self._journal.submit(number, terms, request)
        return number

    @property
    def context_length(self) -> int:
        """Positions one request may use: the model's context, or what the KV cache has room for."""
        rooms = [self._memory.capacity(g) for g, pool in enumerate(self._pools) if self._holds_all(pool)]
        return min([self.model.spec.context_length, *rooms])

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._running) or len(self._queue) > 0

    def step(self) -> list[Output]:
        """Advance by one step; returns an output for every token sampled and every sample ended in it.

        What fails ends the requests that it concerns, with its cause, and no others.

        Raises:
            OutputError: the journal could not be written since the last step; the next goes on without it.
        """
        if self._journal is not None:
            self._journal.check()
        if not self.has_work:
            return []
        self.recorder.step += 1
        compute = self._decide()
        running = set(self._running)
        admitted = [number for number, _ in compute if number not in running]
        for number in admitted:
            self._queue.admit(number)
            self._running.append(number)
            self.recorder.record("admit", request=number, cached=self._sequences[number].computed)
        try:
            for number in admitted:
                if self._cache.is_swapped(number):
                    self._cache.swap_in(number)
            batch, wanted = self._build_batch(compute)
            self._cache.settle()
            results = self._run(batch, compute, wanted)
            held = self._observe(results.nbytes)
            self.recorder.record(
                "step", tokens=len(batch.token_ids), sequences=len(compute), rows=len(batch.logit_rows),
                bytes=held,
            )  # fmt: skip
            return self._advance(compute, wanted, results)
        except Exception as error:  # whatever a backend may raise
            if isinstance(error, MemoryManagerError):
                self.recorder.limit("refuse", str(error))
            failed = [number for number, _ in compute if number in self._sequences]
            return [output for number in failed for output in self._fail(number, error)]
        finally:
            self._cache.settle()
            if self.recorder.step == 1:  # what was needed to decode weights and to choose BLAS calls
                trim_heap()

    def fork(self, number: int, *, token: int | None = None, seed: int | None = None) -> int:
        """Let a running request go on twice from here; returns the new one's number.

        Both hold the same blocks until they write to them: so beams keep their candidates.

        Args:
            number: a request of one sample whose prompt is computed.
            token: what the new one has in place of the last token; ``None`` for the same.
            seed: with which the new one samples from here on; ``None`` for the same.

        Raises:
            SequenceStateError: the request has ended, or is not running.
            TokenIdError: ``token`` is outside the vocabulary.
            RequestError: the request has several samples or no output yet, or as many run as may.
        """
        parent = self._sequences.get(number)
        if parent is None or number not in self._running:
            raise SequenceStateError(f"request {number} has ended or is not running, and cannot be forked")
        if parent.request.samples > 1 or not parent.generated:
            raise RequestError(f"request {number} has several samples, or no output yet: it cannot be forked")
        if sum(self._sequences[n].places for n in self._running) >= self.config.max_sequences:
            raise RequestError(f"{self.config.max_sequences} sequences are running, and no more may")
        if token is not None and not 0 <= token < self.model.spec.vocabulary_size:
            raise TokenIdError(f"token id {token} is outside the vocabulary")
        child, self._submitted = self._submitted, self._submitted + 1
        self._memory.fork(number, child)
        self._sequences[child] = parent.branch(child, self._decoder(), token, seed)
        self._requests[child] = {child}
        if parent.request.logits_from is not None:
            self._keep_logits.add(child)
        self._queue.fork(number, child)
        self._running.insert(self._running.index(number) + 1, child)
        self.recorder.record("fork", parent=number, child=child)
        if self._journal is not None:
            self._journal.fork(child, number, parent.generated, token, seed)
        return child

    def abort(self, number: int) -> Output | None:
        """End a request now, with all its samples, and give back its memory.

        ``None`` where it has ended already.
        """
        if number not in self._requests:
            return None
        for sequence in tuple(self._requests[number]):
            self._drop(sequence, "abort")
        self._cache.settle()
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
            for output in self.step():
                if output.error is not None:
                    raise output.error
        logits = np.concatenate(sequence.prompt_logits)
        check_finite(logits)
        return logits

    def memory(self) -> MemoryReport:
        """What the engine holds and has held."""
        owners = {request: sorted(sequences) for request, sequences in self._requests.items()}
        return report(self.plan, self.model, self._memory, owners, self._held(0), self._peak, self._peak_step)

    @property
    def _pools(self) -> tuple[KVGroupLayout, ...]:
        return self.plan.layout.groups

    @staticmethod
    def _holds_all(pool: KVGroupLayout) -> bool:
        """Whether a pool keeps a sequence's whole context."""
        return pool.window is None and not pool.recent

    def _check_room(self, prompt: int, max_tokens: int) -> None:
        context = self.model.spec.context_length
        total = prompt + max_tokens
        if total > context:
            raise ContextLengthError(
                f"the prompt has {prompt} tokens and {max_tokens} more are asked for, but the model's "
                f"context is {context}: shorten the prompt or lower max_tokens"
            )
        budget, block = self.config.token_budget, self.config.block_size
        for group, pool in enumerate(self._pools):
            if pool.recent:
                seen = min(total, budget + 2 * block)
            else:
                seen = total if pool.window is None else min(total, pool.window + budget)
            if seen > self._memory.capacity(group):
                text = (
                    f"the request needs {seen} positions of KV cache and there are "
                    f"{self._memory.capacity(group)}: shorten the prompt, lower max_tokens or raise "
                    f"{'kv_tokens' if self.plan.limit is None else 'the memory limit'}"
                )
                self.recorder.limit("refuse", text)
                raise ContextLengthError(text)

    def _tokens(self) -> dict[abc.Hashable, abc.Sequence[int]]:
        return {number: sequence.tokens for number, sequence in self._sequences.items()}

    def _decoder(self) -> StreamDecoder | None:
        if self.tokenizer is None:
            return None
        return self.tokenizer.stream_decoder(skip_special=True, continuation=True)

    def _decide(self) -> tuple[tuple[int, int], ...]:
        """Ask the scheduler, and carry out what it says of memory; gives what to compute.

        Where pre-empting has freed less than hoped, because others hold the same blocks, it is asked again.
        """
        while True:
            adopted: dict[int, scheduler.Blocks] = {}
            decision = self._schedule_step(adopted)
            if adopted:
                computed = {number for number, _ in decision.compute}
                left = [number for number in adopted if number not in computed]
                if left and decision.preempt:
                    # of a policy that pre-empts by rank: what waits held blocks that were not to be had then
                    self._return(adopted)
                    decision = self._schedule_step()
                else:
                    self._return(left)
            for number in decision.preempt:
                self._preempt(number, swap=number in decision.swap)
            if decision.compute:
                return decision.compute
            if not decision.preempt:
                raise MemoryManagerError(
                    "no request can advance, although each alone would fit: a scheduler's bug"
                )

    def _schedule_step(self, adopted: dict[int, scheduler.Blocks] | None = None) -> scheduler.Decision:
        """One decision.

        Args:
            adopted: gets those waiting requests that were given the cached blocks of their beginnings when
                the scheduler looked at them, and how many free blocks of each pool these were; ``None`` where
                nobody is to be given any.
        """
        if self._journal is not None:
            self._journal.decide(self.recorder.step)
        missing: scheduler.Missing = self._memory.missing
        waiting: Iterable[int] = self._queue
        free = self._memory.free_blocks
        if adopted is not None and self.config.prefix_cache and self._places_left() > 0:
            waiting = self._adopting(adopted)
            missing = partial(self._missing, adopted)
        return self._schedule(
            list(self._jobs(self._running, missing)),
            self._jobs(waiting, missing),
            scheduler.Limits(self._budget(), self.config.max_sequences),
            free,
            missing,
            self._memory.reclaimable,
            policy=self._queue.policy,
            host=self._host(),
        )

    def _places_left(self) -> int:
        return self.config.max_sequences - sum([self._sequences[n].places for n in self._running])

    def _adopting(self, adopted: dict[int, scheduler.Blocks]) -> Iterator[int]:
        """Those that wait, each with the cached blocks of its beginning from when it is looked at."""
        for number in self._queue:
            sequence = self._sequences[number]
            if not self._cache.is_swapped(number):
                before = self._memory.free_blocks
                sequence.computed = self._memory.adopt(
                    number,
                    sequence.tokens,
                    sequence.request.cache_salt,
                    sequence.first_logits,
                    again=sequence.looked_up,
                )
                sequence.looked_up = True
                if sequence.computed:
                    after = self._memory.free_blocks
                    adopted[number] = tuple([b - a for b, a in zip(before, after, strict=True)])
            yield number

    def _missing(self, adopted: Mapping[int, scheduler.Blocks], number: int, tokens: int) -> scheduler.Blocks:
        """Free blocks that a request takes to hold so many positions, with those that it has adopted."""
        needed = self._memory.missing(number, tokens)
        if (taken := adopted.get(number)) is None:
            return needed
        return tuple([n + t for n, t in zip(needed, taken, strict=True)])

    def _return(self, numbers: Iterable[int]) -> None:
        """Take adopted blocks back from requests that are not admitted."""
        for number in numbers:
            self._memory.release(number)
            self._sequences[number].computed = 0

    def _host(self) -> scheduler.HostPool | None:
        """Room for the blocks of the pre-empted, and what it costs to use it."""
        if not self.config.swap:
            return None
        return scheduler.HostPool(
            self.config.swap - self._cache.swapped_bytes,
            tuple(self.plan.layout.block_bytes(g) for g in range(len(self._pools))),
            self._memory.held,
            token_seconds=2 * self.model.size / HOST_OPERATIONS,
            byte_seconds=1 / HOST_BANDWIDTH,
        )

    def _budget(self) -> int:
        """Tokens that the next step may compute: no more of them may want logits than there are rows."""
        if not self._keep_logits:
            return self.config.token_budget
        unwanted = 0
        if len(self._sequences) == 1 and (self._running or not self.config.prefix_cache):
            (only,) = self._sequences.values()  # that will adopt nothing any more
            unwanted = only.first_logits - only.computed
        return min(self.config.token_budget, max(unwanted, 0) + self.config.rows)

    def _jobs(self, numbers: Iterable[int], missing: scheduler.Missing) -> Iterator[scheduler.Job]:
        """Requests as the scheduler sees them."""
        terms = self._queue.terms
        for number in numbers:
            sequence = self._sequences[number]
            reserve: scheduler.Blocks = ()
            if sequence.expected is not None:
                reserve = missing(number, sequence.expected)
            yield scheduler.Job(
                number, len(sequence.tokens), sequence.computed, sequence.places, reserve, terms(number)
            )

    def _terms(self, number: int, request: Request) -> scheduler.Terms:
        expected = request.max_tokens if request.expected_tokens is None else request.expected_tokens
        return scheduler.Terms(
            arrival=number,
            submitted=self.recorder.step,
            prompt=len(request.prompt),
            output=expected,
            samples=request.samples,
            priority=request.priority,
            tenant=request.tenant,
            deadline=request.deadline,
        )

    def _build_batch(self, compute: abc.Sequence[tuple[int, int]]) -> tuple[StepBatch, list[int]]:
        """The step's arrays, and how many rows of logits each sequence has of it."""
        sequences, grow = self._sequences, self._memory.grow
        tokens: list[int] = []
        stops: list[int] = []
        wanted: list[int] = []
        for number, count in compute:
            sequence = sequences[number]
            known = sequence.tokens
            stop = sequence.computed + count
            grow(number, stop)
            stops.append(stop)
            if count == 1 and stop == len(known):  # it is decoding, as most are in most steps
                tokens.append(known[-1])
                wanted.append(1)
            else:
                tokens += known[stop - count : stop]
                wanted.append(min(count, max(stop - sequence.first_logits, 0)))
        numbers = [number for number, _ in compute]
        context_lens = _int32(stops)
        query_starts = np.arange(len(compute) + 1, dtype=np.int32)
        positions = context_lens - 1
        rows = logit_rows = query_starts[:-1]
        if len(tokens) > len(compute):
            counts = _int32([count for _, count in compute])
            positions, rows = _last(context_lens, counts), rows.repeat(counts)
            np.cumsum(counts, out=query_starts[1:])
        if len(tokens) > len(compute) or 0 in wanted:
            logit_rows = _last(query_starts[1:], _int32(wanted))
        tables = tuple([self._memory.padded_tables(numbers, g) for g in range(len(self._pools))])
        size = self.plan.layout.block_size
        batch: StepBatch = StepInputs(
            token_ids=_int32(tokens),
            positions=positions,
            query_starts=query_starts,
            context_lens=context_lens,
            logit_rows=logit_rows,
            slot_mapping=tuple([slots_of(table, rows, positions, size) for table in tables]),
            block_tables=tables,
        )
        return batch, wanted

    def _run(
        self, batch: StepBatch, compute: abc.Sequence[tuple[int, int]], wanted: abc.Sequence[int]
    ) -> FloatArray | Candidates:
        """Compute a step; gives all its logits, or candidates where these may be enough for somebody."""
        if self._candidates is not None and not self._keep_logits:
            asking = [
                self._sequences[n].sampling for (n, _), wants in zip(compute, wanted, strict=True) if wants
            ]
            if any(map(may_draw, asking)):
                temperatures = np.array([params.temperature for params in asking], np.float64)
                return self._candidates.run_candidates(batch, temperatures)
        return self._executable.run(batch)

    def _advance(
        self,
        compute: abc.Sequence[tuple[int, int]],
        wanted: abc.Sequence[int],
        results: FloatArray | Candidates,
    ) -> list[Output]:
        """Account for a computed step: sample where a request's tokens are all computed, release, end."""
        outputs: list[Output] = []
        ends = accumulate(wanted)
        for (number, count), wants, end in zip(compute, wanted, ends, strict=True):
            sequence = self._sequences[number]
            sequence.computed += count
            if self.config.prefix_cache:  # before a window passes the blocks
                self._memory.publish(number, sequence.tokens, sequence.request.cache_salt, sequence.computed)
            self._memory.release_passed(number, sequence.computed)
            if sequence.request.logits_from is not None and not isinstance(results, Candidates):
                sequence.prompt_logits.append(results[end - wants : end].copy())
            if sequence.computed == len(sequence.tokens):
                for each in self._divide(sequence) if sequence.places > 1 else (sequence,):
                    outputs += self._accept(each, results, end - 1)
        return outputs

    def _divide(self, sequence: Sequence) -> list[Sequence]:
        """The samples that go on from here: more than one where a prompt is computed that asks for them."""
        samples = [sequence]
        for index in range(1, sequence.places):
            number = sequence.number + index
            self._memory.fork(sequence.number, number)
            self._sequences[number] = sequence.fork(number, self._decoder())
            self._requests[sequence.request_number].add(number)
            self._queue.fork(sequence.number, number)
            self._running.insert(self._running.index(sequence.number) + index, number)
            self.recorder.record("fork", parent=sequence.number, child=number)
            samples.append(self._sequences[number])
        sequence.places = 1
        return samples

    def _accept(self, sequence: Sequence, results: FloatArray | Candidates, row: int) -> list[Output]:
        """Sample a sequence's next token, if it may have one."""
        sampled = None
        try:
            if sequence.generated < sequence.request.max_tokens:
                sampled = self._sampled(sequence, results, row)
            output = sequence.accept(sampled)
        except Exception as error:  # of this sequence alone
            return self._fail(sequence.number, error)
        if output.finish_reason:
            self._drop(sequence.number, output.finish_reason)
        return [output]

    def _sampled(self, sequence: Sequence, results: FloatArray | Candidates, row: int) -> Sampled:
        """A sequence's next token, from candidates where these are enough."""
        if isinstance(results, Candidates):
            sampled = sample_candidates(results, row, sequence.sampling, sequence.generated)
            if sampled is not None:
                return sampled
            logits = results.row(row)
        else:
            logits = results[row]
        sampled = self._sample(logits, sequence.sampling, sequence.tokens, sequence.generated)
        if self._journal is not None:
            self._journal.sampled(sequence.number, logits, sampled.token)
        return sampled

    def _fail(self, number: int, error: Exception) -> list[Output]:
        """End a sequence for a reason that is not its own: an output for each sample that it stands for."""
        sequence = self._sequences[number]
        self._drop(number, "error")
        samples = range(sequence.sample, sequence.sample + sequence.places)
        return [Output(sequence.request_number, None, "", "error", sample, error) for sample in samples]

    def _preempt(self, number: int, *, swap: bool) -> None:
        """Take a running request's memory; what it held is kept on the host, or computed again."""
        self.recorder.limit("preempt", "the KV cache is full", request=number, swapped=swap)
        if swap:
            self._cache.swap_out(number)
        else:
            self._memory.release(number)
            self._sequences[number].restart()
        self._running.remove(number)
        self._queue.preempt(number)

    def _drop(self, number: int, reason: FinishReason) -> None:
        self._cache.release(number)
        sequence = self._sequences.pop(number)
        self._keep_logits.discard(number)
        self._queue.end(number, sequence.generated)
        if number in self._running:
            self._running.remove(number)
        self.recorder.record("end", request=number, tokens=len(sequence.tokens))
        siblings = self._requests[sequence.request_number]
        siblings.discard(number)
        if not siblings:
            del self._requests[sequence.request_number]
        if self._journal is not None:
            self._journal.end(number, reason, sequence.generated, sequence.places)

    def _held(self, logits: int) -> Holdings:
        use = self.backend.memory()
        swapped = self._cache.swapped_bytes
        if self.plan.device.own_memory:
            return Holdings(use.weights, use.mapped, use.arena, logits, use.kv_cache, host=use.host + swapped)
        return Holdings(use.weights, use.mapped, use.arena, logits, use.kv_cache, swapped)

    def _observe(self, logits: int) -> int:
        """Bytes held now; remembers the moment at which it was most."""
        now = self._held(logits)
        if now.total > self._peak.total:
            self._peak, self._peak_step = now, self.recorder.step
        return now.total


def _int32(values: abc.Sequence[int]) -> IndexArray:
    return np.array(values, np.int32)


def _last(ends: IndexArray, counts: IndexArray) -> IndexArray:
    """For each of ``ends``, the last ``counts`` whole numbers below it; one after the other."""
    stops = counts.cumsum(dtype=np.int32)
    numbers: IndexArray = (ends - stops).repeat(counts) + np.arange(stops[-1], dtype=np.int32)
    return numbers
