"""Faults of a KV cache's parts: its manager, its block tables, its prefix cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from refengine.backend.numpy_backend import NumpyBackend
from refengine.memory import BlockTable, KVCacheManager, PrefixCache
from refengine_conformance.faults.fault import Fault
from refengine_conformance.subject import Subject


def cache_fault(name: str, clause: str, wrong: Callable[..., KVCacheManager], story: str) -> Fault:
    """A subject with another manager."""
    return Fault(name, clause, story, lambda: Subject(NumpyBackend, kv_cache=wrong))


def table_fault(name: str, clause: str, wrong: type[BlockTable], story: str) -> Fault:
    """A subject whose manager has other block tables."""
    return cache_fault(name, clause, partial(KVCacheManager, table=wrong), story)


def prefix_fault(name: str, clause: str, wrong: type[PrefixCache], story: str) -> Fault:
    """A subject with another prefix cache."""
    return Fault(name, clause, story, lambda: Subject(NumpyBackend, prefix_cache=wrong))
