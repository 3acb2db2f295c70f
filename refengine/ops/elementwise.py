"""Ops that treat every element alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Literal

import numpy as np

from refengine.ops.arrays import FloatArray
from refengine.ops.registry import op
from refengine.ops.scratch import Scratch, aligned
from refengine.ops.tiles import tile_shape, tiles

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


def _gated_workspace(
    shapes: Sequence[tuple[int, ...] | None], attributes: Mapping[str, Any], itemsize: int
) -> int:
    """Two tiles."""
    gate = shapes[0] or (0,)
    return 2 * aligned(prod(tile_shape(gate)) * itemsize)


@op("gate[..., N], up[..., N] -> [..., N]", sharing="in_place", workspace=_gated_workspace)
def gated(
    gate: FloatArray,
    up: FloatArray,
    *,
    activation: Activation,
    out: FloatArray | None = None,
    scratch: Scratch | None = None,
) -> FloatArray:
    """``activation(gate) · up``: SwiGLU and GeGLU (Shazeer, 2020, arXiv:2002.05202).

    ``silu(g) = g / (1 + exp(-g))``; ``gelu_tanh(g) = g/2 · (1 + tanh(√(2/π) · (g + 0.044715 g³)))``.

    Clauses: OPS-12.
    """
    scratch = scratch or Scratch()
    if out is None:
        out = np.empty_like(gate)
    activate = _silu if activation == "silu" else _gelu_tanh
    gates, ups, products = np.atleast_2d(gate, up, out)
    for tile in tiles(gates.shape):
        with scratch.frame():
            activated = activate(gates[tile], scratch)
            np.multiply(activated, ups[tile], out=products[tile])
    return out


def _silu(g: FloatArray, scratch: Scratch) -> FloatArray:
    """``g / (1 + exp(-g))``."""
    decay, activated = (scratch.empty(g.shape, g.dtype) for _ in range(2))
    np.negative(g, out=decay)
    with np.errstate(over="ignore"):  # exp(-g) = inf for g << 0, and g / inf is the right limit
        np.exp(decay, out=decay)
    decay += g.dtype.type(1)
    np.divide(g, decay, out=activated)
    return activated


def _gelu_tanh(g: FloatArray, scratch: Scratch) -> FloatArray:
    """``g/2 · (1 + tanh(√(2/π) · (g + 0.044715 g³)))``."""
    kind = g.dtype.type
    inner, activated = (scratch.empty(g.shape, g.dtype) for _ in range(2))
    np.multiply(kind(0.044715), g, out=inner)
    inner *= g
    inner *= g
    inner += g
    inner *= kind(math.sqrt(2 / math.pi))
    np.tanh(inner, out=inner)
    inner += kind(1)
    np.multiply(kind(0.5), g, out=activated)
    activated *= inner
    return activated
