"""Tiles of keys and values: from stored numbers, wherever in a pool they lie, to float32 in scratch.

Where numbers lie is an array of indices of bytes, ``places``: those of the tile from ``here`` on, and from
``ahead`` on those that will be needed next, for which memory is asked meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from refengine_numba.kernels.attention_lanes import one_f16, one_f32, turn_f16, turn_f32
from refengine_numba.kernels.attention_sizes import TILE
from refengine_numba.kernels.compilation import inlined, part
from refengine_numba.kernels.intrinsics import prefetch
from refengine_numba.kernels.lanes import sum_of_lanes
from refengine_numba.kernels.vectors import LANES, fma, load_f16, load_f32, splat_f32, store

NUMBER_BYTES: Mapping[str, int] = MappingProxyType({"f16": 2, "f32": 4})
"""Bytes of a stored number."""

LINE = 64
"""Bytes of a cache line."""


def load_keys(
    kind: str, pool: Any, places: Any, here: int, ahead: int, size: int, work: Any, at: int
) -> None:
    """Element d of key i to ``work[at + d · TILE + i]``."""
    raise NotImplementedError


@inlined(load_keys)
def _load_keys(kind: Any) -> Callable[..., Any]:
    nbytes = NUMBER_BYTES[kind.literal_value]
    turn = {"f16": turn_f16, "f32": turn_f32}[kind.literal_value]
    one = {"f16": one_f16, "f32": one_f32}[kind.literal_value]

    def load(kind: str, pool: Any, places: Any, here: int, ahead: int, size: int, work: Any, at: int) -> None:
        whole = size // LANES * LANES
        for i in range(0, TILE, LANES):
            for d in range(0, whole, LANES):
                turn(pool, places, here + i, d * nbytes, work, at + d * TILE + i)
            ask_for(pool, places, ahead + i, LANES, size * nbytes)
        for i in range(TILE):
            for d in range(whole, size):
                work[at + d * TILE + i] = one(pool, places[here + i] + d * nbytes)

    return load


def copy_row(kind: str, pool: Any, place: int, size: int, work: Any, at: int) -> None:
    """One row to ``work[at]`` and after it, zeros up to whole vectors."""
    raise NotImplementedError


@inlined(copy_row)
def _copy_row(kind: Any) -> Callable[..., Any]:
    nbytes = NUMBER_BYTES[kind.literal_value]
    vector = {"f16": load_f16, "f32": load_f32}[kind.literal_value]
    one = {"f16": one_f16, "f32": one_f32}[kind.literal_value]

    def copy(kind: str, pool: Any, place: int, size: int, work: Any, at: int) -> None:
        whole = size // LANES * LANES
        for d in range(0, whole, LANES):
            store(work, at + d, vector(pool, place + d * nbytes))
        if whole < size:
            store(work, at + whole, splat_f32(0.0))
            for d in range(whole, size):
                work[at + d] = one(pool, place + d * nbytes)

    return copy


def load_values(
    kind: str, pool: Any, places: Any, here: int, ahead: int, count: int, size: int, work: Any, at: int
) -> None:
    """Element d of value i to ``work[at + i · width + d]``; width is ``size`` in whole vectors."""
    raise NotImplementedError


@inlined(load_values)
def _load_values(kind: Any) -> Callable[..., Any]:
    nbytes = NUMBER_BYTES[kind.literal_value]

    def load(
        kind: str, pool: Any, places: Any, here: int, ahead: int, count: int, size: int, work: Any, at: int
    ) -> None:
        width = (size + LANES - 1) // LANES * LANES
        for i in range(count):
            copy_row(kind, pool, places[here + i], size, work, at + i * width)
            ask_for(pool, places, ahead + i, 1, size * nbytes)

    return load


@part
def ask_for(pool: Any, places: Any, first: int, count: int, nbytes: int) -> None:
    """Ask memory for some rows."""
    for i in range(first, first + count):
        for line in range(0, nbytes, LINE):
            prefetch(pool, places[i] + line)


@part
def all_finite_rows(work: Any, at: int, count: int) -> bool:
    """Whether ``count`` floats, whole vectors of them, are all finite: nothing else times zero is zero."""
    a = splat_f32(0.0)
    b = splat_f32(0.0)
    for i in range(at, at + count - LANES, 2 * LANES):
        a = fma(load_f32(work, i), splat_f32(0.0), a)
        b = fma(load_f32(work, i + LANES), splat_f32(0.0), b)
    if count % (2 * LANES) != 0:
        a = fma(load_f32(work, at + count - LANES), splat_f32(0.0), a)
    return bool(sum_of_lanes(a + b) == 0)
