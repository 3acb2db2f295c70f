"""Policies are found by name, those of other packages among them."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import pytest

from refengine.errors import RequestError
from refengine.scheduler import (
    BUILT_IN,
    Queue,
    SchedulingPolicy,
    Terms,
    policy,
    scheduling_policies,
    scheduling_policy,
)


def longest_first(patience: int = 100) -> SchedulingPolicy:
    return SchedulingPolicy("longest", "the longest prompt first", lambda t: patience - t.prompt, patience)


def broken() -> str:
    return "a policy"


@pytest.fixture(autouse=True)
def offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages offer policies, good ones and others."""
    here = __name__
    points = EntryPoints(
        EntryPoint(name, value, policy.GROUP)
        for name, value in {
            "longest": f"{here}:longest_first",
            "broken": f"{here}:broken",
            "absent": "refengine_no_such_package:make",
            "fcfs": f"{here}:longest_first",
        }.items()
    )
    monkeypatch.setattr(policy, "entry_points", points.select)


def test_a_policy_of_another_package_is_made_and_used() -> None:
    """It is listed, takes its parameters, and orders a queue."""
    assert scheduling_policies() == (*BUILT_IN, "absent", "broken", "longest")
    queue = Queue(scheduling_policy("longest", patience=50))
    for number, prompt in enumerate([5, 30, 200, 7]):
        queue.submit(number, Terms(number, 0, prompt))
    assert list(queue) == [2, 1, 3, 0]


def test_built_in_names_cannot_be_taken() -> None:
    """``fcfs`` stays what its clause says."""
    assert scheduling_policy("fcfs").description == "first come, first served"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("broken", "makes a str"),
        ("absent", "ModuleNotFoundError.*reinstall"),
        ("longets", "choose one of fcfs, sjf, priority, fair, absent, broken, longest; perhaps 'longest'"),
    ],
)
def test_what_is_not_there_or_broken_is_said(name: str, text: str) -> None:
    """The name, why, and how to go on."""
    with pytest.raises(RequestError, match=text):
        scheduling_policy(name)


def test_parameters_may_follow_the_name() -> None:
    """After a colon, as on a command line; whole numbers only."""
    terms = Terms(submitted=10, prompt=9, output=3)
    assert scheduling_policy("sjf:ageing=2, chunk=4").rank(terms) == (10 + 2 * (3 + 2), 0)
    assert scheduling_policy("fcfs:").name == "fcfs"
    for wrong in ("sjf:ageing", "sjf:ageing=", "sjf:4", "sjf:ageing=1.5"):
        with pytest.raises(RequestError, match="whole numbers"):
            scheduling_policy(wrong)


def test_parameters_that_a_policy_does_not_take_are_refused() -> None:
    """By name and by value."""
    with pytest.raises(RequestError, match="colour"):
        scheduling_policy("longest", colour=3)
    with pytest.raises(RequestError, match="patience"):
        scheduling_policy("longest", patience=-1)
