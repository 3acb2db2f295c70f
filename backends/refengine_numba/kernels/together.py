"""The entry through which threads that wait for each other call another one."""

from __future__ import annotations

from typing import Any

from refengine_numba.barrier import STATE_WORDS
from refengine_numba.kernels.barrier import wait
from refengine_numba.kernels.compilation import Compiled, entry
from refengine_numba.kernels.entry import SIGNATURE, call_at, words_at
from refengine_numba.kernels.intrinsics import atomic_add, atomic_load, pause


def together_entry() -> Compiled:
    """Call an entry, wait for the others, and then some time for the next call, which often comes soon.

    Arguments: the entry's address, that of its arguments, barrier, number of calls, how often to look for
    more.
    """

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        calls = words_at(a[3], 1)
        if thread == 0:
            atomic_add(calls, 0, 1)
        call_at(a[0], thread, threads, a[1])
        looks, now = a[4], atomic_load(calls, 0)
        wait(words_at(a[2], STATE_WORDS), threads)
        if thread > 0:
            while looks > 0 and atomic_load(calls, 0) == now:
                looks -= 1
                pause()

    return run
