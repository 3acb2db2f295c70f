"""The C library's heap: memory that was freed, and has not gone back to the system."""

from __future__ import annotations

import ctypes
import sys


def trim_heap() -> None:
    """Give free memory back to the system, where the C library is glibc; elsewhere nothing happens.

    glibc keeps what was freed below something still in use. After a large vocabulary was read that is
    megabytes, which the engine would never use: its own memory comes from the system directly.
    """
    if sys.platform.startswith("linux") and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
