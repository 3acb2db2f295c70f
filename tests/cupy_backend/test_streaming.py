"""Weights that the device has no room for pass through it: in time, in the planned bytes, and with the same bits."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
from cupy_backend.emulation import EmulatedRuntime, HostMemory

from refengine.backend.weights import WeightPlan
from refengine.errors import MemoryLimitError
from refengine.models import Model
from refengine.program import POLICIES, apply_policy, plan_memory
from refengine_conformance.mixed import stored_model
from refengine_conformance.prompts import Chunk, Prompts
from refengine_conformance.subject import Subject, commit_all
from refengine_conformance.tiny_model import tiny_model
from refengine_cupy.backend import CupyBackend
from refengine_cupy.runtime import Await, Copy, Fetch, Launch, Work
from refengine_cupy.source import Kernel
from refengine_cupy.streaming import Stretch, units, with_fetches
from refengine_cupy.weights import plan_packed

MIXED8, FLOAT32 = POLICIES["mixed8"], POLICIES["float32"]
CASES = [
    ("llama", "float32"),
    ("gemma3", "float32"),
    ("qwen2", "mixed8"),
    ("gemma3", "mixed8"),
    ("llama", "mixed16"),
]
TOKENS = ((5, 6, 7, 8, 9, 10, 11, 12, 13), (20, 21))
CHUNKS = ([Chunk(0, 0, 6)], [Chunk(0, 6, 7), Chunk(1, 0, 1)], [Chunk(0, 7, 8)], [Chunk(0, 8, 9)])


@cache
def prompts(family: str, policy: str) -> Prompts:
    model = tiny_model(family) if policy == "float32" else stored_model(family, 0)
    return Prompts(model, TOKENS)


class Running:
    """Prompts on a backend whose weights may take so many bytes of the device."""

    def __init__(
        self, family: str, policy: str, limit: int | None, runtime: EmulatedRuntime | None = None
    ) -> None:
        self.case, self.runtime = prompts(family, policy), runtime or EmulatedRuntime()
        self.backend = CupyBackend(self.runtime)
        subject = Subject(lambda: self.backend, policy=POLICIES[policy])
        self.program = subject.program(self.case.model)
        layout, sizes = self.case.layout(subject.policy), {"T": 11, "S": 2, "R": 11, "P": 4}
        plan = plan_memory(
            self.program, subject.policy, sizes, lambda i, s: self.backend.workspace(i, s, subject.policy)
        )
        self.plan = self.backend.plan_weights(self.program, self.case.model.weights, subject.policy, limit)
        cache = self.backend.create_cache(layout)
        commit_all(cache, layout)
        weights = self.backend.upload(self.case.model.weights, subject.policy, self.plan)
        self.executable = self.backend.compile(self.program, subject.policy, plan, weights, layout, cache)

    def step(self, chunks: Sequence[Chunk]) -> bytes:
        return self.executable.run(self.case.batch(chunks)).tobytes()


@cache
def resident(family: str, policy: str) -> tuple[bytes, ...]:
    running = Running(family, policy, None)
    assert running.plan.host == running.plan.streamed == 0
    return tuple(running.step(chunks) for chunks in CHUNKS)


def plan_of(family: str, policy: str, limit: int | None) -> WeightPlan:
    model = prompts(family, policy).model
    program = Subject(CupyBackend, policy=POLICIES[policy]).program(model)
    return plan_packed(program, model.weights, limit)


def limits(family: str, policy: str) -> list[int]:
    """The least, all but one byte, and some between."""
    least, most = plan_of(family, policy, 0).total, plan_of(family, policy, None).total
    return [least, *(least + (most - least) * n // 4 for n in (1, 2, 3)), most - 1]


@pytest.mark.parametrize("fetches", ["early", "late"])
@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize(("family", "policy"), CASES)
def test_streamed_weights_give_the_bits_of_resident_ones(
    family: str, policy: str, which: int, fetches: Literal["early", "late"]
) -> None:
    """A prompt in pieces and single tokens, whenever copies are done within what they wait for."""
    limit, runtime = limits(family, policy)[which], EmulatedRuntime(fetches=fetches)
    running = Running(family, policy, limit, runtime)
    assert tuple(running.step(chunks) for chunks in CHUNKS) == resident(family, policy)
    passing = any(weight.holding == "streamed" for weight in running.plan.weights.values())
    assert (runtime.fetched > 0) == passing
    assert passing or which == 4


@pytest.mark.parametrize(("family", "policy"), CASES)
def test_a_replayed_graph_fetches_anew(family: str, policy: str) -> None:
    """The recorded list holds the copies as well: each replay copies as many bytes, and gives the same bits."""
    running = Running(family, policy, 0)
    bits, fetched = [], []
    for _ in range(4):
        before = running.runtime.fetched
        bits.append(running.step([Chunk(0, 0, 1)]))
        fetched.append(running.runtime.fetched - before)
    assert len(set(bits)) == len(set(fetched)) == 1
    streamed = [w for w in running.plan.weights.values() if w.holding == "streamed"]
    assert fetched[0] == sum(weight.host for weight in streamed)


def no_waits(work: Sequence[Work]) -> list[Work]:
    """Copies are waited for at the end."""
    fetches = sum(isinstance(each, Fetch) for each in work)
    return [*(each for each in work if not isinstance(each, Await)), Await(fetches)]


def no_room(work: Sequence[Work]) -> list[Work]:
    """Copies do not wait for what reads the passage."""
    return sorted(work, key=lambda each: not isinstance(each, Fetch))


@pytest.mark.parametrize(("spoil", "caught_by"), [(no_waits, "late"), (no_room, "early")])
@pytest.mark.parametrize("fetches", ["early", "late"])
def test_a_wait_that_is_missing_shows(
    spoil: Callable[[Sequence[Work]], list[Work]], caught_by: str, fetches: Literal["early", "late"]
) -> None:
    """In one of the two ways to be as unlucky as the waits allow."""

    class Careless(EmulatedRuntime):
        def launch(self, launches: Sequence[Work]) -> None:
            super().launch(spoil(launches))

    running = Running("llama", "float32", 0, Careless(fetches=fetches))
    found = tuple(running.step(chunks) for chunks in CHUNKS)
    assert (found != resident("llama", "float32")) == (fetches == caught_by)


@pytest.mark.parametrize(("family", "policy"), CASES)
def test_every_limit_is_kept(family: str, policy: str) -> None:
    """From nothing to everything, byte by byte in strides: at most the limit, or the least there is."""
    least, most = plan_of(family, policy, 0), plan_of(family, policy, None)
    assert {weight.holding for weight in most.weights.values()} == {"repacked"}
    for limit in range(0, most.total + 700, 331):
        plan = plan_of(family, policy, limit)
        assert plan.total <= max(limit, least.total)
        assert plan.held + plan.host == most.held
    assert plan_of(family, policy, most.total) == most
    assert most.total - 1 >= plan_of(family, policy, most.total - 1).total


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize(("family", "policy"), CASES)
def test_what_is_held_is_what_was_planned(family: str, policy: str, which: int) -> None:
    """By the backend's count, and by what was taken of the device and of the host."""
    taken: dict[str, int] = {}

    class Counting(EmulatedRuntime):
        def allocate(self, nbytes: int, purpose: str) -> HostMemory:
            taken[purpose] = nbytes
            return super().allocate(nbytes, purpose)

        def pinned(self, nbytes: int, purpose: str):
            taken[purpose] = nbytes
            return super().pinned(nbytes, purpose)

    running = Running(family, policy, limits(family, policy)[which], Counting())
    plan = running.plan
    for _ in range(2):
        use = running.backend.memory()
        assert (use.weights, use.mapped, use.host) == (plan.held, plan.mapped + plan.streamed, plan.host)
        running.step(CHUNKS[0])
    assert taken["weights"] == plan.held
    assert taken.get("streamed weights in passage", 0) == plan.streamed
    assert taken["weights in pinned memory"] == plan.host


def test_vectors_stay_and_tables_are_read_where_they_lie() -> None:
    """Under the tightest limit too; a matrix that is looked up and multiplied passes through for the product."""
    for family, table in (("llama", "pinned"), ("gemma3", "streamed")):
        plan, model = plan_of(family, "float32", 0), prompts(family, "float32").model
        for role, weight in plan.weights.items():
            one = len(model.weights[role].shape) == 1
            expected = "repacked" if one else table if role == "token_embedding" else "streamed"
            assert weight.holding == expected, role


def test_what_is_streamed_stands_apart() -> None:
    """At half the room, no long stretch of a deep model is streamed, and none is resident."""
    model = tiny_model(layers=24)
    program = Subject(CupyBackend).program(model)
    everything, least = (plan_packed(program, model.weights, limit).total for limit in (None, 0))
    plan = plan_packed(program, model.weights, (everything + least) // 2)
    matrices = {role: w for role, w in plan.weights.items() if len(model.weights[role].shape) > 1}
    for holding in ("streamed", "repacked"):
        roles = [role for role, weight in matrices.items() if weight.holding == holding]
        layers = sorted({int(role.split(".")[1]) for role in roles if role.startswith("layers.")})
        assert max(b - a for a, b in pairwise([-1, *layers, 24])) <= 3


def test_a_unit_is_under_way_while_the_one_before_it_is_read() -> None:
    """Each copy stands before the wait for the last but its own; and none but the first two before all launches."""
    lists: list[list[Work]] = []

    class Listening(EmulatedRuntime):
        def launch(self, launches: Sequence[Work]) -> None:
            lists.append(list(launches))
            super().launch(launches)

    running = Running("llama", "float32", 0, Listening())
    running.step([Chunk(0, 0, 1)])
    [[arrays, *work]] = lists
    assert isinstance(arrays, Copy)
    assert [isinstance(each, Fetch) for each in work[:3]] == [True, True, False]
    begun = [n for n, each in enumerate(work) if isinstance(each, Fetch)]
    awaited = [n for n, each in enumerate(work) if isinstance(each, Await)]
    assert len(begun) == len(awaited) > 20
    assert all(copy < wait for copy, wait in zip(begun[1:], awaited, strict=False))


def launch_of(number: int) -> Launch:
    return Launch(Kernel("elementwise", "add", "Binary", 256), (1, 1, 1), bytes([number]))


def test_a_place_is_free_when_the_last_of_its_readers_is_done() -> None:
    """Where several launches read a unit, only the first waits for it, and its place is kept until the last."""
    a, b = (Stretch(number, 0, 8, ((number, 100, 8),)) for number in range(2))
    c = Stretch(2, 8, 16, ((2, 108, 8), (3, 112, 4)))
    one, two, three, four, five = map(launch_of, range(5))
    parts = [([one], [a]), ([], [c]), ([two], []), ([three], [a]), ([four], [b]), ([five], [c])]
    assert with_fetches(parts) == [
        Fetch(0, 100, 8), Await(1), one, two, three,
        Fetch(1, 100, 8), Fetch(2, 108, 8), Fetch(3, 112, 4), Await(2), four, Await(4), five,
    ]  # fmt: skip


def test_a_step_without_logits_does_not_fetch_their_matrix() -> None:
    running = Running("llama", "float32", 0)
    batch = running.case.batch([Chunk(0, 0, 4)])
    running.executable.run(replace(batch, logit_rows=np.empty(0, np.int32)))
    streamed = {role: w.host for role, w in running.plan.weights.items() if w.holding == "streamed"}
    assert running.runtime.fetched == sum(streamed.values()) - streamed["output"]


def test_products_of_the_same_codes_pass_together() -> None:
    """q, k and v; gate and up: what one launch may read is one unit, whose bytes pass at once."""
    model = prompts("qwen2", "mixed8").model
    encodings = dict.fromkeys(model.weights, "q4_0")
    found = units(apply_policy(model.program, MIXED8, encodings), encodings)
    together = {tuple(role.rpartition(".")[2] for role in unit.roles) for unit in found}
    assert {("q", "k", "v"), ("gate", "up"), ("down",)} <= together
    plan = plan_of("qwen2", "mixed8", 0)
    program = Subject(CupyBackend, policy=MIXED8).program(model)
    for unit in units(program, {role: w.encoding for role, w in plan.weights.items()}):
        nbytes = sum(plan.weights[role].host for role in unit.roles)
        assert {plan.weights[role].nbytes for role in unit.roles} == {nbytes}


@pytest.mark.parametrize("what", ["weights", "passage", "pinned"])
def test_memory_that_is_refused_is_named_and_the_rest_is_given_back(what: str) -> None:
    """At the first, the second and the third of three allocations."""
    alive: list[weakref.ref[object]] = []

    class Refusing(EmulatedRuntime):
        def allocate(self, nbytes: int, purpose: str) -> HostMemory:
            self.most = 0 if what in purpose else 2**32
            alive.append(weakref.ref(memory := super().allocate(nbytes, purpose)))
            return memory

        def pinned(self, nbytes: int, purpose: str):
            self.most_pinned = 0 if what == "pinned" else 2**32
            alive.append(weakref.ref(memory := super().pinned(nbytes, purpose)))
            return memory

    model: Model = prompts("llama", "float32").model
    backend, plan = CupyBackend(Refusing()), plan_of("llama", "float32", 0)
    with pytest.raises(MemoryLimitError, match=what):
        backend.upload(model.weights, FLOAT32, plan)
    gc.collect()
    assert not any(reference() for reference in alive)
    assert backend.memory().total == backend.memory().host == 0
