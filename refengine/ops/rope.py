"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from refengine.ops.arrays import FloatArray, IndexArray
from refengine.ops.registry import op

Pairing = Literal["interleaved", "halves"]
"""Which two elements of a head rotate together: ``2i`` and ``2i+1``, or ``i`` and ``i + dims/2``.

The paper and GGUF's ``llama`` tensors use the first, GPT-NeoX and Transformers the second.
"""


@op("positions[T] -> [T, dims]")
def rope_table(
    positions: IndexArray,
    *,
    frequencies: tuple[float, ...],
    dims: int,
    magnitude: float = 1.0,
    out: FloatArray | None = None,
) -> FloatArray:
    """Cosines, then sines, of ``positions[t] · frequencies[i]``, times ``magnitude``.

    Angles and functions are evaluated in float64 and rounded once, where the table is stored or used, so
    that it is as exact at position 100,000 as at 1. ``dims`` is twice the number of frequencies (radians
    per position).

    Clauses: OPS-9.
    """
    angles = positions[:, None].astype(np.float64) * np.asarray(frequencies, np.float64)
    if out is None:
        out = np.empty((len(positions), dims))
    out[:, : dims // 2] = np.cos(angles) * magnitude
    out[:, dims // 2 :] = np.sin(angles) * magnitude
    return out


@op("x[T, H, D], table[T, dims] -> [T, H, D]", sharing="in_place")
def rope(
    x: FloatArray,
    table: FloatArray,
    *,
    pairing: Pairing,
    out: FloatArray | None = None,
) -> FloatArray:
    """Rotate pair ``i`` of every head by its angle: ``(a, b) → (a·cos - b·sin, b·cos + a·sin)``.

    Elements beyond the table's ``dims`` stay as they are.

    Clauses: OPS-10, OPS-11.
    """
    dims = table.shape[-1]
    table = table.astype(x.dtype, copy=False)
    cosines, sines = table[:, None, : dims // 2], table[:, None, dims // 2 :]
    even, odd = (
        (slice(0, dims, 2), slice(1, dims, 2))
        if pairing == "interleaved"
        else (slice(0, dims // 2), slice(dims // 2, dims))
    )
    a, b = x[..., even], x[..., odd]
    rotated_a, rotated_b = a * cosines - b * sines, b * cosines + a * sines
    if out is None:
        out = np.empty_like(x)
    if out is not x:
        out[..., dims:] = x[..., dims:]
    out[..., even] = rotated_a
    out[..., odd] = rotated_b
    return out
