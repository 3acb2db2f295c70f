"""What a backend says that it takes."""

from __future__ import annotations

from dataclasses import fields

from refengine.backend import MemoryUse


def checked_memory(use: MemoryUse) -> MemoryUse:
    """The same, if its parts are whole numbers from 0 on that add up."""
    parts = [getattr(use, field.name) for field in fields(use)]
    assert all(isinstance(part, int) and part >= 0 for part in parts), use
    assert use.total == sum(parts) - use.host
    return use
