"""A thread's share of a kernel's work: consecutive items, as even as they go."""

from __future__ import annotations

from refengine_numba.kernels.compilation import part


@part
def share(items: int, thread: int, threads: int) -> tuple[int, int]:
    """A thread's first item, and the one after its last."""
    return items * thread // threads, items * (thread + 1) // threads
