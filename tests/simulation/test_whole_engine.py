"""The whole engine under a random load, with everything going wrong, on a backend that notices everything."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import pytest
from expected import VOCABULARY, Expected, expected
from fake_backend import FakeBackend, Mishap, Mishaps, sampler
from tiny_model import tiny_model
from waits import Waits

from refengine import Engine, EngineConfig, Request, SamplingParams
from refengine.engine_plan import plan_engine
from refengine.errors import RequestError, SequenceStateError
from refengine.scheduler import Decision, Terms, schedule, scheduling_policy

SHORT, LONG = 50_000, 1_000_000
"""Steps of all policies together, in an ordinary run and with ``--refengine-profile thorough``."""

LIFE = 400
"""Steps in which requests come to one engine."""

POLICIES = ["fcfs", "sjf:ageing=1", "priority:ageing=2", "fair"]

MODELS = {"full": tiny_model("llama", layers=1), "windowed": tiny_model("gemma3", layers=3)}


@dataclass
class World:
    """An engine, those who use it, and what must come of it.

    Attributes:
        seed: of all chances.
        policy: of scheduling.
        unfinished: what is expected, by request and sample.
        seen: how often what happened.
        waits: when who came, was admitted and ended.
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
        if rng.random() < 0.5:  # a limit with nothing to spare, or hardly anything
            least = plan_engine(model, self.backend, self.config).most_bytes
            self.config = replace(self.config, memory=least + rng.choice([0, 0, 1000]))
        self.forks = rng.random() < 0.5
        self.decision: Decision
        self.waits = Waits(scheduling_policy(self.policy), self.config.token_budget)
        self.engine = Engine(
            model, self.backend, self.config, sample=sampler(self.mishaps), schedule=self.schedule
        )
        self.beginning = tuple(rng.randrange(VOCABULARY) for _ in range(30))

    def schedule(self, *given: Any, **more: Any) -> Decision:
        """The engine's, overheard."""
        self.decision = schedule(*given, **more)
        return self.decision

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
        self.waits.check()
        self.seen.update(event.kind for event in self.engine.recorder.events)
        self.seen["swap"] += sum(bool(e.fields.get("swapped")) for e in self.engine.recorder.events)
        self.seen.update({f"failing {kind}": times for kind, times in self.mishaps.met.items()})
        return taken

    def come_and_go(self) -> None:
        """Submissions, forks and aborts."""
        rng = self.random
        if len(self.unfinished) < 12 and rng.random() < 0.35:
            self.submit()
        if self.forks and self.unfinished and rng.random() < 0.08:
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
        self.waits.submitted(
            Terms(
                number, self.engine.recorder.step, len(request.prompt), most, request.samples,
                request.priority, request.tenant, request.deadline,
            )
        )  # fmt: skip
        self.unfinished[number] = expected(request)

    def fork(self, number: int) -> None:
        seed = self.random.choice([None, self.random.randrange(1000)])
        try:
            child = self.engine.fork(number, seed=seed)
        except (RequestError, SequenceStateError):
            return
        (parent,) = self.unfinished[number].values()
        sampling = parent.sampling if seed is None else replace(parent.sampling, seed=seed)
        self.unfinished[child] = {0: replace(parent, sampling=sampling)}
        self.waits.fork(number, child)
        self.seen["forked by a caller"] += 1

    def abort(self, number: int) -> None:
        output = self.engine.abort(number)
        assert output is not None
        assert (output.request, output.finish_reason) == (number, "abort")
        for index in self.unfinished.pop(number):
            self.waits.ended(number + index, self.engine.recorder.step)
        assert self.engine.abort(number) is None
        self.seen["abort"] += 1

    def step(self) -> None:
        """One step: outputs as expected, each sample's last one once; limits are kept."""
        met, before = self.mishaps.met.total(), self.engine.recorder.step
        outputs = self.engine.step()
        if (step := self.engine.recorder.step) > before:
            self.keeps_to_its_limits()
            for number, _ in self.decision.compute:
                self.waits.admitted(number, step)
        for output in outputs:
            samples = self.unfinished[output.request]  # nobody hears of what has ended
            number = output.request + output.sample
            if output.finish_reason == "error":
                assert isinstance(output.error, Mishap), output.error
                assert self.mishaps.met.total() > met, "failed without a cause"
            else:
                samples[output.sample].take(output)
                if output.sampled is not None:
                    self.waits.generated(number)
            if output.finish_reason:
                self.waits.ended(number, step)
                del samples[output.sample]
                if not samples:
                    del self.unfinished[output.request]

    def keeps_to_its_limits(self) -> None:
        """Of tokens, of places, of the KV cache, of the host, and of memory in all."""
        engine, config, plan = self.engine, self.config, self.engine.plan
        assert sum(tokens for _, tokens in self.decision.compute) <= config.token_budget
        assert sum(engine._sequences[n].places for n in engine._running) <= config.max_sequences
        held = self.backend.storage.nbytes
        assert held <= plan.layout.nbytes
        assert (swapped := engine._cache.swapped_bytes) <= config.swap
        if config.memory is not None:
            assert held + swapped + plan.fixed_bytes + plan.process_bytes <= config.memory
            if self.random.random() < 0.05:
                report = engine.memory()
                assert report.peak.logits <= plan.logits_bytes
                without = plan.fixed_bytes - plan.logits_bytes + plan.process_bytes
                assert report.peak.total + without <= config.memory == report.limit

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
    """Under every policy, whatever fails: the tokens are those alone, each sample ends once and in time, limits
    are kept, and nothing is left.
    """
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
