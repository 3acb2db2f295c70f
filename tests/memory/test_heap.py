"""Memory that was freed goes back to the system when it is asked to."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

from refengine.memory.heap import trim_heap

BLOCKS, BLOCK = 1000, 64 * 1024
"""64 MB in pieces that glibc does not map one by one."""


def own_memory() -> int:
    """Bytes of anonymous memory, as Linux tells."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_was_freed_below_something_in_use_goes_back() -> None:
    """64 MB are written and freed, all but the last piece; after trimming most of them are gone."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "malloc_trim"):
        pytest.skip("the C library is not glibc")
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    blocks = [library.malloc(BLOCK) for _ in range(BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    last = blocks.pop()
    for block in blocks:
        library.free(block)
    before = own_memory()
    trim_heap()
    assert before - own_memory() > BLOCKS * BLOCK / 2
    library.free(last)
