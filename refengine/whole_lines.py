"""Files that grow by whole lines: one that cannot be written whole is not left there in part."""

from __future__ import annotations

import os
from contextlib import suppress


def append_whole(descriptor: int, line: bytes) -> None:
    """Append to a file that nobody else writes to: all of it, or nothing.

    Args:
        descriptor: of a file that was opened for appending.
        line: with its newline.

    Raises:
        OSError: the system refuses, since the disk is full for example; what had been written of the line is
            cut off again, as far as the system lets that happen.
    """
    written = 0
    try:
        while written < len(line):
            written += os.write(descriptor, memoryview(line)[written:])
    except BaseException:  # Ctrl-C too
        if written:
            with suppress(OSError):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
        raise
