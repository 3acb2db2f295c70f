"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Iterable


def bytes_figure(count: float) -> str:
    """``98.4 MB``: decimal prefixes, as disks and downloads are counted."""
    return _scaled(count, "B")


def count_figure(count: float) -> str:
    """``134.5 M``, the way models are named."""
    return _scaled(count, "").rstrip()


def amount(count: int, noun: str) -> str:
    """``1 token``, ``2,048 tokens``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def span_figure(values: Iterable[int]) -> str:
    """``9`` where all are equal, else ``4–9``."""
    ordered = sorted(set(values))
    return "–".join(f"{value:,}" for value in dict.fromkeys((ordered[0], ordered[-1])))


def _scaled(count: float, unit: str) -> str:
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.1f} {prefix}{unit}"
    return f"{count:.0f} {unit}"
