"""Ops that treat every element alone: one loop, and a formula for each.

Formulas round where the golden ops round; ``add`` and ``scale`` once, and the others stay within the errors
that the specification counts (OPS-12, OPS-13), since exp and tanh err by less than it grants them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine_numba.kernels.compilation import Compiled, entry, inlined, part
from refengine_numba.kernels.entry import SIGNATURE, floats_at
from refengine_numba.kernels.functions import exp, tanh
from refengine_numba.kernels.lanes import load_first, store_first
from refengine_numba.kernels.share import share
from refengine_numba.kernels.vectors import LANES, float_of_bits, load_f32, splat_f32, store

ROOT = np.float32(math.sqrt(2 / math.pi))
CUBIC = np.float32(0.044715)

Floats = NDArray[np.float32]


@part
def _add(x: Any, y: Any, factor: Any) -> Any:
    return x + y


@part
def _scale(x: Any, y: Any, factor: Any) -> Any:
    return x * splat_f32(factor)


@part
def _softcap(x: Any, y: Any, factor: Any) -> Any:
    return tanh(x / splat_f32(factor)) * splat_f32(factor)


@part
def _silu(x: Any, y: Any, factor: Any) -> Any:
    return x / (exp(splat_f32(np.float32(-0.0)) - x) + splat_f32(np.float32(1))) * y


@part
def _gelu_tanh(x: Any, y: Any, factor: Any) -> Any:
    z = (splat_f32(CUBIC) * x * x * x + x) * splat_f32(ROOT)
    return splat_f32(np.float32(0.5)) * x * (tanh(z) + splat_f32(np.float32(1))) * y


FORMULAS: Mapping[str, Callable[[Any, Any, Any], Any]] = MappingProxyType(
    {"add": _add, "scale": _scale, "softcap": _softcap, "silu": _silu, "gelu_tanh": _gelu_tanh}
)
"""Of vectors x and y, and a number; the last two are activations of ``gated``."""


def formula(name: str, x: Any, y: Any, factor: Any) -> Any:
    """Sixteen results."""
    raise NotImplementedError


@inlined(formula)
def _formula(name: Any) -> Any:
    chosen = FORMULAS[name.literal_value]

    def run(name: str, x: Any, y: Any, factor: Any) -> Any:
        return chosen(x, y, factor)

    return run


@part
def each(name: str, x: Any, y: Any, out: Any, factor: Any, first: int, last: int) -> None:
    """Elements ``first`` to ``last``, not included, of flat arrays; ``out`` may be either operand."""
    whole = first + (last - first) // LANES * LANES
    for at in range(first, whole, LANES):
        store(out, at, formula(name, load_f32(x, at), load_f32(y, at), factor))
    if whole < last:
        count = last - whole
        result = formula(name, load_first(x, whole, count), load_first(y, whole, count), factor)
        store_first(out, whole, count, result)


def elementwise_entry(name: str) -> Compiled:
    """A formula of all elements, by rows.

    Arguments: x, y (of a formula without one: x), result, rows T, elements of a row, factor (float32).
    """
    FORMULAS[name]

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        rows, size = a[3], a[4]
        first, last = share(rows, thread, threads)
        x, y, out = floats_at(a[0], rows * size), floats_at(a[1], rows * size), floats_at(a[2], rows * size)
        each(name, x, y, out, float_of_bits(np.int32(a[5])), first * size, last * size)

    return run
