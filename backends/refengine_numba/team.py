"""Threads that wait for work and do it together: one call of a compiled function in each.

They are threads of Python that are asleep in a lock between two calls, and outside of Python during one:
``ctypes`` gives the interpreter to others for as long as the compiled function runs. So no parallel runtime
is needed, calls from several threads of Python take turns, and a process that was forked off starts
threads of its own.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.errors import UnsupportedError
from refengine_numba.barrier import barrier_state
from refengine_numba.entries import entry

VARIABLE = "REFENGINE_THREADS"
"""The environment variable that says how many threads compute."""

LOOKS = 30_000
"""How often a thread looks for the next call before it goes to sleep: for about a millisecond."""

_MOST = 1024


def thread_count() -> int:
    """How many threads are to compute: what ``REFENGINE_THREADS`` says, else one per core it may use.

    Raises:
        UnsupportedError: it is no number of threads.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen:
        if not chosen.isascii() or not chosen.isdigit() or not 1 <= int(chosen) <= _MOST:
            raise UnsupportedError(f"{VARIABLE}={chosen!r} is no number of threads from 1 to {_MOST}")
        return int(chosen)
    return len(_cores())


def _cores() -> set[int]:
    """The cores that this thread may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


class Team:
    """Calls an entry (see :mod:`entries`) in several threads at once, the caller's among them.

    Args:
        threads: at least 1.

    Attributes:
        threads: how many take part in the next call; may be changed between two.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._turn = threading.Lock()
        self._helpers: list[_Helper] = []
        self._barrier = barrier_state()
        self._calls = barrier_state()
        self._words = np.array([0, 0, self._barrier.ctypes.data, self._calls.ctypes.data, 0], np.int64)
        self._process = os.getpid()
        self._spread_for = -1, 0
        weakref.finalize(self, _dismiss, self._helpers)

    def run(self, function: Any, words: NDArray[np.int64], most: int | None = None) -> None:
        """Call ``function(thread, threads, words)`` for every thread, and return when all have returned.

        Args:
            function: an entry: whatever has its address.
            words: int64, C-contiguous, the entry's arguments.
            most: threads that may take part.
        """
        threads = self.threads if most is None else min(self.threads, most)
        if self._process != os.getpid():  # forked: the other threads stayed behind, perhaps holding the lock
            self._turn, self._process = threading.Lock(), os.getpid()
            self._helpers.clear()
            self._spread_for = -1, 0
        with self._turn:
            self._words[:2] = function.address, words.ctypes.data
            self._words[4] = LOOKS if threads <= len(_cores()) else 0
            call, pointer = (
                entry("together.together").function,
                self._words.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)),
            )
            kept = (
                self._words,
                self._barrier,
                self._calls,
            )  # which a thread may still look at when this has returned

            def work(thread: int, kept: object = kept) -> None:
                call(thread, threads, pointer)

            while len(self._helpers) < threads - 1:
                self._helpers.append(_Helper(len(self._helpers) + 1))
            for helper in self._helpers[: threads - 1]:
                helper.work = work
            self._spread(threads)
            starts = iter([helper.begin.release for helper in self._helpers[: threads - 1]])
            try:
                for start in starts:
                    start()
            finally:  # whoever is interrupted between two of them: a thread that began waits for all others
                for start in starts:
                    start()
                call(0, threads, pointer)

    def _spread(self, threads: int) -> None:
        """Keep the other threads off the core that the caller runs on, if there are enough.

        Threads that wait for each other take turns on one core so smoothly that the system may leave them
        there while another core is idle: a step then takes ten times as long.
        """
        here = _core()
        if here is None or (here, threads) == self._spread_for:
            return
        cores = _cores()
        others = cores - {here} if threads <= len(cores) else cores
        for helper in self._helpers:
            os.sched_setaffinity(helper.id, others)
        self._spread_for = here, threads


def _core() -> int | None:
    """The core that this thread runs on; ``None`` where the system does not tell, or pins no threads."""
    return _sched_getcpu()() if hasattr(os, "sched_setaffinity") else None


@cache
def _sched_getcpu() -> Callable[[], int]:
    function: Callable[[], int] = ctypes.CDLL(None).sched_getcpu
    return function


class _Helper:
    """One thread besides the caller's: it does its work when ``begin`` is released; without work it ends."""

    def __init__(self, thread: int) -> None:
        self.work: Callable[[int], None] | None = None
        self.begin = threading.Lock()
        self.begin.acquire()
        itself = threading.Thread(target=self._serve, args=(thread,), name=f"refengine-{thread}", daemon=True)
        itself.start()
        self.id = itself.native_id or 0

    def _serve(self, thread: int) -> None:
        while True:
            self.begin.acquire()
            if self.work is None:
                return
            self.work(thread)


def _dismiss(helpers: list[_Helper]) -> None:
    for helper in helpers:
        helper.work = None
        helper.begin.release()
