"""Amounts of memory as people write them."""

from __future__ import annotations

import re
from decimal import Decimal

import click

UNITS = {
    prefix + unit: base**power
    for power, prefix in enumerate(("k", "m", "g", "t"), start=1)
    for unit, base in (("", 1000), ("b", 1000), ("i", 1024), ("ib", 1024))
} | {"": 1, "b": 1}
"""Bytes of a unit: ``gb`` and ``g`` are decimal, ``gib`` is binary."""

EXAMPLES = "2GiB, 1.5G, 500MB, 67108864"


def size(text: str) -> int:
    """The bytes of ``2GiB`` (2 × 1024³), ``2GB`` or ``2G`` (2 × 1000³) or ``512``; rounded down.

    Raises:
        click.BadParameter: it is no such amount.
    """
    found = re.fullmatch(r"(\d+|\d*\.\d+|\d+\.)\s*([a-z]*)", text.strip().lower(), re.ASCII)
    if found is None or found[2] not in UNITS:
        raise click.BadParameter(f"{text!r} is no amount of memory; such are {EXAMPLES}")
    return int(Decimal(found[1]) * UNITS[found[2]])
