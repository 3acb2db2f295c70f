"""Cutting the rows of an array into tiles, so that an op's working memory does not grow with them."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

TILE_ELEMENTS = 2**15
"""Elements treated at once by ops that treat rows or elements alone: 128 KiB of float32, cache-sized."""


def tile_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The largest tile of an array of this shape: as many whole rows as fit, one at least."""
    return (min(shape[0], max(1, TILE_ELEMENTS // max(1, prod(shape[1:])))), *shape[1:])


def tiles(shape: tuple[int, ...]) -> Iterator[slice]:
    """The rows of each tile, in order."""
    step = max(1, tile_shape(shape)[0])
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))
