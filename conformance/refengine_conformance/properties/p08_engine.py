"""Chapter *Scheduling*: the engine on tiny models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any

from hypothesis import strategies as st

from refengine import Engine, EngineConfig, Output, Request, SamplingParams
from refengine.memory import KVCacheManager
from refengine.models import Model
from refengine.sampling import Sampled
from refengine_conformance.registry import holds
from refengine_conformance.subject import Subject
from refengine_conformance.tiny_model import tiny_model


@cache
def model(family: str) -> Model:
    """A tiny model, made once: one kind of layer, or two with different windows."""
    return tiny_model(family, layers=1 if family == "llama" else 3)


@dataclass
class Watched:
    """The subject's engine on a tiny model, and what it gave each request so far."""

    engine: Engine
    memory: KVCacheManager
    outputs: dict[int, list[Output]] = field(default_factory=dict)

    def step(self) -> None:
        """One step; its outputs are noted."""
        for output in self.engine.step():
            self.outputs.setdefault(output.request, []).append(output)

    def finish(self, patience: int = 1000) -> None:
        """Steps until nothing is left."""
        while self.engine.has_work:
            assert patience, "requests that never end"
            patience -= 1
            self.step()

    def results(self, number: int) -> list[Sampled | None]:
        """A request's tokens with their log-probabilities."""
        return [output.sampled for output in self.outputs[number]]

    def holds_nothing(self) -> bool:
        """Whether all blocks of all groups are free."""
        return self.memory.free_blocks == self.engine.plan.layout.num_blocks


def watched(
    subject: Subject,
    family: str,
    limits: Mapping[str, Any] = MappingProxyType({}),
    sample: Callable[..., Any] | None = None,
) -> Watched:
    """An engine of the subject's parts."""
    managers: list[KVCacheManager] = []

    def kv_cache(layout: Any) -> KVCacheManager:
        managers.append(subject.kv_cache(layout))
        return managers[-1]

    engine = Engine(
        model(family),
        subject.start(),
        EngineConfig(subject.policy.name, fallback=subject.fallback, **limits),
        schedule=subject.schedule,
        sample=sample or subject.sample,
        kv_cache=kv_cache,
    )
    return Watched(engine, managers[-1])


FAMILIES = st.sampled_from(["llama", "gemma3"])


LIMITS = st.fixed_dictionaries(
    {
        "token_budget": st.sampled_from([16, 5, 3, 2]),
        "max_sequences": st.sampled_from([4, 3, 2, 1]),
        "block_size": st.sampled_from([3, 4, 1]),
        "kv_tokens": st.sampled_from([24, 28, 36, 200]),
    }
)
"""Little memory and small steps; every one of ``REQUESTS`` fits alone."""


PROMPTS = st.builds(
    lambda length, first, step: tuple((first + step * i) % 97 for i in range(length)),
    *(st.sampled_from([12, 9, 14, 4, 1]), st.integers(0, 96), st.integers(0, 96)),
)


REQUESTS = st.builds(
    Request,
    PROMPTS,
    max_tokens=st.sampled_from([10, 8, 5, 1, 0]),
    sampling=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.9]),
        repetition_penalty=st.sampled_from([1.0, 1.5]),
        seed=st.integers(0, 2**64 - 1),
        logprobs=st.sampled_from([None, 3]),
    ),
)


@holds("SCH-12", "scheduler", "kv_cache", "backend", tier="state")
def one_reason_to_end_and_it_comes_last(subject: Subject, data: st.DataObject) -> None:
    """Some requests are aborted on the way; each still ends once, and at length with all its tokens."""
    made = watched(subject, data.draw(FAMILIES), data.draw(LIMITS))
    wanted = {made.engine.submit(request): request for request in data.draw(st.lists(REQUESTS, max_size=4))}
    for number in data.draw(st.lists(st.sampled_from(sorted(wanted) or [0]), max_size=2)):
        made.step()
        ended = made.engine.abort(number)
        over = number not in wanted or any(o.finish_reason for o in made.outputs.get(number, []))
        assert (ended is None) == over
        if ended is not None:
            assert ended.finish_reason == "abort"
            made.outputs.setdefault(number, []).append(ended)
    made.finish()
    assert set(made.outputs) == set(wanted)
    for number, request in wanted.items():
        reasons = [output.finish_reason for output in made.outputs[number]]
        assert reasons[:-1] == [None] * (len(reasons) - 1)
        assert reasons[-1] in ("length", "abort")
        if reasons[-1] == "length":
            assert sum(output.sampled is not None for output in made.outputs[number]) == request.max_tokens


@holds("SCH-13", "scheduler", "kv_cache", "sampler", "backend", level="L3", tier="state")
def company_and_memory_change_no_bit(subject: Subject, data: st.DataObject) -> None:
    """Each request alone with all the room there is, against all of them in turns with little."""
    family = data.draw(FAMILIES)
    requests = data.draw(st.lists(REQUESTS, min_size=2, max_size=3))
    together = watched(subject, family, data.draw(LIMITS))
    for request in requests:
        together.engine.submit(request)
        if data.draw(st.booleans()):
            together.step()
    together.finish()
    alone = watched(subject, family)
    for number, request in enumerate(requests):
        alone.engine.submit(request)
        alone.finish()
        assert together.results(number) == alone.results(number)


@holds("SCH-14", "scheduler", "kv_cache", "allocator", "backend", level="M", tier="state")
def the_ended_hold_nothing(subject: Subject, data: st.DataObject) -> None:
    """After requests have ended or been aborted, all blocks of all groups are free."""
    made = watched(subject, data.draw(FAMILIES), data.draw(LIMITS))
    numbers = [
        made.engine.submit(request) for request in data.draw(st.lists(REQUESTS, min_size=1, max_size=3))
    ]
    made.step()
    made.engine.abort(data.draw(st.sampled_from(numbers)))
    made.finish()
    assert made.holds_nothing()


class MishapError(Exception):
    """What goes wrong in a step."""


@holds("SCH-14", "scheduler", "kv_cache", "allocator", "backend", level="M", tier="state")
def a_failed_step_ends_its_requests_and_no_others(subject: Subject, data: st.DataObject) -> None:
    """The sampler fails once: one request ends with the cause, the others with their own results."""
    family, limits = data.draw(FAMILIES), data.draw(LIMITS)
    requests = data.draw(st.lists(REQUESTS.filter(lambda r: r.max_tokens > 0), min_size=2, max_size=3))
    fuse = data.draw(st.integers(1, 6))

    def sample(*arguments: Any) -> Sampled:
        nonlocal fuse
        fuse -= 1
        if fuse == 0:
            raise MishapError
        sampled: Sampled = subject.sample(*arguments)
        return sampled

    made = watched(subject, family, limits, sample)
    numbers = {made.engine.submit(request): request for request in requests}
    made.finish()
    assert made.holds_nothing()
    last = {number: made.outputs[number][-1] for number in numbers}
    dead = {number for number, output in last.items() if output.finish_reason == "error"}
    assert len(dead) == (fuse <= 0)
    assert all(isinstance(last[number].error, MishapError) for number in dead)
    assert all(made.engine.abort(number) is None for number in numbers)
    alone = watched(subject, family)
    for number in numbers.keys() - dead:
        other = alone.engine.submit(numbers[number])
        alone.finish()
        assert made.results(number) == alone.results(other)
