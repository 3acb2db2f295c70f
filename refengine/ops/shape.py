"""Ops that move or rename elements without computing."""

from __future__ import annotations

from typing import Any

from refengine.ops.arrays import FloatArray, IndexArray
from refengine.ops.registry import op

_ROWS = 16
"""Rows fetched at once."""


@op("x[T, N] -> [T, heads, N/heads]", sharing="view")
def split_heads(x: FloatArray, *, heads: int) -> FloatArray:
    """The same memory, seen as heads.

    Clauses: OPS-5.
    """
    return x.reshape(x.shape[0], heads, -1)


@op("x[T, H, D] -> [T, H*D]", sharing="view")
def merge_heads(x: FloatArray) -> FloatArray:
    """The same memory, heads side by side.

    Clauses: OPS-5.
    """
    return x.reshape(x.shape[0], -1)


@op("x[T, N], rows[R] -> [R, N]")
def take_rows(x: FloatArray, rows: IndexArray, *, out: FloatArray | None = None) -> FloatArray:
    """``x[rows]``: the tokens whose logits somebody wants.

    Clauses: OPS-5, CNV-1.
    """
    if out is None:
        return x[rows]
    return copy_rows(x, rows, out)


def copy_rows(table: Any, rows: IndexArray, out: FloatArray) -> FloatArray:
    """``out[r] = table[rows[r]]``, a few rows at a time, so that what lies in between is small."""
    for start in range(0, len(rows), _ROWS):
        out[start : start + _ROWS] = table[rows[start : start + _ROWS]]
    return out
