"""What kernels by rows are called with: norm, rotation, elementwise formulas, copies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from refengine_numba.arguments import Arguments, check, float32_word

Floats = NDArray[np.float32]

FORMULAS = ("add", "scale", "softcap", "silu", "gelu_tanh")
"""Of elements x and y, and a number; the last two are activations of ``gated``."""

UNARY = frozenset({"scale", "softcap"})
"""Formulas without y."""

PAIRINGS = ("interleaved", "halves")
"""Which elements of a head are pair i: 2i and 2i + 1, or i and i + dims / 2."""


def rms_norm(x: Floats, weight: Floats, y: Floats, *, eps: float, rows: str = "T") -> Arguments:
    """Arguments of ``norm.rms_norm``: x [T, N] or [T, H, N], weight [N] -> y as x, which it may be.

    Args:
        x: float32.
        weight: float32.
        y: float32, the result.
        eps: inside the root.
        rows: the symbol of T.

    Raises:
        ValueError: a shape, dtype or stride is wrong.
    """
    size = x.shape[-1]
    check("x", x, np.float32, x.shape)
    check("weight", weight, np.float32, (size,))
    check("y", y, np.float32, x.shape, written=True)
    heads = math.prod(x.shape[1:-1])
    return Arguments.of(x, weight, y, len(x), heads, size, float32_word(eps), symbols={3: rows})


def take_rows(
    x: Floats, ids: NDArray[np.int32], y: Floats, *, rows: str = "T", taken: str = "R"
) -> Arguments:
    """Arguments of ``copy.take_rows``: x [T, N], ids [R] -> y [R, N], elsewhere.

    Args:
        x: float32.
        ids: which rows, int32, in any order and any number of times; each must lie in 0 to T - 1 when the
            entry runs.
        y: float32.
        rows: the symbol of T.
        taken: the symbol of R.

    Raises:
        ValueError: a shape, dtype or stride is wrong.
    """
    check("x", x, np.float32, x.shape)
    check("ids", ids, np.int32, (len(y),))
    check("y", y, np.float32, (len(ids), *x.shape[1:]), written=True)
    size = math.prod(x.shape[1:])
    return Arguments.of(x, ids, y, len(ids), size, len(x), symbols={3: taken, 5: rows})


def elementwise(
    name: str, x: Floats, y: Floats | None, out: Floats, *, factor: float = 1.0, rows: str = "T"
) -> Arguments:
    """Arguments of ``elementwise.elementwise``: float32 arrays [T, …] of one shape; ``out`` may be x or y.

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


def rope(x: Floats, table: Floats, y: Floats, *, rows: str = "T") -> Arguments:
    """Arguments of ``rope.rope``: x [T, H, D], table [T, dims] -> y as x, which it may be.

    Args:
        x: float32.
        table: float32, as ``rope.rope_table`` writes it.
        y: float32, the result.
        rows: the symbol of T.

    Raises:
        ValueError: a shape, dtype or stride is wrong.
    """
    count, heads, size = x.shape
    dims = table.shape[1]
    if dims > size or dims % 2:
        raise ValueError(f"a table of {dims} dims turns pairs of heads of {dims} or more, not of {size}")
    check("x", x, np.float32, x.shape)
    check("table", table, np.float32, (count, dims))
    check("y", y, np.float32, x.shape, written=True)
    return Arguments.of(x, table, y, count, heads, size, dims, symbols={3: rows})


def rope_table(
    positions: NDArray[np.int32],
    table: Floats,
    *,
    frequencies: Sequence[float],
    magnitude: float = 1.0,
    rows: str = "T",
) -> Arguments:
    """Arguments of ``rope.rope_table``: positions [T] -> table [T, 2 · frequencies].

    Args:
        positions: int32.
        table: float32, the result.
        frequencies: radians per position of every pair.
        magnitude: of every cosine and sine.
        rows: the symbol of T.

    Raises:
        ValueError: a shape, dtype or stride is wrong.
    """
    check("positions", positions, np.int32, (len(table),))
    check("table", table, np.float32, (len(positions), 2 * len(frequencies)), written=True)
    numbers = np.array([*frequencies, magnitude], np.float64)
    words = positions, numbers, table, len(positions), len(frequencies)
    return Arguments.of(*words, symbols={3: rows})
