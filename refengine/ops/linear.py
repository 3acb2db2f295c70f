"""Ops that read weight matrices: token embedding and linear projection."""

from __future__ import annotations

import numpy as np

from refengine.ops.arrays import FloatArray, IndexArray
from refengine.ops.matmul import matmul_columns
from refengine.ops.registry import op


@op("token_ids[T], table[V, E] -> [T, E]")
def embedding(token_ids: IndexArray, table: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """Row ``token_ids[t]`` of ``table`` for every token.

    ``table`` need only support ``table[rows]``: a tensor still in its stored encoding decodes just these.

    Clauses: OPS-5, CNV-1, ENC-14.
    """
    rows = table[token_ids]
    if out is None:
        return rows
    out[...] = rows
    return out


@op("x[T, K], weight[N, K], bias[N]? -> [T, N]")
def linear(
    x: FloatArray,
    weight: FloatArray,
    bias: FloatArray | None = None,
    *,
    out: FloatArray | None = None,
) -> FloatArray:
    """``y[t, n] = Σ_k weight[n, k] · x[t, k] + bias[n]``, each row of ``y`` independent of the others.

    Accumulated in the operands' dtype; the error of each output is at most
    ``(K + 1) · u · (Σ_k |weight[n, k] · x[t, k]| + |bias[n]|)`` with ``u`` its unit roundoff
    (Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., §3.1), in whatever order it is summed.

    Clauses: OPS-2, OPS-7, CNV-4, CNV-9, ENC-14.
    """
    if out is None:
        out = np.empty((x.shape[0], weight.shape[0]), x.dtype)
    matmul_columns(weight, x.T, order="F", out=out.T)
    if bias is not None:
        out += bias
    return out
