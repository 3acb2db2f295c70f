"""Where the blocks of a pre-empted request go: to the host, or nowhere, whichever is cheaper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from refengine.scheduler.job import Blocks, Job


@dataclass(frozen=True)
class HostPool:
    """Room on the host for KV blocks, and what it costs to use it.

    Attributes:
        room: bytes that are free in it.
        block_bytes: of a block of each pool.
        held: ``held(id)``, the blocks of each pool that a request refers to.
        token_seconds: to compute one token again.
        byte_seconds: to copy one byte one way.
    """

    room: int
    block_bytes: Blocks
    held: Callable[[int], Blocks]
    token_seconds: float
    byte_seconds: float

    def nbytes(self, job: Job) -> int:
        """Bytes of a request's blocks."""
        return sum(count * nbytes for count, nbytes in zip(self.held(job.id), self.block_bytes, strict=True))

    def takes(self, job: Job, room: int) -> bool:
        """Whether a request's blocks fit into ``room`` bytes, and copying them twice is the cheaper way.

        Clauses: SCH-16.
        """
        nbytes = self.nbytes(job)
        return nbytes <= room and 2 * nbytes * self.byte_seconds < job.computed * self.token_seconds
