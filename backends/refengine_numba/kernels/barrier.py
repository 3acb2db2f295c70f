"""A barrier between threads inside compiled code, without Python, and while all goes well without the system.

The last thread to arrive opens the next round; the others watch for it: first spinning, for about as long as
a well-balanced step makes them wait, then letting other threads have the core between two looks, and at last
asleep for moments. So two threads on one core change places soon, and one that waits for long costs nothing.

Source: Mellor-Crummey & Scott, 1991, ACM TOCS 9(1), algorithm 7 (a central barrier; the round's number stands
for the reversed sense).
"""

from __future__ import annotations

from typing import Any

from refengine_numba.barrier import ARRIVED, ROUND
from refengine_numba.kernels.compilation import part
from refengine_numba.kernels.intrinsics import atomic_add, atomic_load, atomic_store, doze, give_way, pause

SPINS = 2000
"""Looks before a thread first gives way: some tens of microseconds."""

YIELDS = 4000
"""Looks with giving way in between, before a thread first sleeps: some milliseconds."""


@part
def wait(state: Any, threads: int) -> None:
    """Return once all ``threads`` threads are here; what they wrote before is seen by all after.

    Every thread must come, with the same ``threads``: one that leaves by an exception makes the others wait
    for ever. The state serves any number of rounds, one group of threads at a time.
    """
    if threads == 1:
        return
    here = atomic_load(state, ROUND)
    if atomic_add(state, ARRIVED, 1) == threads - 1:
        atomic_store(state, ARRIVED, 0)
        atomic_store(state, ROUND, here + 1)
        return
    looks = 0
    while atomic_load(state, ROUND) == here:
        looks += 1
        if looks < SPINS:
            pause()
        elif looks < YIELDS:
            give_way()
        else:
            doze()
