"""The barrier lets nobody through early, and two threads on one core get by."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import numba
import numpy as np
import pytest

from refengine_numba.barrier import barrier_state
from refengine_numba.kernels.barrier import wait


@numba.njit(nogil=True)
def rounds(count: int, threads: int, state: np.ndarray, counters: np.ndarray, thread: int) -> int:
    """How often some thread was seen in another round than this one."""
    astray = 0
    for i in range(count):
        counters[16 * thread] += 1
        wait(state, threads)
        for other in range(threads):
            astray += counters[16 * other] != i + 1
        wait(state, threads)
    return astray


def meet(count: int, threads: int) -> tuple[list[int], float]:
    """What the threads saw, and the seconds a barrier took."""
    state, counters = barrier_state(), np.zeros(16 * threads, np.int64)
    rounds(0, threads, state, counters, 0)
    seen = [-1] * threads

    def member(thread: int) -> None:
        seen[thread] = rounds(count, threads, state, counters, thread)

    team = [threading.Thread(target=member, args=(t,)) for t in range(threads)]
    start = time.perf_counter()
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    return seen, (time.perf_counter() - start) / (2 * count)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_nobody_passes_before_all_are_there(threads: int) -> None:
    """Each thread counts its rounds; between two barriers all counts are equal. More threads than cores, too."""
    seen, _ = meet(200, threads)
    assert seen == [0] * threads


def test_a_state_serves_groups_of_any_size_in_turn() -> None:
    """After a round it is at rest."""
    state, counters = barrier_state(), np.zeros(64, np.int64)
    for threads in (2, 3, 1, 2):
        counters[:] = 0
        team = [
            threading.Thread(target=rounds, args=(5, threads, state, counters, t)) for t in range(threads)
        ]
        for thread in team:
            thread.start()
        for thread in team:
            thread.join(timeout=60)
            assert not thread.is_alive()


def test_two_threads_share_one_core() -> None:
    """They give way to each other: a barrier costs less than a millisecond, not a time slice of the scheduler's."""
    code = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        f"sys.path.insert(0, {__file__.rsplit('/', 1)[0]!r}); import test_barrier; "
        "seen, seconds = min((test_barrier.meet(300, 2) for _ in range(12)), key=lambda m: m[1]); "
        "assert seen == [0, 0], seen; print(seconds)"
    )
    if not hasattr(__import__("os"), "sched_setaffinity"):
        pytest.skip("this system does not pin processes to cores")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-3


def test_a_late_thread_is_waited_for_asleep() -> None:
    """While one thread is away for a second, the other uses a small part of that second."""
    state = barrier_state()
    used: list[float] = []

    @numba.njit(nogil=True)
    def once(state: np.ndarray) -> None:
        wait(state, 2)

    once.compile("(int64[::1],)")

    def early() -> None:
        start = time.thread_time()
        once(state)
        used.append(time.thread_time() - start)

    thread = threading.Thread(target=early)
    thread.start()
    time.sleep(1)
    once(state)
    thread.join()
    assert used[0] < 0.5
