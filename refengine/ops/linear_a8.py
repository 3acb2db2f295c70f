"""Products of activations in 8-bit codes with the integers of stored weights: the policy ``mixed8``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from refengine.ops.arrays import FloatArray
from refengine.ops.fused import fma, fma_workspace
from refengine.ops.linear import row_tiles, tile_rows
from refengine.ops.registry import op
from refengine.ops.scratch import Scratch, aligned
from refengine.ops.tiles import TILE_ELEMENTS, tile_shape, tiles

GROUP = 32
"""Activations that share a scale."""

RECORD_BYTES = 48
"""Of a group's record."""

_LARGEST = 127


class Groups(NamedTuple):
    """Rows of a weight matrix [N, K] as integers, for G groups of 32: weight = scale · integer + offset.

    Attributes:
        integers: float32 [N, K], C-contiguous.
        scales: float32 [G, N].
        offsets: float32 [G, N], ``None`` where the encoding has none.
    """

    integers: NDArray[np.float32]
    scales: NDArray[np.float32]
    offsets: NDArray[np.float32] | None


class GroupedMatrix(Protocol):
    """A weight matrix that gives its rows as integers, scales and offsets, some at a time."""

    shape: tuple[int, int]

    def groups(self, start: int, stop: int, scratch: Scratch) -> Groups:
        """Rows ``start`` to ``stop``.

        What is read lies in ``scratch``: the three arrays, and nothing besides.
        """
        ...


def _quantize_workspace(
    shapes: Sequence[tuple[int, ...] | None], attributes: Mapping[str, Any], itemsize: int
) -> int:
    x = shapes[0]
    if x is None:
        return 0
    rows, columns = tile_shape(x)
    groups = rows * (columns // GROUP)
    return aligned(4 * rows * columns) + 3 * aligned(4 * groups) + aligned(groups)


@op("x[T, K] -> [T, K/32, 48]", dtype=np.uint8, workspace=_quantize_workspace)
def quantize_a8(
    x: FloatArray, *, out: NDArray[np.uint8] | None = None, scratch: Scratch | None = None
) -> NDArray[np.uint8]:
    """Each 32 activations of a row as 32 codes from -127 to 127 and a scale.

    All arithmetic is float32, with one rounding per operation. ``scale = max |x| / 127``, and a code is
    ``x / scale`` rounded to the nearest integer, ties to even, and moved into -127 to 127 (below the normal
    numbers, where a scale is inexact, the quotient can be greater). Where the scale is 0, so are the codes.
    Where an activation is not finite, neither is the scale, and all codes are 1: so every product with the
    group is NaN or infinite, and what cannot be computed shows.

    Returns:
        Records of 48 bytes: 32 codes, int8; scale, float32; ``scale · sum`` of the codes, rounded, float32;
        the sum, int32; the sum of the second 16, int32; all little-endian.

    Clauses: MIX-2, MIX-3, MIX-4.
    """
    scratch = scratch or Scratch()
    if out is None:
        out = np.empty((len(x), x.shape[1] // GROUP, RECORD_BYTES), np.uint8)
    for rows in tiles(x.shape):
        with scratch.frame():
            _write_records(x[rows], out[rows], scratch)
    return out


def _write_records(x: FloatArray, records: NDArray[np.uint8], scratch: Scratch) -> None:
    shape = records.shape[:2]
    groups = x.reshape(*shape, GROUP)
    quotients = scratch.empty(groups.shape, np.float32)
    scales, safe, sums = (scratch.empty(shape, np.float32) for _ in range(3))
    usable = scratch.empty(shape, np.bool_)
    with np.errstate(all="ignore"):
        np.abs(groups, out=quotients)
        np.max(quotients, axis=2, out=scales)
        scales /= np.float32(_LARGEST)
        np.isfinite(scales, out=usable)
        safe[...] = 1
        np.copyto(safe, scales, where=usable)
        safe[safe == 0] = 1
        np.divide(groups, safe[..., None], out=quotients)
        np.rint(quotients, out=quotients)
        np.clip(quotients, -_LARGEST, _LARGEST, out=quotients)
        np.logical_not(usable, out=usable)
        np.copyto(quotients, 1, where=usable[..., None])
        records[..., :GROUP].view(np.int8)[...] = quotients
        numbers, integers = (records[..., GROUP:].view(kind) for kind in ("<f4", "<i4"))
        np.sum(quotients, axis=2, out=sums)
        numbers[..., 0] = scales
        integers[..., 2] = sums
        np.multiply(scales, sums, out=numbers[..., 1])
        np.sum(quotients[..., GROUP // 2 :], axis=2, out=sums)
        integers[..., 3] = sums


def _tokens_at_once(rows: int) -> int:
    """Tokens whose products with so many weight rows are computed at once."""
    return max(1, TILE_ELEMENTS // rows)


def _linear_workspace(
    shapes: Sequence[tuple[int, ...] | None], attributes: Mapping[str, Any], itemsize: int
) -> int:
    codes, weight = shapes[0], shapes[1]
    if codes is None or weight is None:
        return 0
    rows = min(tile_rows(weight), weight[0])
    tokens = min(_tokens_at_once(rows), codes[0])
    groups = 2 * aligned(4 * codes[1] * rows)
    products = 3 * aligned(4 * tokens * rows) + aligned(4 * GROUP * tokens)
    return aligned(4 * rows * weight[1]) + groups + products + fma_workspace(tokens * rows)


@op("codes[T, K/32, 48], weight[N, K], bias[N]? -> [T, N]", workspace=_linear_workspace)
def linear_a8(
    codes: NDArray[np.uint8],
    weight: GroupedMatrix,
    bias: FloatArray | None = None,
    *,
    out: FloatArray | None = None,
    scratch: Scratch | None = None,
) -> FloatArray:
    """``linear`` of what codes of activations stand for with weights as they are stored.

    For a group with scale ``s`` and ``sS``, scale times sum of codes, in its record, a weight row's integers
    ``w``, scale ``d`` and offset ``m``, and ``I`` the sum of ``w · code``: from left to right, from zero,

    - ``y = fma(d · s, I, y)``
    - where the encoding has offsets, ``y = fma(m, sS, y)``

    then ``y + bias``: all of it float32, ``I`` an exact integer, and one rounding for each ``·``, ``+`` and
    ``fma``. So every row of ``y`` has the bits that it has alone.

    Clauses: MIX-5, MIX-6, MIX-7, MIX-8.
    """
    scratch = scratch or Scratch()
    count = weight.shape[0]
    if out is None:
        out = np.empty((len(codes), count), np.float32)
    with np.errstate(all="ignore"):
        for rows in row_tiles(weight.shape):
            with scratch.frame():
                groups = weight.groups(rows.start, rows.stop, scratch)
                tokens = _tokens_at_once(min(tile_rows(weight.shape), count))
                for first in range(0, len(codes), tokens):
                    some = slice(first, first + tokens)
                    with scratch.frame():
                        out[some, rows] = _products(codes[some], groups, scratch)
        if bias is not None:
            out += bias
    return out


def _products(codes: NDArray[np.uint8], groups: Groups, scratch: Scratch) -> NDArray[np.float32]:
    """Sums over all groups: [t, N]."""
    shape = (len(codes), len(groups.integers))
    y = scratch.zeros(shape, np.float32)
    sums, scales = (scratch.empty(shape, np.float32) for _ in range(2))
    numbers = scratch.empty((len(codes), GROUP), np.float32)
    for group in range(codes.shape[1]):
        columns = slice(group * GROUP, (group + 1) * GROUP)
        record = codes[:, group]
        s, scaled_sum = (record[:, at : at + 4].view("<f4") for at in (GROUP, GROUP + 4))
        numbers[...] = record[:, :GROUP].view(np.int8)
        np.matmul(numbers, groups.integers[:, columns].T, out=sums)
        np.multiply(groups.scales[group], s, out=scales)
        fma(scales, sums, y, scratch)
        if groups.offsets is not None:
            fma(groups.offsets[group], scaled_sum, y, scratch)
    return y
