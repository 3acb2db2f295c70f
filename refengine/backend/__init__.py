"""Backends: the protocol, the registry and the NumPy backend."""

from __future__ import annotations

from refengine.backend.activations import plan_activations
from refengine.backend.info import BackendInfo
from refengine.backend.protocol import (
    Backend,
    CandidateExecutable,
    Device,
    Executable,
    FusingBackend,
    KVStorage,
    MemoryUse,
    PreparingBackend,
    RunKVStorage,
)
from refengine.backend.registry import BackendStatus, load, registered
from refengine.backend.selection import select
from refengine.backend.weights import WeightPlan

__all__ = [
    "Backend",
    "BackendInfo",
    "BackendStatus",
    "CandidateExecutable",
    "Device",
    "Executable",
    "FusingBackend",
    "KVStorage",
    "MemoryUse",
    "PreparingBackend",
    "RunKVStorage",
    "WeightPlan",
    "load",
    "plan_activations",
    "registered",
    "select",
]
