"""Which segments of a KV pool are committed."""

from __future__ import annotations

from refengine.errors import MemoryManagerError


class Segments:
    """The committed segments of a pool that has so many.

    Clauses: KVC-14.
    """

    def __init__(self, count: int) -> None:
        self._count, self._committed = count, set[int]()

    def __len__(self) -> int:
        return len(self._committed)

    def commit(self, segment: int) -> None:
        """Note that a segment is.

        Raises:
            MemoryManagerError: it is committed already, or there is none of this number.
        """
        if segment in self._committed or not 0 <= segment < self._count:
            raise MemoryManagerError(f"KV segment {segment} of {self._count} cannot be committed")
        self._committed.add(segment)

    def release(self, segment: int) -> None:
        """Note that it is no more.

        Raises:
            MemoryManagerError: it is not committed.
        """
        if segment not in self._committed:
            raise MemoryManagerError(f"KV segment {segment} is not committed and cannot be released")
        self._committed.remove(segment)
