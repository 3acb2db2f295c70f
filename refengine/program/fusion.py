"""Instructions that a backend computes as one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fusion:
    """Instructions that follow each other and run together, as far as memory is concerned.

    Attributes:
        first, last: positions of the first of them and of the last.
        unwritten: indices of values that one of them gives and only others of them read, and that are never
            in memory.
        workspace: bytes of working memory that they need together at most.
        needed_until: position of the last that needs it: what later ones give may lie there. ``None`` for
            ``last``.
    """

    first: int
    last: int
    unwritten: frozenset[int] = frozenset()
    workspace: int = 0
    needed_until: int | None = None

    @property
    def positions(self) -> range:
        """Of its instructions."""
        return range(self.first, self.last + 1)
