"""Work that is prepared while the engine computes, but never much of it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")

POLL_SECONDS = 0.1


class ReadAhead(Generic[Item]):
    """Runs an iterator in a thread of its own, at most some items ahead. Use as a context manager.

    Args:
        items: what to run; an exception in it comes out of ``get``.
        window: items ready at most.
    """

    def __init__(self, items: Iterator[Item], window: int) -> None:
        self._items = items
        self._ready = queue.Queue[Item | BaseException | None](window)
        self._stopping, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="refengine read-ahead", daemon=True)

    def __enter__(self) -> ReadAhead[Item]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def get(self, *, wait: bool) -> Item | None:
        """The next item; ``None`` where none is ready and we do not ``wait``, or none will come any more."""
        if self._ended:
            return None
        try:
            item = self._ready.get(block=wait)
        except queue.Empty:
            return None
        self._ended = item is None or isinstance(item, BaseException)
        if isinstance(item, BaseException):
            raise item
        return item

    def _run(self) -> None:
        last: BaseException | None = None
        try:
            for item in self._items:
                self._put(item)
                if self._stopping.is_set():
                    return
        except BaseException as error:  # it belongs to whoever asks for the next item
            last = error
        self._put(last)

    def _put(self, item: Item | BaseException | None) -> None:
        while not self._stopping.is_set():
            try:
                self._ready.put(item, timeout=POLL_SECONDS)
                return
            except queue.Full:
                continue
