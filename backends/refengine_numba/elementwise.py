"""Ops that treat every element alone: one loop, and a formula for each.

Formulas round where the golden ops round; ``add`` and ``scale`` once, and the others stay within the errors
that the specification counts (OPS-12, OPS-13), since exp and tanh err by less than it grants them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine_numba.arguments import Arguments, check, float32_word
from refengine_numba.compilation import entry, inlined, part
from refengine_numba.entry import SIGNATURE, floats_at
from refengine_numba.functions import exp, tanh
from refengine_numba.lanes import load_first, store_first
from refengine_numba.share import share
from refengine_numba.vectors import LANES, float_of_bits, load_f32, splat_f32, store

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

UNARY = frozenset({"scale", "softcap"})
"""Formulas without y."""


def formula(name: str, x: Any, y: Any, factor: Any) -> Any:
    """Sixteen results."""
    raise NotImplementedError


@inlined(formula)
def _formula(name: Any, x: Any, y: Any, factor: Any) -> Any:
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


@cache
def elementwise_entry(name: str) -> Any:
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


def elementwise(
    name: str, x: Floats, y: Floats | None, out: Floats, *, factor: float = 1.0, rows: str = "T"
) -> Arguments:
    """Arguments of ``elementwise_entry``: float32 arrays [T, …] of one shape; ``out`` may be x or y.

    Args:
        name: of the formula.
        x: the first operand; what ``gated`` activates.
        y: the second; ``None`` for formulas without one.
        out: the result.
        factor: of ``scale``, or the cap of ``softcap``.
        rows: the symbol of T.

    Raises:
        ValueError: a shape, dtype or stride is wrong, or there is an operand too many or too few.
    """
    if (y is None) != (name in UNARY):
        raise ValueError(f"{name} takes {'one operand' if name in UNARY else 'two operands'}")
    other = x if y is None else y
    check("x", x, np.float32, x.shape)
    check("y", other, np.float32, x.shape)
    check("out", out, np.float32, x.shape, written=True)
    size = math.prod(x.shape[1:])
    return Arguments.of(x, other, out, len(x), size, float32_word(factor), symbols={3: rows})
