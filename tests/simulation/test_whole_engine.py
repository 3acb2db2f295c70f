"""The whole engine under a random load, with everything going wrong, on a backend that notices everything."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np
import pytest
from fake_backend import NOTHING, FakeBackend, Mishap, Mishaps, choose, history, logits_after, sampler
from tiny_model import tiny_model

from refengine import Engine, EngineConfig, Output, Request, SamplingParams
from refengine.errors import RequestError, SequenceStateError

SHORT, LONG = 50_000, 1_000_000
"""Steps of all policies together, in an ordinary run and with ``--refengine-profile thorough``."""

LIFE = 400
"""Steps in which requests come to one engine."""

POLICIES = ["fcfs", "sjf:ageing=1", "priority:ageing=2", "fair"]

VOCABULARY = 97

MODELS = {"full": tiny_model("llama", layers=1), "windowed": tiny_model("gemma3", layers=3)}


@dataclass
class Expected:
    """A sample as it would go alone.

    Attributes:
        request: what it belongs to.
        sampling: with its own seed.
        known: the history of its prompt and output.
        generated: tokens of output.
    """

    request: Request
    sampling: SamplingParams
    known: int
    generated: int = 0

    def next(self) -> int:
        """The token that comes now."""
        logits = logits_after(np.array([self.known], np.uint64), VOCABULARY)[0]
        return choose(logits, self.sampling, self.generated)

    def take(self, output: Output) -> None:
        """An output must be the next one, and end the sample if and only if that is over."""
        if self.request.max_tokens == 0:
            assert (output.sampled, output.finish_reason) == (None, "length")
            return
        assert output.sampled is not None
        token = output.sampled.token
        assert token == self.next(), "another token than alone"
        self.known, self.generated = history(self.known, token), self.generated + 1
        reason = "length" if self.generated == self.request.max_tokens else None
        assert output.finish_reason == ("stop" if token in self.request.stop_ids else reason)


@dataclass
class World:
    """An engine, those who use it, and what must come of it.

    Attributes:
        seed: of all chances.
        policy: of scheduling.
        unfinished: what is expected, by request and sample.
        seen: how often what happened.
    """

    seed: int
    policy: str
    unfinished: dict[int, dict[int, Expected]] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.random = rng = random.Random(f"{self.policy} {self.seed}")
        self.config = EngineConfig(
            block_size=4,
            kv_dtype=rng.choice([None, None, "int8/int4"]),
            token_budget=rng.choice([1, 5, 8, 13, 64]),
            max_sequences=rng.choice([3, 5, 9]),
            kv_tokens=rng.choice([64, 80, 128]),
            prefix_cache=rng.random() < 0.5,
            swap=rng.choice([0, 6000, 10**9]),
            scheduling=self.policy,
            check=rng.random() < 0.1,
        )
        worst = rng.choice([0.0, 1.0])  # half of all lives are without faults
        rates = {"executor": 0.004 * worst, "commit": 0.02 * worst, "sampler": 0.002 * worst}
        self.mishaps = Mishaps(rates, self.seed)
        self.backend = FakeBackend(self.mishaps)
        model = MODELS[rng.choice(sorted(MODELS))]
        self.engine = Engine(model, self.backend, self.config, sample=sampler(self.mishaps))
        self.beginning = tuple(rng.randrange(VOCABULARY) for _ in range(30))

    def run(self) -> int:
        """Requests come for a while; then all must end. Gives the number of steps."""
        taken = 0
        for taken in count(1):
            if taken <= LIFE:
                self.come_and_go()
            elif not self.engine.has_work:
                break
            self.step()
            assert taken < 20 * LIFE, "requests do not end"
        assert not self.unfinished, "requests are lost"
        self.nothing_is_left()
        self.seen.update(event.kind for event in self.engine.recorder.events)
        self.seen["swap"] += sum(bool(e.fields.get("swapped")) for e in self.engine.recorder.events)
        self.seen.update({f"failing {kind}": times for kind, times in self.mishaps.met.items()})
        return taken

    def come_and_go(self) -> None:
        """Submissions, forks and aborts."""
        rng = self.random
        if len(self.unfinished) < 12 and rng.random() < 0.35:
            self.submit()
        if self.unfinished and rng.random() < 0.04:
            self.fork(rng.choice(list(self.unfinished)))
        if self.unfinished and rng.random() < 0.02:
            self.abort(rng.choice(list(self.unfinished)))

    def submit(self) -> None:
        rng = self.random
        own = tuple(rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 2, 7, 9])))
        request = Request(
            self.beginning[: rng.choice([0, 0, 4, 16, 17, 29])] + own,
            most := rng.choice([0, 1, 2, 5, 9, 20]),
            SamplingParams(rng.choice([0.0, 0.9]), seed=rng.randrange(1000)),
            stop_ids=frozenset(rng.sample(range(VOCABULARY), rng.choice([0, 2]))),
            samples=rng.choice([1, 1, 1, 3]),
            priority=rng.randrange(10),
            tenant=rng.choice("abc"),
            cache_salt=rng.choice(["", "", "other"]),
            expected_tokens=rng.choice([None, None, most]),
            deadline=rng.choice([None, None, 30]),
        )
        number = self.engine.submit(request)
        known = NOTHING
        for token in request.prompt:
            known = history(known, token)
        self.unfinished[number] = {
            i: Expected(request, replace(request.sampling, seed=request.sampling.seed + i), known)
            for i in range(request.samples)
        }

    def fork(self, number: int) -> None:
        seed = self.random.choice([None, self.random.randrange(1000)])
        try:
            child = self.engine.fork(number, seed=seed)
        except (RequestError, SequenceStateError):
            return
        (parent,) = self.unfinished[number].values()
        sampling = parent.sampling if seed is None else replace(parent.sampling, seed=seed)
        self.unfinished[child] = {0: replace(parent, sampling=sampling)}
        self.seen["forked by a caller"] += 1

    def abort(self, number: int) -> None:
        output = self.engine.abort(number)
        assert output is not None
        assert (output.request, output.finish_reason) == (number, "abort")
        del self.unfinished[number]
        assert self.engine.abort(number) is None
        self.seen["abort"] += 1

    def step(self) -> None:
        """One step: outputs as expected, each sample's last one once; limits are kept."""
        met = self.mishaps.met.total()
        for output in self.engine.step():
            samples = self.unfinished[output.request]  # nobody hears of what has ended
            if output.finish_reason == "error":
                assert isinstance(output.error, Mishap), output.error
                assert self.mishaps.met.total() > met, "failed without a cause"
            else:
                samples[output.sample].take(output)
            if output.finish_reason:
                del samples[output.sample]
                if not samples:
                    del self.unfinished[output.request]
        layout = self.engine.plan.layout
        assert self.backend.storage.nbytes <= layout.nbytes
        held = self.engine.memory().current if self.random.random() < 0.05 else None
        assert held is None or held.swapped <= self.config.swap

    def nothing_is_left(self) -> None:
        """No block, segment, swapped byte or entry of the queue."""
        assert self.engine.memory().current.swapped == 0
        manager = self.engine._memory
        assert manager.sequences == ()
        assert manager.free_blocks == self.engine.plan.layout.num_blocks
        assert not manager.pending_copies
        if not self.config.prefix_cache:
            assert self.backend.storage.nbytes == 0
        assert (len(self.engine._queue), self.engine._running, self.engine._sequences) == (0, [], {})


@pytest.mark.parametrize("policy", POLICIES)
def test_everybody_gets_what_they_would_get_alone(policy: str, pytestconfig: pytest.Config) -> None:
    """Under every policy, whatever fails: the tokens are those alone, each sample ends once, nothing is left."""
    thorough = pytestconfig.getoption("--refengine-profile") == "thorough"
    steps, seen = 0, Counter[str]()
    for seed in count():
        world = World(seed, policy)
        try:
            steps += world.run()
        except BaseException as problem:
            problem.add_note(f"seed {seed}, {world.config}")
            raise
        seen += world.seen
        if steps >= (LONG if thorough else SHORT) // len(POLICIES):
            break
    for kind in ("preempt", "swap", "fork", "forked by a caller", "copy", "abort"):
        assert seen[kind] > 0, f"no {kind} was ever seen"
    for kind in ("executor", "commit", "sampler"):
        assert seen[f"failing {kind}"] > 0, f"no {kind} ever failed"
