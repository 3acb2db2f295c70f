"""Products of float16 numbers, summed in float32: the policy ``mixed16``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.errors import NumericalError
from refengine.ops.arrays import FloatArray
from refengine.ops.linear import TiledMatrix, row_tiles, tile_rows
from refengine.ops.matmul import BASE_WIDTHS, WIDE_WIDTHS, matmul_columns
from refengine.ops.registry import op
from refengine.ops.scratch import Scratch, aligned
from refengine.ops.tiles import tile_shape, tiles

LARGEST = 2.0**15
"""Rows with a larger activation are made smaller: below 2¹⁶ nothing that is rounded to float16 overflows."""


def _linear_workspace(
    shapes: Sequence[tuple[int, ...] | None], attributes: Mapping[str, Any], itemsize: int
) -> int:
    x, weight = shapes[0], shapes[1]
    if x is None or weight is None:
        return 0
    rows = min(tile_rows(weight), weight[0])
    columns = max(x[0], max(BASE_WIDTHS))
    rounded = aligned(4 * columns * x[1]) + aligned(4 * x[0])
    halves = aligned(2 * rows * weight[1]) + aligned(rows * weight[1])
    product = aligned(4 * rows * max(w for w in (*BASE_WIDTHS, *WIDE_WIDTHS) if w <= columns))
    tile = aligned(4 * rows * weight[1]) + max(halves, product)
    return rounded + max(aligned(2 * prod(tile_shape(x))), tile)


@op("x[T, K], weight[N, K], bias[N]? -> [T, N]", workspace=_linear_workspace)
def linear_a16(
    x: FloatArray,
    weight: FloatArray | TiledMatrix,
    bias: FloatArray | None = None,
    *,
    out: FloatArray | None = None,
    scratch: Scratch | None = None,
) -> FloatArray:
    """``linear`` of activations and weights rounded to float16, summed in float32.

    Where the largest absolute value of a row of ``x`` is above 2¹⁵, and finite, the row is multiplied by the
    power of two that brings it into (2¹⁴, 2¹⁵] before it is rounded, and its sums are divided by that power.

    With ``x'`` and ``w'`` the rounded numbers, the error of each output is at most
    ``(K + 1) · u · (Σ_k |w'[n, k] · x'[t, k]| + |bias[n]|)``, as that of ``linear``: products of two float16
    are exact, and so is the power.

    Raises:
        NumericalError: a weight is not finite in float16.

    Clauses: MIX-9, MIX-10, MIX-11.
    """
    scratch = scratch or Scratch()
    if out is None:
        out = np.empty((len(x), weight.shape[0]), np.float32)
    with scratch.frame():
        rounded, powers = _rounded_rows(x, scratch)
        for rows in row_tiles(weight.shape):
            with scratch.frame():
                tile = _rounded_tile(weight, rows, scratch)
                matmul_columns(tile, rounded.T, order="F", out=out[:, rows].T, scratch=scratch)
        with np.errstate(over="ignore"):
            out *= powers
    if bias is not None:
        out += bias
    return out


def _rounded_rows(x: FloatArray, scratch: Scratch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Rows rounded to float16, with rows of zeros behind them where they are few; and each one's power."""
    rounded = scratch.zeros((max(len(x), max(BASE_WIDTHS)), x.shape[1]), np.float32)
    powers = scratch.empty((len(x), 1), np.float32)
    for rows in tiles(x.shape):
        with scratch.frame():
            part = np.abs(x[rows], out=rounded[rows.start : rows.stop])
            largest = part.max(axis=1, keepdims=True)
            fraction, exponent = np.frexp(largest)
            above = exponent - 15 - (fraction == 0.5)
            power = np.where((largest > LARGEST) & np.isfinite(largest), above, 0)
            powers[rows] = np.ldexp(np.float32(1), power)
            np.multiply(x[rows], np.ldexp(np.float32(1), -power), out=part)
            halves = scratch.empty(part.shape, np.float16)
            halves[...] = part
            part[...] = halves
    return rounded, powers


def _rounded_tile(weight: FloatArray | TiledMatrix, rows: slice, scratch: Scratch) -> NDArray[np.float32]:
    """Weight rows rounded to float16, as float32."""
    if isinstance(weight, np.ndarray):
        tile = scratch.empty((rows.stop - rows.start, weight.shape[1]), np.float32)
        tile[...] = weight[rows]
    else:
        tile = weight.tile(rows.start, rows.stop, scratch)
    with scratch.frame():
        halves, finite = scratch.empty(tile.shape, np.float16), scratch.empty(tile.shape, np.bool_)
        with np.errstate(over="ignore"):
            halves[...] = tile
        if not np.isfinite(halves, out=finite).all():
            raise NumericalError(
                "a weight is too large for float16, which the policy mixed16 rounds weights to: "
                "choose the policy float32"
            )
        tile[...] = halves
    return tile
