"""Root-mean-square normalisation."""

from __future__ import annotations

import numpy as np

from refengine.ops.arrays import FloatArray
from refengine.ops.registry import op


@op("x[..., N], weight[N] -> [..., N]", sharing="in_place")
def rms_norm(
    x: FloatArray,
    weight: FloatArray,
    *,
    eps: float,
    out: FloatArray | None = None,
) -> FloatArray:
    """``x / sqrt(mean(x²) + eps) · weight`` over the last axis (Zhang & Sennrich, 2019, arXiv:1910.07467).

    ``eps`` stands inside the root. Used over the hidden size, and over each head for q and k norms.

    Clauses: OPS-8.
    """
    mean_square = np.square(x).mean(axis=-1, keepdims=True)
    inverse_root = 1 / np.sqrt(mean_square + x.dtype.type(eps))
    out = np.multiply(x, inverse_root, out=out)
    return np.multiply(out, weight, out=out)
