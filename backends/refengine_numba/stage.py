"""Stages of a step: calls of entries, and where between two of them all threads must wait for each other.

A stage reads and writes spans of memory. A thread may run ahead of the others into the next stages for as
long as nobody is hurt by it: until a stage writes what an earlier one still reads or writes, or reads what
it still writes. Two stages that split their work by rows in the same way do not hurt each other in a span
whose rows lie alike for both, since each thread meets its own rows only. So a token's way through norm,
rotation and residual needs no barrier at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from refengine_numba.arguments import Arguments
from refengine_numba.entries import Entry

STAGE_WORDS = 3
"""Words of a stage: its entry's address, its first argument, whether all threads meet before it."""


@dataclass(frozen=True)
class Span:
    """A stretch of memory that a stage reads or writes.

    Attributes:
        start: address.
        nbytes: how many bytes.
        row_bytes: where each thread meets its own rows only: the bytes of a row; 0 where any thread may meet
            any byte.
        rows: the symbol of the number of rows, by which these are shared out.
    """

    start: int
    nbytes: int
    row_bytes: int = 0
    rows: str = ""

    @classmethod
    def of(cls, array: NDArray[Any], rows: str = "") -> Span:
        """The memory of a C-contiguous array, by rows of its first axis where ``rows`` names their number."""
        return cls(array.ctypes.data, array.nbytes, array.nbytes // max(1, len(array)) if rows else 0, rows)

    def hurts(self, other: Span) -> bool:
        """Whether a write to one of them, at another time in another thread, can meet the other."""
        if self.start + self.nbytes <= other.start or other.start + other.nbytes <= self.start:
            return False
        alike = (self.start, self.row_bytes, self.rows) == (other.start, other.row_bytes, other.rows)
        return not (alike and self.row_bytes > 0)


@dataclass(frozen=True, eq=False)
class Stage:
    """One call of an entry in every thread.

    Attributes:
        entry: a kernel.
        arguments: what it is called with.
        reads: memory that other stages write.
        writes: memory that other stages read or write.
    """

    entry: Entry
    arguments: Arguments
    reads: tuple[Span, ...]
    writes: tuple[Span, ...]


def barriers(stages: Sequence[Stage]) -> list[bool]:
    """Before which stages all threads must have finished all earlier ones."""
    needed = []
    reads: list[Span] = []
    writes: list[Span] = []
    for stage in stages:
        hurt = any(w.hurts(s) for w in stage.writes for s in (*reads, *writes)) or any(
            r.hurts(s) for r in stage.reads for s in writes
        )
        if hurt:
            reads, writes = [], []
        reads += stage.reads
        writes += stage.writes
        needed.append(hurt)
    return needed
