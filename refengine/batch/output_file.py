"""The output of a batch: rows are appended whole, and survive whatever ends the process.

Why no row is lost and none is there twice, whenever the process is killed:

- A row is one line, and its newline is its last byte. The file grows at its end, so what a killed process
  leaves is whole lines, and at most one without a newline. That one is cut off on opening, before anything is
  appended; its request has no answer yet, and is answered again. On a full disk it is cut off at once.
- What has been written belongs to the system at once (nothing waits in this process), so a kill loses none of
  it. Every `SYNC_ROWS` rows or `SYNC_SECONDS` it is forced to the disk; of a machine that loses power, later
  rows may be missing, and are answered again like those that never came.
- On opening, each line is read and counted as the answer to one row of the input (`refengine.batch.resume`),
  and only the others are answered, each once. Rows of the input differ in their ``custom_id``, so no line
  can be counted for two.
- Errors that are to be tried again are left out of a copy, which then takes the file's place; until it does,
  and it does so in one step, the file is as it was.
- The file is locked while it is open, where the system has such locks (POSIX): there is one writer.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from refengine.batch.row import ID_PREFIX
from refengine.errors import OutputError, RequestError
from refengine.whole_lines import append_whole

SYNC_ROWS, SYNC_SECONDS = 64, 2.0

START = f'{{"id": "{ID_PREFIX}'.encode()
"""What every row begins with."""

FIELDS = {"id", "custom_id", "response", "error"}


class Written(NamedTuple):
    """A row of the output, as found there."""

    line: int
    row: Mapping[str, Any]


class OutputFile:
    """A file that rows are appended to. Use as a context manager.

    Args:
        path: the file; made where there is none.
        clock: seconds, for when to force rows to the disk.

    Raises:
        RequestError: it is no regular file, or another process writes to it.
        OutputError: it cannot be opened.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._clock, self._synced, self._unsynced = clock, clock(), 0
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        try:
            if path.exists() and not stat.S_ISREG(path.stat().st_mode):
                raise RequestError(f"{path} is not a regular file: only there can a batch be resumed")
            self._descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            raise OutputError(f"{path} cannot be opened: {error.strerror}") from error
        try:
            _lock(self._descriptor, path)
            if not os.path.samestat(os.fstat(self._descriptor), path.stat()):  # replaced since it was opened
                raise _locked(path)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._unsynced:
                self._sync()
        except OSError as cause:
            if error is None:
                raise self._unwritable(cause) from cause
        finally:
            os.close(self._descriptor)

    def rows(self) -> Iterator[Written]:
        """The whole rows in it.

        Raises:
            RequestError: a line is no row of a batch's output, so that the file must be something else.
        """
        line = 0
        with self.path.open("rb") as file:
            for line, data in enumerate(file, start=1):
                if data.endswith(b"\n"):
                    yield Written(line, self._row(line, data))
                elif not (data.startswith(START) or START.startswith(data) or not data.strip(b"\0")):
                    raise self._foreign(line)

    def cut_torn_row(self) -> int:
        """Cut off what follows the last newline; returns how many bytes that were. Call after ``rows``."""
        end = size = os.fstat(self._descriptor).st_size
        with self.path.open("rb") as file:
            while end:
                start = max(end - 2**16, 0)
                file.seek(start)
                if (at := file.read(end - start).rfind(b"\n")) >= 0:
                    end = start + at + 1
                    break
                end = start
        if end < size:
            os.ftruncate(self._descriptor, end)
        return size - end

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row whole.

        Raises:
            OutputError: the disk is full, or refuses otherwise; nothing of the row is there.
        """
        data = f"{json.dumps(row, allow_nan=False)}\n".encode()
        try:
            append_whole(self._descriptor, data)
            self._unsynced += 1
            if self._unsynced >= SYNC_ROWS or self._clock() - self._synced >= SYNC_SECONDS:
                self._sync()
        except OSError as error:
            raise self._unwritable(error) from error

    def remove(self, rows: Callable[[Mapping[str, Any]], bool]) -> None:
        """Remove rows, so that there is never a moment at which others are gone too.

        Raises:
            OutputError: there is no room for a copy without them; the file is as it was.
        """
        kept = self.path.with_name(f".{self.path.name}.kept")
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | getattr(os, "O_BINARY", 0)
        mode = stat.S_IMODE(os.fstat(self._descriptor).st_mode)
        try:
            descriptor = os.open(kept, flags, mode)
            try:
                _lock(descriptor, self.path)
                with self.path.open("rb") as file:
                    for line, data in enumerate(file, start=1):
                        if not rows(self._row(line, data)):
                            append_whole(descriptor, data)
                os.fsync(descriptor)
                os.replace(kept, self.path)
            except BaseException:
                os.close(descriptor)
                kept.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written anew without its errors: {error.strerror}\nIt is as it was."
            ) from error
        os.close(self._descriptor)
        self._descriptor = descriptor

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path} cannot be written: {error.strerror}\n"
            "Whole rows stay: mend this, and the same command goes on from there."
        )

    def _sync(self) -> None:
        os.fsync(self._descriptor)
        self._synced, self._unsynced = self._clock(), 0

    def _row(self, line: int, data: bytes) -> Mapping[str, Any]:
        try:
            row = json.loads(data)
        except (ValueError, RecursionError):
            raise self._foreign(line) from None
        if not isinstance(row, dict) or row.keys() != FIELDS or not str(row["id"]).startswith(ID_PREFIX):
            raise self._foreign(line)
        return row

    def _foreign(self, line: int) -> RequestError:
        return RequestError(
            f"line {line} of {self.path} is no row that a batch has written: choose another file"
        )


def _lock(descriptor: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise _locked(path) from None


def _locked(path: Path) -> RequestError:
    return RequestError(f"another process writes to {path}: wait for it, or choose another file")
