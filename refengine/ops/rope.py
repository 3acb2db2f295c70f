"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Literal

import numpy as np

from refengine.ops.arrays import FloatArray, IndexArray
from refengine.ops.registry import op
from refengine.ops.scratch import Scratch, aligned
from refengine.ops.tiles import tile_shape, tiles

Pairing = Literal["interleaved", "halves"]
"""Which two elements of a head rotate together: ``2i`` and ``2i+1``, or ``i`` and ``i + dims/2``.

The paper and GGUF's ``llama`` tensors use the first, GPT-NeoX and Transformers the second.
"""


def _table_workspace(
    shapes: Sequence[tuple[int, ...] | None], attributes: Mapping[str, Any], itemsize: int
) -> int:
    """Angles and a function of them, of one tile, in float64."""
    (tokens,), pairs = shapes[0] or (0,), attributes["dims"] // 2
    return 2 * aligned(prod(tile_shape((tokens, pairs))) * 8)


@op("positions[T] -> [T, dims]", workspace=_table_workspace)
def rope_table(
    positions: IndexArray,
    *,
    frequencies: tuple[float, ...],
    dims: int,
    magnitude: float = 1.0,
    out: FloatArray | None = None,
    scratch: Scratch | None = None,
) -> FloatArray:
    """Cosines, then sines, of ``positions[t] · frequencies[i]``, times ``magnitude``.

    Angles and functions are evaluated in float64 and rounded once, where the table is stored or used, so
    that it is as exact at position 100,000 as at 1. ``dims`` is twice the number of frequencies (radians
    per position).

    Clauses: OPS-9.
    """
    scratch = scratch or Scratch()
    pairs = dims // 2
    if out is None:
        out = np.empty((len(positions), dims))
    for tile in tiles((len(positions), pairs)):
        with scratch.frame():
            angles, values = (scratch.empty((tile.stop - tile.start, pairs), np.float64) for _ in range(2))
            np.multiply(positions[tile, None], np.asarray(frequencies, np.float64), out=angles)
            for function, columns in ((np.cos, slice(0, pairs)), (np.sin, slice(pairs, dims))):
                function(angles, out=values)
                values *= magnitude
                out[tile, columns] = values
    return out


def _rope_workspace(
    shapes: Sequence[tuple[int, ...] | None], attributes: Mapping[str, Any], itemsize: int
) -> int:
    """Both elements of the pairs of one tile, and a product."""
    x, table = shapes[0] or (0, 0, 0), shapes[1] or (0, 0)
    return 3 * aligned(prod(tile_shape((*x[:2], table[1] // 2))) * itemsize)


@op("x[T, H, D], table[T, dims] -> [T, H, D]", sharing="in_place", workspace=_rope_workspace)
def rope(
    x: FloatArray,
    table: FloatArray,
    *,
    pairing: Pairing,
    out: FloatArray | None = None,
    scratch: Scratch | None = None,
) -> FloatArray:
    """Rotate pair ``i`` of every head by its angle: ``(a, b) → (a·cos - b·sin, b·cos + a·sin)``.

    Elements beyond the table's ``dims`` stay as they are.

    Clauses: OPS-10, OPS-11.
    """
    scratch = scratch or Scratch()
    if out is None:
        out = np.empty_like(x)
    dims = table.shape[-1]
    even, odd = (
        (slice(0, dims, 2), slice(1, dims, 2))
        if pairing == "interleaved"
        else (slice(0, dims // 2), slice(dims // 2, dims))
    )
    for tile in tiles((*x.shape[:2], dims // 2)):
        turns = table[tile, None].astype(x.dtype, copy=False)
        cosines, sines = turns[..., : dims // 2], turns[..., dims // 2 :]
        a, b = x[tile, :, even], x[tile, :, odd]
        with scratch.frame():
            rotated_a, rotated_b, product = (scratch.empty(a.shape, x.dtype) for _ in range(3))
            np.multiply(a, cosines, out=rotated_a)
            rotated_a -= np.multiply(b, sines, out=product)
            np.multiply(b, cosines, out=rotated_b)
            rotated_b += np.multiply(a, sines, out=product)
            out[tile, :, even] = rotated_a  # only now: ``out`` may be ``x``
            out[tile, :, odd] = rotated_b
    if out is not x:
        out[..., dims:] = x[..., dims:]
    return out
