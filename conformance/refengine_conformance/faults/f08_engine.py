"""Faults of chapter *Scheduling*: in what an engine is made of."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from refengine import backend
from refengine.memory import KVCacheManager
from refengine.ops import FloatArray
from refengine_conformance.faults.fault import Fault, faulty_op
from refengine_conformance.subject import Subject


def summed_in_batch_order(
    x: FloatArray, weight: FloatArray, bias: FloatArray | None = None, *, out: FloatArray | None = None
) -> FloatArray:
    """One dot product alone, and for several rows partial sums of odd and even elements."""
    exact = x.dtype.type
    if len(x) == 1:
        y = np.stack([np.cumsum(row * x[0], dtype=exact)[-1] for row in weight])[None]
    else:
        y = sum((x[:, part::2, None] * weight.T[None, part::2]).sum(1, dtype=exact) for part in (0, 1))
    y = y if bias is None else y + bias
    if out is None:
        return y
    out[...] = y
    return out


class FirstGroupReleased(KVCacheManager):
    """Forgets a sequence and gives back its blocks of the first group only."""

    def release(self, sequence: Hashable) -> None:
        """Give back what is in the first table."""
        for table in self.tables(sequence)[:1]:
            table.release_all()
        self._sequences.pop(sequence, None)


class KeptOnRelease(KVCacheManager):
    """Keeps the last block of a sequence that is cut off in the middle of a block."""

    def release(self, sequence: Hashable) -> None:
        """Give back whole blocks."""
        for table in self.tables(sequence):
            for block in table.blocks[:-1]:
                if block >= 0:
                    table._allocator.release(int(block))
        self._sequences.pop(sequence, None)


def cached_by(manager: Callable[..., Any]) -> Callable[[], Subject]:
    """Makes a subject with another manager of the KV cache."""
    return lambda: Subject(lambda: backend.load("numpy"), kv_cache=manager)


FAULTS: tuple[Fault, ...] = (
    Fault(
        "sums depend on the number of rows",
        "SCH-13",
        "A BLAS takes another kernel, with another order of additions, for one row than for several.",
        faulty_op("linear", summed_in_batch_order),
    ),
    Fault(
        "only the first group's blocks come back",
        "SCH-14",
        "A second kind of layer was added and the release forgotten.",
        cached_by(FirstGroupReleased),
    ),
    Fault(
        "the block begun is kept",
        "SCH-14",
        "The number of blocks to give back is rounded down.",
        cached_by(KeptOnRelease),
    ),
)
