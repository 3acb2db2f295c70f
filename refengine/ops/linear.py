"""Ops that read weight matrices: token embedding and linear projection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from refengine.ops.arrays import FloatArray, IndexArray
from refengine.ops.matmul import matmul_columns, matmul_workspace, padded
from refengine.ops.registry import op
from refengine.ops.scratch import Scratch, aligned
from refengine.ops.shape import copy_rows

TILE_ELEMENTS = 2**19
"""Weights multiplied at once: a tile decoded to float32 has 2 MiB, which a cache can hold."""

TILE_ROW_MULTIPLE = 48
"""Tiles have a multiple of so many rows: of the register blocks (12, 16, 24) of BLAS kernels."""

MIN_TILE_ROWS = 192
"""Tiles of long rows have so many all the same: a BLAS packs the other operand anew for every tile."""


class TiledMatrix(Protocol):
    """A weight matrix that gives its rows as numbers, some at a time; it may hold them in any other form."""

    shape: tuple[int, int]

    def tile(self, start: int, stop: int, scratch: Scratch) -> FloatArray:
        """Rows ``start`` to ``stop`` in the activations' dtype: ``[stop - start, K]``, C-contiguous.

        What is decoded lies in ``scratch``: one array of that size, and nothing besides.
        """
        ...


@op("token_ids[T], table[V, E] -> [T, E]")
def embedding(token_ids: IndexArray, table: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """Row ``token_ids[t]`` of ``table`` for every token.

    ``table`` need only support ``table[rows]``: a tensor still in its stored encoding decodes just these.

    Clauses: OPS-5, CNV-1, ENC-14.
    """
    if out is None:
        return table[token_ids]
    return copy_rows(table, token_ids, out)


def tile_rows(shape: tuple[int, ...]) -> int:
    """Rows of a weight ``[N, K]`` that ``linear`` multiplies at once: a function of its shape alone."""
    rows = TILE_ELEMENTS // shape[1] // TILE_ROW_MULTIPLE * TILE_ROW_MULTIPLE
    return max(rows, MIN_TILE_ROWS)


def row_tiles(shape: tuple[int, ...]) -> Iterator[slice]:
    """The rows of a weight ``[N, K]``, as many at a time as are multiplied at once."""
    step = tile_rows(shape)
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _linear_workspace(
    shapes: Sequence[tuple[int, ...] | None], attributes: Mapping[str, Any], itemsize: int
) -> int:
    x, weight = shapes[0], shapes[1]
    if x is None or weight is None:
        return 0
    rows = min(tile_rows(weight), weight[0])
    decoded = aligned(rows * weight[1] * itemsize)
    return decoded + matmul_workspace(1, rows, weight[1], x[0], itemsize)


@op("x[T, K], weight[N, K], bias[N]? -> [T, N]", workspace=_linear_workspace)
def linear(
    x: FloatArray,
    weight: FloatArray | TiledMatrix,
    bias: FloatArray | None = None,
    *,
    out: FloatArray | None = None,
    scratch: Scratch | None = None,
) -> FloatArray:
    """``y[t, n] = Σ_k weight[n, k] · x[t, k] + bias[n]``, each row of ``y`` independent of the others.

    Goes by tiles of weight rows (``tile_rows``), so that a weight in another form is decoded a tile at a time
    and gives the bits that its decoded form gives.

    Accumulated in the operands' dtype; the error of each output is at most
    ``(K + 1) · u · (Σ_k |weight[n, k] · x[t, k]| + |bias[n]|)`` with ``u`` its unit roundoff
    (Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., §3.1), in whatever order it is summed.

    Clauses: OPS-2, OPS-7, CNV-4, CNV-9, ENC-14.
    """
    scratch = scratch or Scratch()
    if out is None:
        out = np.empty((len(x), weight.shape[0]), x.dtype)
    with scratch.frame():
        columns = padded(x.T, "F", scratch)
        for rows in row_tiles(weight.shape):
            with scratch.frame():
                tile = (
                    weight[rows]
                    if isinstance(weight, np.ndarray)
                    else weight.tile(rows.start, rows.stop, scratch)
                )
                matmul_columns(tile, columns, order="F", out=out[:, rows].T, scratch=scratch)
    if bias is not None:
        out += bias
    return out
