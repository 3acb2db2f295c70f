"""A tensor in its stored encoding: a view of bytes that nobody has read yet."""

from __future__ import annotations
