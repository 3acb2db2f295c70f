"""Generated loads have the tails they say, and the policies do with them what they are for."""

from __future__ import annotations

import math
from io import StringIO
from statistics import fmean, median

import pytest

from refengine.errors import ContextLengthError, FormatError, RequestError
from refengine.scheduler import Limits
from refengine.simulation import (
    Arrival,
    HeavyTails,
    Journal,
    differences,
    generate,
    read_journal,
    replay,
    simulate,
    small_layout,
)

LOAD = generate(HeavyTails(rate=3.5), 2000, seed=7)


def test_lengths_and_gaps_follow_their_distributions() -> None:
    """Median, spread, tail and rate are those asked for, within four standard errors."""
    shape = HeavyTails(rate=5, prompt_median=100, prompt_sigma=0.8, output_least=10, longest=10**6)
    load = generate(shape, 20_000, seed=3)
    n = len(load)
    logs = [math.log(arrival.prompt) for arrival in load]
    assert abs(median(logs) - math.log(100)) < 4 * 1.2533 * 0.8 / math.sqrt(n)
    spread = math.sqrt(fmean((log - math.log(100)) ** 2 for log in logs))
    assert abs(spread - 0.8) < 4 * 0.8 / math.sqrt(2 * n)
    for times in (2, 8, 32):
        share = fmean(arrival.output > 10 * times for arrival in load)
        expected = (10 * times / (10 * times + 0.5)) ** 1.3 * times**-1.3  # outputs are rounded
        assert abs(share - expected) < 4 * math.sqrt(expected / n)
    assert abs(load[-1].time - n / 5) < 4 * math.sqrt(n) / 5


@pytest.mark.parametrize("rate", [3.0, 3.5, 5.0])
def test_the_shortest_first_waits_least(rate: float) -> None:
    """Near the machine's limit and above it: at least 30 % less mean waiting, and everybody within its bound."""
    load = generate(HeavyTails(rate=rate), 2000, seed=7)
    first, shortest = simulate(load, "fcfs"), simulate(load, "sjf")
    assert shortest.figures["wait_mean"] < 0.7 * first.figures["wait_mean"]
    for made in (first, shortest):
        assert all(course.steps <= course.most_steps for course in made.courses)


def test_the_quiet_tenant_does_not_wait_for_the_loud_one() -> None:
    """One sends a hundred long requests at once, the other a short one now and then."""
    loud = [Arrival(0.0, 300, 60, 60, tenant="loud") for _ in range(100)]
    quiet = [Arrival(1.0 + i, 20, 10, 10, tenant="quiet") for i in range(20)]
    load = tuple(sorted(loud + quiet, key=lambda arrival: arrival.time))
    waits = {
        policy: max(c.waited for c in simulate(load, policy).courses if c.arrival.tenant == "quiet")
        for policy in ("fcfs", "fair")
    }
    assert waits["fair"] < waits["fcfs"] / 4


def test_the_urgent_go_first_at_the_cost_of_others() -> None:
    """With blocks kept on the host, the highest level waits a fifth of what it does without priorities."""
    load = generate(HeavyTails(rate=3.5, priorities=4), 1000, seed=7)
    waits = {
        policy: fmean(
            course.waited
            for course in simulate(load, policy, host_bytes=10**9).courses
            if course.arrival.priority == 3
        )
        for policy in ("fcfs", "priority")
    }
    assert waits["priority"] < waits["fcfs"] / 5


def test_expectations_save_preemptions() -> None:
    """Where requests tell how much memory they will take, fewer are admitted too early."""
    shape = HeavyTails(rate=8, output_least=64, longest=512, estimate_sigma=0)
    told = HeavyTails(rate=8, output_least=64, longest=512, estimate_sigma=0, hinted=1)
    silent, hinted = (
        simulate(generate(each, 300, seed=1), layout=small_layout(2048)) for each in (shape, told)
    )
    assert silent.preemptions > 20
    assert hinted.preemptions == 0


def test_a_recorded_load_comes_again_under_another_policy() -> None:
    """A journal under one policy gives, replayed under another, what that one would have made of it."""
    text = StringIO()
    recorded = simulate(LOAD[:300], "fcfs", journal=Journal(text))
    record = read_journal(StringIO(text.getvalue()))
    assert record.load == LOAD[:300]
    assert differences(record) == []
    assert replay(record, "fcfs").figures == recorded.figures
    assert replay(record, "sjf").figures == simulate(LOAD[:300], "sjf").figures


def test_a_journal_that_breaks_off_is_read_up_to_there() -> None:
    """Killed in the middle of a line; what is no journal is refused with the line."""
    text = StringIO()
    simulate(LOAD[:20], journal=Journal(text))
    whole = text.getvalue()
    assert len(read_journal(StringIO(whole[:-30])).entries) <= len(read_journal(StringIO(whole)).entries)
    for wrong in ("", "{}\n", "hello\n", '{"journal":2}\n', whole[:200] + "\n" + whole[200:]):
        with pytest.raises(FormatError):
            read_journal(StringIO(wrong))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rate", 0),
        ("rate", math.inf),
        ("rate", math.nan),
        ("longest", 0),
        ("prompt_sigma", -1),
        ("tenants", 0),
    ],
)
def test_impossible_distributions_are_refused(name: str, value: float) -> None:
    """With the name of what is wrong."""
    with pytest.raises(RequestError, match=name):
        HeavyTails(**{name: value})


def test_requests_that_never_fit_are_refused_before_the_start() -> None:
    """Too long for the cache, or with more samples than places."""
    with pytest.raises(ContextLengthError, match="request 1"):
        simulate((Arrival(0, 5, 5, 5), Arrival(0, 5000, 5, 5)), layout=small_layout(1024))
    with pytest.raises(ContextLengthError, match="samples"):
        simulate((Arrival(0, 5, 5, 5, samples=5),), limits=Limits(64, 4))
