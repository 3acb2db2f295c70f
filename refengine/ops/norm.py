"""Root-mean-square normalisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from refengine.ops.arrays import FloatArray
from refengine.ops.registry import op
from refengine.ops.scratch import Scratch, aligned
from refengine.ops.tiles import tile_shape, tiles


def _workspace(shapes: Sequence[tuple[int, ...] | None], attributes: Mapping[str, Any], itemsize: int) -> int:
    """The squares of one tile."""
    x = shapes[0] or (0,)
    return aligned(prod(tile_shape(x)) * itemsize)


@op("x[..., N], weight[N] -> [..., N]", sharing="in_place", workspace=_workspace)
def rms_norm(
    x: FloatArray,
    weight: FloatArray,
    *,
    eps: float,
    out: FloatArray | None = None,
    scratch: Scratch | None = None,
) -> FloatArray:
    """``x / sqrt(mean(x²) + eps) · weight`` over the last axis (Zhang & Sennrich, 2019, arXiv:1910.07467).

    ``eps`` stands inside the root. Used over the hidden size, and over each head for q and k norms.

    Clauses: OPS-8.
    """
    scratch = scratch or Scratch()
    if out is None:
        out = np.empty_like(x)
    rows, normalised = np.atleast_2d(x, out)
    for tile in tiles(rows.shape):
        with scratch.frame():
            squares = np.square(rows[tile], out=scratch.empty(rows[tile].shape, x.dtype))
            mean_square = squares.mean(axis=-1, keepdims=True)
        inverse_root = 1 / np.sqrt(mean_square + x.dtype.type(eps))
        np.multiply(rows[tile], inverse_root, out=normalised[tile])
        np.multiply(normalised[tile], weight, out=normalised[tile])
    return out
