"""What waits holds no cached blocks: a prefix is adopted when its request is looked at, and admitted."""

from __future__ import annotations

import pytest
from tiny_model import tiny_model

from refengine import Engine, EngineConfig, Request
from refengine.backend import load

BEGINNING = tuple(range(1, 17))
"""Four blocks."""


def engine(scheduling: str = "fcfs", kv_tokens: int = 40) -> Engine:
    """Ten blocks, four of which hold a beginning that nobody uses at the moment."""
    config = EngineConfig(block_size=4, kv_tokens=kv_tokens, prefix_cache=True, scheduling=scheduling)
    made = Engine(tiny_model("llama", layers=1), load("numpy"), config)
    made.submit(Request((*BEGINNING, 50), 1))
    while made.has_work:
        made.step()
    return made


@pytest.mark.parametrize("scheduling", ["fcfs", "sjf:ageing=0", "priority", "fair"])
def test_the_prefix_of_a_later_one_does_not_delay_the_head_of_the_queue(scheduling: str) -> None:
    """Five blocks are wanted and seven are free, the cached ones among them: the next step has the request in it,
    whoever behind it begins with what is cached.
    """
    made = engine(scheduling)
    first = made.submit(Request((60,) * 8, 12))
    made.step()
    head = made.submit(Request(tuple(range(70, 90)), 2))
    later = made.submit(Request((*BEGINNING, 51), 20))
    assert {output.request for output in made.step()} == {first, head}
    assert made.memory().requests.get(later, 0) == 0
    while made.has_work:
        made.step()


def test_all_that_fit_are_admitted_together_each_with_its_prefix() -> None:
    """Three blocks and a part are taken by each; the four cached ones count once, and only for the first."""
    made = engine(kv_tokens=28)
    numbers = [made.submit(Request((*BEGINNING, last), 3)) for last in (51, 52, 53)]
    assert {output.request for output in made.step()} == set(numbers)
    assert made.memory().kv.blocks_in_use == (7,)
    assert made.memory().kv.hit_tokens == 3 * len(BEGINNING)


def test_a_prefix_that_does_not_fit_is_given_back() -> None:
    """The head of the queue waits for room, and what it would have begun with stays free."""
    made = engine()
    first = made.submit(Request((60,) * 28, 8))
    made.step()
    waiting = made.submit(Request((*BEGINNING, *BEGINNING), 2))
    assert {output.request for output in made.step()} == {first}
    assert made.memory().requests.get(waiting, 0) == 0
    while made.has_work:
        made.step()
    assert made.memory().kv.blocks_in_use == (0,)
