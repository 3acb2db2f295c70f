"""The light half of the NumPy backend."""

from __future__ import annotations

from refengine.backend.info import BackendInfo

INFO = BackendInfo(
    description="the golden operations on the CPU, in NumPy",
    install="pip install refengine",
    probe=lambda: None,
    priority=0,
)
