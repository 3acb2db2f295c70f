"""The entry that goes through a table of stages without coming back to Python."""

from __future__ import annotations

from typing import Any

from refengine_numba.barrier import STATE_WORDS
from refengine_numba.kernels.barrier import wait
from refengine_numba.kernels.compilation import Compiled, entry
from refengine_numba.kernels.entry import SIGNATURE, call, words_at
from refengine_numba.stage import STAGE_WORDS


def run_stages_entry() -> Compiled:
    """Call every stage. Arguments: table, number of stages, their arguments, words of these, barrier."""

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        table, arguments = words_at(a[0], a[1] * STAGE_WORDS), words_at(a[2], a[3])
        barrier = words_at(a[4], STATE_WORDS)
        for i in range(a[1]):
            if table[STAGE_WORDS * i + 2] != 0:
                wait(barrier, threads)
            call(table[STAGE_WORDS * i], thread, threads, arguments, table[STAGE_WORDS * i + 1])

    return run
