"""Ops that treat every element alone."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from refengine.ops.arrays import FloatArray
from refengine.ops.registry import op

Activation = Literal["silu", "gelu_tanh"]


@op("x[..., N], y[..., N] -> [..., N]", sharing="in_place")
def add(x: FloatArray, y: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """``x + y``: the residual connection.

    Clauses: OPS-6, CNV-2, CNV-3, CNV-6.
    """
    total: FloatArray = np.add(x, y, out=out)
    return total


@op("x[..., N] -> [..., N]", sharing="in_place")
def scale(x: FloatArray, *, factor: float, out: FloatArray | None = None) -> FloatArray:
    """``x · factor``, the factor rounded to the dtype of ``x`` first.

    Clauses: OPS-6, CNV-2, CNV-3, CNV-5.
    """
    scaled: FloatArray = np.multiply(x, x.dtype.type(factor), out=out)
    return scaled


@op("x[..., N] -> [..., N]", sharing="in_place")
def softcap(x: FloatArray, *, cap: float, out: FloatArray | None = None) -> FloatArray:
    """``cap · tanh(x / cap)``: squeezes scores or logits into ``(-cap, cap)`` (Gemma 2, arXiv:2408.00118).

    Clauses: OPS-13.
    """
    capped: FloatArray = np.divide(x, x.dtype.type(cap), out=out)
    np.tanh(capped, out=capped)
    capped *= x.dtype.type(cap)
    return capped


@op("gate[..., N], up[..., N] -> [..., N]", sharing="in_place")
def gated(
    gate: FloatArray,
    up: FloatArray,
    *,
    activation: Activation,
    out: FloatArray | None = None,
) -> FloatArray:
    """``activation(gate) · up``: SwiGLU and GeGLU (Shazeer, 2020, arXiv:2002.05202).

    ``silu(g) = g / (1 + exp(-g))``; ``gelu_tanh(g) = g/2 · (1 + tanh(√(2/π) · (g + 0.044715 g³)))``.

    Clauses: OPS-12.
    """
    kind = gate.dtype.type
    if activation == "silu":
        with np.errstate(over="ignore"):  # exp(-g) = inf for g << 0, and g / inf is the right limit
            activated = gate / (kind(1) + np.exp(-gate))
    else:
        inner = kind(math.sqrt(2 / math.pi)) * (gate + kind(0.044715) * gate * gate * gate)
        activated = kind(0.5) * gate * (kind(1) + np.tanh(inner))
    result: FloatArray = np.multiply(activated, up, out=out)
    return result
