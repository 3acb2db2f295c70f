"""Clients that read slowly or never, beside others, on an engine with everything going wrong."""

from __future__ import annotations

import gc
import random
import weakref
from collections import Counter

import pytest
from expected import VOCABULARY, expected
from fake_backend import FakeBackend, Mishap, Mishaps, sampler
from tiny_model import tiny_model

from refengine import Engine, EngineConfig, Output, Request, SamplingParams
from refengine.service import EngineService, Ticket

ROUNDS, LONG = 12, 400
"""Times that clients come, in an ordinary run and with ``--refengine-profile thorough``."""


def request(rng: random.Random) -> Request:
    return Request(
        tuple(rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 5, 12]))),
        rng.choice([0, 1, 9, 30]),
        SamplingParams(rng.choice([0.0, 0.9]), seed=rng.randrange(1000)),
        stop_ids=frozenset(rng.sample(range(VOCABULARY), rng.choice([0, 2]))),
        samples=rng.choice([1, 1, 3]),
    )


def most(asked: Request) -> int:
    """Outputs of a request at most: for every token, or one where there is none; and that it was aborted."""
    return asked.samples * max(1, asked.max_tokens) + 1


def check(asked: Request, outputs: list[Output]) -> Counter[str]:
    """They are those of the request alone, as far as they go, and each sample ends once; tells why."""
    samples, ends = expected(asked), Counter[str]()
    for output in outputs:
        assert not ends["abort"], "outputs of what has ended"
        if output.finish_reason == "error":
            assert isinstance(output.error, Mishap)
        elif output.finish_reason != "abort":
            samples[output.sample].take(output)
        if output.finish_reason:
            ends[output.finish_reason] += 1
            if output.finish_reason != "abort":  # which ends all samples that are left
                del samples[output.sample]
    assert bool(samples) == bool(ends["abort"])
    return ends


def engine(seed: int) -> Engine:
    mishaps = Mishaps({"executor": 0.002, "sampler": 0.002}, seed)
    config = EngineConfig(block_size=4, token_budget=16, max_sequences=6, kv_tokens=96, swap=10**6)
    return Engine(tiny_model("llama", layers=1), FakeBackend(mishaps), config, sample=sampler(mishaps))


def test_who_does_not_read_holds_up_nobody_and_keeps_little(pytestconfig: pytest.Config) -> None:
    """Others get all that is theirs while outputs of the neglected wait: no more than they may have tokens. These
    are all there later, and no memory of the engine is held for them.
    """
    rng, seen = random.Random(1), Counter[str]()
    for seed in range(LONG if pytestconfig.getoption("--refengine-profile") == "thorough" else ROUNDS):
        made = engine(seed)
        with EngineService(made) as service:
            neglected: list[tuple[Request, Ticket, list[Output]]] = []
            for _ in range(12):
                ticket = service.submit(asked := request(rng))
                if rng.random() < 0.5:
                    seen += check(asked, list(ticket))
                else:
                    begun = [next(iter(ticket))] if rng.random() < 0.5 else []  # slow, or absent
                    neglected.append((asked, ticket, begun))
                    if rng.random() < 0.2:
                        ticket.abort()
                assert all(len(late._outputs) <= most(slow) for slow, late, _ in neglected)
            seen += check(last := request(rng), list(service.submit(last)))
            for asked, ticket, begun in neglected:
                seen += check(asked, begun + list(ticket))
        assert not made.has_work
        assert (made.memory().current.kv_cache, made.memory().current.swapped) == (0, 0)
    for kind in ("length", "stop", "abort", "error"):
        assert seen[kind] > 0, f"nobody ended with {kind}"


def test_unread_outputs_are_kept_by_nobody_but_their_ticket() -> None:
    """A client that goes away without reading: once its request has ended, nothing is left of it."""
    made = engine(0)
    with EngineService(made) as service:
        gone = weakref.ref(service.submit(Request((1, 2, 3), 30)))
        for _ in range(50):
            list(service.submit(Request((4, 5), 9)))  # others, until it has surely ended
        gc.collect()
        assert gone() is None
