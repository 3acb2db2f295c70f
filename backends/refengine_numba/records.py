"""Activations as codes, in records: how many bytes they take."""

from __future__ import annotations

from refengine_numba.layout import GROUP

RECORD_BYTES = 48
"""Of a record."""

CHUNK = 128
"""Rows of activations that a kernel takes at a time: their records stay in the second-level cache."""


def record_bytes(rows: int, columns: int) -> int:
    """Bytes of all records of activations [rows, columns]."""
    return rows * (columns // GROUP) * RECORD_BYTES
