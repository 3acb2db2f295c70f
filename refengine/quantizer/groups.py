"""Rows of weights as integers: what products of 8-bit codes read of the encodings that store integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from refengine.quantizer import affine, classic, k_quants
from refengine.quantizer.decode import CHUNK_WEIGHTS
from refengine.quantizer.encodings import encoding
from refengine.quantizer.parts import Parts

GROUP = 32
"""Consecutive weights of a row that share a scale and an offset."""

GROUPED: Mapping[str, Callable[[NDArray[np.uint8]], Parts]] = MappingProxyType(
    {
        "q4_0": classic.q4_0_parts,
        "q4_1": classic.q4_1_parts,
        "q5_0": classic.q5_0_parts,
        "q5_1": classic.q5_1_parts,
        "q8_0": classic.q8_0_parts,
        "q4_k": k_quants.q4_k_parts,
        "q5_k": k_quants.q5_k_parts,
        "q6_k": k_quants.q6_k_parts,
        "int4_g32": affine.int4_parts,
        "int4_g64": affine.int4_parts,
        "int4_g128": affine.int4_parts,
        "int8_g32": affine.int8_parts,
        "int8_g64": affine.int8_parts,
        "int8_g128": affine.int8_parts,
    }
)
"""The encodings whose weights are integers, with a scale and perhaps an offset per group, each with what
reads its blocks [n, block_bytes]; immutable."""

_WITH_OFFSETS = frozenset({"q4_1", "q5_1", "q4_k", "q5_k"})


def has_offsets(encoding: str) -> bool:
    """Whether weights of this encoding, one of :data:`GROUPED`, have offsets."""
    return encoding in _WITH_OFFSETS


def read_groups(
    name: str,
    data: NDArray[np.uint8],
    integers: NDArray[np.float32],
    scales: NDArray[np.float32],
    offsets: NDArray[np.float32] | None,
) -> None:
    """Read N stored rows, uint8 [N, row_bytes], of K weights each: weight = scale · integer + offset.

    In ``q6_k`` an integer is the stored one times the factor of its 16 weights; in the affine encodings it is
    the stored one less its block's zero point, and a block of 128 weights is four groups with the same scale.
    What a group's integers give with codes from -127 to 127 is a sum of at most 32 · 32 · 128 · 127 < 2²⁴:
    exact in float32, in any order.

    Args:
        name: of the encoding, one of :data:`GROUPED`.
        data: the rows.
        integers: float32 [N, K], to be written.
        scales: float32 [G, N] for the G = K / 32 groups of a row, to be written.
        offsets: float32 [G, N], to be written; ``None`` where the encoding has none.

    Clauses: MIX-5.
    """
    stored, rows = encoding(name), len(data)
    step = max(1, CHUNK_WEIGHTS // max(1, integers.shape[1]))
    with np.errstate(all="ignore"):
        for start in range(0, rows, step):
            some = slice(start, min(start + step, rows))
            count = some.stop - start
            blocks = np.ascontiguousarray(data[some]).reshape(-1, stored.block_bytes)
            parts = GROUPED[name](blocks)
            flat = integers[some].reshape(-1)
            flat[...] = parts.integers.reshape(-1)
            if parts.factors is not None:
                flat *= parts.factors.reshape(-1).repeat(flat.size // max(1, parts.factors.size))
            scales[:, some] = _per_group(parts.scales, count, len(scales)).T
            if offsets is not None and parts.offsets is not None:
                offsets[:, some] = _per_group(parts.offsets, count, len(offsets)).T


def _per_group(values: NDArray[np.float32], rows: int, groups: int) -> NDArray[np.float32]:
    """[n, g] -> [rows, groups]: the value of a block for each of its groups."""
    by_row = values.reshape(rows, -1)
    return by_row.repeat(groups // max(1, by_row.shape[1]), axis=1)
