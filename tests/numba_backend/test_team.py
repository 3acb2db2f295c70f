"""Threads that wait for work: all take part, from any caller, in a forked process too, and none is left over."""

from __future__ import annotations

import gc
import multiprocessing
import threading
from typing import Any

import numpy as np
import pytest

from refengine.errors import UnsupportedError
from refengine_numba.kernels.compilation import entry
from refengine_numba.kernels.entry import SIGNATURE, words_at
from refengine_numba.team import VARIABLE, Team, thread_count


@entry(SIGNATURE)
def sign_in(thread: int, threads: int, a: Any) -> None:
    """Count a visit. Arguments: counters, their number."""
    counters = words_at(a[0], a[1])
    counters[thread] += threads


def visits(team: Team, times: int = 1, most: int | None = None) -> list[int]:
    """What each thread has counted after so many calls."""
    counters = np.zeros(64, np.int64)
    for _ in range(times):
        team.run(sign_in, np.array([counters.ctypes.data, 64], np.int64), most)
    return counters[counters > 0].tolist()


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_each_thread_is_called_once_per_call(threads: int) -> None:
    """With its own number, and how many there are."""
    assert visits(Team(threads), times=50) == [50 * threads] * threads


def test_the_number_of_threads_may_change_between_calls() -> None:
    """Up, down, and not above what a call allows."""
    team = Team(2)
    assert visits(team) == [2, 2]
    team.threads = 4
    assert visits(team) == [4] * 4
    assert visits(team, most=3) == [3] * 3
    team.threads = 1
    assert visits(team) == [1]


def test_callers_take_turns() -> None:
    """Eight threads share one team."""
    team, seen = Team(3), list[list[int]]()
    callers = [threading.Thread(target=lambda: seen.append(visits(team, 20))) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert seen == [[60] * 3] * 8


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    """Those of its parent did not come along."""
    team = Team(3)
    visits(team)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=lambda: results.put(visits(team)))
    child.start()
    assert results.get(timeout=60) == [3, 3, 3]
    child.join(timeout=60)
    assert child.exitcode == 0


def test_threads_end_with_their_team() -> None:
    """A team that nobody holds any more leaves none behind."""
    before = set(threading.enumerate())  # those of earlier teams may end meanwhile
    team = Team(5)
    visits(team)
    helpers = set(threading.enumerate()) - before
    assert len(helpers) == 4
    del team
    gc.collect()
    for helper in helpers:
        helper.join(30)
    assert not any(helper.is_alive() for helper in helpers)


def test_the_environment_says_how_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number from 1 to 1024; anything else is refused by name."""
    monkeypatch.setenv(VARIABLE, "3")
    assert thread_count() == 3
    for wrong in ("0", "-1", "two", "1.5", "4096", "²"):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(UnsupportedError, match=VARIABLE):
            thread_count()
    monkeypatch.delenv(VARIABLE)
    assert thread_count() >= 1
