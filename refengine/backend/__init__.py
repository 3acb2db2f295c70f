"""Backends: the protocol, the registry and the NumPy backend."""

from __future__ import annotations

from refengine.backend.info import BackendInfo
from refengine.backend.protocol import Backend, Device, Executable, MemoryUse
from refengine.backend.registry import BackendStatus, load, registered

__all__ = [
    "Backend",
    "BackendInfo",
    "BackendStatus",
    "Device",
    "Executable",
    "MemoryUse",
    "load",
    "registered",
]
